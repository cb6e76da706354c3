"""
Reads params.yaml: a `Declaration`, or every problem at once, each on its line.

Three kinds of problem come together here: YAML that is not allowed (`pipelines.marked_yaml`),
values that the types refuse (`pipelines.params`), and values that contradict one another or the
files that they name. The third kind is searched in the plain data, not in the typed result, so
that one misspelt key does not hide that a corpus is missing.
"""

from __future__ import annotations

import json
import posixpath
import re
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, get_args
from urllib.parse import urlsplit

from pydantic import ValidationError

from pipelines import atomic, console, hashing, marked_yaml, migrations, params, tensor_rules
from pipelines.errors import FleetError, ParamsError, Problem
from pipelines.layout import Layout
from pipelines.marked_yaml import Finding
from pipelines.stores.addresses import is_loopback
from pipelines.wording import did_you_mean, quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from pydantic_core import ErrorDetails

    from pipelines.marked_yaml import Document, Loc, Mark
    from pipelines.params import Closed, Declaration

# Names of folders in work/ that are no model's.
TAKEN_NAMES = frozenset(
    path.parts[1]
    for path in (
        Layout().slice("stage", "key"),
        Layout().log("stage", "key"),
        Layout().scratch("model"),
        Layout().receipt("model"),
        Layout().observed("model"),
        Layout().serving,
    )
) | {"mlruns", "mlartifacts", "remote"}
_QUANT_TYPES: tuple[str, ...] = get_args(params.QuantType)
# A set that is wrong on all of its lines is most often of another kind than declared.
_ITEM_FLAWS_SHOWN = 10
# The values need flash attention: llama.cpp refuses a quantized V cache without it.
_UNQUANTIZED_KV = ("f32", "f16", "bf16")


class Flaw(NamedTuple):
    """Something wrong with a value, or with its key, or with what is missing below it."""

    loc: Loc
    text: str
    on_key: bool = False


# --- reading ----------------------------------------------------------------------------------


def load(path: Path) -> Declaration:
    """
    Read params.yaml.

    Raises:
        ParamsError: It is wrong; `problems` holds every finding, in the order of the file.
    """
    document = marked_yaml.read(path)
    return _judge(document, _contradictions(document.data))


def check(at: Layout) -> Declaration:
    """
    Read params.yaml and look at the files that it names.

    Raises:
        ParamsError: The declaration, a corpus or a source directory is wrong; all problems at once.
    """
    document = marked_yaml.read(at.params)
    return _judge(
        document, chain(_contradictions(document.data), _file_flaws(document.data, at.root))
    )


def check_files(declared: Declaration, root: Path) -> list[Problem]:
    """Return what is wrong with the corpora and source directories below `root`, by line."""
    data = json.loads(declared.model_dump_json())
    flaws = list(_file_flaws(data, root))
    if not flaws:
        return []
    try:
        document = marked_yaml.read(Layout(root).params)
    except ParamsError:
        # The file has changed since it was read; what is wrong is still worth saying.
        document = marked_yaml.Document(marked_yaml.shown_name(Layout(root).params))
    return _problems(document, flaws)


def check_main(at: Layout, *, as_json: bool) -> int:
    """
    Do `fleet check`: say on stdout what is declared, or fail.

    Args:
        at: The checkout.
        as_json: Print {file, models, quants, hosts, problems, warnings} and return 2 if there are
            problems.

    Raises:
        ParamsError: There are problems and `as_json` is false.
    """
    problems: tuple[Problem, ...] = ()
    counts = {"models": 0, "quants": 0, "hosts": 0}
    late: list[str] = []
    try:
        declared = check(at)
    except ParamsError as error:
        if not as_json:
            raise
        problems = error.problems
    else:
        counts = {name: len(getattr(declared, name)) for name in counts}
        late = over_waivers(declared, datetime.now(UTC).strftime("%Y-%m-%d"))
    name = marked_yaml.shown_name(at.params)
    if not as_json:
        for line in late:
            console.warn(f"{name}: {line}")
        console.out(f"{name}: {', '.join(_count(word, n) for word, n in counts.items())}, all well")
        return 0
    found = [
        {"file": each.file, "line": each.line, "column": each.column, "text": each.text}
        for each in problems
    ]
    console.out(json.dumps({"file": name, **counts, "problems": found, "warnings": late}, indent=2))
    return ParamsError.exit_code if problems else 0


def _count(plural: str, number: int) -> str:
    return f"{number} {plural.removesuffix('s') if number == 1 else plural}"


