"""How long stages took, and which failed: what a run leaves for the plan and the gate after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import console, records, wording

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pipelines.ci_records import TimesRecord
    from pipelines.layout import Layout
    from pipelines.live import StageLine

_DIGITS = 3
_CAUSE_CHARACTERS = 500


def path(at: Layout) -> Path:
    """Return where a run keeps them; not in git."""
    return at.root / "work/times.json"


def read(at: Layout) -> TimesRecord:
    """Read what the runs in this checkout left; nothing if there was none."""
    from pipelines.ci_records import TimesRecord  # noqa: PLC0415 - not at CLI start

    found = records.read_or_reason(path(at), TimesRecord)
    return TimesRecord() if isinstance(found, str) else found


def note(at: Layout, stages: Iterable[StageLine]) -> None:
    """
    Keep how long the stages of a run took that really ran, and what became of those that failed.

    What an earlier run said of other stages stays; of a stage that is right now, no failure does.
    """
    from pipelines.ci_records import TimesRecord  # noqa: PLC0415 - not at CLI start

    before = read(at)
    wall_s, failed, codes = dict(before.wall_s), dict(before.failed), dict(before.codes)
    for stage in stages:
        if stage.state == "done":
            wall_s[stage.name] = round(stage.wall_s, _DIGITS)
        if stage.state in {"done", "cached", "unchanged"}:
            failed.pop(stage.name, None)
            codes.pop(stage.name, None)
        if stage.state in {"failed", "skipped"}:
            failed[stage.name] = wording.shortened(
                " ".join(console.clean(stage.cause).split()), _CAUSE_CHARACTERS
            )
            codes.pop(stage.name, None)
            if stage.code is not None:
                codes[stage.name] = stage.code
    records.write(path(at), TimesRecord(wall_s=wall_s, failed=failed, codes=codes))
