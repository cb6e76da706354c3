"""
Planted faults before the whole stage `verify`, and the rows of docs/verify.md that follow.

A fault of `gguf_faults` is written into a GGUF that the real converter made; records are written
for the bad file as if `convert` had made it; and `verify.verify` is run as the command runs it:
every layer, real tokenizers, real servers, real outputs. What upstream says of one source is the
same for each fault, and takes most of the time: it is asked once, by the real processes, and kept.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from unittest import mock

import sample
from architecture_factory import FAMILIES, NAMES
from gguf_faults import FAULTS
from record_factory import convert_record, fetch_record
from verify_factory import EMBEDDED, converted

from pipelines import (
    atomic,
    declaration,
    gguf_header,
    hashing,
    prompts,
    records,
    upstream_chat,
    verify,
    verify_logits,
    verify_template,
    verify_tokens,
)
from pipelines.layout import Layout
from pipelines.params import Verify, VerifySlice
from pipelines.upstream_logits import ANSWER, OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from pipelines.toolchain import Toolchain
    from pipelines.upstream_chat import Reference
    from pipelines.verify_records import VerifyRecord

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "docs/verify.md"
EMBEDDED_NAME: Final = "tiny-llama"
# In which model each fault is planted: the embedded one, whose weights are trained, or else the
# smallest family that has a place for it.
ELSEWHERE: Final = {
    "experts used": "mixtral",
    "expert order": "mixtral",
    "soft cap": "gemma4",
    "sliding window": "gemma4",
    "logit scale": "command-r",
    "pooling": "bert",
    "swapped query and key": "gpt2",
    "dropped bias": "gpt2",
    "zero bias": "gpt2",
    "wrong pre-tokenizer": "gpt2",
    "merge lost": "gpt2",
}
# Layers with a window look 128 tokens back: fewer would not show that it is another.
TOKENS: Final = {"gemma4": 160}
_TOKENS: Final = 128

MODELS: Final = (EMBEDDED_NAME, *NAMES)
# The real ones, whatever is patched while a model is proven.
_ASK_TOKENS, _START_CHAT = verify_tokens.ask_upstream, upstream_chat.start
_ASK_OUTPUTS: Final = verify_logits.ask_upstream
# Model and fault, in the order of the table.
PLANTED: Final = tuple((ELSEWHERE.get(fault, EMBEDDED_NAME), fault) for fault in FAULTS)


class _Done:
    """A rendering that has ended."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def result(self) -> Reference:
        return self._reference


