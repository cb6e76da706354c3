"""
Files of the Hub, brought with patience: watched, resumed, and ended when they hang.

A worker (`pipelines.hub_worker`) transfers one file after another; we look at the clock. Ours are
the deadline for all files of a model, the rate below which a transfer counts as hung, and how often
something is tried again. A hung transfer is ended with its process and goes on the plain way,
without xet, once; each attempt goes on where the one before ended. A server's wish to be left alone
is granted as long as the deadline allows it, and never beyond.

Nothing here says that bytes are right: `pipelines.hub` hashes them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, proc
from pipelines.errors import DigestError, MachineError, RetryLaterError, ToolError, UpstreamError
from pipelines.hub_worker import READY, Failure, Order

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.errors import FleetError

ACCESS_HINT: Final = (
    "Set HF_TOKEN to a token that may read it (under Actions: a secret of that name), and accept "
    "the model's conditions on its page if it has any."
)
NETWORK_HINT: Final = "Check the network, the proxy and HF_ENDPOINT, then try again."

_TOO_BUSY: Final = frozenset({408, 425, 429})
_SERVER_ERRORS: Final = range(500, 600)
# More than any pause that nobody would wonder about.
LONG_PAUSE_S: Final = 5.0
_TOLD_WITHIN_S: Final = 10.0
# Python, httpx2 and huggingface_hub, on a machine that has a lot to do.
_READY_WITHIN_S: Final = 120.0
# What a transfer has to have brought before it broke for that to count as progress.
_PROGRESS_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Patience:
    """
    How long one bears with the network. Nothing of it changes bytes.

    Attributes:
        deadline_s: For all files of a model, with all repeats.
        min_rate_bytes_s: A transfer that is slower ...
        stall_s: ... for so long is ended.
        tries: How often something that brought nothing is tried again.
        first_pause_s: Before that; doubled each time, up to `longest_pause_s`.
        longest_pause_s: See `first_pause_s`.
    """

    deadline_s: float = 720 * 60.0
    min_rate_bytes_s: float = 100 * 1024.0
    stall_s: float = 60.0
    tries: int = 5
    first_pause_s: float = 1.0
    longest_pause_s: float = 8.0


# For a question on the way, which somebody waits for and can do without.
QUICK: Final = Patience(deadline_s=30.0, stall_s=10.0, tries=2)


class LengthError(DigestError):
    """A whole file has another size than its listing says; what there is of it is of no use."""


class Transfers:
    """Files of one repository at one commit, brought one after another by one worker."""

    def __init__(self, repo: str, revision: str, patience: Patience) -> None:
        """Begin to count down; a worker is started when there is something to do."""
        self._patience = patience
        self._deadline = time.monotonic() + patience.deadline_s
        self._repo = repo
        self._revision = revision
        self._worker: proc.Dialogue | None = None
        # Since a transfer hung, or xet failed.
        self._is_plain = False

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; none are left when it is negative."""
        return self._deadline - time.monotonic()

    def bring(  # noqa: PLR0913 - each is one independent fact, named at the call
        self,
        name: str,
        size_bytes: int,
        part: Path,
        progress: Callable[[int], None],
        *,
        large: bool,
        fresh: bool = False,
    ) -> None:
        """
        Append to `part` what is missing of a file, until it has the declared size.

        Args:
            name: Path in the repository.
            size_bytes: As the listing declares it.
            part: File; what is there of it counts as the first bytes.
            progress: Called with the number of bytes that are there.
            large: Whether it is in LFS, so that xet may have it.
            fresh: Ask caches on the way for nothing that they keep.

        Raises:
            UpstreamError: It cannot be had.
            RetryLaterError: It cannot be had now; what came stays in `part`.
            LengthError: It has another size.
            MachineError: It cannot be written.
        """
        from pipelines import hub_metadata  # noqa: PLC0415 - it reads what reads this module

        order = Order(
            endpoint=hub_metadata.endpoint(),
            repo=self._repo,
            revision=self._revision,
            name=name,
            size_bytes=size_bytes,
            large=large,
            part=str(part),
            fresh=fresh,
        )
        tried = stalls = deaths = 0
        if _size_bytes(part) == size_bytes:
            return  # one that is linked elsewhere may be read-only by now
        while True:
            before_bytes = _size_bytes(part)
            self._require_time(order)
            failure = self._attempt(order, progress)
            if failure is None:
                return
            stalls += failure.kind == "stalled"
            deaths += failure.kind == "died"
            brought_bytes = _size_bytes(part) - before_bytes
            if brought_bytes >= _PROGRESS_BYTES:
                tried = 0
            if brought_bytes >= max(_PROGRESS_BYTES, self._quantum_bytes):
                stalls = min(stalls, 1)
            if failure.kind in {"stalled", "xet"} and not self._is_plain:
                self._is_plain = True
                self.close()
                console.info(f"{self._file(order)}: {_words(failure)}; on the plain way now.")
                continue
            error = self._error(failure, order)
            is_over = tried >= self._patience.tries or stalls > 1 or deaths > 1
            if is_over or failure.kind == "offline" or not _may_pass(error):
                raise error
            self._pause(failure, order, tried)
            tried += 1

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    # --- one attempt ---

    @property
    def _quantum_bytes(self) -> float:
        """What has to come within `stall_s`."""
        return max(1.0, self._patience.min_rate_bytes_s * self._patience.stall_s)

    def _attempt(self, order: Order, progress: Callable[[int], None]) -> Failure | None:
        """Have the worker try once; what hangs, and who dies, is gone afterwards."""
        try:
            return self._watched(self._ready_worker(order), order, progress)
        except ToolError as error:
            self._worker = None
            first, *last_words = error.message.removeprefix(f"{Path(sys.executable).name} ").split(
                "\n"
            )
            return Failure(kind="died", detail=f"{first} {' '.join(last_words[-1:]).strip()}")
        except BaseException:
            self.close()
            raise

    def _ready_worker(self, order: Order) -> proc.Dialogue:
        """Return the worker, which is started if there is none."""
        if self._worker is not None:
            return self._worker
        self._worker = proc.Dialogue(
            [sys.executable, "-m", "pipelines.hub_worker"], env=_environment(plain=self._is_plain)
        )
        until = time.monotonic() + max(min(_READY_WITHIN_S, self.left_s), 0)
        said: str | None = ""
        while said not in {READY, None}:  # this Python may have something to say of its own
            said = self._worker.hear(within_s=max(until - time.monotonic(), 0))
        if said is None:
            self._require_time(order)
            raise MachineError(
                f"the program that talks to the Hub was not there within {_READY_WITHIN_S:.0f} s.",
                hint="This machine has too much to do. Try again.",
            )
        return self._worker

    def _watched(
        self, worker: proc.Dialogue, order: Order, progress: Callable[[int], None]
    ) -> Failure | None:
        """Give an order and follow what comes of it; None if all of it came."""
        worker.tell(json.dumps(asdict(order)), within_s=_TOLD_WITHIN_S)
        mark_s, mark_bytes = time.monotonic(), None
        while True:
            patient_s = mark_s + self._patience.stall_s - time.monotonic()
            if patient_s <= 0:
                self.close()
                return Failure(kind="stalled", detail=_rate_words(self._patience))
            self._require_time(order)
            line = worker.hear(within_s=min(patient_s, self.left_s))
            said = _message(line)
            if "done" in said:
                progress(said["done"])
                return None
            if "failed" in said:
                return Failure(**said["failed"])
            if "at" in said:
                progress(said["at"])
                # The first word may be about bytes of an earlier attempt.
                if mark_bytes is None or said["at"] - mark_bytes >= self._quantum_bytes:
                    mark_bytes = said["at"]
                    mark_s = time.monotonic()

    def _require_time(self, order: Order) -> None:
        if self.left_s > 0:
            return
        self.close()
        raise RetryLaterError(
            f"{self._file(order)}: {_duration(self._patience.deadline_s)} were not enough."
            f"{_kept(order)}",
            hint="Run the same command again: it goes on from there. `fetch.deadline_minutes` of "
            "params.yaml says how long it may take.",
        )

    # --- between two attempts ---

    def _pause(self, failure: Failure, order: Order, tried: int) -> None:
        """Wait as the server asks for, or a little, if the deadline allows it."""
        patience = self._patience
        # Half of it by chance: a fleet of runners must not come back in step.
        pause_s = min(patience.first_pause_s * 2**tried, patience.longest_pause_s)
        pause_s *= random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        pause_s = max(pause_s, failure.retry_after_s or 0.0)
        if pause_s > self.left_s:
            when = datetime.fromtimestamp(time.time() + pause_s, UTC)
            asks = (
                f"asks to be left alone for {_duration(failure.retry_after_s)}"
                if failure.retry_after_s
                else "does not answer as it should"
            )
            raise RetryLaterError(
                f"{self._file(order)}: {_words(failure)}; the server {asks}, and there are "
                f"{_duration(max(self.left_s, 0))} left for this fetch.{_kept(order)}",
                hint=f"Run the same command again after {when:%Y-%m-%d %H:%M:%S} UTC.",
            )
        if pause_s >= LONG_PAUSE_S:
            console.info(f"{self._file(order)}: {_words(failure)}; again in {pause_s:.0f} s.")
        time.sleep(pause_s)

    # --- words ---

    @property
    def _where(self) -> str:
        return f"hf:{self._repo} at {self._revision[:12]}"

    def _file(self, order: Order) -> str:
        return f"{self._where}: {console.clean(order.name)}"

    def _error(self, failure: Failure, order: Order) -> FleetError:
        """Sort a failure by who has to do something about it."""
        file, words = self._file(order), _words(failure)
        error: FleetError
        match failure.kind:
            case "status":
                error = self._refusal(failure, order)
            case "disk" if failure.errno in {errno.ENOSPC, errno.EDQUOT}:
                error = MachineError(
                    f"{file}: the disk is full.{_kept(order)}",
                    hint="Make room and run the same command again: it goes on from there.",
                )
            case "disk":
                error = MachineError(f"{order.part} cannot be written: {words}.")
            case "length":
                error = LengthError(
                    f"{order.name} of {self._where} is not what the Hub lists: wanted "
                    f"{order.size_bytes:,} bytes, got {words}.",
                    hint="A proxy or a mirror changed it. Nothing was kept; try again.",
                )
            case "offline":
                error = RetryLaterError(
                    f"{file} is not here, and HF_HUB_OFFLINE is set.", hint="Unset it to download."
                )
            case "died":
                # Memory may be there the next time; a bug of ours would be the same.
                error = ToolError(f"{file}: the program that talks to the Hub {words}.")
            case "unreachable":
                error = RetryLaterError(
                    f"{file} cannot be had from {shown_address(order.endpoint)} now: {words}."
                    f"{_kept(order)}",
                    hint=NETWORK_HINT,
                )
            case _:
                text = f"{file} did not come: {words}.{_kept(order)}"
                error = RetryLaterError(text, hint=NETWORK_HINT)
        return error

    def _refusal(self, failure: Failure, order: Order) -> UpstreamError:
        """Say what a refusal means; the codes are those that huggingface_hub knows."""
        status = failure.status or 0
        if status in _TOO_BUSY or status in _SERVER_ERRORS:
            return RetryLaterError(
                f"{self._file(order)}: {_words(failure)}.{_kept(order)}",
                hint="Run the same command again in some minutes.",
            )
        gone = (
            f"{self._where}: there is no such commit; upstream may have rewritten its history.",
            "Look at the commits on the Hub and declare another `revision`.",
        )
        known = {
            "GatedRepo": (f"{self._where} is gated.", ACCESS_HINT),
            "RevisionNotFound": gone,
            "RepoNotFound": (
                f"hf:{self._repo} does not exist, or this machine may not see it.",
                ACCESS_HINT,
            ),
        }
        message, hint = known.get(
            failure.code, (f"{self._file(order)}: {_words(failure)}.", ACCESS_HINT)
        )
        if failure.detail == "Access to this resource is disabled.":
            message, hint = f"{self._where} was disabled by the Hub.", "Declare another source."
        return UpstreamError(message, hint=hint)


