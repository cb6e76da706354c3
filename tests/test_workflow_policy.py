"""What must hold in the workflows and actions of this template, rule by rule."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import sample

from checks import files, installed, linters, policy, rules_jobs, rules_repository, tables

ROOT = Path(__file__).resolve().parent.parent
WATCHED = (".github", "actions")
CHECKOUT = "actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1"


class Edit(NamedTuple):
    """
    One small change that takes a promise away.

    Attributes:
        rule: Name of the rule that has to catch it.
        file: Name of a workflow, else path of a file.
        old: Text that is there; the first place is changed.
        new: What stands there then.
        after: Text behind which `old` is looked for.
    """

    rule: str
    file: str
    old: str
    new: str
    after: str = ""

    @property
    def path(self) -> str:
        """Path of the file below the root."""
        return self.file if "/" in self.file else f".github/workflows/{self.file}.yml"


RUNS_ON = "runs-on: ubuntu-24.04"
GUARD = " &&\n      github.event.pull_request.head.repo.full_name == github.repository"
APP = "permission-contents: write"

WEAKENINGS = [
    # --- what starts a workflow, and whose code it runs
    Edit("trigger-table", "model-pr", "  pull_request:\n", "  pull_request_target:\n"),
    Edit("trigger-table", "publish", "    branches: [main]\n", ""),
    Edit("trigger-table", "model-pr", ", labeled]", ", labeled, edited]"),
    Edit("workflow-run-names-a-workflow", "report", "[model PR]", "[model-pr]"),
    Edit("workflow-run-names-a-workflow", "model-pr", "name: model PR", "name: Model PR"),
    Edit("workflow-run-no-ref-checkout", "report", "          fetch-depth: 0\n",
         "          fetch-depth: 0\n          ref: ${{ github.event.workflow_run.head_sha }}\n"),
    Edit("no-unsafe-pr-checkout", "report", "          fetch-depth: 0\n",
         "          fetch-depth: 0\n          allow-unsafe-pr-checkout: true\n"),
    Edit("checkout-ref", "model-pr", "github.event.pull_request.head.sha", "github.head_ref"),
    Edit("checkout-ref", "publish", "          persist-credentials: false\n",
         "          persist-credentials: false\n          repository: stranger/r\n"),
    # --- what a job may
    # A webhook that says more than that something moved; whoever sends one is outside.
    Edit("trigger-table", "check-upstream", "[hub-webhook]", "[hub-webhook, bump]"),
    Edit("fork-guard", "check-upstream", "github.event_name != 'workflow_dispatch' ||", "true ||"),
    Edit("permissions-exact", "check-upstream", "pull-requests: read #", "pull-requests: write #"),
    Edit("permissions-exact", "check-upstream", "issues: write # the one",
         "pull-requests: write # the one"),
    Edit("secret-only-in", "check-upstream", "          record: upstream.json\n",
         "          record: upstream.json\n          models: ${{ secrets.HF_TOKEN }}\n",
         after="  issue:\n"),
    Edit("token-scope", "check-upstream", APP, f"{APP}\n          permission-issues: write"),
    Edit("concurrency-group", "check-upstream", "  cancel-in-progress: false",
         "  cancel-in-progress: true"),
    Edit("artifact-bounded", "check-upstream", "          name: upstream\n",
         "          name: upstream\n          run-id: 1\n", after="  bump:\n"),
    Edit("permissions-exact", "publish", "permissions: {}\n", "permissions: write-all\n"),
    Edit("permissions-exact", "ci", "permissions: {}\n", ""),
    Edit("permissions-exact", "model-pr", "contents: read # takes the repository; records",
         "contents: write # takes the repository; records"),
    Edit("permissions-exact", "report", "      actions: read #", "      actions: write #"),
    Edit("id-token-only-in", "model-pr", "      contents: read # takes the repository; records",
         "      id-token: write # for S3\n      contents: read # takes the repository; records"),
    Edit("token-scope", "model-pr", APP, f"{APP}\n          permission-workflows: write"),
    Edit("token-scope", "rollback", f"          {APP}\n          permission-pull-requests: write\n",
         ""),
    Edit("token-scope", "publish", f"          {APP}\n", f"          {APP}\n          owner: o\n"),
    Edit("token-scope", "publish", f"          {APP}\n",
         f"          {APP}\n          skip-token-revoke: true\n"),
    Edit("secret-only-in", "model-pr", "          host: ${{ matrix.host }}\n",
         "          host: ${{ secrets.HF_TOKEN }}\n"),
    Edit("secret-only-in", "publish", "defaults:\n",
         "env:\n  HF_TOKEN: ${{ secrets.HF_TOKEN }}\n\ndefaults:\n"),
    Edit("secret-only-in", "model-pr", "          models: ${{ matrix.models }}\n",
         "          models: ${{ toJSON(secrets) }}\n"),
    Edit("no-secrets-inherit", "ci", "  ok:\n",
         "  called:\n    uses: ./.github/workflows/x.yml\n    secrets: inherit\n  ok:\n"),
    Edit("environment-of-job", "publish", "    environment: ${{ matrix.environment }}\n", ""),
    Edit("environment-of-job", "rollback", "${{ inputs.environment }}", "test"),
    # --- where it runs, when, beside what
    Edit("self-hosted-only-in", "ci", RUNS_ON, "runs-on: [self-hosted, gpu]"),
    Edit("self-hosted-only-in", "publish", RUNS_ON, "runs-on: ubuntu-latest"),
    Edit("self-hosted-only-in", "model-pr", RUNS_ON, "runs-on: ${{ matrix.runs_on }}",
         after="  gate:\n"),
    Edit("fork-guard", "model-pr", GUARD, ""),
    Edit("fork-guard", "model-pr", GUARD, "", after="  adopt:\n"),
    Edit("fork-guard", "model-pr", GUARD, GUARD.replace("&&", "||")),
    Edit("fork-guard", "model-pr", GUARD,
         GUARD.replace("&&\n      ", "&&\n      (true || ") + ")"),
    Edit("fork-guard", "rollback", "github.ref == format", "github.ref != format"),
    Edit("fork-guard", "publish", "    if: github.ref == format('refs/heads/{0}', "
         "github.event.repository.default_branch)\n", ""),
    # The template itself is nobody's fleet, and a branch proposes nothing for the default one.
    Edit("fork-guard", "template-init", " &&\n      !github.event.repository.is_template", ""),
    Edit("fork-guard", "template-init", "github.ref == format", "true || github.ref == format"),
    Edit("permissions-exact", "template-init", "      pull-requests: write # its pull request\n",
         "      pull-requests: write # its pull request\n      actions: write # more\n"),
    Edit("trigger-table", "template-init", "    paths: [.github/CODEOWNERS]\n", ""),
    Edit("secret-only-in", "template-init", "          token: ${{ github.token }}\n",
         "          token: ${{ secrets.FLEET_APP_KEY }}\n"),
    Edit("no-actor-guard", "rollback", "    if: github.ref ==",
         "    if: github.actor == 'somebody' && github.ref =="),
    Edit("empty-matrix-guard", "publish", "needs.plan.outputs.any == 'true'", "always()"),
    Edit("matrix-legs-independent", "model-pr", "      fail-fast: false\n", ""),
    Edit("concurrency-group", "model-pr", "      group: gpu-${{ matrix.host }}\n",
         "      group: gpu\n"),
    Edit("concurrency-group", "publish", "  queue: max\n", ""),
    # A publish that waits for its approval holds its group: a rollback would wait for days.
    Edit("concurrency-group", "rollback", "  group: rollback\n", "  group: publish\n"),
    Edit("concurrency-group", "report", "${{ github.event.workflow_run.head_repository.full_name }}"
         "-", ""),
    Edit("needs-exact", "model-pr", "    needs: [plan, gpu]\n", "    needs: [plan]\n"),
    Edit("needs-exact", "ci", "    needs: [check, test]\n", "    needs: [check]\n"),
    Edit("steps-exact", "publish", "      # One attestation takes",
         "      - name: Attest\n        uses: ./actions/comment\n      # One attestation takes"),
    Edit("steps-exact", "model-pr", "      - name: Load-test\n        uses: ./actions/load-test\n"
         "        with:\n          models: ${{ matrix.models }}\n"
         "          host: ${{ matrix.host }}\n", ""),
    Edit("steps-exact", "model-pr", "      - name: Judge\n",
         "      - name: Help\n        run: make help\n      - name: Judge\n"),
    Edit("no-container", "model-pr", "    strategy:\n",
         "    container: {image: ubuntu, options: --privileged}\n    strategy:\n"),
    Edit("no-inline-ignore", "report", "  workflow_run:\n",
         "  workflow_run: # zizmor: ignore[dangerous-triggers]\n"),
    Edit("artifact-bounded", "model-pr", "          path: bundles\n", "          path: work\n",
         after="      - name: Hand over the records\n"),
    Edit("required-check-name", "model-pr", "    name: gate\n", "    name: Gate\n"),
    Edit("timeout", "model-pr", "    timeout-minutes: ${{ matrix.timeout_minutes }}\n", ""),
    Edit("timeout", "ci", "    timeout-minutes: 30\n", "    timeout-minutes: 3000\n"),
    Edit("no-error-swallowed", "model-pr", "      - name: Judge\n",
         "      - name: Judge\n        continue-on-error: true\n"),
    Edit("no-error-swallowed", "ci", "run: make test", "run: make test || true"),
    Edit("shell-bash", "publish", "defaults:\n  run:\n    shell: bash\n", ""),
    Edit("shell-bash", "actions/plan/action.yml", "shell: bash", "shell: sh"),
    Edit("tables-complete", "ci", "  ok:\n",
         f"  more:\n    name: more\n    {RUNS_ON}\n    timeout-minutes: 5\n"
         "    permissions: {}\n    steps: []\n  ok:\n"),
    # --- actions of others
    Edit("pin-listed", "ci", CHECKOUT, "actions/checkout@v7"),
    Edit("pin-listed", "ci", CHECKOUT, f"{CHECKOUT[:-4]}0000"),
    Edit("pin-listed", "ci", f"{CHECKOUT} # v7.0.1", f"{CHECKOUT} # v7.0.2"),
    Edit("pin-listed", "ci", CHECKOUT, CHECKOUT.replace("actions/", "acti0ns/")),
    Edit("pin-used", ".github/pins.yaml", "actions/attest:\n",
         "actions/cache: {version: v6.1.0, sha: 5, why: x, required: [], inputs: [], "
         "outputs: []}\nactions/attest:\n"),
    Edit("persist-credentials", "model-pr", "          persist-credentials: false\n", ""),
    Edit("persist-credentials", "model-pr", "persist-credentials: false",
         "persist-credentials: true", after="  adopt:\n"),
    Edit("no-cache-in-publish", "publish", "cache-mode: none", "cache-mode: write"),
    Edit("no-cache-in-publish", "publish", "      - name: Set up\n",
         "      - name: Cache\n        uses: actions/cache@55cc8345863c7cc4c66a329aec7e433d2d1c52a9"
         " # v6.1.0\n      - name: Set up\n"),
    Edit("artifact-bounded", "model-pr", "          retention-days: 30\n", ""),
    Edit("artifact-bounded", "model-pr", "          name: gate\n", "          name: models\n"),
    Edit("artifact-bounded", "model-pr", "if-no-files-found: error", "if-no-files-found: ignore"),
    Edit("artifact-bounded", "model-pr", "          pattern: plan\n",
         "          pattern: plan\n          run-id: 1\n"),
    # --- what is typed
    Edit("no-expression-in-run", "ci", 'test "$RESULTS" = "success success"',
         'test "${{ join(needs.*.result) }}" = "success success"'),
    Edit("no-expression-in-run", "actions/plan/action.yml", '--base="$FLEET_BASE"',
         '--base="${{ inputs.base }}"'),
    Edit("runner-files-by-python", "ci", "run: make check",
         'run: make check && echo "done=1" >> "$GITHUB_OUTPUT"'),
    Edit("one-run-line", "actions/quantize/action.yml", '-- "$FLEET_MODELS"',
         '-- "$FLEET_MODELS" && rm -rf work'),
    Edit("one-run-line", "ci", "        run: make check\n",
         "        run: |\n          make check\n          make clean\n"),
    Edit("verb-exists", "actions/adopt/action.yml", 'fleet" adopt', 'fleet" adpot'),
    Edit("setup-first", "report", "      - name: Set up\n        uses: ./actions/setup\n", ""),
    # --- actions of this repository
    Edit("described", "actions/gate/action.yml",
         "    description: File of the plan; it may be missing if planning failed.\n", ""),
    Edit("described", "model-pr", "    name: gate\n", ""),
    Edit("composite-input-exists", "actions/bundle/action.yml", "inputs.host ", "inputs.hosts "),
    Edit("composite-input-exists", "actions/bundle/action.yml", "inputs.out ", "inputs.host "),
    Edit("composite-output-mapping", "actions/plan/action.yml", "outputs.any }}",
         "outputs.models }}"),
    Edit("composite-output-mapping", "actions/plan/action.yml", "    - id: fleet\n",
         "    - id: flet\n"),
    Edit("call-matches-action", "model-pr", "          models: ${{ matrix.models }}\n",
         "          model: ${{ matrix.models }}\n"),
    Edit("call-matches-action", "model-pr", "          measured: ${{ needs.gpu.result }}\n", ""),
    Edit("call-matches-action", "report", "./actions/comment", "./actions/report"),
    # --- what stands beside them
    Edit("codeowners-cover", ".github/CODEOWNERS", "/actions/          @OWNER/fleet-security\n",
         "/actions/  # nobody\n"),
    Edit("codeowners-cover", ".github/CODEOWNERS", "/.github/          @OWNER/fleet-security\n",
         "/.github/\n"),
    Edit("dependabot-cover", ".github/dependabot.yml", "[/, /actions/*]", "[/]"),
    Edit("dependabot-cover", ".github/dependabot.yml", "cooldown: {default-days: 7}",
         "cooldown: {default-days: 1}"),
]  # fmt: skip


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A copy of the workflows and actions as they are."""
    sample.take(tmp_path, *WATCHED)
    return tmp_path


