"""
The lines of `fleet doctor` about the repository on GitHub: its settings, runners and labels.

    lines(at, declared)     asks GitHub; some seconds, whatever it answers

Nothing is changed: every request is a GET. What the settings should be, and why, is in
docs/security.md ("Settings, one by one"); the fix of a line is the call of that page. Environments,
secrets, the App and the rules of the default branch are in `doctor_guards`.
"""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, get_args

from pipelines import (
    bump_change,
    doctor_asked,
    doctor_guards,
    doctor_lines,
    doctor_settings,
    health_runners,
    runner_health,
    wording,
)
from pipelines.bump_engine import ENGINE_LABEL
from pipelines.ci_records import OVER_BUDGET_LABEL
from pipelines.doctor_asked import ATTEST, UNSEEN, Asked, Look
from pipelines.doctor_lines import Line, fail, ok, warn
from pipelines.github import runners as github_runners
from pipelines.github.client import taken
from pipelines.github.errors import GitHubError
from pipelines.upstream_records import ChangeClass

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.layout import Layout
    from pipelines.params import Declaration

_SETTINGS: Final = "settings/actions"
_ADMINISTRATION: Final = "`administration: read`"


def lines(at: Layout, declared: Declaration | None) -> list[Line]:
    """
    Look at the repository on GitHub.

    Args:
        at: The checkout; says which repository, unless GITHUB_REPOSITORY does.
        declared: The declaration; None if it cannot be read: hosts and registries are left out.
    """
    return doctor_lines.looked("github", "repository", lambda: _lines(at, declared))


def _lines(at: Layout, declared: Declaration | None) -> list[Line]:
    gh = doctor_asked.client(at.root)
    if gh is None:
        fix = "export GITHUB_TOKEN=$(gh auth token)"
        return [warn("github", "repository", "nobody can be asked without a token", fix)]
    try:
        basis = doctor_asked.basis(gh)
    except GitHubError as error:
        if error.status not in UNSEEN:
            raise
        fix = (
            "export GITHUB_TOKEN=$(gh auth token)  # of somebody who may see it\n"
            f"or look there: {doctor_asked.web(gh)}; GITHUB_REPOSITORY=OWNER/NAME names another"
        )
        return [warn("github", "repository", f"cannot be seen: {error.message}", fix)]
    asked = functools.partial(_asked, gh, basis, declared)
    looks = [*_looks(), *doctor_guards.looks(declared)]
    return [
        _repository(basis),
        *doctor_lines.together(
            "github",
            {each.name: functools.partial(doctor_asked.watched, each, asked) for each in looks},
            # A look has several questions, each with a deadline of its own.
            within_s=2 * doctor_lines.ANSWER_WITHIN_S,
        ),
    ]


def _asked(gh: Any, basis: doctor_asked.Basis, declared: Declaration | None) -> Asked:  # noqa: ANN401 - GitHub
    return Asked(gh=doctor_asked.another(gh), basis=basis, declared=declared)


def _repository(basis: doctor_asked.Basis) -> Line:
    who = "" if basis.people is None else f", {wording.counted(basis.people, 'login')} may push"
    kind = "private" if basis.private else "public"
    return ok("github", "repository", f"{basis.repository}: {kind}, default {basis.branch}{who}")


def _looks() -> list[Look]:
    rows = (
        ("actions", _actions, _ADMINISTRATION, _SETTINGS),
        ("workflow-token", _workflow_token, _ADMINISTRATION, _SETTINGS),
        ("fork-approval", _fork_approval, _ADMINISTRATION, _SETTINGS),
        ("retention", _retention, _ADMINISTRATION, _SETTINGS),
        ("workflows", _workflows, "`actions: read`", "actions"),
        ("runners", _runners, _ADMINISTRATION, f"{_SETTINGS}/runners"),
        ("labels", _labels, "`issues: read`", "labels"),
        ("alerts", _alerts, _ADMINISTRATION, "settings/security_analysis"),
        ("attestations", _attestations, "`variables: read`", "settings/variables/actions"),
    )
    return [Look(name=name, look=look, scope=scope, page=page) for name, look, scope, page in rows]


# --- Settings > Actions > General -------------------------------------------------------------


