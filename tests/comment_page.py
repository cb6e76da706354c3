"""
A comment as GitHub shows it: Markdown to HTML, its style, its Mermaid, in a real browser.

Markdown is read by markdown-it with GitHub's tables and strikethrough, charts are drawn by Mermaid
itself, of a version that GitHub's may be older or newer than.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest
from markdown_it import MarkdownIt
from node_tools import NpmFile, npm_file

from checks import installed

if TYPE_CHECKING:
    from pathlib import Path

    from markdown_it.token import Token

BROWSER: Final = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MERMAID: Final = NpmFile(
    "mermaid",
    "11.12.2",
    "package/dist/mermaid.min.js",
    "n34QPDPEKmaeCG4WDMGy0OT6PSyxKCfy2pJgShP+Qow2KLrvWjclwbc3yXfSIf4BanqWEhQEpngWwNp/XhZt6w==",
)
# The measures of GitHub's own style sheet, as far as they change what fits.
STYLE: Final = """
body { margin: 0; background: #fff; color: #1f2328; font: 14px/1.5 -apple-system,
  BlinkMacSystemFont, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif,
  "Apple Color Emoji", "Noto Color Emoji"; overflow-wrap: break-word; }
main { max-width: 100%; padding: 16px; box-sizing: border-box; }
h3 { font-size: 1.25em; margin: 0 0 16px; line-height: 1.25; font-weight: 600; }
p, ul, table, pre, details { margin: 0 0 16px; }
ul { padding-left: 2em; } li + li { margin-top: .25em; }
table { display: block; width: max-content; max-width: 100%; overflow: auto;
  border-collapse: collapse; font-variant: tabular-nums; }
th, td { padding: 6px 13px; border: 1px solid #d1d9e0; } th { font-weight: 600; }
tr:nth-child(2n) td { background: #f6f8fa; }
sub { font-size: 75%; line-height: 0; position: relative; bottom: -.25em; }
code { font: 85% ui-monospace, SFMono-Regular, "SF Mono", Menlo, Consolas, "Liberation Mono",
  monospace; padding: .2em .4em; background: #818b981f; border-radius: 6px; }
pre { padding: 16px; overflow: auto; background: #f6f8fa; border-radius: 6px; }
pre code { background: none; padding: 0; }
summary { cursor: pointer; }
"""
_GATHER: Final = """
mermaid.initialize({ startOnLoad: false, securityLevel: "strict" });
const blocks = [...document.querySelectorAll("code.language-mermaid")];
const charts = [];
for (const [index, block] of blocks.entries()) {
  try {
    const { svg } = await mermaid.render("chart" + index, block.textContent);
    const figure = document.createElement("div");
    figure.innerHTML = svg;
    block.parentElement.replaceWith(figure);
    charts.push(svg.includes("Syntax error") ? "Syntax error" : figure.textContent);
  } catch (error) { charts.push("Syntax error: " + error); }
}
document.body.dataset.result = JSON.stringify({
  charts,
  width: innerWidth,
  scroll: document.documentElement.scrollWidth,
  wider: [...document.querySelectorAll("main *")].filter((e) => !e.closest("table, pre, svg")
    && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.tagName + e.textContent),
  tables: [...document.querySelectorAll("table")].map((t) => [t.clientWidth, t.scrollWidth]),
});
document.querySelectorAll("[id^=dchart]").forEach((e) => e.remove());
"""


def parser() -> MarkdownIt:
    """Return a reader of Markdown with what GitHub adds, raw HTML let through."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def tokens(markdown: str) -> list[Token]:
    """Return every token of a text, inner ones in the place of the block that holds them."""
    found: list[Token] = []
    for token in parser().parse(markdown):
        found += token.children or [token]
    return found


def mermaid() -> Path:
    """Return the path of Mermaid; the test is skipped without it."""
    try:
        return npm_file(MERMAID)
    except installed.MissingError as missing:
        pytest.skip(missing.message)


def page(markdown: str, *, is_open: bool = True) -> str:
    """Set a comment as a page; `is_open` unfolds everything."""
    body = parser().render(markdown)
    if is_open:
        body = body.replace("<details>", "<details open>")
    return (
        f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style><main>{body}</main>'
        f'<script src="{mermaid().as_uri()}"></script><script type="module">{_GATHER}</script>'
    )


def browse(
    markdown: str, tmp_path: Path, width: int, *, is_open: bool = True, png: Path | None = None
) -> dict[str, Any]:
    """
    Open a comment in a browser, draw its charts, and return what is seen.

    Args:
        markdown: The comment.
        tmp_path: For the page and the profile.
        width: Of the window, in pixels.
        is_open: Whether everything is unfolded.
        png: Where a picture of it goes, if one is wanted.
    """
    # A window of a headless browser has a least width, a frame has none.
    inner = tmp_path / f"comment-{width}.html"
    inner.write_text(page(markdown, is_open=is_open), encoding="utf-8")
    height = 2400 if png else 900
    outer = tmp_path / f"frame-{width}.html"
    outer.write_text(
        "<!doctype html><style>body { margin: 0 } iframe { border: 0 }</style><body>"
        f'<iframe width="{width}" height="{height}" src="{inner.as_uri()}"></iframe>'
        "<script>addEventListener('load', () => setInterval(() => { const b = "
        "frames[0].document.body; if (b.dataset.result) document.body.dataset.result = "
        "b.dataset.result; }, 20));</script>",
        encoding="utf-8",
    )
    done = subprocess.run(
        [BROWSER or "", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--no-first-run", "--allow-file-access-from-files", "--disable-web-security",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=15000",
         f"--window-size={max(width, 500)},{height}",
         *([f"--screenshot={png}"] if png else ["--dump-dom"]), outer.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    if png:
        return {}
    (result,) = re.findall(r'<body data-result="([^"]*)"', done.stdout)
    seen: dict[str, Any] = json.loads(html.unescape(result))
    return seen
