"""
The lines of `fleet doctor` about what guards the fleet on GitHub.

That is the default branch, the environments, the App, and the secrets.

A secret is known by its name; GitHub shows nobody its value.
"""

from __future__ import annotations

import base64
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pipelines import doctor_settings, wording
from pipelines.doctor_asked import APP_CLIENT, Asked, Look
from pipelines.doctor_lines import Line, fail, ok, warn
from pipelines.doctor_settings import ACTIONS_APP_ID, PULL_REFS, REQUIRED_CHECKS
from pipelines.github.client import quoted, ref_path, taken
from pipelines.github.errors import GitHubError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.github.client import GitHub
    from pipelines.params import Declaration

APP_KEY: Final = "FLEET_APP_KEY"
# Of the jobs that write and publish nothing.
BOT: Final = "bot"
# What the workflows hand to the store of a registry, by the beginning of its URL, and whether
# nothing can be written there without.
_LOGINS: Final[dict[str, tuple[tuple[str, ...], bool]]] = {
    "s3:": (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), False),
    "hf:": (("HF_TOKEN",), True),
    "oci:": (("REGISTRY_USERNAME", "REGISTRY_PASSWORD"), False),
    "mlflow:": (("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), False),
}
_OF_ENVIRONMENTS: Final = frozenset(
    {APP_KEY, *(name for names, _ in _LOGINS.values() for name in names)}
)
_PLACEHOLDER_PERSON: Final = 1


def looks(declared: Declaration | None) -> list[Look]:
    """Return the looks; one for each environment in which a registry is written."""
    rows: list[tuple[str, Callable[[Asked], Iterator[Line]], str, str]] = [
        ("default-branch", _default_branch, "`metadata: read`", "settings/rules"),
        ("code-owners", _code_owners, "`contents: read`", "blob/HEAD/.github/CODEOWNERS"),
        ("app", _app, "`variables: read`", "settings/variables/actions"),
        ("secrets", _secrets, "`secrets: read`", "settings/secrets/actions"),
        (f"environment {BOT}", _bot, "`actions: read`", "settings/environments"),
    ]
    rows += [
        (
            f"environment {name}",
            functools.partial(_publishing, name, urls),
            "`actions: read` and `environments: read`",
            "settings/environments",
        )
        for name, urls in published_in(declared).items()
    ]
    return [Look(name=name, look=look, scope=scope, page=page) for name, look, scope, page in rows]


def published_in(declared: Declaration | None) -> dict[str, list[str]]:
    """Return the addresses of registries by the environment in which they are written."""
    found: dict[str, list[str]] = {}
    for each in declared.registries.values() if declared else ():
        if each.environment:
            found.setdefault(each.environment, []).append(each.url)
    return found


# --- the default branch -----------------------------------------------------------------------


@dataclass
class Guard:
    """
    What has to be true before something gets onto the default branch, of all rules together.

    Attributes:
        pull: Whether it has to be a pull request.
        reviews: Approvals that it needs.
        owners: Whether code owners have to be among them.
        last_push: Whether somebody else has to approve the last push.
        forced: Whether history can be exchanged.
        deleted: Whether the branch can be removed.
        checks: By name, GitHub's number of the App whose word counts; None is anybody's.
        bypassed: Who is not bound by it, in words.
        unseen: Rulesets of which nobody could see who is not bound by them.
    """

    pull: bool = False
    reviews: int = 0
    owners: bool = False
    last_push: bool = False
    forced: bool = True
    deleted: bool = True
    checks: dict[str, int | None] = field(default_factory=dict)
    bypassed: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    def flaws(self, *, alone: bool, ci_is_off: bool) -> list[str]:
        """Say what can get past it; `alone`: nobody is there who could review."""
        found: list[str] = []
        if not self.pull:
            found.append("whoever may write may push to it")
        for name in REQUIRED_CHECKS:
            if name not in self.checks:
                if name == "gate" or not ci_is_off:
                    found.append(f"{name} is not required")
            elif self.checks[name] != ACTIONS_APP_ID:
                found.append(f"anybody may report {name}, not GitHub Actions alone")
        found += [] if alone else self._unreviewed()
        found += ["its history can be exchanged"] if self.forced else []
        found += ["it can be deleted"] if self.deleted else []
        if self.bypassed:
            found.append(f"not bound by it: {wording.first_few(self.bypassed)}")
        if self.unseen:
            found.append(f"who is not bound by {wording.first_few(self.unseen)} cannot be seen")
        return found

    def _unreviewed(self) -> list[str]:
        found = ["nobody has to approve"] if self.pull and not self.reviews else []
        found += [] if self.owners else ["code owners are not asked"]
        found += [] if self.last_push else ["who pushed last may be the one who approves"]
        return found


def _default_branch(asked: Asked) -> Iterator[Line]:
    """Whether `gate` and the code owners can be passed by."""
    gh, basis = asked.gh, asked.basis
    guard = _guard(gh, basis.branch)
    ci_is_off = "ci" not in guard.checks and _is_off(gh, "ci.yml")
    flaws = guard.flaws(alone=basis.alone, ci_is_off=ci_is_off)
    if flaws:
        fixes = []
        if len(flaws) > bool(guard.unseen):
            fixes.append(doctor_settings.command(doctor_settings.ruleset(alone=basis.alone)))
        if guard.unseen:
            fixes.append(f"Let who may change it look there: {basis.web}/settings/rules")
        more = "" if basis.people else " (alone: docs/security.md, Alone)"
        text = f"{basis.branch}: {'; '.join(flaws)}{more}"
        yield warn("github", "default-branch", text, "\n".join(fixes))
        return
    names = wording.listed(sorted(guard.checks))
    who = "nobody to review" if basis.alone else wording.counted(guard.reviews, "approval")
    yield ok("github", "default-branch", f"{basis.branch}: requires {names}; {who}")


def _is_off(gh: GitHub, file: str) -> bool:
    """Say whether a workflow was switched off by hand."""
    for each in gh.paged("actions/workflows", "workflows"):
        if str(each.get("path", "")).endswith(f"/{file}"):
            return each.get("state") == "disabled_manually"
    return False


def _guard(gh: GitHub, branch: str) -> Guard:
    """Add up the rulesets and the older protection of a branch."""
    guard = Guard()
    sets: dict[int, str] = {}
    of_branch = ref_path(branch).removeprefix("heads/")
    for each in gh.paged(f"rules/branches/{of_branch}"):
        _add_rule(guard, each)
        # An organization's binds this branch, too, and lets others past.
        whose = "the organization's " if each.get("ruleset_source_type") == "Organization" else ""
        number = int(taken(each, "ruleset_id", int))
        sets[number] = f"{whose}ruleset {number}"
    for number, name in sorted(sets.items()):
        actors = (gh.find(f"rulesets/{number}") or {}).get("bypass_actors")
        if not isinstance(actors, list):
            # Shown to who may change it, and to nobody else.
            guard.unseen.append(name)
            continue
        guard.bypassed += [str(actor.get("actor_type")) for actor in actors]
    if not guard.checks or not guard.pull:
        _add_protection(guard, gh, of_branch)
    return guard


def _add_rule(guard: Guard, rule: dict[str, Any]) -> None:
    kind, told = rule.get("type"), rule.get("parameters") or {}
    if kind == "pull_request":
        guard.pull = True
        guard.reviews = max(guard.reviews, int(told.get("required_approving_review_count") or 0))
        guard.owners |= told.get("require_code_owner_review") is True
        guard.last_push |= told.get("require_last_push_approval") is True
    elif kind == "required_status_checks":
        for each in told.get("required_status_checks") or ():
            _add_check(guard, str(each.get("context")), each.get("integration_id"))
    elif kind == "non_fast_forward":
        guard.forced = False
    elif kind == "deletion":
        guard.deleted = False


def _add_check(guard: Guard, name: str, app: object) -> None:
    number = app if isinstance(app, int) and app > 0 else None
    guard.checks[name] = guard.checks.get(name) or number


def _add_protection(guard: Guard, gh: GitHub, branch: str) -> None:
    """Add what "branch protection rules" say, which no ruleset shows."""
    told = gh.find(f"branches/{branch}/protection")
    if not told:
        return
    reviews = told.get("required_pull_request_reviews")
    if isinstance(reviews, dict):
        guard.pull = True
        guard.reviews = max(guard.reviews, int(reviews.get("required_approving_review_count") or 0))
        guard.owners |= reviews.get("require_code_owner_reviews") is True
        guard.last_push |= reviews.get("require_last_push_approval") is True
    checks = told.get("required_status_checks")
    if isinstance(checks, dict):
        for name in checks.get("contexts") or ():
            _add_check(guard, str(name), None)
        for each in checks.get("checks") or ():
            _add_check(guard, str(each.get("context")), each.get("app_id"))
    guard.forced &= (told.get("allow_force_pushes") or {}).get("enabled") is not False
    guard.deleted &= (told.get("allow_deletions") or {}).get("enabled") is not False
    if (told.get("enforce_admins") or {}).get("enabled") is not True:
        guard.bypassed.append("administrators")


def _code_owners(asked: Asked) -> Iterator[Line]:
    """Whether GitHub understands CODEOWNERS: a line that it does not asks nobody."""
    told = asked.gh.find("codeowners/errors")
    if told is None:
        text = "GitHub finds no CODEOWNERS on the default branch: nobody is asked"
        yield warn("github", "code-owners", text, "Commit .github/CODEOWNERS.")
        return
    wrong = taken(told, "errors", list)
    if not wrong and not _names_owners(asked.gh):
        text = "CODEOWNERS names nobody: nobody is asked"
        yield warn("github", "code-owners", text, "Name @LOGIN or @ORGANIZATION/TEAM in it.")
        return
    if not wrong:
        yield ok("github", "code-owners", "GitHub understands every line of CODEOWNERS")
        return
    places = [f"line {each.get('line')}: {each.get('kind')}" for each in wrong]
    fix = (
        "Name teams and people who may write to the repository, in .github/CODEOWNERS; a personal "
        "account has no teams: @LOGIN."
    )
    yield warn("github", "code-owners", wording.first_few(places), fix)


def _names_owners(gh: GitHub) -> bool:
    """Say whether a line of CODEOWNERS names somebody; true if it lies where we do not look."""
    told = gh.find("contents/.github/CODEOWNERS")
    if told is None or told.get("encoding") != "base64":
        return True
    text = base64.b64decode(str(taken(told, "content", str))).decode(errors="replace")
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    return any("@" in word for words in lines for word in words[1:])


# --- environments, App, secrets ---------------------------------------------------------------


def _secrets_of(gh: GitHub, place: str) -> frozenset[str]:
    every = gh.paged(f"{place}secrets", "secrets")
    return frozenset(str(taken(each, "name", str)) for each in every)


def _secrets_everywhere(asked: Asked) -> frozenset[str]:
    """Return the names of secrets that every job has: of the repository, and of its owner."""
    own = _secrets_of(asked.gh, "actions/")
    try:
        return own | _secrets_of(asked.gh, "actions/organization-")
    except GitHubError:
        return own  # a person's repository has no others


def _secrets_in(asked: Asked, environment: str) -> frozenset[str]:
    """Return the names of secrets of an environment; none if there is no such one."""
    if environment not in asked.basis.environments:
        return frozenset()
    return _secrets_of(asked.gh, f"environments/{quoted(environment)}/")


def _app(asked: Asked) -> Iterator[Line]:
    """Whether there is an App, and its key where jobs look for it."""
    if not asked.basis.variables.get(APP_CLIENT):
        text = (
            f"none ({APP_CLIENT} is not set): somebody has to click for the checks of what jobs "
            "wrote, and runner health knows of no host whether it is online"
        )
        fix = "docs/github.md, Once, step 4; without one: docs/github.md, Without an App."
        yield warn("github", "app", text, fix)
        return
    wanted = [BOT, *published_in(asked.declared)]
    everywhere = _secrets_everywhere(asked)
    missing = [name for name in wanted if APP_KEY not in everywhere | _secrets_in(asked, name)]
    if missing:
        fix = "\n".join(f"gh secret set {APP_KEY} --env {name} < app.pem" for name in missing)
        text = f"{APP_CLIENT} is set, but {APP_KEY} is missing in {wording.listed(missing)}"
        yield fail("github", "app", text, fix)
        return
    yield ok("github", "app", f"its key is in {wording.listed(wanted)}")


def _secrets(asked: Asked) -> Iterator[Line]:
    """Whether a login lies where every branch can read it."""
    own = _secrets_of(asked.gh, "actions/") & _OF_ENVIRONMENTS
    shared: frozenset[str] = frozenset()
    if asked.basis.organization:
        # Not to be seen is not well.
        shared = _secrets_of(asked.gh, "actions/organization-") & _OF_ENVIRONMENTS
    loose = sorted(own | shared)
    environments = list(published_in(asked.declared)) or ["production"]
    if loose:
        text = f"every branch can read {wording.listed(loose)}: of the repository"
        text += " or its organization, no environment's" if shared else ", no environment's"
        fix = "\n".join(
            [
                f"gh secret set {name} --env {each}"
                for name in loose
                for each in ([BOT, *environments] if name == APP_KEY else environments)
            ]
            + [f"gh secret delete {name}" for name in sorted(own)]
            + [
                f"gh secret delete {name} --org {asked.gh.owner}  # or share it with others alone"
                for name in sorted(shared)
            ]
        )
        yield warn("github", "secrets", text, fix)
    else:
        yield ok("github", "secrets", "no login of a registry is the repository's own")


def _branches(asked: Asked, name: str) -> list[str] | None:
    """Return the branches that may use an environment; None: all of them."""
    policy = asked.basis.environments[name].get("deployment_branch_policy")
    if not isinstance(policy, dict):
        return None
    if policy.get("custom_branch_policies") is not True:
        return ["(protected branches)"]
    path = f"environments/{quoted(name)}/deployment-branch-policies"
    return [str(taken(each, "name", str)) for each in asked.gh.paged(path, "branch_policies")]


def _reviewers(environment: dict[str, Any]) -> tuple[int, bool]:
    """Return how many may approve, and whether one's own run is none of theirs."""
    for rule in environment.get("protection_rules") or ():
        if rule.get("type") == "required_reviewers":
            return len(rule.get("reviewers") or ()), rule.get("prevent_self_review") is True
    return 0, False


def _publishing(name: str, urls: list[str], asked: Asked) -> Iterator[Line]:
    """Whether an environment in which registries are written is guarded, and can open them."""
    line, basis = f"environment {name}", asked.basis
    fix = _environment_fix(name, asked)
    if name not in basis.environments:
        text = (
            "params.yaml declares it, and GitHub has none: the first publish makes one, in which "
            "nobody is asked and no login is"
        )
        yield fail("github", line, text, fix)
        return
    flaws: list[str] = []
    count, others = _reviewers(basis.environments[name])
    if not count:
        flaws.append("nobody has to approve: whoever may merge publishes")
    elif not others and not basis.alone:
        flaws.append("who started a run may approve it")
    branches = _branches(asked, name)
    if branches is None:
        flaws.append("every branch may use it")
    elif other := [each for each in branches if each not in {basis.branch, "(protected branches)"}]:
        flaws.append(f"branches may use it beside {basis.branch}: {wording.first_few(other)}")
    if flaws:
        yield warn("github", line, "; ".join(flaws), fix)
    else:
        yield ok("github", line, f"{wording.counted(count, 'reviewer')}, {basis.branch} alone")
    yield from _logins(name, urls, asked)


def _logins(name: str, urls: list[str], asked: Asked) -> Iterator[Line]:
    """Whether the secrets are there with which the registries of an environment are opened."""
    line = f"secrets {name}"
    there = _secrets_in(asked, name) | _secrets_everywhere(asked)
    for url in urls:
        wanted, needed = next(
            (found for start, found in _LOGINS.items() if url.startswith(start)), ((), False)
        )
        missing = [each for each in wanted if each not in there]
        if not missing:
            continue
        fix = "\n".join(f"gh secret set {each} --env {name}" for each in missing)
        text = f"{wording.listed(missing)} missing for {url}"
        if needed:
            yield fail("github", line, f"{text}: nothing can be written there", fix)
        else:
            yield warn("github", line, f"{text}: right only if it asks for no login, or OIDC", fix)


def _environment_fix(name: str, asked: Asked) -> str:
    """Return the calls that guard an environment; the reviewer is who looks, as far as is known."""
    basis = asked.basis
    calls = doctor_settings.environment(
        name,
        branches=[basis.branch],
        reviewer=basis.person or _PLACEHOLDER_PERSON,
        alone=basis.alone,
    )
    said = f"the reviewer is number {basis.person or _PLACEHOLDER_PERSON}"
    said += ", you" if basis.person else ", nobody of yours"
    if not basis.alone:
        said += ": add who else approves, by gh api users/LOGIN --jq .id"
    return f"# {said}\n{doctor_settings.command(*calls)}"


def _bot(asked: Asked) -> Iterator[Line]:
    """Whether the environment of the jobs that write asks nobody, and admits what it has to."""
    line, basis = f"environment {BOT}", asked.basis
    fix = doctor_settings.command(
        *doctor_settings.environment(BOT, branches=[basis.branch, PULL_REFS], reviewer=None)
    )
    if BOT not in basis.environments:
        text = "GitHub has none: the first run makes one that every branch may use, without a key"
        # Without an App none of its jobs has anything to hide.
        yield (
            ok("github", line, text) if basis.has_app is False else warn("github", line, text, fix)
        )
        return
    if _reviewers(basis.environments[BOT])[0]:
        yield warn("github", line, "each of its jobs waits until somebody approves", fix)
        return
    branches = _branches(asked, BOT)
    if branches is None:
        yield warn("github", line, "every branch may use it", fix)
    elif missing := [each for each in (basis.branch, PULL_REFS) if each not in branches]:
        text = f"does not admit {wording.listed(missing)}: adopt, bump and runner health fail"
        yield fail("github", line, text, fix)
    else:
        yield ok("github", line, f"admits {wording.listed(branches)}")