def _actions(asked: Asked) -> Iterator[Line]:
    """Which actions may run at all, and whether a commit has to be named."""
    told = asked.gh.get("actions/permissions")
    fix = doctor_settings.command(*doctor_settings.ALLOWED)
    if not taken(told, "enabled", bool):
        yield fail("github", "actions", "GitHub Actions are switched off: no workflow runs", fix)
        return
    allowed = told.get("allowed_actions")
    wide: list[str] = []
    if allowed == "local_only":
        text = "only actions of this repository may run, and every workflow begins with "
        yield fail("github", "actions", f"{text}actions/checkout", fix)
        return
    if allowed == "selected":
        chosen = asked.gh.get("actions/permissions/selected-actions")
        patterns = [str(each) for each in chosen.get("patterns_allowed") or []]
        if chosen.get("github_owned_allowed") is not True and not _covers(patterns):
            text = "GitHub's own actions may not run, and every workflow uses them"
            yield fail("github", "actions", text, fix)
            return
        if others := [each for each in patterns if not each.startswith("actions/")]:
            wide.append(f"others may run, too: {wording.first_few(others)}")
        if chosen.get("verified_allowed") is True:
            wide.append("those of every verified creator may run")
    else:
        wide.append("any action of anybody may run")
    if told.get("sha_pinning_required") is not True:  # an older server does not know it
        wide.append("a tag, which can be moved, is enough to name one")
    if wide:
        yield warn("github", "actions", wording.listed(wide), fix)
    else:
        yield ok("github", "actions", "GitHub's own alone, each named by its commit")


def _covers(patterns: list[str]) -> bool:
    return any(each in {"actions/*", "*"} for each in patterns)


def _workflow_token(asked: Asked) -> Iterator[Line]:
    """What the token of a job may that names no rights, and whether jobs open pull requests."""
    told = asked.gh.get("actions/permissions/workflow")
    writes = taken(told, "default_workflow_permissions", str) != "read"
    opens = taken(told, "can_approve_pull_request_reviews", bool)
    has_app = asked.basis.has_app
    fix = doctor_settings.command(doctor_settings.workflow_token(opens_pulls=has_app is False))
    wrong = ["a job that names no rights may write"] if writes else []
    if has_app is False and not opens:
        text = "no job may open a pull request, and there is no App: ledger, bump and rollback fail"
        yield fail("github", "workflow-token", "; ".join([text, *wrong]), fix)
        return
    if has_app and opens:
        wrong.append("jobs may approve pull requests, which only a fork without an App needs")
    if wrong:
        yield warn("github", "workflow-token", wording.listed(wrong), fix)
    else:
        more = "; jobs open pull requests" if opens else ""
        yield ok("github", "workflow-token", f"a job that names no rights may read{more}")


def _fork_approval(asked: Asked) -> Iterator[Line]:
    """Who has to agree before code of a stranger runs."""
    name = "fork-approval"
    if asked.basis.private:
        told = asked.gh.get("actions/permissions/fork-pr-workflows-private-repos")
        fix = doctor_settings.command(doctor_settings.PRIVATE_FORKS)
        if taken(told, "run_workflows_from_fork_pull_requests", bool):
            more = [
                words
                for key, words in (
                    ("send_write_tokens_to_workflows", "with tokens that write"),
                    ("send_secrets_and_variables", "with secrets"),
                )
                if told.get(key) is True
            ]
            text = " ".join(["pull requests of forks run workflows", wording.listed(more)]).strip()
            yield warn("github", name, text, fix)
        else:
            yield ok("github", name, "pull requests of forks run nothing")
        return
    told = asked.gh.get("actions/permissions/fork-pr-contributor-approval")
    policy = str(taken(told, "approval_policy", str))
    if policy == doctor_settings.APPROVAL.body["approval_policy"]:
        yield ok("github", name, "every external contributor waits for approval")
        return
    who = {
        "first_time_contributors": "who has had one pull request merged",
        "first_time_contributors_new_to_github": "everybody but who is new to GitHub",
    }.get(policy, "somebody")
    text = f"{who} runs workflows without approval ({policy})"
    yield warn("github", name, text, doctor_settings.command(doctor_settings.APPROVAL))


