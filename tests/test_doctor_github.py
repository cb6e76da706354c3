"""What `fleet doctor` says of the repository on GitHub, and the level of security it reaches."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import node_tools
import pytest
import requests
import sample
from github_api import Fault, GitHubApi, Token, now
from github_fixtures import serving
from github_openapi import load

from pipelines import declaration, doctor_github, doctor_security, doctor_settings
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.doctor_lines import Line
    from pipelines.params import Declaration

ROOT = Path(__file__).resolve().parent.parent
PERSON = "ghp_of-a-person"
_CALL = re.compile(
    r"^(?:echo '(?P<body>[^']*)' \| )?gh api --method (?P<method>\S+) "
    r"repos/\{owner\}/\{repo\}/(?P<path>\S+)(?: --input -)?$",
    re.MULTILINE,
)
LOGINS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
HOSTS = """
hosts:
  desk: {memory_mib: 4096, runs_on: [self-hosted, gpu, desk]}

registries:
  local: {url: 'file:registry'}
  production: {url: 's3://bucket/models', environment: production}
"""


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHubApi]:
    """A new public repository, as its administrator sees it; nothing is set yet."""
    with serving(tmp_path) as running:
        running.settings.pushed_at = now()
        for name, value in running.environment(PERSON).items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def declared(tmp_path: Path) -> Declaration:
    """A fleet that is measured on `desk` and published from `production`."""
    text = sample.of("params.yaml").read_text()
    start = text.index("\nhosts:")
    end = text.index("\nregistries:")
    rest = text[end:].partition("\n\n")[2]
    path = tmp_path / "params.yaml"
    path.write_text(f"{text[:start]}\n{HOSTS}\n{rest}")
    return declaration.load(path)


def looked(declared: Declaration | None) -> dict[str, Line]:
    """Return the lines by name; of several the worst."""
    found: dict[str, Line] = {}
    for line in doctor_github.lines(Layout(ROOT), declared):
        states = ("ok", "warn", "fail")
        if line.name not in found or states.index(line.state) > states.index(
            found[line.name].state
        ):
            found[line.name] = line
        # What is not well has something to paste or to do.
        assert line.area == "github"
        assert line.state == "ok" or line.fix, line
    return found


def pasted(fix: str) -> Iterator[tuple[str, str, Any]]:
    """Yield method, path and body of each `gh` command that a fix prints."""
    for found in _CALL.finditer(fix):
        yield found["method"], found["path"], json.loads(found["body"]) if found["body"] else None
    for line in fix.splitlines():
        if line.startswith("gh label create "):
            _, _, _, name, _, colour = shlex.split(line)
            yield "POST", "labels", {"name": name, "color": colour}


def paste(api: GitHubApi, fix: str) -> None:
    """Do what a person does who pastes a fix; secrets are asked for and not shown."""
    for method, path, body in pasted(fix):
        answer = requests.request(
            method,
            f"{api.url}/repos/{api.repository}/{path}",
            json=body,
            headers={
                "Authorization": f"Bearer {PERSON}",
                "X-GitHub-Api-Version": "2022-11-28",
                "Accept": "application/vnd.github+json",
            },
            timeout=20,
        )
        assert answer.status_code < 300, (path, answer.text)
    for name, place in re.findall(r"^gh secret set (\S+) --env (\S+)", fix, re.MULTILINE):
        api.settings.secrets.setdefault(place, set()).add(name)
    for name in re.findall(r"^gh secret delete (\S+)$", fix, re.MULTILINE):
        api.settings.secrets[""].discard(name)


def guarded(api: GitHubApi, declared: Declaration) -> None:
    """Paste every fix that is printed, with an App and a runner that takes one job."""
    api.settings.variables["FLEET_APP_CLIENT_ID"] = "Iv23abc"
    api.settings.scanning = "enabled"
    api.add_runner("desk", ["self-hosted", "gpu", "desk"], ephemeral=True, version="2.330.0")
    for line in looked(declared).values():
        paste(api, line.fix)
    # What only shows once there are environments: their secrets.
    for line in looked(declared).values():
        paste(api, line.fix)


def test_a_new_repository_is_told_all_that_it_lacks_and_every_fix_when_pasted_mends_its_line(
    api: GitHubApi, declared: Declaration
) -> None:
    """Against GitHub's own description of each call; afterwards nothing but the App is open."""
    api.labels.clear()
    before = looked(declared)
    assert {name for name, line in before.items() if line.state != "ok"} == {
        "actions", "workflow-token", "fork-approval", "retention", "runner desk", "labels",
        "alerts", "default-branch", "app", "environment production",
    }  # fmt: skip
    assert before["environment production"].state == before["runner desk"].state == "fail"
    assert before["workflow-token"].state == "fail"
    assert "no job may open a pull request" in before["workflow-token"].text

    guarded(api, declared)
    after = looked(declared)
    assert {name: line.text for name, line in after.items() if line.state != "ok"} == {}
    assert not [each for each in api.requests if each.is_write and each.status is None]