def _may_pass(error: FleetError) -> bool:
    """Tell whether another attempt makes sense at all."""
    return isinstance(error, RetryLaterError | ToolError)


def _environment(*, plain: bool) -> dict[str, str]:
    """Variables of the worker besides ours; the token is among ours."""
    places = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]
    env = {"PYTHONPATH": os.pathsep.join(place for place in places if place)}
    return env | ({"HF_HUB_DISABLE_XET": "1"} if plain else {})


def _message(line: str | None) -> dict[str, Any]:
    """Read what a worker says; what a library printed is nothing."""
    with contextlib.suppress(ValueError):
        said = json.loads(line or "")
        return said if isinstance(said, dict) else {}
    return {}


def shown_address(url: str) -> str:
    """Return an address as it may be shown: without the password of a mirror."""
    return re.sub(r"//[^/]*@", "//", url)


def _size_bytes(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _kept(order: Order) -> str:
    there = _size_bytes(Path(order.part))
    return f" {there:,} of {order.size_bytes:,} bytes of it are kept." if there else ""


def _words(failure: Failure) -> str:
    """Say what happened, as a part of a sentence."""
    detail = console.clean(failure.detail.strip().split("\n")[0])[:200].rstrip(".")
    if failure.kind == "status":
        return f"the Hub answers {failure.status}{f' ({detail})' if detail else ''}"
    return detail or failure.kind


def _rate_words(patience: Patience) -> str:
    rate = patience.min_rate_bytes_s / 1024
    return f"it was slower than {rate:,.0f} KiB/s for {_duration(patience.stall_s)}"


def _duration(seconds: float | None) -> str:
    seconds = seconds or 0.0
    if seconds < 120:  # noqa: PLR2004 - minutes of one digit say too little
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min"
