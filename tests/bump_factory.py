"""
A fleet whose one model moved on the Hub, and the pull request that `fleet bump` makes of it.

The Hub is the stand-in of tests/hub with the files of the embedded model and real commits on top:
trained on, a template that takes tools, other sampling defaults. The record is that of a real look,
the body that of the real renderer; what earlier runs took is written beside it.

    python tests/bump_factory.py        writes tests/data/bump/*.md
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import record_factory as make
from hub import Hub

from pipelines import bump, check_upstream, declaration, records
from pipelines.ci_records import TimesRecord
from pipelines.layout import Layout
from pipelines.ledger import Ledger
from pipelines.release_records import Move
from pipelines.upstream_records import (
    Difference,
    FileChange,
    FileState,
    ModelUpstream,
    UpstreamRecord,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hub import Repo

    from pipelines.bump_change import Bump

ROOT: Final = Path(__file__).resolve().parent.parent
DATA: Final = ROOT / "tests/data/bump"
MODEL: Final = "tiny-llama"
OTHER: Final = "other-model"
REPOSITORY: Final = "octo-lab/Tiny-Llama"
OLD: Final = "1c89cacc68298811416ce71dd1246966e61b47ea"
NEW: Final = "9f3c4e5a7d1b20866c0f4d7be8a95310f2d64c0b"
NEWER: Final = "b7a1f0c2d3e4958677685940312233445566778a"
PARAMS: Final = f"""\
# The fleet of a test; every line of it has to survive.
toolchain: {{llama_cpp_python: 0.3.36, sha256: {"a" * 64}}}
corpora:
  evaluation: {{path: corpora/evaluation.txt, sha256: {"b" * 64}}}
check_upstream: {{engines: false}}

models:
  {MODEL}:   # the small one
    source: "hf:{REPOSITORY}"
    revision: {OLD}  # pinned
    context_tokens:   512
  {OTHER}: {{source: "hf:owner/repo", revision: {"d" * 40}, context_tokens: 512}}

quants:
  {MODEL}-Q8_0: {{model: {MODEL}, type: Q8_0}}
  {MODEL}-Q4_K_M: {{model: {MODEL}, type: Q4_K_M}}
  {OTHER}-Q8_0: {{model: {OTHER}, type: Q8_0}}
hosts:
  local: {{memory_mib: 4096, runs_on: [self-hosted, gpu]}}
"""
AT: Final = datetime(2026, 11, 16, 9, 14, tzinfo=UTC)
LOOKED_AT: Final = datetime(2026, 11, 22, 5, 41, tzinfo=UTC)
# Of a look that `fleet bump` believes.
NOW: Final = datetime.now(UTC)
WEIGHTS: Final = "model.safetensors"
_TOOLS: Final = (
    "{%- if tools %}\n"
    "{{- '<|system|>\\nYou may call: ' + (tools | tojson) + '<|end|>\\n' }}\n"
    "{%- endif %}\n"
)


def embedded() -> dict[str, bytes]:
    """Return the files of the embedded model, as they would be on the Hub."""
    names = (
        "README.md", "LICENSE", "config.json", "generation_config.json", WEIGHTS,
        "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json",
    )  # fmt: skip
    return {name: (ROOT / "examples/tiny-llama" / name).read_bytes() for name in names}


def trained_on(weights: bytes) -> bytes:
    """Return other weights in the same tensors."""
    (length,) = struct.unpack_from("<Q", weights)
    body = bytearray(weights[8 + length :])
    for place in range(0, len(body), 4096):
        body[place] ^= 1
    return weights[: 8 + length] + bytes(body)


def edited(data: bytes, **changes: Any) -> bytes:
    """Return a JSON object with other values."""
    return json.dumps(json.loads(data) | changes, indent=2).encode() + b"\n"


@contextmanager
def upstream() -> Iterator[tuple[Hub, Repo, str]]:
    """Serve the story; yield the Hub, the repository and the commit that the fleet pins."""
    files = embedded()
    template = json.loads(files["tokenizer_config.json"])["chat_template"]
    with Hub() as hub:
        repo = hub.create(REPOSITORY, files, at=AT - timedelta(days=90))
        pinned = repo.head
        repo.commit(
            {WEIGHTS: trained_on(files[WEIGHTS])},
            title="Train 4,000 steps more on the documentation of 2026",
            at=AT - timedelta(days=2),
        )
        repo.commit(
            {"generation_config.json": edited(files["generation_config.json"], temperature=0.6)},
            title="Sample a little colder",
            at=AT - timedelta(days=1),
        )
        repo.commit(
            {
                "tokenizer_config.json": edited(
                    files["tokenizer_config.json"], chat_template=_TOOLS + template
                )
            },
            title="Let the chat template take tools",
            at=AT,
        )
        yield hub, repo, pinned


def checkout(root: Path, text: str = PARAMS) -> Layout:
    """Write a fleet that was measured and published once."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "params.yaml").write_text(text)
    at = Layout(root)
    size = sum(map(len, embedded().values()))
    parameters = 3_410_176
    records.write(
        at.model_record("fetch", MODEL),
        make.fetch_record(
            MODEL,
            source=f"hf:{REPOSITORY}",
            revision=OLD,
            parameters_count=parameters,
            size_bytes=size,
        ),
    )
    took = {"convert": 6.1, "verify": 21.4, "choose": 0.2, "load-test": 64.0}
    times = {f"{stage}@{MODEL}": wall_s for stage, wall_s in took.items()}
    for type_, made_s, measured_s in (("Q8_0", 1.9, 41.0), ("Q4_K_M", 3.2, 38.5)):
        times |= {
            f"quantize@{MODEL}-{type_}": made_s,
            f"benchmark@{MODEL}-{type_}": measured_s,
        }
    records.write(at.times(MODEL), TimesRecord(wall_s=times))
    Ledger.load(at.ledger(MODEL), MODEL).append(
        "production",
        "stable",
        Move.model_validate(
            {
                "sequence": 1,
                "action": "publish",
                "release": "e9edfb8e46f8" + "0" * 52,
                "previous": None,
                "at": "2026-09-01T12:00:00Z",
                "who": "Ada",
                "why": "it passed its gates",
                "run": None,
            }
        ),
    )
    return at