def test_a_look_changes_nothing(api: GitHubApi, declared: Declaration) -> None:
    """Whatever is wrong with the repository."""
    looked(declared)
    assert len(api.requests) >= 20
    assert {each.method for each in api.requests} == {"GET"}


WEAKENED: tuple[tuple[dict[str, Any], str, str, str], ...] = (
    ({"enabled": False}, "actions", "fail", "switched off"),
    ({"allowed_actions": "local_only"}, "actions", "fail", "actions/checkout"),
    ({"github_owned_allowed": False}, "actions", "fail", "GitHub's own actions may not run"),
    ({"patterns_allowed": ["evil/*"]}, "actions", "warn", "evil/*"),
    ({"sha_pinning_required": False}, "actions", "warn", "a tag"),
    ({"default_workflow_permissions": "write"}, "workflow-token", "warn", "may write"),
    ({"can_approve_pull_request_reviews": True}, "workflow-token", "warn", "approve"),
    ({"approval_policy": "first_time_contributors"}, "fork-approval", "warn", "first_time"),
    ({"days": 90}, "retention", "warn", "90 days"),
)


def test_each_setting_that_was_weakened_is_said(api: GitHubApi, declared: Declaration) -> None:
    """Of Settings > Actions > General, one by one."""
    guarded(api, declared)
    for change, line, state, words in WEAKENED:
        (key,) = change
        (kept,) = [each for each in api.settings.permissions.values() if key in each]
        before = kept[key]
        kept.update(change)
        found = looked(declared)
        assert [each.name for each in found.values() if each.state != "ok"] == [line]
        assert (found[line].state, words in found[line].text) == (state, True), found[line]
        kept[key] = before


def test_what_github_does_not_show_is_claimed_by_no_line(
    api: GitHubApi, declared: Declaration
) -> None:
    """A private repository may have bought no scanning; an older server knows no pinning."""
    guarded(api, declared)
    assert "push protection" in looked(declared)["alerts"].text
    api.settings.scanning = ""
    (kept,) = [each for each in api.settings.permissions.values() if "sha_pinning_required" in each]
    del kept["sha_pinning_required"]
    found = looked(declared)
    text = "Dependabot alerts; not to be seen: secret scanning and push protection"
    assert found["alerts"].text == text
    assert (found["actions"].state, "a tag, which" in found["actions"].text) == ("warn", True)


def _rule(api: GitHubApi, kind: str) -> dict[str, Any]:
    (made,) = api.settings.rulesets.values()
    rule: dict[str, Any] = next(each for each in made["rules"] if each["type"] == kind)
    return rule


def test_a_default_branch_that_can_be_passed_by_is_said_with_every_hole(
    api: GitHubApi, declared: Declaration
) -> None:
    """Each rule that is taken out; `ci` may be missing where its workflow is switched off."""
    guarded(api, declared)
    (ruleset,) = api.settings.rulesets.values()
    checks = _rule(api, "required_status_checks")["parameters"]["required_status_checks"]
    reviews = _rule(api, "pull_request")["parameters"]
    assert looked(declared)["default-branch"].state == "ok"

    ci = checks.pop()
    assert "ci is not required" in looked(declared)["default-branch"].text
    api.workflows[".github/workflows/ci.yml"] = "disabled_manually"
    assert looked(declared)["default-branch"].state == "ok"
    checks.append(ci)

    del checks[0]["integration_id"]
    reviews.update(require_code_owner_review=False, require_last_push_approval=False)
    ruleset["bypass_actors"] = [{"actor_type": "RepositoryRole", "actor_id": 5}]
    ruleset["rules"] = [each for each in ruleset["rules"] if each["type"] != "non_fast_forward"]
    text = looked(declared)["default-branch"].text
    for words in ("anybody may report gate", "code owners are not asked", "pushed last", "history",
                  "RepositoryRole"):  # fmt: skip
        assert words in text

    ruleset["bypass_actors"] = None  # GitHub leaves it out for who may not change it
    found = looked(declared)["default-branch"]
    assert "who is not bound by ruleset 1 cannot be seen" in found.text
    assert f"{api.repository}/settings/rules" in found.fix

    ruleset["enforcement"] = "evaluate"
    assert "whoever may write may push to it; gate is not required" in (
        looked(declared)["default-branch"].text
    )


