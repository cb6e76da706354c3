"""
The load test against somebody's running server: `fleet load-test MODEL --url URL`.

The same generator, ladder, open run, levels and calibration as the stage's. What cannot be known of
a server that is not ours is not claimed: which file it serves, how much memory it takes, whether
others use it meanwhile. So it writes no record, and nothing is promoted by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import urlsplit, urlunsplit

import requests
from pydantic import Field

from pipelines import corpora, load_gates, load_session, params
from pipelines.console import clean
from pipelines.errors import ParamsError, RetryLaterError
from pipelines.load_records import Calibration, EngineId, LoadGate, LoadRun
from pipelines.records import Part
from pipelines.wording import did_you_mean, first_few, quoted

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.load.plan import Api
    from pipelines.params import Corpus, Declaration, Host, LoadTest, Slo

_ANSWER_WITHIN_S: Final = 10.0
_HTTP_OK: Final = 200
_HOST: Final = "remote"


class RemoteTest(Part):
    """What driving a running server showed; printed by `--json`, never a record of the stage."""

    schema_version: int = 1
    url: str
    api: str
    name: str
    engine: EngineId
    slos: dict[str, dict[str, float]]
    runs: tuple[LoadRun, ...]
    calibration: Calibration | None
    gates: tuple[LoadGate, ...]
    invalid: tuple[str, ...] = Field(description="Why the numbers are not to be trusted.")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """
    What is to be driven.

    Attributes:
        url: Root of the server; without a password, which would show in process lists.
        api: What it speaks; None to find out.
        name: The model as the server calls it; None for the key.
        key: The model in params.yaml, or a name that is not declared there.
    """

    url: str
    api: Api | None
    name: str | None
    key: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model on a running server: where, in which dialect, under which name, of which version."""

    url: str
    api: Api
    name: str
    version: str


def find(wanted: Wanted) -> Found:
    """
    Find a model on a running server.

    Raises:
        ParamsError: The URL is none, or the server does not have the model.
        RetryLaterError: Nothing answers there.
    """
    url = checked_url(wanted.url)
    api, version = identify(url, wanted.api)
    return Found(url=url, api=api, name=pick_name(names(url, api), wanted), version=version)


@dataclass(frozen=True, kw_only=True)
class _Declared:
    load_test: LoadTest
    slos: dict[str, Slo]
    hosts: dict[str, Host]
    corpus: Corpus
    context_tokens: int | None


def drive(wanted: Wanted, declared: Declaration, at: Layout, *, log: Path) -> RemoteTest:
    """
    Drive a model on a running server by the declared plan.

    A model that is declared is judged by its own levels, another one by those of the fleet.

    Raises:
        ParamsError: The URL is none, or the server does not have the model.
        RetryLaterError: Nothing answers there.
        ToolError: The server answers, but not as its API says.
    """
    found = find(wanted)
    plan = _declared(declared, wanted.key)
    corpora.require(plan.corpus, at, "text of the load test's prompts")
    session = load_session.opened(
        url=found.url,
        api=found.api,
        name=found.name,
        declared=plan.load_test,
        slos=plan.slos,
        corpus=(at.root / plan.corpus.path).read_text(encoding="utf-8"),
        context_tokens=plan.context_tokens,
        log=log,
    )
    runs: list[LoadRun] = []
    session.drive(runs, lambda: None)
    calibrated = session.calibrate(runs)
    judged = next((run for run in runs if run.kind == "open"), None)
    return RemoteTest(
        url=found.url,
        api=found.api,
        name=found.name,
        engine=EngineId(
            kind="remote",
            version=found.version,
            llama_cpp="unknown",
            found_by="url",
            declared=True,
            sentence=f"a running server at {found.url}",
        ),
        slos={host: slo.model_dump(exclude_none=True) for host, slo in plan.slos.items()},
        runs=tuple(runs),
        calibration=calibrated,
        gates=tuple(
            gate
            for host, slo in plan.slos.items()
            if judged is not None
            for gate in load_gates.judge(judged, slo, host, plan.hosts[host], peak_memory_mib=None)
        ),
        invalid=(calibrated.reason,) if calibrated is not None and calibrated.client_bound else (),
    )


