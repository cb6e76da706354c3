"""
Ask the package index for the page of a project, exactly as pip would: a program, no module.

    python -P pip_page.py PROJECT SECONDS

runs on the interpreter that has pip, which may hold nothing else, and prints one line of JSON: for
each index that was asked `host` and either `status`, `type` and `text`, or `error`, a word. The
session is pip's own: its configuration files and variables, index, certificates, proxy, .netrc,
keyring and hosts that may be without TLS. An address may hold a secret, in its path too, so nothing
but the host leaves this program, and pip's own warnings, which show paths, are not let out.
"""

from __future__ import annotations

import json
import logging
import posixpath
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Final

# The page of a project with thousands of files has 20 MB.
_MOST_BYTES: Final = 32 << 20
_PIECE_BYTES: Final = 1 << 16
_PAGES: Final = "application/vnd.pypi.simple.v1"
_ACCEPT: Final = f"{_PAGES}+json, {_PAGES}+html; q=0.1, text/html; q=0.01"
_OK: Final = 200
_NOT_FOUND: Final = frozenset({404, 410})


def main(project: str, seconds: str) -> int:
    """Print what the configured indexes say of a project, up to the first that may know it."""
    logging.disable(logging.CRITICAL)
    asked: list[dict[str, Any]] = []
    try:
        session, urls = _as_configured(project, seconds)
    except SystemExit:
        asked.append({"host": "", "error": "configuration"})
    except Exception as error:  # noqa: BLE001 - another pip than those that we know
        asked.append({"host": "", "error": f"pip:{type(error).__name__}"})
    else:
        for url in urls:
            asked.append(_asked(session, url, project))
            # One that is silent may know it: another one must not speak in its place.
            if asked[-1].get("status") not in _NOT_FOUND:
                break
    sys.stdout.write(json.dumps({"asked": asked}) + "\n")
    return 0


def _as_configured(project: str, seconds: str) -> tuple[Any, list[str]]:
    """Return pip's session and the indexes, as `pip download` would have them."""
    from pip._internal.commands import create_command  # noqa: PLC0415 - to say where it is not

    command: Any = create_command("download")
    options, _ = command.parse_args(
        ["--no-input", "--timeout", seconds, "--retries", "1", "--no-cache-dir", project]
    )
    session = command._build_session(options)  # noqa: SLF001 - pip has no public interface
    indexes = [] if options.no_index else [options.index_url, *options.extra_index_urls]
    return session, [url for url in indexes if url]


def _asked(session: Any, index: str, project: str) -> dict[str, Any]:  # noqa: ANN401 - pip's
    """Return what one index says; see the module."""
    url = posixpath.join(index, urllib.parse.quote(project)).rstrip("/") + "/"
    parts = urllib.parse.urlsplit(url)
    found: dict[str, Any] = {"host": parts.hostname or parts.scheme}
    if parts.scheme == "file" and Path(urllib.request.url2pathname(parts.path)).is_dir():
        url += "index.html"
    try:
        if not _is_safe(session, url):
            return found | {"error": "insecure"}
        answer = session.get(
            url, headers={"Accept": _ACCEPT, "Cache-Control": "max-age=0"}, stream=True
        )
        with answer:
            # Whoever sits on one step of plain HTTP chooses the next.
            if not all(_is_safe(session, step.url) for step in (*answer.history, answer)):
                return found | {"error": "insecure"}
            found["status"] = answer.status_code
            if answer.status_code != _OK:
                return found
            content = bytearray()
            for piece in answer.iter_content(_PIECE_BYTES):
                content += piece
                if len(content) > _MOST_BYTES:
                    return found | {"status": None, "error": "too-large"}
            kind = answer.headers.get("Content-Type") or "text/html"
    except Exception as error:  # noqa: BLE001 - whatever it is, its words may hold an address
        return found | {"status": None, "error": type(error).__name__}
    return found | {"type": kind, "text": bytes(content).decode("utf-8", "replace")}


def _is_safe(session: Any, url: str) -> bool:  # noqa: ANN401 - pip's
    """Tell whether pip would take a digest from there: TLS, this machine, or a trusted host."""
    from pip._internal.models.link import Link  # noqa: PLC0415 - see `_as_configured`

    return bool(session.is_secure_origin(Link(url)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