def test_who_is_alone_is_not_asked_for_a_second_pair_of_eyes(
    api: GitHubApi, declared: Declaration
) -> None:
    """GitHub lets nobody approve their own: the fixes that are printed leave that out."""
    api.settings.people = ["mona"]
    guarded(api, declared)
    assert _rule(api, "pull_request")["parameters"]["required_approving_review_count"] == 0
    kept = api.settings.environments["production"]
    assert kept["prevent_self_review"] is False
    assert len(kept["reviewers"]) == 1
    assert {line.state for line in looked(declared).values()} == {"ok"}


def test_the_older_kind_of_branch_protection_counts_too(
    api: GitHubApi, declared: Declaration
) -> None:
    """No ruleset shows it."""
    guarded(api, declared)
    api.settings.rulesets.clear()
    api.settings.protection = {
        "required_status_checks": {
            "contexts": ["gate", "ci"],
            "checks": [{"context": "gate", "app_id": 15368}, {"context": "ci", "app_id": 15368}],
        },
        "required_pull_request_reviews": {
            "dismiss_stale_reviews": False,
            "require_code_owner_reviews": True,
            "required_approving_review_count": 1,
            "require_last_push_approval": True,
        },
        "allow_force_pushes": {"enabled": False},
        "allow_deletions": {"enabled": False},
        "enforce_admins": {"url": f"{api.url}/x", "enabled": True},
    }
    assert looked(declared)["default-branch"].state == "ok"
    api.settings.protection["enforce_admins"]["enabled"] = False
    assert "not bound by it: administrators" in looked(declared)["default-branch"].text


def test_an_environment_that_guards_nothing_is_said(api: GitHubApi, declared: Declaration) -> None:
    """Reviewers, one's own review, branches; `bot` the other way round."""
    guarded(api, declared)
    production, bot = (api.settings.environments[name] for name in ("production", "bot"))
    production["prevent_self_review"] = False
    production["branches"].append("release/*")
    bot["branches"].remove("refs/pull/*/merge")
    found = looked(declared)
    assert "who started a run may approve it" in found["environment production"].text
    assert "release/*" in found["environment production"].text
    assert found["environment bot"].state == "fail"
    assert "does not admit refs/pull/*/merge" in found["environment bot"].text

    production.update(reviewers=[], deployment_branch_policy=None)
    bot["reviewers"] = [{"type": "User", "id": 1}]
    found = looked(declared)
    assert "whoever may merge publishes; every branch may use it" in (
        found["environment production"].text
    )
    assert "waits until somebody approves" in found["environment bot"].text


def test_a_login_is_missed_by_name_and_one_that_every_branch_can_read_is_said(
    api: GitHubApi, declared: Declaration
) -> None:
    """Values are asked for by nobody."""
    guarded(api, declared)
    secrets = api.settings.secrets
    secrets["production"] -= LOGINS
    assert looked(declared)["secrets production"].text.startswith(
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY missing for s3://bucket/models"
    )
    secrets["organization"] = set(LOGINS)
    assert "secrets production" not in looked(declared)

    secrets["bot"].discard("FLEET_APP_KEY")
    found = looked(declared)["app"]
    assert (found.state, "missing in bot" in found.text) == ("fail", True)
    secrets[""] = {"FLEET_APP_KEY", "UNRELATED"}
    found = looked(declared)["secrets"]
    assert "every branch can read FLEET_APP_KEY:" in found.text
    paste(api, found.fix)
    assert looked(declared)["secrets"].state == "ok"

    # An organization shares its own with every branch, too.
    api.settings.groups = [{"name": "cards", "restricted": True, "runners": []}]
    found = looked(declared)["secrets"]
    assert (found.state, "or its organization" in found.text) == ("warn", True)
    assert "gh secret delete AWS_ACCESS_KEY_ID --org " in found.fix


def test_code_owners_without_a_name_are_none(api: GitHubApi, declared: Declaration) -> None:
    """GitHub finds no error in a file of comments, and asks nobody."""
    guarded(api, declared)
    assert looked(declared)["code-owners"].state == "ok"
    text = "# Nobody yet.\n/pipelines/  # @mona\n"
    api.git.commit(api.default_branch, {".github/CODEOWNERS": text}, author="mona")
    found = looked(declared)["code-owners"]
    assert (found.state, "names nobody" in found.text) == ("warn", True)