def _retention(asked: Asked) -> Iterator[Line]:
    """How long logs stay, which name paths and versions of the operator's machine."""
    told = asked.gh.get("actions/permissions/artifact-and-log-retention")
    days, most = taken(told, "days", int), doctor_settings.RETENTION_DAYS
    if days > most:
        fix = doctor_settings.command(doctor_settings.RETENTION)
        yield warn("github", "retention", f"logs and artifacts stay {days} days, not {most}", fix)
    else:
        yield ok("github", "retention", f"logs and artifacts stay {wording.counted(days, 'day')}")


def _workflows(asked: Asked) -> Iterator[Line]:
    """Whether GitHub has stopped the schedules."""
    found = health_runners.schedules(asked.gh, datetime.now(UTC))
    for each in found:
        if each.status == "unknown":
            fix = f"{each.next_step}\nor look there: {asked.basis.web}/actions"
            yield warn("github", "workflows", f"cannot be seen: {each.value}", fix)
        else:
            yield warn("github", "workflows", each.value, each.next_step)
    if not found:
        yield ok("github", "workflows", "GitHub has stopped no schedule")


# --- runners ----------------------------------------------------------------------------------


def _runners(asked: Asked) -> Iterator[Line]:
    """Whether each host has a runner online with its labels, and how long that stays one."""
    if asked.declared is None:
        yield warn("github", "runners", "params.yaml cannot be read: no host is known", "")
        return
    hosts = runner_health.measured(asked.declared)
    every = github_runners.runners(asked.gh)
    sees_all = True
    try:
        groups = github_runners.groups(asked.gh) if asked.basis.organization else ()
    except GitHubError as error:
        sees_all = False
        yield _unseen_groups(asked, error)
    else:
        every = tuple({one.id: one for one in (*every, *_grouped(groups))}.values())
        yield from _groups(groups)
    if sees_all and not hosts and not every:
        yield ok("github", "runners", "no host has `runs_on`: GitHub reaches no machine")
    for host, labels in hosts.items():
        yield from _of_host(asked, host, labels, every, sees_all=sees_all)
    yield from _of_nobody(asked, hosts, every)
    if kept := [each.name for each in every if not each.ephemeral]:
        # Whatever its labels: a job can name those that it has.
        yield _registration(wording.first_few(kept), private=asked.basis.private)


def _unseen_groups(asked: Asked, error: GitHubError) -> Line:
    text = f"those of the organization cannot be seen: {wording.clause(error.message)}"
    fix = (
        "gh auth refresh --scopes admin:org && export GITHUB_TOKEN=$(gh auth token)\n"
        f"or look there: {asked.basis.web}/{_SETTINGS}/runners"
    )
    return warn("github", "runners", text, fix)


def _of_nobody(
    asked: Asked,
    hosts: Mapping[str, tuple[str, ...]],
    every: tuple[github_runners.Runner, ...],
) -> Iterator[Line]:
    """Which runners no host names: a job of any branch can."""
    wanted = [frozenset(each.lower() for each in labels) for labels in hosts.values()]
    for each in every:
        if not any(labels <= each.labels for labels in wanted):
            text = "is registered here, and no host of params.yaml has its labels"
            fix = f"{asked.basis.web}/{_SETTINGS}/runners: remove it, or give a host its labels."
            yield warn("github", f"runner {each.name}", text, fix)


def _grouped(groups: tuple[github_runners.Group, ...]) -> list[github_runners.Runner]:
    return [one for group in groups for one in group.runners]


def _groups(groups: tuple[github_runners.Group, ...]) -> Iterator[Line]:
    """Whether runners of an organization do whatever any of its workflows says."""
    if not groups:
        return
    wide = [each.name for each in groups if each.any_workflow and each.runners]
    if wide:
        text = f"any workflow may use {wording.first_few(wide)}"
        fix = (
            "Settings of the organization, Actions, Runner groups: this repository alone, and "
            "selected workflows: model-pr.yml and runner-health.yml."
        )
        yield warn("github", "runner-groups", text, fix)
    else:
        yield ok("github", "runner-groups", "none gives runners to any workflow")