def test_the_workflows_and_actions_as_they_are_break_no_rule() -> None:
    """Rules that cry at what is right are switched off by the next person in a hurry."""
    assert [str(finding) for finding in policy.judge(files.read(ROOT))] == []


@pytest.mark.parametrize("linter", linters.ALL)
def test_the_workflows_and_actions_as_they_are_pass_every_program(linter: str) -> None:
    """`make check` is green on what is delivered."""
    try:
        found = list(linters.ALL[linter](files.read(ROOT)))
    except installed.MissingError as missing:
        pytest.skip(missing.message)
    assert [str(finding) for finding in found] == []


@pytest.mark.parametrize("edit", WEAKENINGS, ids=lambda e: f"{e.rule}:{e.file.split('/')[-1]}")
def test_an_edit_that_takes_a_promise_away_is_caught_by_the_rule_that_is_named(
    edit: Edit, template: Path
) -> None:
    """Each is made alone in the real file; the rule tells the file and a line of it."""
    path = template / edit.path
    text = path.read_text(encoding="utf-8")
    assert edit.after in text
    before, behind = text[: text.index(edit.after)], text[text.index(edit.after) :]
    assert edit.old in behind, f"{edit.path} has changed: {edit.old!r} is not there"
    path.write_text(before + behind.replace(edit.old, edit.new, 1), encoding="utf-8")

    found = policy.judge(files.read(template))

    mine = [finding for finding in found if finding.rule == edit.rule]
    assert mine, f"caught only by {[finding.rule for finding in found]}"
    assert all(1 <= finding.line <= len(text.splitlines()) + 3 for finding in mine)
    assert all((template / finding.file).is_file() for finding in mine)