def test_runners_are_held_against_the_labels_that_are_declared(
    api: GitHubApi, declared: Declaration
) -> None:
    """Missing, offline, too old, of no host, and those that outlive a job."""
    number = api.add_runner("desk", ["self-hosted", "gpu"], ephemeral=True)
    found = looked(declared)["runner desk"]
    assert found.state == "fail"
    assert "self-hosted, gpu and desk; those that there are have gpu, self-hosted" in found.text
    texts = [each.text for each in doctor_github.lines(Layout(ROOT), declared)]
    assert any("no host of params.yaml has its labels" in text for text in texts)

    runner = api.runners[number]
    runner.update(labels=["self-hosted", "GPU", "desk"], status="offline")
    found = looked(declared)["runner desk"]
    assert (found.state, found.text) == ("warn", "offline: desk")
    runner.update(status="online", version="2.300.0")
    found = looked(declared)["runner desk"]
    assert (found.state, "2.300.0" in found.text) == ("fail", True)

    runner.update(version="2.330.0", ephemeral=False)
    every = looked(declared)
    assert every["runner desk"].state == "ok"
    assert every["registration"].state == "warn"
    api.settings.private = True
    assert looked(declared)["registration"].state == "ok"


def test_runners_of_an_organization_count_and_where_they_are_not_seen_nothing_is_claimed(
    api: GitHubApi, declared: Declaration
) -> None:
    """They are in groups, which only an owner of the organization may list."""
    guarded(api, declared)
    (number,) = api.runners
    api.settings.groups = [{"name": "cards", "restricted": True, "runners": [number]}]
    found = looked(declared)
    assert [name for name, line in found.items() if line.state != "ok"] == []
    assert found["runner desk"].text.startswith("desk is online")

    api.settings.groups[0]["restricted"] = False
    assert looked(declared)["runner-groups"].text == "any workflow may use cards"

    api.tokens[PERSON] = Token(
        "mona",
        dict.fromkeys(
            ("actions", "administration", "contents", "environments", "pull_requests", "secrets",
             "variables"), "read",
        ),
    )  # fmt: skip
    found = looked(declared)
    assert found["runner desk"].state == "warn"
    assert "those of the organization cannot be seen" in found["runners"].text
    assert level(declared)[1].startswith("cannot be told")


