"""What a gate accepted goes into git: whole, once, and only where its inputs are the same."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from bundle_factory import (
    BASE,
    HOST,
    MODEL,
    ROOT,
    TWIN,
    bundle_of,
    fleet,
    plan_of,
    save,
    with_host,
    with_twin,
)
from github_api import Fault, GitHubApi

from pipelines import (
    adopt,
    atomic,
    bundle,
    bundle_files,
    declaration,
    gate,
    lock_entries,
    records,
)
from pipelines.adopt import AdoptError
from pipelines.coverage import Coverage
from pipelines.errors import FleetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.layout import Layout

EDGE = "edge"
BRANCH = "bump/tiny"


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A fleet as git holds it."""
    return fleet(tmp_path / "fork")


def accepted(at: Layout, *legs: tuple[str, str], head: str | None = None) -> Path:
    """Measure some legs, let the gate judge them, and return its file."""
    folder = at.root.parent
    plan = plan_of(at, *legs)
    made = [bundle_of(at, model, host) for model, host in legs]
    if head is not None:
        plan = plan.model_copy(update={"head": head})
        made = [one.model_copy(update={"head": head}) for one in made]
    (folder / "plan.json").write_text(plan.model_dump_json())
    directory = save(folder / "bundles", *made)
    found, new_records = gate.gate(at, plan_file=folder / "plan.json", bundles=directory)
    assert new_records, found.failures
    records.write(folder / "gate.json", found)
    return folder / "gate.json"


def changed(path: Path, **changes: Any) -> Path:
    """Change fields of a gate's file."""
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | changes))
    return path


def files(root: Path) -> dict[str, bytes]:
    """Return every file below a folder, less what programs said."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and ".git/" not in f"{path.relative_to(root)}/"
        and not path.is_relative_to(root / "work/logs")
    }


# --- here -------------------------------------------------------------------------------------


def test_what_was_adopted_is_covered_and_adopting_it_again_changes_nothing(at: Layout) -> None:
    """The next plan measures nothing, and the same command is as good as none."""
    path = accepted(at, (MODEL, HOST))
    before = files(at.root)

    assert adopt.main(at, path) == 0

    once = files(at.root)
    assert Coverage(declaration.load(at.params), at).runs(MODEL) == ()
    assert {name for name in once if before.get(name) != once[name]} == {
        "dvc.lock",
        f"results/{MODEL}/times.json",
        f"results/{MODEL}/choice.json",
        f"results/{MODEL}/load-test.json",
        *(f"results/{MODEL}/benchmark/{type_}.json"
          for type_ in ("Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS", "Q2_K")),
    }  # fmt: skip
    assert adopt.main(at, path) == 0
    assert files(at.root) == once


def test_a_dry_run_names_the_files_and_writes_none(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would change, before it does."""
    path = accepted(at, (MODEL, HOST))
    before = files(at.root)

    adopt.main(at, path, dry_run=True)

    assert files(at.root) == before
    assert f"writes  results/{MODEL}/choice.json" in capsys.readouterr().err


def test_a_second_model_and_a_second_host_lie_beside_the_first(at: Layout) -> None:
    """Every bundle has its own place; all of it is covered afterwards."""
    with_host(with_twin(at), EDGE)
    legs = [(model, host) for model in (MODEL, TWIN) for host in (HOST, EDGE)]
    path = accepted(at, *legs)

    adopt.main(at, path)

    declared = declaration.load(at.params)
    coverage = Coverage(declared, at)
    for model in (MODEL, TWIN):
        assert coverage.runs(model) == ()
        assert coverage.runs(model, host=EDGE) == ()
        there = at.root / "results" / model / "on" / EDGE
        held = bundle.from_git(at, declared, model, host=EDGE, head=BASE)
        assert held.lock == json.loads((there / "lock.json").read_text())
        assert len(held.files) == 20
    assert (at.root / f"results/{MODEL}/release.json").exists()


def test_after_a_merge_of_another_model_the_same_gate_is_adopted_again(at: Layout) -> None:
    """Main's dvc.lock, then what was measured before the merge: nobody measures anew."""
    ours = accepted(at, (MODEL, HOST)).rename(at.root.parent / "ours.json")
    shutil.rmtree(at.root.parent / "bundles")
    # What came from main: another model, its records, and a lock that knows nothing of ours.
    with_twin(at)
    adopt.main(at, accepted(at, (TWIN, HOST)))

    adopt.main(at, ours)

    coverage = Coverage(declaration.load(at.params), at)
    assert coverage.runs(MODEL) == ()
    assert coverage.runs(TWIN) == ()


