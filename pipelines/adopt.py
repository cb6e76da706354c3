"""
`fleet adopt gate.json`: the records that a gate accepted, put into git.

Here, as files to look at and commit; or with `--commit` as one commit on the branch of the pull
request, over GitHub's API, whose parent is the very commit that was measured. After it the next
run finds everything covered, measures nothing, and the check is green.

The gate's own words are not believed: its bundles are judged again, and have to cover the checkout.
What is written, is written whole: everything is looked at before the first file, and dvc.lock,
without which the records speak of nothing, comes last. The same command repairs a kill in between.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from pipelines import (
    atomic,
    bundle_files,
    console,
    declaration,
    gate,
    runner,
    strict_json,
    wording,
)
from pipelines import bundle as bundles_
from pipelines.ci_records import GateRecord
from pipelines.errors import FleetError, ParamsError
from pipelines.verdict_words import tidy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.gate import Judgement
    from pipelines.layout import Layout
    from pipelines.runner import PullRequest

# As many bundles as a plan has legs, in the mean a quarter full.
_MAX_BYTES: Final = 64 << 20
_WITH_LINES: Final = frozenset({"bundles"})
_MAY_NOT: Final = frozenset({401, 403, 404})
_SUBJECT_CHARACTERS: Final = 100
_SHOWN: Final = 20


class AdoptError(FleetError):
    """Records may not be put into git: they were not accepted, or are those of other inputs."""


def main(at: Layout, gate_file: Path, *, commit: bool = False, dry_run: bool = False) -> int:
    """
    Put the records of a gate into this checkout, or onto the branch of the pull request.

    Args:
        at: The checkout of the commit that was measured, or of one with the same inputs.
        gate_file: By `fleet gate`.
        commit: Commit over GitHub's API instead of writing here.
        dry_run: Say what would change; change nothing.

    Raises:
        AdoptError: The gate did not accept them, or they are not those of this checkout's inputs.
        GitHubError, RetryLaterError: GitHub refused for another reason than a missing right.
    """
    from pipelines import host_records  # noqa: PLC0415 - it writes as we do

    record = read(gate_file)
    host_records.require(at, declaration.load(at.params), None)
    judgement, changed = adoptable(at, record)
    if not changed:
        console.info("The records are in git already: nothing to adopt.")
        return 0
    for path, content in list(changed.items())[:_SHOWN]:
        console.info(f"{'removes' if content is None else 'writes '} {path}")
    if len(changed) > _SHOWN:
        console.info(f"and {wording.counted(len(changed) - _SHOWN, 'more file')}")
    if dry_run:
        return 0
    if commit:
        return _commit(record, judgement, changed, gate_file)
    write(at, changed)
    console.info(f"{wording.counted(len(changed), 'file')} changed. Look at them, then commit.")
    return 0


def read(path: Path) -> GateRecord:
    """
    Read what a gate found, as the file of a stranger.

    Raises:
        BundleError: It is not that, or a bundle in it holds what none may hold.
    """
    data = bundles_.read_bounded(path, _MAX_BYTES)
    try:
        strict_json.loads(data, limit_bytes=_MAX_BYTES, lines_in=_WITH_LINES)
        record = GateRecord.model_validate_json(data)
    except strict_json.NotJsonError as error:
        raise bundles_.BundleError(f"{path.name} is no gate.json: {error.message}.") from None
    except ValidationError as error:
        flaw = bundles_.first_flaw(error)
        raise bundles_.BundleError(f"{path.name} is no gate.json: {flaw}.") from None
    for one in record.bundles:
        bundles_.require_form(one, f"{path.name}, {one.model} on {one.host}")
    return record


def adoptable(at: Layout, record: GateRecord) -> tuple[Judgement, dict[str, bytes | None]]:
    """
    Return the judgement on what a gate found, and the files that adopting it changes here.

    Raises:
        AdoptError: It is not accepted, or not of this checkout's inputs.
    """
    if record.plan is None or record.plan.problems or not record.plan.allowed or record.failures:
        why = record.failures[0] if record.failures else "there is no plan to go by"
        raise AdoptError(
            f"the gate did not accept these records: {tidy(why)}.",
            hint="Adopt those of a run whose gate had something to judge.",
        )
    declared = declaration.load(at.params)
    text = at.params.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="fleet-base-") as folder:
        # As in the gate: the message of the commit says no better verdict than the check.
        base = gate.base_of(at, record.plan, Path(folder))
        judgement = gate.judge_bundles(base, text, record.plan, record.bundles)
    if judgement.failures:
        raise AdoptError(
            f"these records are not those of this checkout: {judgement.failures[0].text}",
            hint=f"They were measured at {record.plan.head[:12]}: check that commit out, or "
            "measure again.",
        )
    if judgement.verdict == "INVALID":
        raise AdoptError(
            f"what is INVALID is not adopted. {judgement.sentence}", hint="Measure again."
        )
    removed = [one.model for one in record.plan.models if one.change == "removed"]
    changed = bundle_files.changes(at, declared, record.bundles, removed=removed)
    for model in dict.fromkeys(one.model for one in record.bundles):
        for failure in gate.uncovered(at, declared, changed, model):
            raise AdoptError(
                f"the inputs here are not those that were measured: {failure.text}",
                hint=f"They were measured at {record.plan.head[:12]}: check that commit out, or "
                "measure again.",
            )
    return judgement, changed


def write(at: Layout, changed: Mapping[str, bytes | None]) -> None:
    """
    Write files of `bundle_files.changes`, each whole, in their order.

    Raises:
        AdoptError: A folder on the way is a link, or a file stands where a folder has to be; said
            before the first one is written.
    """
    for path in changed:
        target = at.root / path
        for folder in target.relative_to(at.root).parents:
            here = at.root / folder
            if here.is_symlink() or (here.exists() and not here.is_dir()):
                raise AdoptError(f"{path} cannot be written: {folder} is not a folder of its own.")
        if target.is_dir() and not target.is_symlink():
            raise AdoptError(f"{path} cannot be written: it is a folder.")
    for path, content in changed.items():
        target = at.root / path
        if content is None:
            target.unlink(missing_ok=True)
        else:
            atomic.write_bytes(target, content)


# --- over GitHub's API ------------------------------------------------------------------------


def message(record: GateRecord, judgement: Judgement) -> str:
    """Compose the message of the commit: the verdict in one line, then what was measured where."""
    names = list(dict.fromkeys(one.model for one in judgement.models))
    what = wording.listed(names) if len(names) < 4 else wording.counted(len(names), "model")  # noqa: PLR2004 - as fits a line
    verdict = judgement.verdict.lower() if judgement.verdict else "retire"
    subject = wording.shortened(f"Records: {verdict} {what or 'what is not declared any more'}",
                                _SUBJECT_CHARACTERS)  # fmt: skip
    measured = (
        {(leg.host, model) for leg in record.plan.legs for model in leg.models}
        if record.plan
        else set()
    )
    lines = [f"{one.model} on {one.host}: {one.sentence}" for one in judgement.models]
    where = [f"Measured {model} on {host} at {record.head}." for host, model in sorted(measured)]
    return "\n".join([subject, "", *lines, *([""] if where else []), *where]) + "\n"


def _commit(
    record: GateRecord,
    judgement: Judgement,
    changed: Mapping[str, bytes | None],
    gate_file: Path,
) -> int:
    from pipelines.github.client import GitHub  # noqa: PLC0415 - requests
    from pipelines.github.commits import commit_files  # noqa: PLC0415 - the same
    from pipelines.github.errors import GitHubError, MovedError  # noqa: PLC0415 - the same

    pull = runner.pull_request()
    if pull is None:
        raise ParamsError(
            "`--commit` writes to the branch of a pull request, and no pull request started this "
            "run.",
            hint=f"fleet adopt {gate_file.name} puts the files into this checkout.",
        )
    if pull.head != record.head:
        console.warn(
            f"The pull request is at {pull.head[:12]}, measured was {(record.head or '')[:12]}: "
            "nothing was written. The run for the newer commit does it."
        )
        return 0
    if pull.is_from_fork:
        return _by_hand(
            record, pull, "the branch is in a fork, where this repository may not write"
        )
    try:
        sha = commit_files(
            GitHub.from_environment(),
            pull.head_ref,
            changed,
            message(record, judgement),
            parent=pull.head,
        )
    except MovedError as error:
        console.warn(f"{error.message} {error.hint}")
        return 0
    except GitHubError as error:
        if error.status not in _MAY_NOT:
            raise
        return _by_hand(record, pull, f"the token may not write to the branch ({error.status})")
    runner.outputs(commit=sha)
    told = f"{wording.counted(len(changed), 'file')} of records, commit {sha[:12]}"
    runner.summary(f"{told}\n")
    console.info(f"{told} on the branch of the pull request.")
    return 0


def _by_hand(record: GateRecord, pull: PullRequest, why: str) -> int:
    """Say what brings the records into git where we may not: no failure, and not done."""
    console.warn(f"The records were not committed: {why}. The summary says how to apply them.")
    runner.summary(
        f"The records were accepted but not committed: {why}.\n\n"
        f"Download the artifact `gate` of this run, then on the branch of pull request "
        f"{pull.number}, at `{record.head}`:\n\n"
        "```\nfleet adopt gate.json\ngit add -A dvc.lock results\n"
        'git commit -m "Records of the measurement"\ngit push\n```\n'
    )
    return 0