def test_what_a_token_may_not_see_is_a_warning_with_the_right_and_the_page_never_well(
    api: GitHubApi, declared: Declaration
) -> None:
    """As with the token of a job, or that of somebody who is no administrator."""
    guarded(api, declared)
    api.tokens[PERSON] = Token("mona", {"contents": "read", "pull_requests": "read"})
    found = looked(declared)
    unseen = {name for name, line in found.items() if "cannot be seen" in line.text}
    assert unseen >= {
        "actions", "workflow-token", "fork-approval", "retention", "runners", "alerts",
        "app", "secrets", "environment bot", "environment production", "workflows",
    }  # fmt: skip
    for name in unseen:
        assert found[name].state == "warn"
        assert "gh auth token" in found[name].fix or name == "workflows"
        assert f"{api.repository}/" in found[name].fix
    assert "`administration: read`" in found["actions"].fix
    security = doctor_security.lines(Layout(ROOT), list(found.values()))
    assert security[0].text.startswith("cannot be told")


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("status", [401, 404])
def test_a_token_that_is_wrong_or_sees_nothing_is_one_line(
    declared: Declaration, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository that is private looks like one that is not there."""
    if status == 401:
        monkeypatch.setenv("GITHUB_TOKEN", "ghp_expired")
    else:
        monkeypatch.setenv("GITHUB_REPOSITORY", "octo/other")
    (line,) = doctor_github.lines(Layout(ROOT), declared)
    assert (line.name, line.state) == ("repository", "warn")
    assert str(status) in line.text
    assert "ghp_expired" not in line.text + line.fix
    (level,) = doctor_security.lines(Layout(ROOT), [line])
    assert (level.state, level.text) == ("warn", "cannot be told: nobody could ask GitHub")


def test_answers_that_are_late_broken_or_a_page_of_a_proxy_are_warnings_and_end_in_time(
    api: GitHubApi, declared: Declaration
) -> None:
    """One question that hangs holds up no other; the rest is said."""
    api.strike(Fault(kind="hang", pause_s=60), matches="GET labels", times=-1)
    api.strike(Fault(kind="html"), matches="GET actions/permissions/workflow", times=-1)
    api.strike(
        Fault(kind="status", status=200, body={"enabled": "yes"}),
        matches=r"GET actions/permissions$",
        times=-1,
    )
    begun = time.monotonic()
    found = looked_loosely(declared)
    assert time.monotonic() - begun < 30
    assert {found[name].state for name in ("labels", "workflow-token", "actions")} == {"warn"}
    assert found["retention"].text == "logs and artifacts stay 90 days, not 30"


def looked_loosely(declared: Declaration) -> dict[str, Line]:
    """Return the lines by name, whether or not they have a fix."""
    return {line.name: line for line in doctor_github.lines(Layout(ROOT), declared)}


def test_a_declaration_that_cannot_be_read_leaves_out_what_depends_on_it(api: GitHubApi) -> None:
    """The repository is looked at all the same."""
    found = looked_loosely(None)  # type: ignore[arg-type]
    assert found["runners"].state == "warn"
    assert found["actions"].state == "warn"
    assert not [name for name in found if name.startswith("environment") and "bot" not in name]
    assert api.requests


def level(declared: Declaration) -> tuple[str, str, list[Line]]:
    """Return the state and the text of the level, and the other lines."""
    found = list(doctor_github.lines(Layout(ROOT), declared))
    first, *rest = doctor_security.lines(Layout(ROOT), found)
    assert first.name == "level"
    return first.state, first.text, rest


def test_the_level_is_that_of_the_page_and_claims_nothing_that_was_not_seen(
    api: GitHubApi, declared: Declaration
) -> None:
    """From a laptop to a public repository whose runner takes one job."""
    state, text, rest = level(declared)
    assert (state, text) == ("ok", "0 of 3: GitHub knows no runner desk now")
    assert rest[0].text == "needs a machine, fork-approval and workflow-token"

    # A machine in a public repository that has nothing set: not even level 1.
    number = api.add_runner("desk", ["self-hosted", "gpu", "desk"])
    state, text, rest = level(declared)
    assert state == "fail"
    assert "level 1 needs fork-approval, workflow-token and registration" in text
    # Of whatever labels.
    api.runners[number]["labels"] = ["self-hosted"]
    assert level(declared)[0] == "fail"
    api.runners[number]["labels"] = ["self-hosted", "gpu", "desk"]

    api.settings.private = True
    paste(api, looked(declared)["workflow-token"].fix)
    state, text, rest = level(declared)
    assert (state, text[:6], rest[0].name) == ("ok", "1 of 3", "level 2")
    assert "default-branch" in rest[0].text
    assert "registration" in rest[0].text

    del api.runners[number]
    api.settings.private = False
    guarded(api, declared)
    state, text, rest = level(declared)
    assert (state, text[:6]) == ("ok", "2 of 3")
    assert [each.name for each in rest] == ["by-hand"]

    api.settings.environments["production"]["reviewers"] = []
    state, text, rest = level(declared)
    assert (text[:6], rest[0].text) == ("1 of 3", "needs environment production")


def test_the_calls_to_paste_are_those_of_the_page_on_security() -> None:
    """One truth: what the doctor prints is what the page says, and GitHub describes it."""
    page = (ROOT / "docs/security.md").read_text()
    said = {
        (method, path.removeprefix("repos/{owner}/{repo}/"), json.dumps(json.loads(body or "{}")))
        for method, path, body in re.findall(
            r"gh api --method (\w+) (repos/\S+)(?: --input - <<'JSON'\n(.*?)\n\s*JSON)?",
            page,
            re.DOTALL,
        )
    }
    calls = [
        doctor_settings.APPROVAL,
        *doctor_settings.ALLOWED,
        doctor_settings.PRIVATE_FORKS,
        doctor_settings.RETENTION,
        doctor_settings.ALERTS,
        doctor_settings.workflow_token(opens_pulls=False),
        doctor_settings.ruleset(alone=False),
        *doctor_settings.environment("production", branches=["main"], reviewer=1),
        *doctor_settings.environment(
            "bot", branches=["main", doctor_settings.PULL_REFS], reviewer=None
        ),
    ]
    assert {(each.method, each.path, json.dumps(dict(each.body))) for each in calls} == said
    contract = load(node_tools.openapi())
    for alone in (False, True):
        call = doctor_settings.ruleset(alone=alone)
        operation = contract.operation(call.method, f"/repos/o/r/{call.path}")
        assert operation is not None
        assert list(operation.problems_of("", json.dumps(dict(call.body)).encode())) == []