def test_what_a_quant_left_goes_with_its_declaration(at: Layout) -> None:
    """Records and entries of what is not declared any more go; release and ledger stay."""
    told = yaml.safe_load(at.params.read_text())
    del told["quants"][f"{MODEL}-Q2_K"]
    at.params.write_text(yaml.safe_dump(told, sort_keys=False))
    kept = [f"results/{MODEL}/{name}" for name in ("release.json", "ledger.jsonl", "publish.json")]
    before = files(at.root)
    changes = bundle_files.changes(at, declaration.load(at.params), [_without(at, "Q2_K")])

    adopt.write(at, changes)

    after = files(at.root)
    gone = {f"results/{MODEL}/{stage}/Q2_K.json" for stage in ("quantize", "benchmark")}
    assert set(before) - set(after) == gone
    assert all(before[name] == after[name] for name in kept)
    assert "Q2_K" not in "".join(lock_entries.parsed((at.root / "dvc.lock").read_text()))


def _without(at: Layout, type_: str) -> Any:
    good = bundle.from_git(at, declaration.load(at.params), MODEL, host=HOST, head=BASE)
    left = {name: text for name, text in good.files.items() if f"/{type_}.json" not in name}
    return good.model_copy(update={"files": left})


def test_a_kill_in_between_is_repaired_by_the_same_command(
    at: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half done is not covered; run again, it is what one run would have left."""
    path = accepted(at, (MODEL, HOST))
    whole = at.root.parent / "whole"
    shutil.copytree(at.root, whole)
    adopt.main(type(at)(whole), path)
    written: list[str] = []
    write = atomic.write_bytes

    def killed(target: Path, data: bytes) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(target.name)
        write(target, data)

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            adopt.main(at, path)
    assert "dvc.lock" not in written
    assert Coverage(declaration.load(at.params), at).runs(MODEL) != ()

    adopt.main(at, path)

    assert files(at.root) == files(whole)


# --- refused ----------------------------------------------------------------------------------


def test_a_checkout_with_other_inputs_is_refused_untouched(at: Layout) -> None:
    """Records speak of the commit that was measured, not of what was edited since."""
    path = accepted(at, (MODEL, HOST))
    params = at.params.read_text()
    prompts = at.root / "corpora/prompts.yaml"
    before = files(at.root)

    prompts.write_text(prompts.read_text() + "# later\n")
    with pytest.raises(AdoptError, match=r"corpora/prompts\.yaml changed"):
        adopt.main(at, path)
    prompts.write_bytes(before["corpora/prompts.yaml"])

    at.params.write_text(params.replace("max_kld_mean_nats: 0.005", "max_kld_mean_nats: 0.004"))
    with pytest.raises(AdoptError, match=r"other parameters than params\.yaml declares"):
        adopt.main(at, path)
    at.params.write_text(params)

    assert files(at.root) == before


def test_only_what_counts_is_held_against_the_inputs(at: Layout) -> None:
    """A comment in params.yaml since then is another commit and the same inputs."""
    path = accepted(at, (MODEL, HOST))
    at.params.write_text(at.params.read_text() + "# later\n")

    assert adopt.main(at, path) == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"failures": ["A measuring job failed."]}, "a measuring job failed|A measuring job"),
        ({"plan": None}, "there is no plan"),
        ({"bundles": []}, "its bundle did not come"),
        ({"spare": 1}, "is no gate.json"),
        ({"verdict": "GREAT"}, "is no gate.json"),
    ],
)
def test_what_a_gate_did_not_accept_is_refused(
    at: Layout, changes: dict[str, Any], why: str
) -> None:
    """A gate.json that was cut or edited brings nothing into git."""
    path = changed(accepted(at, (MODEL, HOST)), **changes)
    before = files(at.root)

    with pytest.raises(FleetError, match=why):
        adopt.main(at, path)

    assert files(at.root) == before


def test_a_gate_that_lies_about_its_bundles_is_judged_again(at: Layout) -> None:
    """INVALID is not adopted, whatever the file calls it."""
    path = accepted(at, (MODEL, HOST))
    told = json.loads(path.read_text())
    name = f"results/{MODEL}/benchmark/Q4_K_M.json"
    text = told["bundles"][0]["files"][name]
    told["bundles"][0]["files"][name] = text.replace('"VALID"', '"INVALID"', 1)
    path.write_text(json.dumps(told))

    with pytest.raises(AdoptError, match="Q4_K_M"):
        adopt.main(at, path)


def test_nothing_is_written_through_a_link(at: Layout, tmp_path: Path) -> None:
    """A folder of results that leads elsewhere is refused before the first file."""
    path = accepted(at, (MODEL, HOST))
    there = at.root / "results" / MODEL
    shutil.move(there, tmp_path / "elsewhere")
    there.symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")

    with pytest.raises(FleetError):
        adopt.main(at, path)

    assert files(tmp_path / "elsewhere") == before


# --- on the branch ----------------------------------------------------------------------------


@pytest.fixture
def github(tmp_path: Path) -> Iterator[GitHubApi]:
    """GitHub's API before a real repository."""
    with GitHubApi(tmp_path / "octo.git") as api:
        yield api


class Run:
    """A pull request on GitHub whose records were measured, and the job that adopts them."""

    def __init__(self, at: Layout, api: GitHubApi) -> None:
        """Put the fleet onto a branch, measure it there, let the gate judge it."""
        self.at, self.api = at, api
        content: dict[str, str | bytes | None] = {
            name: data for name, data in files(at.root).items() if name != "plan.json"
        }
        api.git.commit("main", {"README.md": "a fleet\n"})
        self.head = api.git.commit(BRANCH, content)
        api.add_pull(BRANCH)
        self.gate = accepted(at, (MODEL, HOST), head=self.head)
        self.summary = at.root.parent / "summary.md"

    def environment(
        self, *, head: str | None = None, repository: str = "octo/fleet"
    ) -> dict[str, str]:
        """Return what a runner sets for it."""
        pull = {
            "number": 1,
            "head": {"sha": head or self.head, "ref": BRANCH, "repo": {"full_name": repository}},
            "base": {"sha": BASE, "ref": "main", "repo": {"full_name": "octo/fleet"}},
            "labels": [],
        }
        event = self.at.root.parent / "event.json"
        event.write_text(json.dumps({"pull_request": pull}))
        return {
            **self.api.environment(),
            "GITHUB_ACTIONS": "true",
            "GITHUB_EVENT_NAME": "pull_request",
            "GITHUB_EVENT_PATH": str(event),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }


@pytest.fixture
def run(at: Layout, github: GitHubApi) -> Run:
    """A measured pull request."""
    return Run(at, github)


def test_the_records_become_one_commit_on_the_measured_one(run: Run, fleet: Any) -> None:
    """The same bytes as adopting here; its parent is what was measured; again, it is none."""
    done = fleet("adopt", "../gate.json", "--commit", cwd=run.at.root, **run.environment())

    assert done.returncode == 0, done.stderr
    tip = run.api.git.head(BRANCH)
    assert run.api.git.resolve(f"{tip}^") == run.head
    adopt.main(run.at, run.gate)
    assert run.api.git.files(str(tip)) == {
        name: data for name, data in files(run.at.root).items() if not name.startswith("work/")
    }
    message = run.api.git.text("log", "-1", "--format=%B", str(tip))
    assert message.splitlines()[0] == f"Records: promote {MODEL}"
    assert f"Measured {MODEL} on {HOST} at {run.head}." in message

    done = fleet("adopt", "../gate.json", "--commit", cwd=run.at.root, **run.environment())

    assert done.returncode == 0
    assert "nothing to adopt" in done.stderr
    assert run.api.git.head(BRANCH) == tip


def test_a_branch_that_moved_is_left_as_it_is(run: Run, fleet: Any) -> None:
    """Somebody pushed while it was measured: the run of the newer commit brings its records."""
    theirs = run.api.git.commit(BRANCH, {"README.md": "newer\n"})

    done = fleet("adopt", "../gate.json", "--commit", cwd=run.at.root, **run.environment())
    newer = fleet(
        "adopt", "../gate.json", "--commit", cwd=run.at.root, **run.environment(head=theirs)
    )

    assert (done.returncode, newer.returncode) == (0, 0)
    assert "somebody changed it in between" in done.stderr
    assert "nothing was written" in newer.stderr
    assert run.api.git.head(BRANCH) == theirs


@pytest.mark.parametrize("status", [403, 404])
def test_a_token_that_may_not_write_leaves_the_command_to_type(
    run: Run, fleet: Any, status: int
) -> None:
    """It is no failure of the measurement; the summary says how to apply it."""
    body = {"message": "Resource not accessible by integration"}
    run.api.strike(Fault(kind="status", status=status, body=body), matches="POST git/trees")

    done = fleet("adopt", "../gate.json", "--commit", cwd=run.at.root, **run.environment())

    assert done.returncode == 0, done.stderr
    assert "fleet adopt gate.json" in run.summary.read_text()
    assert run.api.git.head(BRANCH) == run.head


def test_a_fork_is_never_written_to(run: Run, fleet: Any) -> None:
    """Not even asked: its branch may have the name of one of ours."""
    environment = run.environment(repository="stranger/fleet")

    done = fleet("adopt", "../gate.json", "--commit", cwd=run.at.root, **environment)

    assert done.returncode == 0, done.stderr
    assert "fleet adopt gate.json" in run.summary.read_text()
    assert not any(seen.is_write for seen in run.api.requests)


def test_a_commit_needs_a_pull_request(run: Run, fleet: Any) -> None:
    """Outside of one there is no branch to write to."""
    done = fleet("adopt", "../gate.json", "--commit", cwd=run.at.root, GITHUB_ACTIONS="")

    assert done.returncode == 2
    assert "no pull request started this" in done.stderr


def test_the_applied_records_are_what_a_person_would_commit(at: Layout) -> None:
    """Git sees records and the lock, and nothing of work/."""
    shutil.copy(ROOT / ".gitignore", at.root)
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")
    for argv in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "fleet"]):
        subprocess.run(["git", *author, *argv], cwd=at.root, check=True)

    adopt.main(at, accepted(at, (MODEL, HOST)))

    done = subprocess.run(
        ["git", "status", "--porcelain", "-uall"],
        cwd=at.root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    names = {line[3:] for line in done.stdout.splitlines()}
    assert "dvc.lock" in names
    assert all(name == "dvc.lock" or name.startswith("results/") for name in names)
