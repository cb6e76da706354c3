"""What a comment says of two trees, a gate, a run; the golden files are what it looks like."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import comment_factory as make
import pytest
import record_factory
import sample
from record_factory import MODEL

from pipelines import __main__, bundle, comment, comment_render, declaration, gate, records
from pipelines.ci_records import BundleRecord, GateRecord, ModelPlan, PlanRecord
from pipelines.comment_post import Run, Situation
from pipelines.layout import Layout
from pipelines.records import BenchmarkRecord
from pipelines.trees import Git

if TYPE_CHECKING:
    from pipelines.comment_tree import Comment, ModelComment

HERE = Path(__file__).resolve().parent.parent
LINE = "  tiny-llama-Q4_K_M: {model: tiny-llama, type: Q4_K_M}\n"


def only(found: Comment) -> ModelComment:
    """Return the one model of a comment."""
    (model,) = found.models
    return model


def visible(found: Comment) -> str:
    """Return what is read without unfolding anything."""
    return comment_render.render(found).split("<details>")[0]


# --- what it looks like -----------------------------------------------------------------------


@pytest.mark.parametrize("name", make.STATES)
def test_a_comment_of_each_state_is_its_golden_file(name: str) -> None:
    """`PYTHONPATH=. python tests/comment_factory.py` writes them again."""
    text = comment_render.render(make.state(name))

    assert text == (make.GOLDEN / f"{name}.md").read_text(encoding="utf-8")


def test_every_golden_file_is_of_a_state() -> None:
    """None is left behind by a state that is no more."""
    assert {path.stem for path in make.GOLDEN.iterdir()} == set(make.STATES)


# --- the verdict ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "verdict", "conclusion", "next_step"),
    [
        ("promote", "PROMOTE", "success", "Merge"),
        ("hold", "HOLD", "action_required", "waiver of gate"),
        ("reject", "REJECT", "failure", "Declare a quant"),
        ("invalid", "INVALID", "neutral", "Re-run all jobs (not the failed ones alone)"),
        ("hosts", "REJECT", "failure", "Declare a quant"),
        ("problems", None, "failure", "fleet check"),
        ("over-budget", None, "action_required", "over-budget"),
        ("failed", None, "failure", "log of the run"),
        ("cancelled", None, "neutral", "Re-run all jobs"),
        ("started", None, None, "Nothing to do"),
        ("waiting", None, "action_required", "Approve workflows to run"),
        ("measuring", None, None, "Nothing to do"),
        ("removed", "REMOVED", "success", "Merging takes it out"),
        ("empty", None, "success", ""),
    ],
)
def test_the_check_run_ends_as_the_verdict_says(
    state: str, verdict: str | None, conclusion: str | None, next_step: str
) -> None:
    """Verdict, conclusion and what to do next agree; INVALID is nobody's failure."""
    found = make.state(state)

    assert (found.verdict, found.conclusion) == (verdict, conclusion)
    assert next_step in found.next_step
    assert next_step in visible(found).replace("&#96;", "`")


def test_a_host_with_a_machine_of_its_own_is_judged_by_that() -> None:
    """Each host has its line, and the worst of them is the verdict of the model."""
    found = only(make.state("hosts"))

    assert [(one.where, one.verdict) for one in found.hosts] == [
        ("workstation", "PROMOTE"),
        ("laptop", "REJECT"),
    ]
    assert found.verdict == "REJECT"
    assert [one.host for one in found.others] == ["laptop"]
    assert "on laptop" in found.headline