def test_no_rule_is_without_an_edit_that_it_catches() -> None:
    """A rule that nothing has ever broken may be one that nothing can."""
    assert set(policy.rules()) == {edit.rule for edit in WEAKENINGS}


def test_owners_that_are_nobody_are_warned_of_until_a_team_stands_there(template: Path) -> None:
    """The rule of the branch asks a team that does not exist, which means: nobody."""
    path = template / rules_repository.CODEOWNERS
    assert "waits for no code owner" in rules_repository.unowned(files.read(template))
    path.write_text(path.read_text().replace("@OWNER/", "@real-people/"))

    assert not rules_repository.unowned(files.read(template))


@pytest.mark.parametrize(
    ("text", "owned"),
    [("* @me\n", True), ("", False), ("* @me\n/deploy/\n", False), ("/deploy/\n* @me\n", True)],
)
def test_one_owner_of_everything_owns_what_decides(template: Path, text: str, owned: bool) -> None:  # noqa: FBT001 - a column of the table
    """A fork of one person has one line; the last line that fits decides, as on GitHub."""
    (template / rules_repository.CODEOWNERS).write_text(text)

    assert (not list(rules_repository.codeowners_cover(files.read(template)))) is owned


def test_each_rule_says_why_it_exists() -> None:
    """`python -m checks --rules` is where a person looks who is in its way."""
    for rule in policy.rules().values():
        assert rule.why.endswith("."), rule.name


