"""The model of `fleet init`: a new one, or more quants of one that is declared."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pipelines import (
    console,
    declaration,
    init_plan,
    init_settings,
    init_source,
    init_text,
    params,
    wording,
)
from pipelines.errors import ParamsError
from pipelines.init_source import COMPLETION_MODELFILE
from pipelines.verdict_rules import UNKNOWN_LICENSES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.init_answers import Answers
    from pipelines.init_plan import Plan, Room
    from pipelines.init_source import Subject
    from pipelines.init_text import Entry
    from pipelines.layout import Layout
    from pipelines.params import Declaration

# The set of tasks that the template brings: questions of English that a real model answers.
EVAL: Final = "technical-english"
_CALIBRATION: Final = "calibration"
COMPLETION: Final = """\
# version: 1
#
# For a model without a chat template, which goes on with what it is given. Ollama would put ChatML
# around it, which it has never seen; this adds nothing.
{% raw %}TEMPLATE \"\"\"{{ range .Messages }}{{ .Content }}{{ end }}\"\"\"{% endraw %}
PARAMETER temperature 0.8
PARAMETER top_k 40
PARAMETER top_p 0.9
PARAMETER repeat_penalty 1.0
{% if license %}LICENSE {{ license }}{% endif %}
"""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A model that is to be declared, or one that gets more quants."""

    name: str
    subject: Subject
    plan: Plan
    is_new: bool
    objective: str
    license: str | None
    more: Mapping[str, str]

    @property
    def needs_modelfile(self) -> bool:
        """Whether it has no chat template that its prompts could be put into."""
        return self.is_new and not self.subject.has_template and not self.subject.is_encoder

    @property
    def entries(self) -> tuple[Entry, ...]:
        """As params.yaml has it."""
        quants = init_text.quants(self.name, self.plan.quants)
        return (self.model_entry, *quants) if self.is_new else quants

    @property
    def model_entry(self) -> Entry:
        """The model's own."""
        return init_text.model(
            self.name,
            self.subject,
            self.plan,
            objective=self.objective,
            license_=self.license,
            **self.more,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the operator should know of it."""
        held = self.license is None and not states_license(self.subject)
        license_ = (_held(self.name, self.subject.source),) if held else ()
        return (*self.subject.notes, *license_, *self.plan.notes)


def choose(
    at: Layout, declared: Declaration, answers: Answers, room: Room, *, begins: bool
) -> Wanted | None:
    """Look at the model and plan its quants; None if nothing of it has to be declared."""
    if answers.source is None:
        if answers.license is not None:
            raise ParamsError(
                "`--license` is of a model that is added, and none is named.",
                hint="Of one that is declared: write `license:` into its entry of params.yaml.",
            )
        return None
    source = _spelled(at, answers.source)
    known = None if begins else _known(declared, source, answers.name)
    if known is not None:
        return _more_quants(at, declared, known, answers, room)
    name = name_of(source, answers)
    require_name(name, declared, begins=begins)
    subject = init_source.look(
        source, answers.revision, at, declared, ignore_code=answers.ignore_code
    )
    if answers.license is not None:
        require_license(answers.license, subject)
    plan = _plan(subject, answers, room, declared)
    if not begins:
        init_settings.require_fit(declared, subject, plan)
    more: dict[str, str] = {}
    if answers.ignore_code:
        more["ignore_code"] = "true"
    if begins and EVAL in declared.evals and _can_answer(subject, plan):
        more["evals"] = f"[{EVAL}]"
    if not subject.has_template and not subject.is_encoder:
        more["modelfile"] = COMPLETION_MODELFILE
    return Wanted(
        name=name,
        subject=subject,
        plan=plan,
        is_new=True,
        objective=answers.objective or "speed",
        license=answers.license,
        more=more,
    )


def first_look(at: Layout, declared: Declaration, answers: Answers) -> Subject | None:
    """
    Look whether the model can be built, before anything else is asked; None if it is declared.

    Raises:
        ParamsError: It is no source.
        UpstreamError: The chain cannot build it; says why.
        RetryLaterError: The Hub cannot be reached.
    """
    if answers.source is None or is_declared(at, declared, answers):
        return None
    init_source.require_source(answers.source, at)
    return init_source.look(
        _spelled(at, answers.source),
        answers.revision,
        at,
        declared,
        ignore_code=answers.ignore_code,
        digests=False,
    )


def is_declared(at: Layout, declared: Declaration, answers: Answers) -> bool:
    """Tell whether the model that was named is declared already, under the name that was said."""
    source = answers.source
    return source is not None and _known(declared, _spelled(at, source), answers.name) is not None


def _plan(subject: Subject, answers: Answers, room: Room, declared: Declaration) -> Plan:
    return init_plan.make(
        subject,
        answers,
        room,
        slots=declared.serving.parallel,
        has_calibration=_CALIBRATION in declared.corpora,
    )


def _can_answer(subject: Subject, plan: Plan) -> bool:
    """Tell whether the template's set says something of a model: it must be above chance."""
    is_small = subject.shape.parameters_count < init_settings.SMALL_PARAMETERS_COUNT
    return not (is_small or subject.is_encoder) and plan.context_tokens >= 512  # noqa: PLR2004 - what its items take


def _spelled(at: Layout, source: str) -> str:
    kind, _, place = source.partition(":")
    return f"path:{init_source.below(at.root, place)}" if kind == "path" and place else source


def _known(declared: Declaration, source: str, name: str | None) -> str | None:
    """Return the key under which this source is declared already."""
    same = [
        key
        for key, model in declared.models.items()
        if model.source.casefold() == source.casefold() and name in {None, key}
    ]
    return same[0] if same else None


def _more_quants(
    at: Layout, declared: Declaration, name: str, answers: Answers, room: Room
) -> Wanted | None:
    """Add the quants that were named and are not declared; all else of the model stays."""
    spec = declared.models[name]
    is_own = answers.license == init_text.MINE
    for option, said, is_ in (
        ("context_tokens", answers.context_tokens, spec.context_tokens),
        ("objective", answers.objective, spec.objective),
        ("license", init_text.OTHER if is_own else answers.license, spec.license),
    ):
        if said is not None and said != is_:
            is_so = f"with {option}: {is_}" if is_ is not None else f"without {option}"
            raise ParamsError(
                f"models.{name} is declared already, {is_so}.",
                hint="Edit that line of params.yaml.",
            )
    _require_same_revision(name, spec, answers.revision)
    there = set(params.quants_of(declared, name).values())
    missing = tuple(each for each in answers.quants if each.upper() not in there)
    if not missing:
        return None
    revision = spec.revision if spec.source.startswith("hf:") else None
    subject = init_source.look(spec.source, revision, at, declared, ignore_code=spec.ignore_code)
    wanted = replace(answers, quants=missing, context_tokens=spec.context_tokens)
    plan = _plan(subject, wanted, room, declared)
    if plan.uses_matrix and spec.calibration is None:
        raise ParamsError(
            f"models.{name} declares no `calibration`, which {wording.listed(list(missing))} "
            "would use.",
            hint=f"Write `calibration: {_CALIBRATION}` into its entry, and run this again.",
        )
    return Wanted(
        name=name,
        subject=subject,
        plan=plan,
        is_new=False,
        objective=spec.objective,
        license=spec.license,
        more={},
    )


def _require_same_revision(name: str, spec: params.Model, said: str | None) -> None:
    if said is None or said in {spec.revision, spec.track or "main"}:
        return
    raise ParamsError(
        f"models.{name} is declared already, at {spec.revision[:12]}; `--revision` moves nothing.",
        hint=f"To another commit: fleet bump --help. To compare both: another --name, such as "
        f"{name}-next.",
    )


# --- licence ----------------------------------------------------------------------------------


def states_license(subject: Subject) -> bool:
    """Tell whether the files of a model name a licence under which it can be released."""
    return (subject.license or "").lower() not in UNKNOWN_LICENSES


def require_license(license_: str, subject: Subject) -> None:
    """
    Refuse a licence that is no name of one, or another than the files of the model state.

    Raises:
        ParamsError: It is; a release would be held.
    """
    if not re.fullmatch(params.LICENSE, license_):
        raise ParamsError(
            f"--license {wording.quoted(license_)} is not {params.PATTERN_WORDS[params.LICENSE]}.",
            hint="--license apache-2.0; --license mine for weights of your own",
        )
    if states_license(subject) and license_ != subject.license:
        stated = console.clean(subject.license or "")
        raise ParamsError(
            f"--license {wording.quoted(license_)}: the files of {subject.source} state {stated}, "
            "and a release that accepts another one is held.",
            hint=f"Leave it out, or --license {stated}",
        )


def _held(name: str, source: str) -> str:
    """Say that no release will be made, why, and which line to add."""
    line = f"below `{name}:` under `models:` in params.yaml"
    if source.startswith("path:"):
        return (
            f"{source} states no licence, so that no release is made of it. It is looked for in "
            "README.md (`license: ...` between two lines `---` at its top), config.json "
            f"(`license`) and LICENSE. If the weights are your own, add `license: {init_text.OTHER}"
            f"` {line} (--license mine writes it); if not, the licence that you read and accept, "
            "such as `license: apache-2.0`."
        )
    return (
        "Upstream states no licence: nothing is released until you read its terms and add what you "
        f"accept, such as `license: apache-2.0`, {line} (--license apache-2.0 writes it)."
    )


# --- name -------------------------------------------------------------------------------------


def name_of(source: str, answers: Answers) -> str:
    """Return the key that was said, or make one of the repository or folder: `qwen2-5-7b`."""
    last = source.rstrip("/").rpartition("/")[2].rpartition(":")[2].lower()
    return answers.name or re.sub(r"[^a-z0-9_-]+", "-", last).strip("-_")[:63]


def require_name(name: str, declared: Declaration, *, begins: bool) -> None:
    """
    Refuse a key that is none, or that is another model's.

    Raises:
        ParamsError: It is; with one that can be had.
    """
    taken = name in declaration.TAKEN_NAMES or (not begins and name in declared.models)
    # YAML reads 2024, 0x1f and 1e-5 as numbers.
    is_key = re.fullmatch(params.MODEL_KEY, name) and init_text.is_word(name)
    if is_key and not taken:
        return
    why = "is taken" if taken else f"is not {params.PATTERN_WORDS[params.MODEL_KEY]}"
    free = init_text.key_of(name, or_else="model")
    if taken:
        keys = (f"{name}-{number}" for number in itertools.count(2))
        free = next(key for key in keys if key not in declared.models)
    raise ParamsError(f"the name {wording.quoted(name)} {why}.", hint=f"--name {free}")