def test_a_failed_gate_is_shown_with_value_and_limit(tmp_path: Path) -> None:
    """In the open: what was measured and what was due, of the winner and in the table."""
    base, head = make._trees(tmp_path)
    declared = make.write(head)
    slow = record_factory.load_gate(
        "ttft", value=0.5, low=0.4, high=0.6, outcome="FAIL",
        sentence="50 of 100 requests had the first token within 300 ms",
    )  # fmt: skip
    gates = tuple(slow if one.name == "ttft" else one for one in record_factory.load_gates())
    test = record_factory.winner_test("Q4_K_M", gates=gates)
    tested = record_factory.load_test_record({"local": "Q4_K_M"}, winners=(test,))
    records.write(head.model_record("load-test", MODEL), tested)

    found = make.compose(base, head, {MODEL: declared})

    assert found.verdict == "REJECT"
    (line,) = [one for one in only(found).against_promotion if one.name == "load test: ttft"]
    assert (line.value, line.limit, line.outcome) == ("50.0 %", "95.0 %", "FAIL")
    assert "❌ **load test: ttft**: 50.0 %; due: 95.0 %" in visible(found)
    assert "❌ divergence 0.310 &#62; 0.06" in visible(found)


# --- the base ---------------------------------------------------------------------------------


def test_a_change_inside_the_noise_is_called_that(tmp_path: Path) -> None:
    """Of two separate runs only what is outside of both intervals counts as a change."""
    base, head = make._trees(tmp_path)
    make.write(base, shared={"noise": 0.05})
    faster = {t: {**one, "decode_tok_s": one["decode_tok_s"] * 1.08} for t, one in
              make.FLEET.items()}  # fmt: skip
    declared = make.write(head, fleet=faster, shared={"noise": 0.05})

    text = visible(make.compose(base, head, {MODEL: declared}))

    assert "+8.0\u00a0%\u00a0&#126;<br>&#91;-2.3,\u00a0+19.4&#93;" in text
    assert "from separate runs" in text


def test_what_ran_in_turns_counts_more_than_two_records(tmp_path: Path) -> None:
    """A comparison of exactly these two files is shown in the place of their records."""
    base, head = make._trees(tmp_path)
    make.write(base, fleet=make.OLD)
    declared = make.write(head)
    champion = record_factory.quantize_record("Q5_K_M").gguf.sha256
    side = record_factory.side("Q5_K_M", gguf_sha256=champion)
    other = record_factory.side("Q5_K_M", gguf_sha256="f" * 64)

    for one, words in ((side, "both in turns in one run"), (other, "from separate runs")):
        compared = record_factory.compare_record("better", champion=one)
        records.write(head.comparison(MODEL), compared)
        assert words in only(make.compose(base, head, {MODEL: declared})).against


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"machine": record_factory.machine_id(hw_id="a" * 64)}, "hardware"),
        ({"llama_cpp_commit": "b" * 40}, "llama.cpp commit"),
        ({"threads": 7}, "number of threads"),
    ],
)
def test_numbers_of_other_conditions_are_not_compared(
    tmp_path: Path, changes: dict[str, object], word: str
) -> None:
    """No difference of speed, and the reason in words."""
    base, head = make._trees(tmp_path)
    make.write(base, shared=changes)

    found = make.compose(base, head, {MODEL: make.write(head)})
    text = visible(found)

    assert "<br>&#91;" not in text
    assert f"under another {word}" in text
    assert only(found).against == ""


def test_an_invalid_measurement_of_the_base_is_no_base(tmp_path: Path) -> None:
    """Nothing is held against a measurement that was not to be trusted."""
    base, head = make._trees(tmp_path)
    make.write(base, shared={"validity": record_factory.validity("It was busy.")})

    assert "<br>&#91;" not in visible(make.compose(base, head, {MODEL: make.write(head)}))


def test_the_history_is_that_of_this_hardware(tmp_path: Path) -> None:
    """Records of another machine are left out; the newest one is the one that is shown."""
    found = only(make.state("promote"))

    assert found.history is not None
    assert [one.value_tok_s for one in found.history.points] == [571, 575, 560, 590, 588, 596, 598]
    assert found.history.points[-1].commit == "this"

    slower = make.promote(tmp_path / "other")
    head = Layout(tmp_path / "other/head")
    path = head.quant_record("benchmark", MODEL, "Q4_K_M")
    old = records.read(path, BenchmarkRecord)
    moved = old.machine.model_copy(update={"hw_id": "c" * 64})
    for type_ in make.FLEET:
        path = head.quant_record("benchmark", MODEL, type_)
        one = records.read(path, BenchmarkRecord)
        records.write(path, one.model_copy(update={"machine": moved}))
    git, commit = Git(tmp_path / "other/repository"), slower.base
    again = make.compose(
        Layout(tmp_path / "other/repository"), head,
        {MODEL: record_factory.judge_slice(make.FLEET)}, git=git, commit=commit,
    )  # fmt: skip
    assert only(again).history is None


