"""
Downloads in which something goes wrong: the plan, the try, and what says what came of it.

Each trial is a fetch of a small model with two shards through the code of the stage, from a
stand-in for the Hub that does one kind of fault. Afterwards each file under a final name is held
against the bytes that were committed; the fetch itself is not asked whether they are right.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import struct
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from checkpoints import tiny
from hub import KINDS, Fault, Hub

from pipelines import fetch
from pipelines.errors import FleetError
from pipelines.fetch_downloads import Downloads
from pipelines.hub import HubRepo
from pipelines.hub_download import Patience
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

SHARDS: Final = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# Small and large ones: git's blob id proves the one, sha256 the other.
STRUCK: Final = (*SHARDS, "config.json", "tokenizer.model")

MODEL: Final = "tiny"
RIGHT, UPSTREAM, WRONG_BYTES, LATER = 0, 3, 6, 75
UNFORESEEN, HUNG = -1, -2
# What nothing may take longer than, beyond the declared deadline.
GRACE_S: Final = 10.0
# Long enough for a busy machine, short enough for a test.
PATIENT: Final = Patience(
    deadline_s=60.0, min_rate_bytes_s=16_384.0, stall_s=4.0, tries=2, first_pause_s=0.02,
    longest_pause_s=0.1,
)  # fmt: skip
# Only the deadline ends what is slow.
HURRIED: Final = replace(PATIENT, deadline_s=5.0, min_rate_bytes_s=0.0, stall_s=60.0)

# What a fault strikes: the listing, one file by chance, one of the shards, the bytes of a shard as
# the Hub's storage sends them.
Target = Literal["listing", "file", "weights", "storage"]


@dataclass(frozen=True)
class Planned:
    """A fault of a trial; `anywhere` lets it begin at a byte by chance instead of in the middle."""

    target: Target
    fault: Fault
    times: int | None = None
    anywhere: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """
    One way in which a download goes wrong.

    Attributes:
        kind: A name of `hub.KINDS`, or what upstream itself holds.
        how: Which of its forms.
        expected: Exit code that the fetch has to end with.
        faults: In the order in which they are looked for.
        upstream: Files that were committed like this: what is wrong is the model itself.
        patience: Of the fetch.
    """

    kind: str
    how: str
    expected: int
    faults: tuple[Planned, ...] = ()
    upstream: Mapping[str, bytes | None] = field(default_factory=dict)
    patience: Patience = PATIENT

    def __str__(self) -> str:
        """As a report shows it."""
        return f"{self.kind} ({self.how})"

    def was_met(self, outcome: Outcome) -> bool:
        """Whether it ended as it has to, of the fault that was planned and of nothing else."""
        as_planned = outcome.struck > 0 or not self.faults
        return outcome.code == self.expected and not outcome.missing and as_planned

    @property
    def may_pass(self) -> bool:
        """Whether a next run finds a model that is right, where it was pinned."""
        return not self.upstream and not any(
            KINDS[planned.fault.kind].event is not None for planned in self.faults
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """
    What came of a trial.

    Attributes:
        code: Exit code of the verb, or UNFORESEEN, or HUNG.
        message: What the operator reads.
        wrong: Files under a final name whose bytes are not those that were committed.
        missing: Files that are not there although the code says that all are.
        wall_s: Seconds.
        late_s: Of them past the deadline; negative as long as there was time.
        struck: How often a fault was done.
    """

    code: int
    message: str
    wrong: tuple[str, ...]
    missing: tuple[str, ...]
    wall_s: float
    late_s: float
    struck: int


class Trials:
    """
    Tries out downloads, some at a time; each in a process without threads, as the stage is.

    Use it as a block.
    """

    def __init__(self, hub: Hub, *, at_a_time: int) -> None:
        """Prepare; processes start with the first trials."""
        self._hub = hub
        self._processes = ProcessPoolExecutor(
            at_a_time, multiprocessing.get_context("spawn"), _use, (hub.env(),)
        )
        self._threads = ThreadPoolExecutor(at_a_time)

    def __enter__(self) -> Self:
        """Use it as a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes."""
        self._threads.shutdown(cancel_futures=True)
        self._processes.shutdown(cancel_futures=True)

    def begin(self, trial: Trial, number: int, *, again: bool = False) -> Future[list[Outcome]]:
        """
        Begin one download.

        Args:
            trial: What goes wrong.
            number: Decides which file, and where in it.
            again: Run it once more in the same checkout, with nothing wrong any more.

        Returns:
            What comes of it, and of the second run if there is one.
        """
        return self._threads.submit(self._attempt, trial, number, again=again)

    def _attempt(self, trial: Trial, number: int, *, again: bool) -> list[Outcome]:
        form = f"{trial.kind}-{trial.how}-{number}".replace(" ", "-")
        repo = self._hub.create(f"acme/{form}", files())
        if trial.upstream:
            repo.commit(trial.upstream)
        pinned, name = repo.head, repo.name
        right = repo.revision(pinned)
        chance = random.Random(f"{trial} {number}")
        struck = {"file": chance.choice(STRUCK), "weights": chance.choice(SHARDS)}
        struck["storage"] = struck["weights"]
        for planned in trial.faults:
            _plan(self._hub, name, planned, struck, chance)
        with tempfile.TemporaryDirectory(prefix="fetch-trial-") as scratch:
            outcomes = [self._download(name, pinned, scratch, right, trial.patience)]
            self._hub.forget(f"{name}/")
            if again:
                outcomes.append(self._download(name, pinned, scratch, right, PATIENT))
            self._hub.forget(f"{name}/")
            return outcomes

    def _download(
        self, name: str, pinned: str, root: str, right: Mapping[str, bytes], patience: Patience
    ) -> Outcome:
        done = self._processes.submit(download, name, pinned, root, patience)
        try:
            code, message, wall_s = done.result(timeout=patience.deadline_s + 12 * GRACE_S)
        except TimeoutError:
            code, message, wall_s = HUNG, "it did not end", math.inf
        into = Layout(Path(root)).source(MODEL)
        found = {
            str(path.relative_to(into)): path.read_bytes()
            for path in into.rglob("*")
            if path.is_file()
        }
        return Outcome(
            code=code,
            message=message,
            wrong=tuple(name for name in sorted(found) if found[name] != right.get(name)),
            missing=tuple(sorted(files().keys() - found)) if code == 0 else (),
            wall_s=wall_s,
            late_s=wall_s - patience.deadline_s,
            struck=sum(bool(each.fault) for each in self._hub.asked(f"*{name}/*")),
        )


def _use(env: Mapping[str, str]) -> None:
    os.environ.update(env)


def download(name: str, pinned: str, root: str, patience: Patience) -> tuple[int, str, float]:
    """
    Fetch as the stage does, in this process.

    Returns:
        Exit code of the verb, UNFORESEEN for an error that no verb would explain; what the operator
        reads; seconds.
    """
    at = Layout(Path(root))
    began = time.monotonic()
    code, message = 0, ""
    try:
        downloads = Downloads(at, MODEL, f"hf:{name}", pinned)
        with contextlib.redirect_stderr(io.StringIO()):
            fetch.fetch(
                HubRepo(name, pinned, patience=patience, downloads=downloads),
                at.source(MODEL),
                label=f"fetch {name}",
                known_architectures=frozenset({"LlamaForCausalLM"}),
                llama_cpp_commit="0c1e57098",
                revision=None,
            )
    except FleetError as error:
        code, message = error.exit_code, error.message
    except Exception as error:  # noqa: BLE001 - that there is one is the finding
        code, message = UNFORESEEN, f"{type(error).__name__}: {error}"
    return code, message, time.monotonic() - began


def _plan(
    hub: Hub, name: str, planned: Planned, struck: Mapping[str, str], chance: random.Random
) -> None:
    fault = planned.fault
    if planned.target == "listing":
        pattern = f"/api/models/{name}/revision/*"
    else:
        file = struck[planned.target]
        start = "/storage/*" if planned.target == "storage" else "*"
        pattern = f"{start}{name}/*{file}"
        if planned.anywhere:
            fault = replace(fault, at_byte=chance.randrange(1, len(files()[file])))
        if fault.kind == "swapped" and file in SHARDS:
            fault = replace(fault, content=files()[SHARDS[1 - SHARDS.index(file)]])
    hub.fault(pattern, fault, times=planned.times)


@cache
def files() -> dict[str, bytes]:
    """Return the files of a model that is right; all of them are fetched."""
    with tempfile.TemporaryDirectory() as scratch:
        made = tiny(Path(scratch) / "tiny", shards=2)
        return {path.name: path.read_bytes() for path in made.iterdir()}


# --- the plan -----------------------------------------------------------------------------------


def _once(kind: str, target: Target = "file", expected: int = RIGHT, **fields: object) -> Trial:
    """It goes wrong once; whoever asks again gets what is right."""
    planned = Planned(target, Fault(kind, **fields), times=1, anywhere=target != "listing")  # type: ignore[arg-type]
    return Trial(kind=kind, how="once", expected=expected, faults=(planned,))


def _always(
    kind: str,
    expected: int,
    target: Target = "file",
    *,
    patience: Patience = PATIENT,
    how: str = "always",
    **fields: object,
) -> Trial:
    """It goes wrong each time."""
    planned = Planned(target, Fault(kind, **fields))  # type: ignore[arg-type]
    return Trial(kind=kind, how=how, expected=expected, faults=(planned,), patience=patience)


def _resumed(kind: str) -> Trial:
    """The first transfer is cut; the answer about the rest of it is wrong."""
    cut = Planned("storage", Fault("cut_mid"), times=1)
    return Trial(
        kind=kind, how="after a cut", expected=RIGHT,
        faults=(cut, Planned("storage", Fault(kind))),
    )  # fmt: skip


def _both(kind: str, expected: int, **fields: object) -> tuple[Trial, Trial]:
    return _once(kind, **fields), _always(kind, expected, **fields)  # type: ignore[arg-type]


def _status(status: int, *trials: Trial) -> tuple[Trial, ...]:
    """Name the form of a fault that has one for each status."""
    return tuple(replace(trial, how=f"{status} {trial.how}") for trial in trials)


def _headed(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_OVERLAPPING: Final = _headed(
    {
        name: {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
        for name in ("lm_head.weight", "model.norm.weight")
    },
    bytes(8),
)
# What Python's pickle begins with, and a program in it.
_PICKLE: Final = (
    b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93."
)


def _upstream(kind: str, **changed: bytes | None) -> Trial:
    """The model itself is wrong, and its digests say so truly."""
    names = {"shard": SHARDS[0], "config": "config.json", "index": "model.safetensors.index.json"}
    return Trial(
        kind=kind, how="as committed", expected=UPSTREAM,
        upstream={names.get(name, name): content for name, content in changed.items()},
    )  # fmt: skip


TRIALS: Final[tuple[Trial, ...]] = (
    # wrong bytes: asked for once more, then refused
    *_both("flip", WRONG_BYTES),
    *_both("html", WRONG_BYTES),
    *_both("html_padded", WRONG_BYTES),
    *_both("swapped", WRONG_BYTES),
    *_both("short", WRONG_BYTES),
    *_both("long", WRONG_BYTES),
    *_both("empty", WRONG_BYTES),
    *_both("lfs_pointer", WRONG_BYTES),
    *_both("chunked_short", WRONG_BYTES),
    # right bytes in odd clothes
    _always("endless", RIGHT),
    _always("gzip", RIGHT),
    _always("no_length", RIGHT),
    _always("chunked", RIGHT),
    _always("wrong_etag", RIGHT),
    _always("wrong_commit", RIGHT),
    _always("wrong_linked_size", RIGHT),
    # answers about the rest of a file
    _resumed("wrong_range"),
    _resumed("range_lie"),
    _resumed("range_ignored"),
    _resumed("range_refused"),
    # the connection
    *_both("gzip_lie", LATER),
    *_both("reset_before", LATER),
    *_both("reset_mid", LATER),
    *_both("cut_mid", LATER),
    *_both("no_length_cut", LATER),
    *_both("stall_before", LATER),
    *_both("stall_mid", LATER),
    *_both("drip", LATER),
    _always("drip", LATER, patience=HURRIED, how="until the deadline"),
    # heads
    *_status(408, *_both("status", LATER, status=408)),
    *_status(500, *_both("status", LATER, status=500)),
    *_status(502, *_both("status", LATER, status=502)),
    *_status(503, *_both("status", LATER, status=503)),
    *_status(504, *_both("status", LATER, status=504)),
    *_status(403, _always("status", UPSTREAM, status=403)),
    *_status(404, _always("status", UPSTREAM, status=404)),
    _once("retry_after", status=429, retry_after="1"),
    _always("retry_after", LATER, status=429, retry_after="3600"),
    _once("retry_date", retry_after="1"),
    _always("retry_date", LATER, retry_after="3600"),
    _once("allowance", retry_after="1"),
    _always("allowance", LATER, retry_after="3600"),
    *_both("redirect_other", WRONG_BYTES),
    *_both("redirect_loop", LATER),
    # listings
    _always("listing_html", LATER, "listing"),
    _always("listing_cut", LATER, "listing"),
    _always("listing_endless", LATER, "listing", patience=HURRIED, pause_s=0.005),
    _always("listing_huge", UPSTREAM, "listing"),
    _always("listing_nothing", UPSTREAM, "listing"),
    _always("listing_nonsense", LATER, "listing"),
    _always("listing_missing_digest", UPSTREAM, "listing"),
    _always("listing_missing_size", UPSTREAM, "listing"),
    _always("listing_wrong_size", WRONG_BYTES, "listing"),
    _always("listing_lies", WRONG_BYTES, "listing"),
    _always("listing_other_sha", UPSTREAM, "listing"),
    _always("listing_other_id", UPSTREAM, "listing"),
    _always("listing_other_repository", RIGHT, "listing"),
    _always("listing_names", UPSTREAM, "listing"),
    _always("listing_twice", UPSTREAM, "listing"),
    *(
        replace(trial, kind=f"listing_{trial.kind}")
        for trial in (
            _once("reset_before", "listing"),
            _always("reset_before", LATER, "listing"),
            _always("stall_before", LATER, "listing", patience=HURRIED),
            _once("status", "listing"),
            _always("status", LATER, "listing"),
            _once("retry_after", "listing", status=429, retry_after="1"),
            _always("retry_after", LATER, "listing", status=429),
            _always("redirect_other", UPSTREAM, "listing"),
            _always("redirect_loop", UPSTREAM, "listing"),
        )
    ),
    # what happens between the listing and the weights
    _once("gated_mid", "weights", UPSTREAM),
    _once("gone_mid", "weights", UPSTREAM),
    _once("disabled_mid", "weights", UPSTREAM),
    _once("rewritten_mid", "weights", UPSTREAM),
    _once("replaced_mid", "weights", UPSTREAM),
    _once("renamed_mid", "weights", RIGHT),
    _once("moved_mid", "weights", RIGHT),
    # the model itself
    _upstream("truncated_header", shard=files()[SHARDS[0]][:100]),
    _upstream("overlapping_tensors", shard=_OVERLAPPING),
    _upstream("pickle_disguised", shard=_PICKLE),
    _upstream("page_committed", shard=b"<!DOCTYPE html><html></html>"),
    _upstream("pointer_committed", shard=b"version https://git-lfs.github.com/spec/v1\noid\n"),
    _upstream("shard_missing", shard=None),
    _upstream("config_cut", config=files()["config.json"][:50]),
)  # fmt: skip