def looked(at: Layout, hub: Hub) -> UpstreamRecord:
    """Look at the Hub of the story, on a day that is always the same."""
    with pytest.MonkeyPatch.context() as patched:
        hub.use(patched)
        return check_upstream.look(
            at, declaration.load(at.params), models=[MODEL], clock=lambda: LOOKED_AT
        )


def story(root: Path) -> tuple[Bump, dict[str, str]]:
    """Return the bump of the story, and the names that its commits have in a golden file."""
    with upstream() as (hub, repo, pinned):
        at = checkout(root, PARAMS.replace(OLD, pinned))
        (found,) = bump.plan(at, declaration.load(at.params), looked(at, hub), [MODEL])
    return found, {pinned: OLD, repo.head: NEW}


def golden(text: str, names: Mapping[str, str]) -> str:
    """Give commits the names that they have in a golden file."""
    for found, name in names.items():
        text = text.replace(found, name).replace(found[:7], name[:7])
    return text


# --- without a Hub ----------------------------------------------------------------------------


def moved(model: str = MODEL, old: str = OLD, new: str = NEW, **changes: Any) -> ModelUpstream:
    """Build what a look says of a model of which the weights are others."""
    before = FileState(size_bytes=7 << 20, sha256="1" * 64)
    after = FileState(size_bytes=8 << 20, sha256="2" * 64)
    fields: dict[str, Any] = {
        "model": model,
        "source": f"hf:{REPOSITORY}" if model == MODEL else "hf:owner/repo",
        "track": "main",
        "pinned": old,
        "newest": new,
        "newest_at": AT,
        "state": "moved",
        "reason": f"{new[:12]} on main is newer, with weights.",
        "owner": "octo-lab",
        "repository_id": "66f0",
        "difference": Difference(
            classes=("weights",),
            files=(FileChange(name=WEIGHTS, kind="weights", old=before, new=after),),
            files_count=1,
            tensors=None,
            stages=("fetch", "convert", "quantize", "benchmark", "choose"),
            download_bytes=8 << 20,
        ),
        "commits": ("Train on",),
        "last_success_at": NOW,
    }
    return ModelUpstream(**(fields | changes))


def look_of(*found: ModelUpstream, **changes: Any) -> UpstreamRecord:
    """Build the record of a look, of just now."""
    fields: dict[str, Any] = {"checked_at": NOW, "requests_count": 2, "models": found}
    return UpstreamRecord(**(fields | changes))


def main() -> None:
    """Write the golden files."""
    DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found, names = story(Path(folder))
    text = golden(found.text(), names)
    (DATA / "body.md").write_text(text, encoding="utf-8")
    assert not re.search(r"127\.0\.0\.1|localhost", text)


if __name__ == "__main__":
    main()
