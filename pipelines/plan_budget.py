"""
What the stages of a plan cost: minutes on runners, bytes of disk, bytes from the Hub.

Minutes are those that the same stages took before, by results/MODEL/times.json and, without it, by
what the records say of themselves, and those of the last comparison, which is no stage. Bytes are
those of the records, or, of files that there are none of yet, upper bounds by their type and the
number of weights (`pipelines.disk`). Nothing is asked of a network: what is not known is said to be
unknown and never counted as nothing.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from pipelines import disk, records, wording
from pipelines.bundle import primary_host
from pipelines.ci_records import Budget, TimesRecord
from pipelines.compare_records import CompareRecord
from pipelines.errors import FleetError
from pipelines.load_records import LoadTestRecord
from pipelines.publishing_words import shown_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from pipelines.ci_records import PlannedRun
    from pipelines.layout import Layout
    from pipelines.params import Declaration

# It compares numbers that others measured.
_FREE: Final = frozenset({"choose"})
# They leave large files.
_MAKING: Final = frozenset({"fetch", "convert", "quantize"})
# They lead to another choice.
_CHOOSING: Final = frozenset({"quantize", "benchmark", "evaluate", "choose"})
_MINUTE_S: Final = 60
_MOST_UNKNOWN: Final = 20
_R = TypeVar("_R", bound=records.Record)


def of_runs(
    declared: Declaration, at: Layout, model: str, runs: Sequence[PlannedRun], *, host: str
) -> Budget:
    """
    Say what the stages of one model cost on one host.

    Args:
        declared: The declaration.
        at: The checkout, with the records of earlier runs.
        model: A declared one.
        runs: What has to run of it.
        host: Where.
    """
    folder = at.root / "results" / model
    if host != primary_host(declared, model):
        folder = folder / "on" / host
    one = _Model(declared=declared, at=at, folder=folder, model=model, runs=tuple(runs), unknown=[])
    return Budget(
        gpu_minutes=one.minutes(),
        disk_bytes=one.disk_bytes(),
        network_bytes=one.network_bytes(),
        unknown=tuple(one.unknown[:_MOST_UNKNOWN]),
    )


def together(budgets: Iterable[Budget]) -> Budget:
    """Sum budgets; what is unknown of one stays said, what is known of the others is summed."""
    all_ = list(budgets)
    unknown = list(dict.fromkeys(line for one in all_ for line in one.unknown))
    return Budget(
        gpu_minutes=_sum([one.gpu_minutes for one in all_]),
        disk_bytes=_sum([one.disk_bytes for one in all_]),
        network_bytes=_sum([one.network_bytes for one in all_]),
        unknown=tuple(
            [
                *unknown[:_MOST_UNKNOWN],
                wording.counted(len(unknown) - _MOST_UNKNOWN, "more unknown"),
            ]
            if len(unknown) > _MOST_UNKNOWN
            else unknown
        ),
    )


_N = TypeVar("_N", int, float)


def _sum(values: list[_N | None]) -> _N | None:
    """Sum what is known; None if there is something and nothing of it is known."""
    known = [value for value in values if value is not None]
    return None if values and not known else sum(known)


def over(budget: Budget, declared: Declaration) -> tuple[str, ...]:
    """Say in what a budget is larger than the declaration allows."""
    limits = declared.plan
    compared = (
        ("max_gpu_minutes", budget.gpu_minutes, limits.max_gpu_minutes, "minutes on runners"),
        ("max_disk_gib", _gib(budget.disk_bytes), limits.max_disk_gib, "GiB of new files"),
        ("max_network_gib", _gib(budget.network_bytes), limits.max_network_gib, "GiB from the Hub"),
    )
    return tuple(
        f"about {wording.beyond(value, limit)} {what}, where plan.{name} allows "
        f"{wording.declared(limit)}"
        for name, value, limit, what in compared
        if value is not None and limit is not None and value > limit
    )


def _gib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / disk.GIB


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What is known of one model on one host; `unknown` grows by what is not."""

    declared: Declaration
    at: Layout
    folder: Path
    model: str
    runs: tuple[PlannedRun, ...]
    unknown: list[str]

    # --- minutes

    def minutes(self) -> float | None:
        """Sum how long the stages take; None if nothing is known of any of them."""
        told = self._read("times.json", TimesRecord)
        times = {name: s for name, s in (told.wall_s if told else {}).items() if s >= 0}
        known: list[float] = []
        never: dict[str, int] = {}
        for run in self.runs:
            if run.stage in _FREE:
                continue
            wall_s = self._wall_s(run, times)
            if wall_s is None:
                never[run.stage] = never.get(run.stage, 0) + 1
            else:
                known.append(wall_s)
        if never:
            stages = [f"{stage} ({n})" if n > 1 else stage for stage, n in never.items()]
            take = "takes" if len(stages) == 1 else "take"
            self.unknown.append(
                f"how long {wording.listed(stages)} of {self.model} {take}: "
                "no pull request has timed it"
            )
        known += self._comparison()
        return sum(known) / _MINUTE_S if known or not never else None

    def _comparison(self) -> list[float]:
        """
        Return how long it takes to measure what is chosen against what was chosen before.

        That is done of every model that has a choice and may get another one, beside its stages.
        """
        if all(run.stage not in _CHOOSING for run in self.runs):
            return []
        before = self._read("compare.json", CompareRecord)
        if before is not None:
            return [before.wall_s]
        if (self.folder / "choice.json").is_file():
            most = wording.declared(self.declared.compare.max_minutes)
            self.unknown.append(
                f"how long comparing {self.model} takes: no pull request has timed it, "
                f"{most} min at most"
            )
        return []

    def _wall_s(self, run: PlannedRun, times: Mapping[str, float]) -> float | None:
        """Return how long a stage took; of a new quant how long that of the others did."""
        name = f"{run.stage}@{run.key}"
        if name in times:
            return times[name]
        alike = [wall_s for other, wall_s in times.items() if other.startswith(f"{run.stage}@")]
        if run.stage == "load-test":
            test = self._read("load-test.json", LoadTestRecord)
            alike = [test.wall_s] if test else alike
        elif run.stage == "benchmark":
            type_ = self.declared.quants[run.key].type
            own = self._read(f"benchmark/{type_}.json", records.BenchmarkRecord)
            alike = [own.wall_s] if own else alike or self._benchmarks()
        return statistics.median(alike) if alike else None

    def _benchmarks(self) -> list[float]:
        names = [path.name for path in sorted((self.folder / "benchmark").glob("*.json"))]
        found = [self._read(f"benchmark/{name}", records.BenchmarkRecord) for name in names]
        return [one.wall_s for one in found if one is not None]

    # --- bytes

    def disk_bytes(self) -> int | None:
        """Sum the files that the stages leave; None if nothing is known of them."""
        parameters_count, source_bytes = self._size()
        needed: list[int | None] = []
        for run in self.runs:
            made: records.ConvertRecord | records.QuantizeRecord | None
            if run.stage == "fetch":
                needed.append(source_bytes)
            elif run.stage == "convert":
                made = self._read("convert.json", records.ConvertRecord)
                bound = parameters_count and disk.f16_bytes(parameters_count)
                needed.append(made.gguf.size_bytes if made else bound)
            elif run.stage == "quantize":
                type_ = self.declared.quants[run.key].type
                made = self._read(f"quantize/{type_}.json", records.QuantizeRecord)
                bound = parameters_count and disk.quant_bytes(type_, parameters_count)
                needed.append(made.gguf.size_bytes if made else bound)
        if any(one is None for one in needed):
            self.unknown.append(f"how large the files of {self.model} are: it was never fetched")
        return _sum(needed)

    def _size(self) -> tuple[int | None, int | None]:
        """Return weights and bytes of the source; those of another revision where they must do."""
        from pipelines import fetch  # noqa: PLC0415 - heavy

        spec = self.declared.models[self.model]
        if all(run.stage not in _MAKING for run in self.runs):
            return None, None
        if spec.source.startswith("path:"):
            try:
                size = fetch.size_of(spec.source, spec.revision, self.at)
            except (FleetError, OSError):
                return None, None
            return size.parameters_count, size.source_bytes
        found = self._fetched()
        return (found.parameters_count, found.size_bytes) if found else (None, None)

    def _fetched(self) -> records.FetchRecord | None:
        """Return the newest record of the same source."""
        primary = records.read_or_reason(
            self.at.model_record("fetch", self.model), records.FetchRecord
        )
        for found in (self._read("fetch.json", records.FetchRecord), primary):
            if isinstance(found, records.FetchRecord) and (
                found.source == self.declared.models[self.model].source
            ):
                return found
        return None

    def network_bytes(self) -> int | None:
        """Return what comes from the Hub; None of a revision that nobody has fetched yet."""
        spec = self.declared.models[self.model]
        if spec.source.startswith("path:") or all(run.stage != "fetch" for run in self.runs):
            return 0
        found = self._fetched()
        if found is not None and found.revision == spec.revision:
            return found.size_bytes
        near = f"; the revision before had {shown_size(found.size_bytes)}" if found else ""
        self.unknown.append(f"how large {self.model} at {spec.revision[:7]} is on the Hub{near}")
        return None

    def _read(self, name: str, kind: type[_R]) -> _R | None:
        found = records.read_or_reason(self.folder / name, kind)
        return None if isinstance(found, str) else found