@dataclass
class Bench:
    """
    A place in which `verify` is run on good and on bad conversions.

    Attributes:
        root: Directory of its own.
        tools: The pinned llama.cpp.
        family: From the name of a tiny model to its source and its good 16-bit GGUF.
    """

    root: Path
    tools: Toolchain
    family: Callable[[str], tuple[Path, Path]]

    def __post_init__(self) -> None:
        """Remember nothing yet."""
        self._answers: dict[tuple[str, Path], Any] = {}
        self._good: dict[str, tuple[Path, Path]] = {}
        self._ahead = ThreadPoolExecutor(max_workers=1)
        self._started: dict[str, Future[None]] = {}

    def begin(self, models: Iterable[str]) -> None:
        """
        Make models and ask their upstream, one after the other, while others are being proven.

        A proof keeps one core busy. Whoever needs a model that is on its way waits for it.
        """
        for model in models:
            self._started[model] = self._ahead.submit(self._prepare, model)

    def close(self) -> None:
        """End what was begun; what has not started yet does not start."""
        self._ahead.shutdown(cancel_futures=True)

    def good(self, model: str) -> tuple[Path, Path]:
        """Return source and right conversion of a model."""
        if model in self._started:
            self._started.pop(model).result()
        return self._made(model)

    def _made(self, model: str) -> tuple[Path, Path]:
        if model not in self._good:
            if model == EMBEDDED_NAME:
                f16 = converted(EMBEDDED, self.root / "embedded", self.tools)
                self._good[model] = EMBEDDED, f16
            else:
                self._good[model] = self.family(model)
        return self._good[model]

    def _prepare(self, model: str) -> None:
        """Make a model, and ask those of its upstream that need no GGUF."""
        source, _ = self._made(model)
        place = self.root / f"ahead-{model}"
        place.mkdir()
        log = place / "log"
        if verify_template.upstream_templates(source):
            golden = prompts.load(sample.of("corpora/prompts.yaml"))
            with _START_CHAT(source, golden, log) as pending:
                self._answers["chat", source] = pending.result()
        self._answers["tokens", source] = _ASK_TOKENS(source, place, log)

    def prove(self, model: str, fault: str | None = None) -> VerifyRecord:
        """
        Run the stage on a model, with a fault planted or none.

        Args:
            model: The embedded one, or a family of the factory.
            fault: One of `FAULTS`.

        Raises:
            NotThereError: The model has nothing that could be wrong in this way.
        """
        source, f16 = self.good(model)
        checkout = self.root / "checkout" / model
        atomic.remove(checkout)
        at = Layout(checkout)
        at.f16(model).parent.mkdir(parents=True)
        at.source(model).symlink_to(source)
        (checkout / "corpora").symlink_to(sample.of("corpora"))
        if fault is None:
            os.link(f16, at.f16(model))
        else:
            FAULTS[fault](f16, at.f16(model))
        self._write_records(at, model)
        corpus = declaration.load(sample.of("params.yaml")).corpora["evaluation"]
        wanted = VerifySlice(
            model=model,
            recipe=1,
            corpus=corpus,
            verify=Verify(logits_tokens=TOKENS.get(model, _TOKENS)),
        )
        try:
            with self._upstream_asked_once(source):
                return verify.verify(wanted, at, self.tools)
        finally:
            atomic.remove(checkout)

    def _write_records(self, at: Layout, model: str) -> None:
        """Write what `fetch` and `convert` would have left, with the digest of the present file."""
        found = hashing.digest(at.f16(model))
        header = gguf_header.read(at.f16(model))
        digest = records.FileDigest(
            name="f16.gguf", size_bytes=found.size_bytes, sha256=found.sha256, md5=found.md5
        )
        convert = convert_record(
            model,
            architecture=header.text("general.architecture"),
            gguf=digest,
            tensors_count=len(header.tensors),
            tensor_types=header.type_counts(),
            llama_cpp_commit=self.tools.commit,
        )
        records.write(at.model_record("convert", model), convert)
        records.write(at.model_record("fetch", model), fetch_record(model))

    @contextlib.contextmanager
    def _upstream_asked_once(self, source: Path) -> Iterator[None]:
        """Keep what the three processes say that run upstream's own code."""
        kept = self._answers

        def tokens(source_: Path, scratch: Path, log: Path) -> Any:
            if ("tokens", source) not in kept:
                kept["tokens", source] = _ASK_TOKENS(source_, scratch, log)
            return kept["tokens", source]

        def chat(source_: Path, golden: Any, log: Path, **more: Any) -> Any:
            if ("chat", source) not in kept:
                with _START_CHAT(source_, golden, log, **more) as pending:
                    kept["chat", source] = pending.result()
            return _Done(kept["chat", source])

        def outputs(subject: Any, job: Path) -> dict[str, Any]:
            if ("outputs", source) not in kept:
                answer = _ASK_OUTPUTS(subject, job)
                folder = self.root / f"outputs-{subject.model}"
                folder.mkdir()
                for path in (job.with_name(ANSWER), job.with_name(OUTPUTS)):
                    if path.is_file():
                        os.link(path, folder / path.name)
                kept["outputs", source] = answer, folder
                return dict(answer)
            answer, folder = kept["outputs", source]
            for path in folder.iterdir():
                os.link(path, job.parent / path.name)
            return dict(answer)

        with (
            mock.patch.object(verify_tokens, "ask_upstream", tokens),
            mock.patch.object(upstream_chat, "start", chat),
            mock.patch.object(verify_logits, "ask_upstream", outputs),
        ):
            yield