def _judge(document: Document, others: Iterable[Flaw]) -> Declaration:
    """
    Return the typed declaration if nothing is wrong with it.

    Args:
        document: The file.
        others: What is wrong beyond YAML and types. A value that these refuse is not judged again.

    Raises:
        ParamsError: Something is.
    """
    problems = [finding.within(document.name) for finding in document.findings]
    refused = {finding.loc for finding in document.findings}
    declared = None
    try:
        # From JSON, since strict types then take a list for a tuple, and nothing else for less.
        declared = params.Declaration.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        details = [_of_value(each) for each in error.errors(include_url=False)]
        typed = [
            _type_flaw(document, each)
            for each in details
            if each["loc"] not in refused or each["type"] == "extra_forbidden"
        ]
        problems += _problems(document, typed)
        refused |= {flaw.loc for flaw in typed if not flaw.on_key}
    problems += _problems(document, (f for f in others if f.on_key or f.loc not in refused))
    if declared is None or problems:
        raise marked_yaml.failure(problems)
    return declared


def _problems(document: Document, flaws: Iterable[Flaw]) -> list[Problem]:
    """Put each flaw on its line, once."""
    return [
        Finding(_mark(document, flaw), flaw.loc, flaw.text).within(document.name)
        for flaw in dict.fromkeys(flaws)
    ]


def _mark(document: Document, flaw: Flaw) -> Mark:
    return document.key_at(flaw.loc) if flaw.on_key else document.value_at(flaw.loc)


# --- what the types refuse --------------------------------------------------------------------


def _of_value(detail: ErrorDetails) -> ErrorDetails:
    """Leave out of the place which alternative of `a number or a word` pydantic speaks of."""
    if detail["loc"][-2:-1] in {("gpu_layers",), ("cpu_moe_layers",)}:
        return detail | {"loc": detail["loc"][:-1]}
    return detail


_LOGIN_PLACE = (
    "user and password belong in the environment (AWS_* for `s3:`, HF_TOKEN for `hf:`, "
    "MLFLOW_TRACKING_* for `mlflow:`, GGUF_FLEET_<NAME>_* for `oci:`), never in this file"
)


def _type_flaw(document: Document, detail: ErrorDetails) -> Flaw:
    """Say in the words of the declaration what pydantic says in its own."""
    from pipelines import schema  # noqa: PLC0415 - builds the JSON Schema; only after a mistake

    loc = detail["loc"]
    if detail["type"] == "extra_forbidden":
        return _unknown_key(loc, schema.at(loc[:-1]))
    if loc and loc[-1] == "[key]":
        names = schema.at(loc[:-2])["propertyNames"]
        better = re.sub("[^a-z0-9_-]+", "-", str(loc[-2]).lower()).strip("-_")
        fits = names["pattern"] == params.MODEL_KEY and re.fullmatch(params.MODEL_KEY, better)
        close = f"; {quoted(better)} would be" if fits else ""
        return Flaw(loc[:-1], f"is not {schema.allowed(names)}{close}", on_key=True)
    part, shown = schema.at(loc), document.shown(loc)
    words = schema.allowed(part)
    if detail["type"] == "missing":
        meaning = f" {part['description']}" if "description" in part else ""
        return Flaw(loc, f"is missing.{meaning} Allowed: {words}", on_key=True)
    # Never repeated: these may hold a password.
    if loc == ("track", "tracking_uri"):
        shown = ""
    elif loc[:1] == ("registries",) and "@" in f"{detail['input']}{shown}":
        words, shown = f"{words}; {_LOGIN_PLACE}", ""
    if shown and "enum" in part and (close := did_you_mean(str(detail["input"]), part["enum"])):
        return Flaw(loc, f"{shown} is unknown{close} Allowed: {words}")
    if not shown:
        return Flaw(loc, f"is not {words}")
    quotes = "pattern" in part and isinstance(detail["input"], int | float)
    return Flaw(loc, f"{shown} is not {words}" + ("; put it in quotes" if quotes else ""))


def _unknown_key(loc: Loc, parent: dict[str, Any]) -> Flaw:
    known = list(parent["properties"])
    if (new := migrations.renamed(loc)) is not None:
        text = f"is called {quoted(new.name)} since {new.since}: fleet template migrate"
        return Flaw(loc, text, on_key=True)
    close = did_you_mean(str(loc[-1]), known) or "."
    return Flaw(loc, f"is no key here{close} Allowed: {', '.join(known)}", on_key=True)


# --- what contradicts itself ------------------------------------------------------------------
#
# These functions see plain data that may be of any shape: whatever is not of the type that a rule
# is about has been reported by the types.


