"""
The load test against somebody's running server: `fleet load-test MODEL --url URL`.

The same generator, ladder, open run, levels and calibration as the stage's. What cannot be known of
a server that is not ours is not claimed: which file it serves, how much memory it takes, whether
others use it meanwhile. So it writes no record, and nothing is promoted by it.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

import requests
from pydantic import Field
from urllib3.exceptions import HTTPError

from pipelines import corpora, load_gates, load_session, params
from pipelines.console import clean
from pipelines.errors import ParamsError, RetryLaterError
from pipelines.load import access
from pipelines.load_records import Calibration, EngineId, LoadGate, LoadRun
from pipelines.records import Part
from pipelines.wording import did_you_mean, first_few, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.load.plan import Api
    from pipelines.params import Corpus, Declaration, Host, LoadTest, Slo

_ANSWER_WITHIN_S: Final = 10.0
_HTTP_OK: Final = 200
_HTTP_REDIRECTS: Final = range(300, 400)
_HTTP_UNKNOWN_CALLER: Final = (401, 403)
# A list of some ten thousand models; what is longer is no list of models.
_MOST_BYTES: Final = 4 << 20
_NAME_CHARACTERS: Final = 512
_NAMES_COMPARED: Final = 1000
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
        # That server keeps what earlier tests have sent: their prompts would be read from a cache.
        salt=secrets.randbits(load_session.SALT_BITS),
    )
    runs: list[LoadRun] = []
    session.drive(runs, lambda: None)
    calibrated = session.calibrate(runs)
    judged = load_gates.judged_run(runs)
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
        invalid=tuple(_doubts(runs, calibrated)),
    )


def _doubts(runs: Sequence[LoadRun], calibrated: Calibration | None) -> Iterator[str]:
    if calibrated is not None and calibrated.client_bound:
        yield calibrated.reason
    if any(run.kind == "open" for run in runs) and load_gates.judged_run(runs) is None:
        yield load_gates.NOTHING_ARRIVED


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
            # What stands before an @ may be a password.
            f"--url {quoted(text.rpartition('@')[2])} is no address of a server.",
            hint="--url http://localhost:11434",
        )
    if parts.username is not None or parts.password is not None:
        raise ParamsError(
            "--url holds a password or a user, which process lists would show.",
            hint=f"A key belongs into the environment, as {access.API_KEY_ENV}.",
        )
    path = parts.path.rstrip("/")
    for tail in ("/v1", "/api"):
        path = path.removesuffix(tail)
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def identify(url: str, api: Api | None) -> tuple[Api, str]:
    """
    Tell what a server speaks, and its version as far as it says.

    Raises:
        RetryLaterError: Nothing answers.
        ParamsError: It speaks neither, or not what was asked for, or does not let us in.
    """
    version = _ask(f"{url}/api/version").value if api != "openai" else None
    if isinstance(version, dict) and isinstance(version.get("version"), str):
        return "ollama", f"Ollama {clean(version['version'])[:40]}"
    if api != "ollama":
        models = _ask(f"{url}/v1/models")
        if isinstance(models.value, dict) and isinstance(models.value.get("data"), list):
            return "openai", models.server or "an OpenAI-compatible server"
    asked = {"ollama": "Ollama's API", "openai": "the OpenAI-compatible API"}
    what = asked[api] if api else "neither Ollama's API nor the OpenAI-compatible one"
    raise ParamsError(
        f"{url} answers, but {'not ' if api else ''}with {what}.",
        hint="Give the root of the server, without /api or /v1.",
    )


def names(url: str, api: Api) -> list[str]:
    """Return the models that a server lists; what is no name of one is left out."""
    path, list_, key = {
        "ollama": ("/api/tags", "models", "name"), "openai": ("/v1/models", "data", "id"),
    }[api]  # fmt: skip
    listed = _ask(f"{url}{path}").value
    entries = listed.get(list_) if isinstance(listed, dict) else None
    if not isinstance(entries, list):
        return []
    found = (each.get(key) for each in entries if isinstance(each, dict))
    return [name for name in found if isinstance(name, str) and len(name) <= _NAME_CHARACTERS]


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
    listed = [clean(each) for each in listed[:_NAMES_COMPARED]]
    shown = first_few(listed) or "nothing"
    raise ParamsError(
        f"the server has no model {quoted(asked)}{did_you_mean(asked, listed) or '.'}",
        hint=f"--name NAME; it has {shown}.",
    )


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """JSON that a server answered, None if it was something else, and what it calls itself."""

    value: Any
    server: str


def _ask(url: str) -> _Reply:
    """
    Ask for JSON, of which so much is read for so long, and from nobody else than was asked.

    Raises:
        RetryLaterError: Nothing answers, or not to the end.
        ParamsError: It sends us elsewhere, or wants to know who we are.
    """
    with requests.Session() as session:
        session.trust_env = False
        session.headers.update(access.headers())
        session.verify = access.certificates()
        try:
            with session.get(
                url, timeout=_ANSWER_WITHIN_S, stream=True, allow_redirects=False
            ) as answer:
                _require_answer(url, answer)
                body = _body(answer) if answer.status_code == _HTTP_OK else b""
        except (requests.RequestException, HTTPError, OSError) as error:
            raise RetryLaterError(
                f"nothing answers at {url}: {type(error).__name__}.",
                hint="Is the server running, and can it be reached from here?",
            ) from error
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    return _Reply(value=value, server=clean(answer.headers.get("Server", ""))[:60])


def _require_answer(url: str, answer: requests.Response) -> None:
    if answer.status_code in _HTTP_REDIRECTS:
        where = clean(answer.headers.get("Location", ""))[:200] or "nowhere"
        raise ParamsError(
            f"{url} sends us on to {where}.", hint="Give that address, if it is right."
        )
    if answer.status_code in _HTTP_UNKNOWN_CALLER:
        raise ParamsError(
            f"{url} refuses us: status {answer.status_code}.",
            hint=f"{access.API_KEY_ENV} in the environment is sent as the key of the server.",
        )


def _body(answer: requests.Response) -> bytes:
    """
    Read an answer up to its end, or as much as shows that it is none.

    Raises:
        Timeout: It goes on for too long.
    """
    deadline = time.monotonic() + _ANSWER_WITHIN_S
    body = bytearray()
    while len(body) <= _MOST_BYTES and (data := answer.raw.read1(_MOST_BYTES)):
        body += data
        if time.monotonic() > deadline:
            raise requests.Timeout
    return bytes(body) if len(body) <= _MOST_BYTES else b""