def caught_by(record: VerifyRecord) -> tuple[str, ...]:
    """Return the layers that failed, in their order."""
    return tuple(check.layer for check in record.checks if check.outcome == "FAIL")


# --- the tables of docs/verify.md -------------------------------------------------------------

FAULT_HEAD: Final = (
    "| fault | what is planted | model | caught first by | caught by | by the outputs alone |\n"
    "|:--|:--|:--|:--|:--|:--|\n"
)
ARCHITECTURE_HEAD: Final = (
    "| model | architecture | tokenizer | layers that pass | not there | divergence, mean (nats) "
    "| most | same top |\n|:--|:--|:--|:--|:--|--:|--:|--:|\n"
)


def fault_row(model: str, fault: str, record: VerifyRecord) -> str:
    """Write the row of a fault: what it is, and the layers that `record` says caught it."""
    layers = caught_by(record)
    what = (FAULTS[fault].__doc__ or "").strip().rstrip(".").replace("|", "\\|")
    first = f"`{layers[0]}`" if layers else "nothing"
    alone = "yes" if "logits" in layers else "no"
    return (
        f"| {fault} | {what} | {model} | {first} | {', '.join(f'`{each}`' for each in layers)} "
        f"| {alone} |"
    )


def architecture_row(model: str, tokenizer: str, record: VerifyRecord) -> str:
    """Write the row of an architecture, with the agreement of its outputs."""
    agreement, embeddings = record.logits, record.embeddings
    figures = ("", "", "")
    if agreement is not None:
        figures = (
            f"{agreement.kld_mean_nats:.1e}",
            f"{agreement.kld_max_nats:.1e}",
            f"{agreement.same_top:.2%}",
        )
    elif embeddings is not None:
        figures = (
            f"1 - cosine: {1 - embeddings.cosine_mean:.1e}",
            f"{1 - embeddings.cosine_min:.1e}",
            "",
        )
    return f"| {' | '.join([*_layer_cells(model, tokenizer, record), *figures])} |"


def _layer_cells(model: str, tokenizer: str, record: VerifyRecord) -> list[str]:
    passed = [check.layer for check in record.checks if check.outcome == "PASS"]
    skipped = [check.layer for check in record.checks if check.outcome == "SKIP"]
    failed = "".join(f"; FAIL: `{each}`" for each in caught_by(record))
    return [
        model,
        record.architecture,
        tokenizer + failed,
        "all 8" if len(passed) == len(record.checks) else f"{len(passed)} of {len(record.checks)}",
        ", ".join(f"`{each}`" for each in skipped),
    ]


def tokenizer_of(model: str) -> str:
    """Name the real tokenizer of a tiny model."""
    return "its own" if model == EMBEDDED_NAME else FAMILIES[model].vocabulary


def rows(table: str) -> dict[str, str]:
    """Return the rows of a table of docs/verify.md by their first cell; `faults` or another."""
    between = _between(DOCS.read_text(encoding="utf-8"), table)[1]
    found = [line for line in between.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in found}


def write_rows(table: str, head: str, changed: dict[str, str], order: tuple[str, ...]) -> None:
    """Replace rows of a table of docs/verify.md; those that `order` does not name are dropped."""
    merged = rows(table) | changed
    before, _, after = _between(DOCS.read_text(encoding="utf-8"), table)
    body = "".join(merged[key] + "\n" for key in order if key in merged)
    atomic.write_bytes(DOCS, f"{before}\n{head}{body}\n{after}".encode())


def _between(text: str, table: str) -> tuple[str, str, str]:
    """Split the page around a table."""
    begin, end = f"<!-- {table}: begin -->\n", f"<!-- {table}: end -->"
    before, _, rest = text.partition(begin)
    body, found, after = rest.partition(end)
    assert found, f"docs/verify.md has no table {table}"
    return before + begin, body, found + after