def _contradictions(data: Any) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    yield from _model_flaws(data)
    yield from _quant_flaws(data)
    yield from _gate_flaws(data)
    yield from _benchmark_flaws(_mapping(data, "benchmark"))
    yield from _compare_flaws(_mapping(data, "compare"))
    yield from _serving_flaws(data)
    yield from _registry_flaws(data)
    yield from _waiver_flaws(data)
    for key, host in _entries(data, "hosts"):
        if host.get("vram_mib") is None and host.get("memory_mib") is None:
            text = "needs `vram_mib` (a GPU host) or `memory_mib` (a CPU host)"
            yield Flaw(("hosts", key), text, on_key=True)
        labels = host.get("runs_on")
        if isinstance(labels, list) and labels and labels[0] != "self-hosted":
            text = "must begin with `self-hosted`: GitHub's own machines measure nothing"
            yield Flaw(("hosts", key, "runs_on"), text)
    uri = _mapping(data, "track").get("tracking_uri")
    if isinstance(uri, str) and _holds_password(uri):
        text = "holds a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        yield Flaw(("track", "tracking_uri"), text)


def _holds_password(uri: str) -> bool:
    try:
        return urlsplit(uri).password is not None
    except ValueError:
        return False


def _model_flaws(data: Any) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """References of a model to corpora, and its name."""
    models = _mapping(data, "models")
    used = [str(quant.get("model")) for _, quant in _entries(data, "quants")]
    # A quant of an undeclared model is most likely the one that another model misses.
    all_known = bool(used) and all(name in models for name in used)
    for key, model in _entries(data, "models"):
        here: Loc = ("models", key)
        if key in TAKEN_NAMES:
            taken = ", ".join(sorted(TAKEN_NAMES))
            yield Flaw(here, f"is the name of a folder in work/; not allowed: {taken}", on_key=True)
        if all_known and key not in used:
            text = f"has no quant; declare one under `quants`, such as {quoted(f'{key}-Q4_K_M')}"
            yield Flaw(here, text, on_key=True)
        yield from _corpus_flaws(data, here, model)
        for what in ("eval", "host"):
            names = model.get(f"{what}s")
            names = names if isinstance(names, list) else []
            yield from _names_flaws((*here, f"{what}s"), what, names, _mapping(data, f"{what}s"))
    for key, entry in _entries(data, "evals"):
        if entry.get("kind") == "multiple-choice" and entry.get("chance") is not None:
            text = "is for the other kinds; of a multiple choice the items say it. Remove it"
            yield Flaw(("evals", key, "chance"), text, on_key=True)


def _names_flaws(
    here: Loc, what: str, names: list[object], declared: dict[str, Any]
) -> Iterator[Flaw]:
    """Names in a list that are not declared, or there twice."""
    for i, name in enumerate(names):
        if not isinstance(name, str):
            continue
        if name not in declared:
            text = f"{what} {quoted(name)} is not declared{_instead(name, declared)}"
            yield Flaw((*here, i), text)
        elif name in names[:i]:
            yield Flaw((*here, i), f"{what} {quoted(name)} is there twice; once is enough")


def _corpus_flaws(data: Any, here: Loc, model: dict[str, Any]) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    corpora = _mapping(data, "corpora")
    digests: dict[str, object] = {}
    for role in ("evaluation", "calibration"):
        name = model.get(role, params.Model.model_fields[role].default)
        if not isinstance(name, str):
            continue
        if name not in corpora:
            text = f"corpus {quoted(name)} is not declared{_instead(name, corpora)}"
            yield Flaw((*here, role), text, on_key=role not in model)
            continue
        corpus = corpora[name]
        digests[role] = corpus.get("sha256", name) if isinstance(corpus, dict) else name
    both = len(digests) == 2  # noqa: PLR2004 - calibration and evaluation
    if both and digests["evaluation"] == digests["calibration"]:
        text = "is the same text as `evaluation`; a matrix fitted to the text on which it is judged"
        yield Flaw((*here, "calibration"), f"{text} makes quants look better than they are")


def _instead(name: str, declared: Iterable[str]) -> str:
    """Say which names could have been meant."""
    shown = ", ".join(quoted(each) for each in list(declared)[:20]) or "nothing"
    return f"{did_you_mean(name, declared) or '.'} Declared: {shown}"