def _declared(declared: Declaration, key: str) -> _Declared:
    """Resolve the plan of a declared model, or that of the fleet."""
    if key in declared.models:
        slice_ = params.load_test_slice(declared, key)
        return _Declared(
            load_test=slice_.load_test,
            slos=slice_.slos,
            hosts=slice_.hosts,
            corpus=slice_.corpus,
            context_tokens=slice_.context_tokens,
        )
    levels = declared.load_test.slo.model_dump(exclude_none=True)
    return _Declared(
        load_test=declared.load_test,
        slos={_HOST: params.Slo(**({"min_goodput": params.MIN_GOODPUT} | levels))},
        hosts={_HOST: params.Host()},
        corpus=next(iter(declared.corpora.values())),
        context_tokens=None,
    )


def checked_url(text: str) -> str:
    """
    Return the root of a server, without what people paste behind it.

    Raises:
        ParamsError: It is no http URL, or holds a password.
    """
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        known = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, known = urlsplit(""), False
    if not known:
        raise ParamsError(
            f"--url {quoted(text)} is no address of a server.", hint="--url http://localhost:11434"
        )
    if parts.password is not None:
        raise ParamsError("--url holds a password, which process lists would show.")
    path = parts.path.rstrip("/")
    for tail in ("/v1", "/api"):
        path = path.removesuffix(tail)
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def identify(url: str, api: Api | None) -> tuple[Api, str]:
    """
    Tell what a server speaks, and its version as far as it says.

    Raises:
        RetryLaterError: Nothing answers.
        ParamsError: It speaks neither, or not what was asked for.
    """
    version = _json(f"{url}/api/version") if api != "openai" else None
    if isinstance(version, dict) and isinstance(version.get("version"), str):
        return "ollama", f"Ollama {clean(version['version'])[:40]}"
    models = _json(f"{url}/v1/models") if api != "ollama" else None
    if isinstance(models, dict) and isinstance(models.get("data"), list):
        return "openai", _server_words(url)
    asked = {"ollama": "Ollama's API", "openai": "the OpenAI-compatible API"}
    what = asked[api] if api else "neither Ollama's API nor the OpenAI-compatible one"
    raise ParamsError(
        f"{url} answers, but {'not ' if api else ''}with {what}.",
        hint="Give the root of the server, without /api or /v1.",
    )


def _server_words(url: str) -> str:
    """Return what an OpenAI-compatible server says of itself in its headers."""
    try:
        said = requests.get(f"{url}/v1/models", timeout=_ANSWER_WITHIN_S).headers.get("Server", "")
    except requests.RequestException:
        said = ""
    return clean(said)[:60] or "an OpenAI-compatible server"


def names(url: str, api: Api) -> list[str]:
    """Return the models that a server lists."""
    if api == "ollama":
        listed: Any = _json(f"{url}/api/tags")
        entries, key = (listed or {}).get("models"), "name"
    else:
        listed = _json(f"{url}/v1/models")
        entries, key = (listed or {}).get("data"), "id"
    return [str(entry[key]) for entry in entries or [] if isinstance(entry, dict) and key in entry]


def pick_name(listed: list[str], wanted: Wanted) -> str:
    """
    Find the model on the server: by its name, by its key, or since it is the only one.

    Raises:
        ParamsError: It is not there, with what is.
    """
    asked = wanted.name or wanted.key
    for candidate in (asked, f"{asked}:latest"):
        if candidate in listed:
            return candidate
    if wanted.name is None and len(listed) == 1:
        return listed[0]
    shown = first_few([clean(each) for each in listed]) or "nothing"
    raise ParamsError(
        f"the server has no model {quoted(asked)}{did_you_mean(asked, listed) or '.'}",
        hint=f"--name NAME; it has {shown}.",
    )


def _json(url: str) -> Any:  # noqa: ANN401 - any JSON value
    """Ask for JSON; None if the server answers with something else."""
    try:
        answer = requests.get(url, timeout=_ANSWER_WITHIN_S)
    except requests.RequestException as error:
        raise RetryLaterError(
            f"nothing answers at {url}: {type(error).__name__}.",
            hint="Is the server running, and can it be reached from here?",
        ) from error
    if answer.status_code != _HTTP_OK:
        return None
    try:
        return cast("Any", answer.json())
    except requests.JSONDecodeError:
        return None
