"""The command line: what a person, a DVC stage and an action all type."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

import pytest

from pipelines import atomic
from pipelines.__main__ import STAGES, main, parser

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Fleet = Callable[..., subprocess.CompletedProcess[str]]

HEAVY = ("dvc", "mlflow", "torch", "transformers", "huggingface_hub", "rich", "jinja2", "pydantic")


def test_help_names_every_stage_and_every_exit_code(fleet: Fleet) -> None:
    """`fleet --help` shows all verbs and what each exit code means."""
    done = fleet("--help")

    assert done.returncode == 0
    for stage in STAGES:
        assert stage.name in done.stdout
    assert "75 try later" in done.stdout


def test_help_imports_nothing_heavy(fleet: Fleet) -> None:
    """Starting the command line loads no package that takes time to load."""
    done = fleet("--help", PYTHONPROFILEIMPORTTIME="1")

    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded.intersection(HEAVY)


def test_every_verb_explains_itself(fleet: Fleet) -> None:
    """`fleet VERB --help` works for each verb that the overview lists."""
    for verb in ("repro", "check", "toolchain", "machine", "digest", "schema", "track"):
        done = fleet(verb, "--help")

        assert done.returncode == 0
        assert done.stdout.startswith(f"usage: fleet {verb}")


def test_a_folder_without_params_says_where_to_go(fleet: Fleet, tmp_path: Path) -> None:
    """Outside a fleet the error names the folder and the file that is missing; exit 2."""
    done = fleet("check", cwd=tmp_path)

    assert done.returncode == 2
    assert f"there is no params.yaml in {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_key_gets_a_suggestion(fleet: Fleet, checkout: Path) -> None:
    """A misspelt quant is answered with the declared one that is closest to it."""
    done = fleet("quantize", "tiny-llama-Q4_K_N", cwd=checkout)

    assert done.returncode == 2
    assert 'did you mean "tiny-llama-Q4_K_M"?' in done.stderr


def test_an_edit_during_a_run_is_noticed(fleet: Fleet, checkout: Path) -> None:
    """A stage refuses values that DVC did not see, so that the lock never records a lie."""
    planned = checkout / "work/params/fetch/tiny-llama.json"
    planned.parent.mkdir(parents=True)
    planned.write_text(
        f'{{"model": "tiny-llama", "source": "path:elsewhere", "revision": "{"0" * 40}"}}'
    )

    done = fleet("fetch", "tiny-llama", cwd=checkout, DVC_STAGE="fetch@tiny-llama")

    assert done.returncode == 2
    assert "was edited while DVC was running" in done.stderr


def test_a_full_disk_is_named_without_a_traceback(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the disk refuses is said with the file and the next step; exit 7."""

    def refuse(path: Path, _text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.chdir(checkout)
    monkeypatch.setattr(atomic, "write_text", refuse)

    code = main(["schema", "--write"])

    said = capsys.readouterr().err
    assert code == 7
    assert "No space left on device: params.schema.json" in said
    assert "Make room" in said


def test_a_log_is_of_one_run(fleet: Fleet, checkout: Path) -> None:
    """What an earlier run of the stage printed is gone when the next one begins."""
    log = checkout / "work/logs/choose-tiny-llama.log"
    log.parent.mkdir(parents=True)
    log.write_text("of an earlier run")

    fleet("choose", "tiny-llama", cwd=checkout)

    assert not log.exists() or "earlier" not in log.read_text()


def test_an_unknown_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A verb that does not exist exits 2 and lists those that do."""
    with pytest.raises(SystemExit) as exit_:
        main(["quantise"])

    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert 'did you mean "quantize"?' in said
    assert "benchmark" in said


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["docter"], "doctor"), (["template", "statsu"], "status"), (["zebra"], None)],
)
def test_a_slip_of_the_finger_is_guessed(
    capsys: pytest.CaptureFixture[str], words: list[str], meant: str | None
) -> None:
    """A verb, and what a verb does; a word like none of them is not guessed at."""
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().err
    assert f'did you mean "{meant}"?' in said if meant else "did you mean" not in said


def test_template_alone_is_its_status() -> None:
    """Who types no more wants to know, and changes nothing."""
    assert parser().parse_args(["template"]).use == "status"


def test_a_reader_that_stops_reading_is_no_failure(checkout: Path) -> None:
    """`fleet schema | head -1` ends quietly."""
    import subprocess  # noqa: PLC0415 - a pipe between two real processes

    line = f"{sys.executable} -m pipelines schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=checkout, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0
    assert done.stderr == ""