def _quant_flaws(data: Any) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """Name of a quant, its model, its matrix, its rules."""
    models = _mapping(data, "models")
    seen: dict[tuple[str, str], str] = {}
    for key, quant in _entries(data, "quants"):
        here: Loc = ("quants", key)
        if _is_text(quant, "model") and quant["model"] not in models:
            name = quant["model"]
            text = f"model {quoted(name)} is not declared{_instead(name, models)}"
            yield Flaw((*here, "model"), text)
        elif _is_text(quant, "model") and quant.get("type") in _QUANT_TYPES:
            yield from _name_flaws(here, key, quant, seen)
        yield from _imatrix_flaws(here, quant, models.get(str(quant.get("model"))))
        yield from _tensor_flaws(here, quant)


def _name_flaws(
    here: Loc, key: str, quant: dict[str, Any], seen: dict[tuple[str, str], str]
) -> Iterator[Flaw]:
    model, type_ = quant["model"], quant["type"]
    if key != f"{model}-{type_}":
        yield Flaw(here, f"must be called {quoted(f'{model}-{type_}')}", on_key=True)
    first = seen.setdefault((model, type_), key)
    if first != key:
        text = f"{type_} of {quoted(model)} is declared by {quoted(first)} already"
        yield Flaw((*here, "type"), text)


def _imatrix_flaws(here: Loc, quant: dict[str, Any], model: object) -> Iterator[Flaw]:
    imatrix, type_ = quant.get("imatrix", False), quant.get("type")
    loc = (*here, "imatrix")
    if imatrix is True and isinstance(model, dict) and model.get("calibration") is None:
        name = quoted(str(quant["model"]))
        yield Flaw(loc, f"model {name} declares no `calibration` corpus")
    if imatrix is False and isinstance(type_, str) and type_ in params.NEEDS_IMATRIX:
        text = f"must be true: llama-quantize makes no {type_} without an importance matrix"
        yield Flaw(loc, text, on_key="imatrix" not in quant)


def _tensor_flaws(here: Loc, quant: dict[str, Any]) -> Iterator[Flaw]:
    rules = quant.get("tensor_types")
    rules = rules if isinstance(rules, list) else []
    for i, rule in enumerate(rules):
        pattern = rule.get("match") if isinstance(rule, dict) else None
        if isinstance(pattern, str) and not params.is_safe_regex(pattern):
            text = f"{quoted(pattern)} is no regular expression that llama-quantize and Python read"
            more = "alike: lower case, no `=`, no `(?` but `(?:` and `(?!`, four repeats at most"
            yield Flaw((*here, "tensor_types", i, "match"), f"{text} {more}")
    type_ = quant.get("type")
    for option in ("tensor_types", "recipe_file"):
        if quant.get(option) and isinstance(type_, str) and type_ in params.UNQUANTIZED:
            text = f"has no effect on {type_}, whose tensors are not quantized; remove it"
            yield Flaw((*here, option), text, on_key=True)
    if quant.get("preset") is not None and type_ in tensor_rules.NOTHING_TO_KEEP:
        text = f"keeps tensors at Q8_0: no effect on {type_}, which is as exact; remove it"
        yield Flaw((*here, "preset"), text, on_key=True)
    if quant.get("leave_output_tensor") is True and quant.get("output_tensor_type") is not None:
        text = "contradicts `leave_output_tensor: true`; remove one of the two"
        yield Flaw((*here, "output_tensor_type"), text, on_key=True)