def _registration(names: str, *, private: bool) -> Line:
    """Say that the registration of a runner outlives a job."""
    stays = f"{names} stays registered after a job"
    if private:
        text = f"{stays}: right for a private repository (level 1)"
        return ok("github", "registration", text)
    fix = "deploy/runner/README.md, 4b: one registration for each job."
    return warn("github", "registration", f"{stays}, and the repository is public", fix)


def _of_host(
    asked: Asked,
    host: str,
    labels: tuple[str, ...],
    every: tuple[github_runners.Runner, ...],
    *,
    sees_all: bool,
) -> Iterator[Line]:
    name = f"runner {host}"
    seen = health_runners.seen(asked.gh, host, labels, every, waiting=None, now=datetime.now(UTC))
    wanted = wording.listed(list(labels))
    if seen.status == "absent":
        there = sorted({label for each in every for label in each.labels})
        text = f"no runner has the labels {wanted}"
        text += f"; those that there are have {wording.first_few(there)}" if there else ""
        fix = (
            f"Register one as deploy/runner/README.md says, with --labels {','.join(labels)}; or "
            f"remove `runs_on` of {host} from params.yaml: then nothing is measured on GitHub. "
            "Of a scale set GitHub may show no labels: deploy/kubernetes/README.md."
        )
        yield (fail if sees_all else warn)("github", name, text, fix)
        return
    for each in seen.findings:
        say = fail if each.status == "sick" and each.rule != "runner" else warn
        yield say("github", name, each.value, each.next_step)
    if not seen.findings:
        names = wording.first_few([each.name for each in seen.runners if each.online])
        yield ok("github", name, f"{names} is online with {wanted}")


# --- the rest ---------------------------------------------------------------------------------


def _labels(asked: Asked) -> Iterator[Line]:
    """Whether the labels are there that jobs may give and not make."""
    wanted = [
        OVER_BUDGET_LABEL,
        bump_change.LABEL,
        *(bump_change.CLASS_LABEL.format(name=name) for name in get_args(ChangeClass)),
        ENGINE_LABEL,
    ]
    there = {str(taken(each, "name", str)).lower() for each in asked.gh.paged("labels")}
    if missing := [each for each in wanted if each.lower() not in there]:
        fix = doctor_settings.label_command(missing)
        yield warn("github", "labels", f"missing: {', '.join(missing)}", fix)
    else:
        yield ok("github", "labels", f"all {len(wanted)} are there")


def _alerts(asked: Asked) -> Iterator[Line]:
    """Whether GitHub tells of known holes and of secrets that are pushed."""
    told = asked.gh.get(f"/repos/{asked.gh.repository}").get("security_and_analysis")
    on, fixes = ["Dependabot alerts"], list[str]()
    off, unknown = list[str](), list[str]()
    if not asked.gh.exists("vulnerability-alerts"):
        off.append("Dependabot alerts")
        fixes.append(doctor_settings.command(doctor_settings.ALERTS))
    for key, words in (
        ("secret_scanning", "secret scanning"),
        ("secret_scanning_push_protection", "push protection"),
    ):
        shown = told.get(key) if isinstance(told, dict) else None
        status = shown.get("status") if isinstance(shown, dict) else None
        {"enabled": on, "disabled": off}.get(str(status), unknown).append(words)
    if off:
        fixes.append(f"{asked.basis.web}/settings/security_analysis")
        text = f"off, or not to be seen: {wording.listed(off)}"
        yield warn("github", "alerts", text, "\n".join(fixes))
    else:
        # Of a private repository only where it was bought; to be seen by an administrator.
        more = f"; not to be seen: {wording.listed(unknown)}" if unknown else ""
        yield ok("github", "alerts", f"{wording.listed(on)}{more}")


def _attestations(asked: Asked) -> Iterator[Line]:
    """Whether what is published can be verified by who serves it."""
    name, basis = "attestations", asked.basis
    if not basis.private:
        yield ok("github", name, "a public repository attests what it publishes")
        return
    told = basis.variables.get(ATTEST, "")
    if told.lower() == "true":
        yield ok("github", name, f"{ATTEST} is true: needs Enterprise Cloud in a private one")
    elif told:
        fix = f"gh variable set {ATTEST} --body true"
        yield warn("github", name, f"{ATTEST} is {wording.quoted(told)}; only true counts", fix)
    else:
        yield ok("github", name, "a private repository publishes without attestations")