def test_each_right_that_a_job_has_comes_with_its_reason() -> None:
    """Who wants to take a right away, or give one, reads what it was for."""
    for workflow in tables.WORKFLOWS.values():
        for job in workflow.jobs.values():
            for level, reason in job.permissions.values():
                assert level in {"read", "write"}
                assert len(reason.split()) > 1


def test_what_measures_may_write_nothing_and_what_writes_measures_nothing() -> None:
    """The tables themselves keep the promise that the workflows are held to."""
    for workflow, name in tables.SELF_HOSTED_IN:
        job = tables.WORKFLOWS[workflow].jobs[name]
        assert {level for level, _ in job.permissions.values()} <= {"read"}
        assert not job.secrets
        assert (workflow, name) not in tables.APP_TOKENS


def test_a_file_that_uses_what_a_rule_cannot_see_through_is_refused(template: Path) -> None:
    """An anchor, a merge key or a second document would show the rules less than GitHub sees."""
    path = template / ".github/workflows/ci.yml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("  check:\n", "  check: &check\n", 1), encoding="utf-8")
    found = policy.judge(files.read(template))
    assert [(f.rule, f.file) for f in found if f.rule == "plain-yaml"] == [
        ("plain-yaml", ".github/workflows/ci.yml")
    ]


@pytest.mark.parametrize(
    ("condition", "parts"),
    [
        ("a && b", ["a", "b"]),
        ("${{ a && (b || c) }}", ["a", "(b || c)"]),
        ("a && b || c", ["a && b || c"]),
        ("x == 'a && b' && c", ["x == 'a && b'", "c"]),
        ("!cancelled() &&\n  b", ["!cancelled()", "b"]),
        ("", [""]),
    ],
)
def test_a_guard_counts_only_where_nothing_can_go_around_it(
    condition: str, parts: list[str]
) -> None:
    """What is joined by `||`, or stands in a string or in parentheses, guards nothing."""
    assert rules_jobs.conjuncts(condition) == parts


def test_the_page_about_checks_lists_every_rule_as_it_is() -> None:
    """Who looks a rule up finds the reason that the code gives."""
    page = (ROOT / "docs/workflow-checks.md").read_text(encoding="utf-8")
    listed = [line for line in page.splitlines() if line.startswith("| `")]
    assert listed == [f"| `{rule.name}` | {rule.why} |" for rule in policy.rules().values()]