def _gate_flaws(data: Any) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """A percentile that is estimated from too little text is no gate."""
    fields, quality = params.Quality.model_fields, _mapping(data, "benchmark", "quality")
    chunks = quality.get("chunks", fields["chunks"].default)
    window = quality.get("context_tokens", fields["context_tokens"].default)
    if not _is_whole(chunks) or not _is_whole(window):
        return
    least = -(-params.P999_TOKENS // max(window // 2, 1))
    if chunks >= least:
        return
    owners: list[Loc] = [()]
    owners += [("models", key) for key, _ in _entries(data, "models")]
    for owner in owners:
        if _mapping(data, *owner, "gates").get("max_kld_p999_nats") is not None:
            text = f"needs `benchmark.quality.chunks` of {least:,} or more, not {chunks:,}"
            yield Flaw((*owner, "gates", "max_kld_p999_nats"), text)


def _benchmark_flaws(benchmark: dict[str, Any]) -> Iterator[Flaw]:
    """Settings that llama.cpp would change in silence, or that leave too little to judge."""

    def value(key: str) -> Any:  # noqa: ANN401 - any YAML value
        return benchmark.get(key, params.Benchmark.model_fields[key].default)

    dropped, repetitions = value("dropped_repetitions"), value("repetitions")
    if _is_whole(dropped) and _is_whole(repetitions):
        most = repetitions - params.MIN_SAMPLES
        if dropped > most:
            text = f"of {repetitions} repetitions {params.MIN_SAMPLES} samples must remain"
            yield Flaw(("benchmark", "dropped_repetitions"), f"{text}: {max(most, 0)} at most")
    batch, ubatch = value("batch_tokens"), value("ubatch_tokens")
    if _is_whole(batch) and _is_whole(ubatch) and ubatch > batch:
        text = f"{ubatch} is more than `batch_tokens`, {batch}, to which llama.cpp would lower it"
        yield Flaw(("benchmark", "ubatch_tokens"), text)
    if value("kv_type") not in _UNQUANTIZED_KV and value("flash_attention") is False:
        text = f"{quoted(str(value('kv_type')))} needs `flash_attention: true`"
        yield Flaw(("benchmark", "kv_type"), text)
    depths = value("depths")
    if isinstance(depths, list) and len({str(each) for each in depths}) < len(depths):
        yield Flaw(("benchmark", "depths"), "holds a depth twice")


def _goodput_flaws(data: Any, owner: Loc) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """A share that so few requests cannot show, even if none of them misses."""
    share = _mapping(data, *owner).get("min_goodput")
    count = _mapping(data, "load_test").get(
        "open_requests", params.LoadTest.model_fields["open_requests"].default
    )
    if not isinstance(share, float) or not 0 < share < 1 or not _is_whole(count):
        return
    least = params.least_requests(share)
    if count < least:
        text = f"needs `load_test.open_requests` of {least:,} or more, not {count:,}"
        yield Flaw((*owner, "min_goodput"), text)


def _compare_flaws(declared: dict[str, Any]) -> Iterator[Flaw]:
    """Repetitions of which none would be left."""

    def value(key: str) -> Any:  # noqa: ANN401 - any YAML value
        return declared.get(key, params.Compare.model_fields[key].default)

    dropped, repetitions = value("dropped_repetitions"), value("repetitions")
    if _is_whole(dropped) and _is_whole(repetitions) and dropped >= repetitions:
        text = f"leaves none of {repetitions} repetitions: {max(repetitions - 1, 0)} at most"
        yield Flaw(("compare", "dropped_repetitions"), text)


def _serving_flaws(data: Any) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """Prompts that do not fit the context, and what the engines refuse."""
    fleet, load = _mapping(data, "serving"), _mapping(data, "load_test")
    yield from _goodput_flaws(data, ("load_test", "slo"))
    for key, _ in _entries(data, "hosts"):
        yield from _goodput_flaws(data, ("hosts", key, "slo"))
    fields = params.LoadTest.model_fields
    prompt = load.get("prompt_tokens", fields["prompt_tokens"].default)
    answer = load.get("generate_tokens", fields["generate_tokens"].default)
    for key, model in _entries(data, "models"):
        context = model.get("context_tokens")
        if _is_whole(context) and _is_whole(prompt) and _is_whole(answer):
            needed = prompt + answer + params.TEMPLATE_TOKENS
            if needed > context:
                text = (
                    f"{context:,} is less than the load test needs: {prompt:,} prompt_tokens, "
                    f"{answer:,} generate_tokens and {params.TEMPLATE_TOKENS} for the chat template"
                )
                yield Flaw(("models", key, "context_tokens"), text)
        yield from _goodput_flaws(data, ("models", key, "slo"))
        own = fleet | _mapping(model, "serving")
        yield from _expert_flaws(key, model, own)
        if own.get("kv_type", "f16") != "f16" and own.get("flash_attention") is False:
            place: Loc = ("models", key, "serving") if "serving" in model else ("serving",)
            text = f"`kv_type: {own['kv_type']}` needs `flash_attention: true`"
            yield Flaw(place, text, on_key=True)


def _expert_flaws(key: str, model: dict[str, Any], own: dict[str, Any]) -> Iterator[Flaw]:
    """Experts in main memory, which Ollama can be told of no single model."""
    engine = own.get("engine", params.Serving.model_fields["engine"].default)
    if own.get("cpu_moe_layers") is None or engine not in {"auto", "ollama"}:
        return
    is_own = _mapping(model, "serving").get("cpu_moe_layers") is not None
    place: Loc = ("models", key, "serving") if is_own else ("serving",)
    yield Flaw((*place, "cpu_moe_layers"), params.NO_EXPERTS_APART, on_key=True)


def _registry_flaws(data: Any) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """What a kind of registry needs or has not, and two that are one."""
    registries = _entries(data, "registries")
    kinds = {key: str(entry.get("url")).partition(":")[0] for key, entry in registries}
    kinds.setdefault(params.LOCAL_REGISTRY, "file")
    for key, entry in registries:
        here: Loc = ("registries", key)
        kind = kinds[key]
        if kind not in _REGISTRY_KINDS:
            continue  # the types say what a URL is
        if key == params.LOCAL_REGISTRY and kind != "file":
            text = "must be `file:` and a directory: it is the registry that `dvc repro` keeps"
            yield Flaw((*here, "url"), text)
        if key == params.LOCAL_REGISTRY and entry.get("environment") is not None:
            text = "is for registries that a workflow writes to; `local` is on one machine only"
            yield Flaw((*here, "environment"), text, on_key=True)
        yield from _blobs_flaws(here, entry, kinds)
        for option, for_kinds in (("endpoint", ("s3", "hf")), ("region", ("s3",))):
            if entry.get(option) is not None and kind not in for_kinds:
                text = f"is for {' and '.join(f'`{each}:`' for each in for_kinds)}; remove it"
                yield Flaw((*here, option), text, on_key=True)
        yield from _plain_http_flaws(here, entry)
    yield from _twin_flaws(registries)


_REGISTRY_KINDS = ("file", "s3", "oci", "hf", "mlflow")


def _blobs_flaws(here: Loc, entry: dict[str, Any], kinds: dict[str, str]) -> Iterator[Flaw]:
    """`mlflow:` keeps no files, so another registry has to; the others keep their own."""
    is_mlflow = kinds[str(here[1])] == "mlflow"
    blobs = entry.get("blobs")
    if blobs is None:
        if is_mlflow:
            others = ", ".join(quoted(key) for key, kind in kinds.items() if kind != "mlflow")
            text = f"needs `blobs`: the registry that holds the files. Declared: {others}"
            yield Flaw(here, text, on_key=True)
    elif not is_mlflow:
        text = "is for `mlflow:`; this registry keeps its own files"
        yield Flaw((*here, "blobs"), text, on_key=True)
    elif isinstance(blobs, str) and blobs not in kinds:
        text = f"registry {quoted(blobs)} is not declared{_instead(blobs, kinds)}"
        yield Flaw((*here, "blobs"), text)
    elif isinstance(blobs, str) and kinds[blobs] == "mlflow":
        yield Flaw((*here, "blobs"), f"{quoted(blobs)} is `mlflow:`, which keeps no files either")


def _plain_http_flaws(here: Loc, entry: dict[str, Any]) -> Iterator[Flaw]:
    """Credentials and models that anybody on the way may read or change."""
    for key in ("url", "endpoint"):
        text = entry.get(key)
        address = text.removeprefix("mlflow:") if isinstance(text, str) else ""
        if not address.startswith("http://") or entry.get("insecure") is True:
            continue
        try:
            host = urlsplit(address).hostname or ""
        except ValueError:
            continue  # the types say what a URL is
        if not is_loopback(host):
            told = f"is plain HTTP to {quoted(host)}: anybody on the way reads and changes what is"
            yield Flaw((*here, key), f"{told} sent. Take https, or declare `insecure: true`")


def _twin_flaws(registries: list[tuple[str, dict[str, Any]]]) -> Iterator[Flaw]:
    """One place under two names would have two histories of one alias."""
    seen: dict[tuple[str, str], str] = {}
    if params.LOCAL_REGISTRY not in dict(registries):
        seen[_place(params.LOCAL_URL, None)] = params.LOCAL_REGISTRY
    for key, entry in registries:
        url = entry.get("url")
        if not isinstance(url, str):
            continue
        first = seen.setdefault(_place(url, entry.get("endpoint")), key)
        if first != key:
            text = f"is the place of registry {quoted(first)} already; remove one of the two"
            yield Flaw(("registries", key, "url"), text)


def _place(url: str, endpoint: object) -> tuple[str, str]:
    """Return what is equal for two spellings of one place."""
    kind, _, rest = url.partition(":")
    return f"{kind}:{posixpath.normpath(rest)}", str(endpoint or "").rstrip("/")


def _waiver_flaws(data: Any) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """Two waivers of one gate: nobody could say which one let a release pass."""
    for key, model in _entries(data, "models"):
        seen: set[object] = set()
        waivers = model.get("waivers")
        for i, waiver in enumerate(waivers if isinstance(waivers, list) else ()):
            gate = waiver.get("gate") if isinstance(waiver, dict) else None
            if isinstance(gate, str) and gate in seen:
                text = f"{quoted(gate)} has a waiver already; keep the one that counts"
                yield Flaw(("models", key, "waivers", i, "gate"), text)
            seen.add(str(gate))


def over_waivers(declared: Declaration, today: str) -> list[str]:
    """
    Name the waivers whose last day is over; no error, or a day's end would stop the chain.

    Args:
        declared: The declaration.
        today: The day in UTC, as 2027-01-31.
    """
    return [
        f"models.{model}.waivers: the waiver of `{waiver.gate}` by {waiver.who} ended on "
        f"{waiver.until}: nothing new is released by it. Remove it, or decide again."
        for model, spec in declared.models.items()
        for waiver in spec.waivers
        if waiver.until < today
    ]


def _mapping(data: Any, *path: str | int) -> dict[str, Any]:  # noqa: ANN401 - any YAML value
    """Return the mapping at a path; an empty one if something else is there."""
    for step in path:
        data = data.get(step) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _entries(data: Any, section: str) -> list[tuple[str, dict[str, Any]]]:  # noqa: ANN401 - any YAML value
    """Return the named mappings of a section."""
    return [(k, v) for k, v in _mapping(data, section).items() if isinstance(v, dict)]


def _is_text(mapping: dict[str, Any], key: str) -> bool:
    return isinstance(mapping.get(key), str)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


# --- files ------------------------------------------------------------------------------------


def _file_flaws(data: Any, root: Path) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """Compare what is declared with what lies below `root`; skips what the types refuse."""
    for key, entry in _entries(data, "corpora"):
        try:
            corpus = params.Corpus.model_validate(entry)
        except ValidationError:
            continue
        yield from _corpus_file_flaws(("corpora", key), corpus, root)
    yield from _eval_file_flaws(data, root)
    yield from _recipe_file_flaws(data, root)
    yield from _modelfile_flaws(data, root)
    for key, entry in _entries(data, "models"):
        source = entry.get("source")
        if isinstance(source, str) and source.startswith("path:"):
            flaws = list(_directory_flaws(("models", key, "source"), source[len("path:") :], root))
            yield from flaws or _revision_flaws(key, entry, source[len("path:") :], root)


def _eval_file_flaws(data: Any, root: Path) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """Sets of tasks: the declared bytes, and items as their kind wants them."""
    for key, entry in _entries(data, "evals"):
        try:
            declared = params.Eval.model_validate(entry)
        except ValidationError:
            continue
        here: Loc = ("evals", key)
        corpus = params.Corpus(path=declared.path, sha256=declared.sha256)
        flaws = list(_corpus_file_flaws(here, corpus, root))
        if not any(flaw.loc[-1] == "path" for flaw in flaws):
            # What is in other bytes than were declared is of interest, too: they are often meant.
            yield from (Flaw((*here, "path"), text) for text in _item_flaws(declared, root))
        yield from flaws


def _recipe_file_flaws(data: Any, root: Path) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """Files of tensor rules: the declared bytes, and rules that llama-quantize will take."""
    for key, quant in _entries(data, "quants"):
        try:
            declared = params.RecipeFile.model_validate(quant.get("recipe_file"))
        except ValidationError:
            continue
        here: Loc = ("quants", key, "recipe_file")
        corpus = params.Corpus(path=declared.path, sha256=declared.sha256)
        flaws = list(_corpus_file_flaws(here, corpus, root))
        yield from flaws
        if not flaws:
            try:
                tensor_rules.read_file(declared, root, ".".join(map(str, here)))
            except FleetError as error:
                yield Flaw((*here, "path"), error.message.rstrip("."))


def _item_flaws(declared: params.Eval, root: Path) -> Iterator[str]:
    """Say what is wrong with the first items of a set, each with file and line."""
    from pipelines import evals  # noqa: PLC0415 - only where there is a set

    problems = evals.problems_of(declared, root)
    yield from map(evals.spelled, problems[:_ITEM_FLAWS_SHOWN])
    if more := problems[_ITEM_FLAWS_SHOWN:]:
        yield f"{declared.path} has {_count('problems', len(more))} more like these"


def _corpus_file_flaws(here: Loc, corpus: params.Corpus, root: Path) -> Iterator[Flaw]:
    path = root / corpus.path
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            yield Flaw((*here, "path"), f"{corpus.path} leads out of the repository")
        elif not path.exists():
            yield Flaw((*here, "path"), f"{corpus.path} does not exist")
        elif not path.is_file():
            yield Flaw((*here, "path"), f"{corpus.path} is not a regular file")
        elif (got := hashing.digest(path).sha256) != corpus.sha256:
            text = f"{corpus.path} has other bytes than declared: want {corpus.sha256}, got {got}"
            yield Flaw((*here, "sha256"), f"{text}. If they are meant, write: sha256: {got}")
    except (OSError, RuntimeError) as error:
        # RuntimeError is how pathlib of Python 3.11 tells of a loop of links.
        yield Flaw((*here, "path"), f"{corpus.path} cannot be read: {_reason(error)}")


def _modelfile_flaws(data: Any, root: Path) -> Iterator[Flaw]:  # noqa: ANN401 - any YAML value
    """Look for the Modelfiles."""
    for key, entry in _entries(data, "models"):
        name = entry.get("modelfile", params.Model.model_fields["modelfile"].default)
        if not isinstance(name, str) or not re.fullmatch(params.MODELFILE, name):
            continue
        loc: Loc = ("models", key, "modelfile")
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            yield Flaw(loc, f"Modelfile {quoted(name)} leads out of the repository")
        elif not path.is_file():
            yield Flaw(loc, f"Modelfile {quoted(name)} does not exist")


def _directory_flaws(loc: Loc, source: str, root: Path) -> Iterator[Flaw]:
    path = root / source
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            yield Flaw(loc, f"directory {quoted(source)} leads out of the repository")
        elif path.resolve() == root.resolve():
            yield Flaw(loc, "must be a directory of the model's own, not the whole repository")
        elif not path.is_dir():
            what = "is not a directory" if path.exists() else "does not exist"
            yield Flaw(loc, f"directory {quoted(source)} {what}")
    except (OSError, RuntimeError) as error:
        yield Flaw(loc, f"directory {quoted(source)} cannot be read: {_reason(error)}")


def _revision_flaws(key: str, entry: dict[str, Any], source: str, root: Path) -> Iterator[Flaw]:
    """Hold the declared revision of a directory against what is in it."""
    from pipelines import fetch, records  # noqa: PLC0415 - only where there is a directory

    revision = entry.get("revision")
    if not isinstance(revision, str) or not re.fullmatch(params.REVISION, revision):
        return
    known = records.read_or_reason(Layout(root).model_record("fetch", key), records.FetchRecord)
    try:
        flaw = fetch.revision_flaw(
            root / source, revision, known if isinstance(known, records.FetchRecord) else None
        )
    except (OSError, FleetError) as error:
        what = error.message if isinstance(error, FleetError) else _reason(error)
        yield Flaw(("models", key, "source"), f"{source} cannot be read: {what.rstrip('.')}")
        return
    if flaw:
        yield Flaw(("models", key, "revision"), flaw)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "a loop of symbolic links"


# --- slices -----------------------------------------------------------------------------------


def slices(declared: Declaration) -> dict[tuple[str, str], Closed]:
    """Return what every stage reads, by (stage, key); the key of `report` is "fleet"."""
    found: dict[tuple[str, str], Closed] = {}
    for model in declared.models:
        found["fetch", model] = params.fetch_slice(declared, model)
        found["convert", model] = params.convert_slice(declared, model)
        found["verify", model] = params.verify_slice(declared, model)
        found["calibrate", model] = params.calibrate_slice(declared, model)
        found["evaluate", model] = params.evaluate_slice(declared, model)
        found["choose", model] = params.choose_slice(declared, model)
        found["load-test", model] = params.load_test_slice(declared, model)
        found["publish", model] = params.publish_slice(declared, model)
        found["track", model] = params.track_slice(declared, model)
    for quant in declared.quants:
        found["quantize", quant] = params.quantize_slice(declared, quant)
        found["benchmark", quant] = params.benchmark_slice(declared, quant)
    found["report", "fleet"] = params.report_slice(declared)
    return found


def write_slices(declared: Declaration, at: Layout) -> None:
    """
    Write every slice where DVC tracks it, and remove those of keys that are gone.

    A file with the same content is left as it is, so that its time stamp says since when.
    """
    wanted: set[Path] = set()
    for (stage, key), slice_ in slices(declared).items():
        path = at.slice(stage, key)
        atomic.write_json(path, json.loads(slice_.model_dump_json()))
        wanted.add(path)
    stages = {path.parent for path in wanted}
    for directory in next(iter(stages)).parent.iterdir():
        if directory not in stages:
            atomic.remove(directory)
            continue
        for path in directory.iterdir():
            if path not in wanted:
                atomic.remove(path)
