"""
The README of a repository on the Hub: what a release says of itself, for people.

A card is a function of the release and of the name of the repository: no time, no host, nothing
that is not in release.json. Names and sentences may come from strangers, so in the body every value
goes through `render.escape_markdown`, values in code through an alphabet that ends no code, and the
front matter is written by a YAML library and has these keys alone.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipelines import console, wording
from pipelines.records import EmbeddingQuality
from pipelines.render import escape_markdown

if TYPE_CHECKING:
    from pipelines.load_records import LoadGate
    from pipelines.release_records import MachineClass, Release, ReleasedQuant

_HUB_SOURCE: Final = "hf:"
_REPO: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_MIB: Final = 2**20
_GIB: Final = 2**30
_OTHER: Final = "other"

# What the Hub knows as `license` (huggingface/hub-docs: docs/hub/repositories-licenses.md); any
# other word has to be `other` with a `license_name`.
LICENSES: Final = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0",
    "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0",
    "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0",
    "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by",
    "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl",
    "lgpl-lr", "deepfloyd-if-license", "llama2", "gemma",
})  # fmt: skip
KEYS: Final = (
    "base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "license_name",
    "license_link", "tags", "quantized_by",
)  # fmt: skip


def render(release: Release, id_: str, repo: str) -> str:
    """
    Render the card.

    Args:
        release: What it is about.
        id_: Its id.
        repo: `owner/name` of the repository, for the commands; its owner has quantized it.
    """
    upstream = _upstream(release)
    quants = release.quants
    return (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            release=release,
            id=id_,
            repo=repo,
            front_matter=Markup(_yaml(front_matter(release, repo))),  # noqa: S704 - quoted by _yaml
            upstream=_link(upstream, release.source.revision) if upstream else None,
            hosts=sorted(release.hosts.items()),
            limits=sorted(release.choice_gates.items()),
            licenses=sorted(release.license.files.items()),
            corpora=sorted({q.imatrix_corpus_sha256 for q in quants if q.imatrix_corpus_sha256}),
            embeds=_embeds(release),
            scored=min(quant.quality.scored_tokens for quant in quants),
            memory_context=max(quant.memory_context_tokens for quant in quants),
            hardware=_hardware(release.machine),
            depth=_depth(release),
            size=lambda quant: _size(release, quant),
            gguf=lambda quant: code(release.of("gguf", quant.type)[0].name),
            code=code,
            safe=Markup,
            sentence=wording.sentence,
            number=wording.number,
            declared=wording.declared,
            level=_level,
            percent=wording.percent,
            tokens=wording.tokens,
            speed=lambda tok_s: f"{wording.number(tok_s)} tok/s" if tok_s else wording.ABSENT,
        )
    )


def front_matter(release: Release, repo: str) -> dict[str, Any]:
    """
    Return the metadata that the Hub reads, in the order of `KEYS`.

    `base_model` is there only for a source on the Hub: that is what the word means there.
    """
    found: dict[str, Any] = {}
    upstream = _upstream(release)
    if upstream:
        found |= {"base_model": [upstream], "base_model_relation": "quantized"}
    task = "feature-extraction" if _embeds(release) else "text-generation"
    found |= {"library_name": "gguf", "pipeline_tag": task}
    found |= _license(release, upstream)
    with_imatrix = any(quant.imatrix_sha256 for quant in release.quants)
    found["tags"] = ["gguf", *(["imatrix"] if with_imatrix else [])]
    found["quantized_by"] = repo.partition("/")[0]
    return found


def _embeds(release: Release) -> bool:
    """Tell whether the model makes embeddings."""
    return all(isinstance(quant.quality, EmbeddingQuality) for quant in release.quants)


def _license(release: Release, upstream: str | None) -> dict[str, str]:
    """Carry the licence over: the Hub's word for it, or its name and where it can be read."""
    id_ = release.license.id
    if id_.lower() in LICENSES:
        return {"license": id_.lower()}
    found = {"license": _OTHER, "license_name": _one_line(id_).lower() or _OTHER}
    texts = sorted(file.name for file in release.of("license"))
    if texts:
        found["license_link"] = texts[0]
    elif upstream:
        revision = release.source.revision
        found["license_link"] = f"https://huggingface.co/{upstream}/blob/{revision}/README.md"
    return found


def code(text: str | None) -> Markup:
    """Keep of a text what can stand between backticks, or in a command, and end neither."""
    return Markup(re.sub(r"[^A-Za-z0-9._/+-]", "_", text or ""))  # noqa: S704 - nothing is left


def _upstream(release: Release) -> str | None:
    """Return the repository of a source on the Hub."""
    name = release.source.source.removeprefix(_HUB_SOURCE)
    on_hub = release.source.source.startswith(_HUB_SOURCE)
    return name if on_hub and _REPO.fullmatch(name) else None


def _link(upstream: str, revision: str) -> Markup:
    """Link to upstream at the very revision; both are of an alphabet that ends no link."""
    address = f"https://huggingface.co/{upstream}/tree/{code(revision)}"
    return Markup(f"[{upstream}]({address})")  # noqa: S704 - see above


def _level(gate: LoadGate, value: float) -> str:
    """Write a value of a service level: a share of requests, or memory."""
    if gate.name == "memory":
        return f"{wording.number(value)} MiB"
    return f"{value * 100:.1f} %"


def _size(release: Release, quant: ReleasedQuant) -> str:
    size_bytes = release.of("gguf", quant.type)[0].size_bytes
    if size_bytes >= _GIB:
        return f"{wording.number(size_bytes / _GIB)} GiB"
    return f"{wording.number(size_bytes / _MIB)} MiB"


def _hardware(machine: MachineClass) -> str:
    if machine.gpus:
        return f"{', '.join(machine.gpus)} ({machine.backend}), {machine.cpu}"
    cores = wording.counted(machine.cores_count, "core")
    return f"{machine.cpu}, {cores}, {machine.memory_gib} GiB ({machine.backend})"


def _depth(release: Release) -> str:
    """Say at which depth decode was measured, if that is one for all."""
    depths = {quant.decode_depth_tokens for quant in release.quants} - {None}
    return f", decode at depth {wording.tokens(depths.pop() or 0)}" if len(depths) == 1 else ""


def _one_line(text: str) -> str:
    return " ".join(console.clean(text).split())


def _yaml(metadata: dict[str, Any]) -> str:
    """Write YAML of which every scalar is quoted, each on its own line."""
    return yaml.safe_dump(
        metadata, sort_keys=False, allow_unicode=False, width=float("inf"), default_flow_style=False
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("pipelines", "templates"),
        autoescape=False,  # noqa: S701 - Markdown: everything goes through `finalize`
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