def test_the_way_back_is_that_of_what_is_stable_now(tmp_path: Path) -> None:
    """By the ledger of the base; of another ledger in the pull request nothing is believed."""
    base, head = make._trees(tmp_path)
    make.write(base)
    declared = make.write(head)
    make.release(head)

    assert only(make.compose(base, head, {MODEL: declared})).rollback == ()
    make.release(base)
    (command,) = only(make.compose(base, head, {MODEL: declared})).rollback
    stable = record_factory.sha256("a release")[:12]
    assert command == f'fleet rollback {MODEL} --to {stable} --reason "..."'


def test_what_upstream_changed_is_listed() -> None:
    """Revision, licence, parameters, files: what it was, what it is."""
    found = {one.what: (one.before, one.after) for one in only(make.state("bump")).changes}

    assert found["licence"] == ("mit", "apache-2.0")
    assert found["parameters"] == ("3,400,000", "3,500,000")
    assert found["files added"][1] == "model-2.safetensors"
    assert found["revision"][0] == "c" * 12


# --- from git and from a gate -----------------------------------------------------------------


class Fork:
    """A repository with the real records of the sample: its base lacks a quant."""

    def __init__(self, root: Path) -> None:
        """Make two commits."""
        self.root = root
        self.at = Layout(root)
        sample.take(
            root, ".gitignore", "params.yaml", "dvc.yaml", "dvc.lock", "results", frozen=True
        )
        self.params = self.at.params.read_text(encoding="utf-8")
        assert LINE in self.params
        own = [self.at.quant_record(stage, MODEL, "Q4_K_M") for stage in ("benchmark", "quantize")]
        kept = [path.read_bytes() for path in own]
        for path in own:
            path.unlink()
        self.at.params.write_text(self.params.replace(LINE, ""), encoding="utf-8")
        self.git("init", "--quiet", "--initial-branch=main")
        self.base = self.commit("base")
        self.git("switch", "--quiet", "--create", "add-a-quant")
        self.at.params.write_text(self.params, encoding="utf-8")
        for path, data in zip(own, kept, strict=True):
            path.write_bytes(data)
        self.head = self.commit("head")

    def git(self, *argv: str) -> str:
        """Run git here."""
        names = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
        done = subprocess.run(
            ["git", *names, *argv], cwd=self.root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def commit(self, message: str) -> str:
        """Commit everything."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)
        return self.git("rev-parse", "HEAD")

    def plan(self) -> PlanRecord:
        """Return a plan that says that git covers the head."""
        model = ModelPlan(
            model=MODEL, change="changed", what=("quants: Q4_K_M is new",), line=42, covered=True
        )
        return PlanRecord(base=self.base, head=self.head, params_blob=None, models=(model,))

    def bundle(self) -> BundleRecord:
        """Return what git holds of the head."""
        declared = declaration.load(self.at.params)
        return bundle.from_git(self.at, declared, MODEL, host="local", head=self.head)

    def gate(self, **changes: object) -> GateRecord:
        """Return what a gate that calls everything good left behind."""
        record = GateRecord(
            base=self.base, head=self.head, verdict="PROMOTE", conclusion="success",
            sentence="all is well", plan=self.plan(), bundles=(self.bundle(),),
        )  # fmt: skip
        return record.model_copy(update=changes)


@pytest.fixture(name="fork")
def _fork(tmp_path: Path) -> Fork:
    return Fork(tmp_path / "fork")


def test_the_verb_prints_the_comment_of_two_revisions(
    fork: Fork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default the working tree against the commit where the branch left main."""
    monkeypatch.chdir(fork.root)

    assert __main__.main(["comment", "--dry-run"]) == 0
    by_default = capsys.readouterr().out
    assert __main__.main(["comment", "--dry-run", "--base", fork.base, "--head", fork.head]) == 0
    by_name = capsys.readouterr().out

    assert by_default.startswith("### ✅ tiny-llama: promote **Q4_K_M**")
    assert "- **declared**: Q4_K_M is new" in by_default
    assert by_default.split("Make it again")[0] == by_name.split("Make it again")[0]
    assert f"`{fork.base[:12]}` → the working tree" in by_default
    assert f"`fleet comment --dry-run --base {fork.base[:12]} --head {fork.head[:12]}`" in by_name
    assert fork.git("status", "--short") == ""


def test_a_quant_that_nobody_measured_is_called_that_and_not_a_disturbed_measurement(
    fork: Fork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who has only declared something is told what measures it, not to start jobs again."""
    monkeypatch.chdir(fork.root)
    quant = f"  {MODEL}-Q8_0:"
    new = f"  {MODEL}-Q5_0: {{model: {MODEL}, type: Q5_0}}\n"
    assert quant in fork.params
    fork.at.params.write_text(fork.params.replace(quant, new + quant))

    assert __main__.main(["comment", "--dry-run"]) == 0

    told = capsys.readouterr().out
    assert f"{MODEL}: not measured yet" in told
    assert f"`fleet repro {MODEL}` measures it." in told
    assert "Re-run" not in told
    assert "disturbed" not in told


def test_outside_a_run_the_verb_says_how_it_prints(
    fork: Fork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person has no pull request at hand, and a missing file has a writer."""
    monkeypatch.chdir(fork.root)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)

    assert __main__.main(["comment"]) == 2
    assert "`fleet comment --dry-run` prints it here" in capsys.readouterr().err
    assert __main__.main(["comment", "--dry-run", "--gate", "nope.json"]) == 2
    assert "`fleet gate --out FILE` writes it" in capsys.readouterr().err


def test_a_broken_declaration_is_told_by_its_lines(
    fork: Fork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the plan: no traceback, no half a comment."""
    monkeypatch.chdir(fork.root)
    fork.at.params.write_text(fork.params.replace("objective: speed", "objective: fast"))

    assert __main__.main(["comment", "--dry-run"]) == 0
    text = capsys.readouterr().out

    assert "params.yaml has 1 problem" in text
    assert re.search(r"❌ params\.yaml, line \d+, column \d+: .*objective", text)


def test_the_verb_refuses_what_contradicts_itself(
    fork: Fork, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gate's file knows its commits; without a dry run GitHub's event does."""
    monkeypatch.chdir(fork.root)

    assert __main__.main(["comment", "--dry-run", "--gate", "g.json", "--base", "HEAD"]) == 2
    assert __main__.main(["comment", "--base", "HEAD"]) == 2
    assert "fleet comment --dry-run" in capsys.readouterr().err
    assert __main__.main(["comment", "--dry-run", "--base", "no-such-thing"]) == 2
    assert "git knows no commit" in capsys.readouterr().err
    assert __main__.main(["comment", "--dry-run", "--model", "tinyllama"]) == 2
    assert '"tinyllama" is not declared, or does not differ' in capsys.readouterr().err
    assert __main__.main(["comment", "--dry-run", "--model", MODEL]) == 0


def test_a_gate_is_judged_again(fork: Fork, tmp_path: Path) -> None:
    """From the records in its bundles, whatever it says of itself."""
    lying = fork.gate(verdict="REJECT", conclusion="failure", sentence="@everyone it is bad")

    found = comment.of_gate(lying, fork.params, fork.at, tmp_path / "trees")

    assert (found.verdict, found.conclusion) == ("PROMOTE", "success")
    assert "everyone" not in comment_render.render(found)
    assert only(found).covered
    assert "(new)" not in only(found).headline
    judged = gate.judge_bundles(fork.at, fork.params, fork.plan(), [fork.bundle()])
    assert only(found).hosts[0].sentence == judged.models[0].sentence


def test_a_bundle_that_was_tampered_with_is_not_shown(fork: Fork, tmp_path: Path) -> None:
    """Its numbers are nobody's numbers: the comment says what is wrong, and fails closed."""
    true = fork.bundle()
    path = f"results/{MODEL}/benchmark/Q4_K_M.json"
    forged = re.sub(r'"median_tok_s": [0-9.]+', '"median_tok_s": 99999.0', true.files[path])
    bad = true.model_copy(update={"files": {**true.files, path: forged}})

    found = comment.of_gate(fork.gate(bundles=(bad,)), fork.params, fork.at, tmp_path / "trees")
    text = comment_render.render(found)

    assert found.conclusion == "failure"
    assert "99,999" not in text
    assert "Q4_K_M.json" in text


def test_a_plan_that_is_silent_about_a_changed_model_is_not_green(
    fork: Fork, tmp_path: Path
) -> None:
    """Whoever writes the plan may leave a model out; the declarations of both commits may not."""
    silent = fork.gate(plan=fork.plan().model_copy(update={"models": ()}), bundles=(), verdict=None)

    found = comment.of_gate(silent, fork.params, fork.at, tmp_path / "trees")

    assert (found.state, found.conclusion) == ("failed", "failure")
    assert f"{MODEL}: its declaration is another one than at the base" in visible(found)


def test_a_gate_without_bundles_says_what_failed(fork: Fork, tmp_path: Path) -> None:
    """The sentences of its failures, and no verdict."""
    broken = fork.gate(
        verdict=None, conclusion="failure", bundles=(), failures=("the measuring job was lost.",)
    )

    found = comment.of_gate(broken, fork.params, fork.at, tmp_path / "trees")

    assert (found.state, found.verdict, found.conclusion) == ("failed", None, "failure")
    assert "the measuring job was lost" in visible(found)


def run_of(fork: Fork, conclusion: str | None = "success") -> Run:
    """Build the run that is reported."""
    return Run(
        id=42, attempt=1, head=fork.head, branch="add-a-quant", head_repository="o/r",
        event="pull_request", conclusion=conclusion, started_at="2026-11-22T00:00:00Z",
        url=make.RUN,
    )  # fmt: skip


def test_what_is_posted_has_annotations_on_params_yaml(fork: Fork) -> None:
    """A model that is not promoted is told at the line where it is declared."""
    strict = fork.params.replace("max_kld_mean_nats: 0.005", "max_kld_mean_nats: 0.000001")
    situation = Situation(
        state="judged", run=run_of(fork), number=7, gate=fork.gate(), params=strict
    )

    found = comment.rendered(situation, fork.at)

    assert found.conclusion != "success"
    assert found.markdown.startswith("### ")
    good = comment.rendered(
        Situation(state="judged", run=run_of(fork), number=7, gate=fork.gate(),
                  params=fork.params),
        fork.at,
    )  # fmt: skip
    assert (good.conclusion, good.annotations) == ("success", ())
    assert good.title.startswith("tiny-llama: promote Q4_K_M")


@pytest.mark.parametrize(
    ("state", "conclusion", "words"),
    [
        ("measuring", None, "Planning, then measuring"),
        ("cancelled", "neutral", "Cancelled"),
        ("failed", "failure", "A job failed"),
        ("unusable", "failure", "gate.json is of another commit"),
    ],
)
def test_a_run_without_a_gate_is_told_as_well(
    fork: Fork, state: str, conclusion: str | None, words: str
) -> None:
    """What is at work, what was stopped, what cannot be used."""
    problem = "gate.json is of another commit." if state == "unusable" else ""
    situation = Situation(
        state=state,  # type: ignore[arg-type]
        run=run_of(fork),
        number=7,
        problem=problem,
    )

    found = comment.rendered(situation, fork.at)

    assert found.conclusion == conclusion
    assert words in found.markdown
