"""
The program that keeps releases in MLflow's model registry; `pipelines.stores.mlflow` asks it.

    python -m pipelines.mlflow_registry      one question a line on stdin, one answer on stdout

A process of its own, as `pipelines.mlflow_runs` is: SIGALRM, with its default action, ends it in
the middle of any call that hangs. It stays for all questions of a command, since mlflow takes
seconds to import, and its 230 MiB are not those of the process that sends the files. It holds no
state: whoever finds it gone starts another.

A question names an operation of `_OPERATIONS` and the address; user and password come with it, on
stdin, so that they are in no argv. An answer is `{"value": ...}` or `{"failure": kind, "text":
...}`, where the kind says what to do:

    unreachable   try again: no connection, no answer, 429, 5xx, a database that is locked
    denied        401 or 403
    wrong         it answered what cannot be
    missing       mlflow is not installed
    refused       anything else
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import mlflow_runs
from pipelines.track import SQLITE, scrubbed

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

# Both name what a version is, so that it is found again and never made twice.
RELEASE_TAG: Final = "fleet.release"
TYPE_TAG: Final = "fleet.type"
# On the version that aliases mean, last: all versions of its release are there.
COMPLETE_TAG: Final = "fleet.complete"

_READY: Final = "READY"
_PENDING: Final = "PENDING_REGISTRATION"
_READY_POLL_S: Final = 0.2
_PAGE: Final = 200
_STATUS: Final = re.compile(r"failed with error code (\d{3}) |too many (\d{3}) error responses")
# The innermost cause, which urllib3 puts at the end of a long line.
_CAUSE: Final = re.compile(r"Caused by (.+)$", re.DOTALL)
_NO_ANSWER: Final = ("failed with exception", "failed with timeout", "Retry", "Max retries")
_DENIED: Final = frozenset({401, 403})
_TOO_MANY: Final = 429
_SERVER_ERROR: Final = 500
_ENDPOINT: Final = "API request to endpoint "
_TEXT_CHARACTERS: Final = 400


class RegistryError(Exception):
    """What went wrong, by kind; see above."""

    def __init__(self, kind: str, text: str) -> None:
        """Say what the asking process is to make of it."""
        super().__init__(text)
        self.kind = kind


def main() -> int:
    """Answer until stdin ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # What a library prints is no answer.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        server = _Server()
        for line in sys.stdin:
            answers.write(json.dumps(server.answer(json.loads(line))) + "\n")
            answers.flush()
    return 0


class _Server:
    """The clients of one process, by address."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str, int], MlflowClient] = {}

    def answer(self, told: dict[str, Any]) -> dict[str, Any]:
        """Do one operation within its time."""
        try:
            client = self._client(told)
            signal.alarm(int(told["answer_within_s"]))
            return {"value": _OPERATIONS[told["operation"]](client, told)}
        except RegistryError as error:
            return {"failure": error.kind, "text": _shown(str(error))}
        except mlflow_runs.NoStoreError as error:
            return {"failure": "unreachable", "text": _shown(str(error))}
        except Exception as error:  # noqa: BLE001 - whatever a registry does has a kind
            return {"failure": _kind(error), "text": _shown(_text(error))}
        finally:
            signal.alarm(0)

    def _client(self, told: dict[str, Any]) -> MlflowClient:
        """Return the client of an address; the time of an import is not the server's."""
        uri = told["uri"]
        for variable, value in told["secrets"].items():
            os.environ.pop(variable, None)
            if value:
                os.environ[variable] = value
        # A database that was removed and made again is another one.
        file = Path(uri.removeprefix(SQLITE))
        is_file = uri.startswith(SQLITE)
        inode = file.stat().st_ino if is_file and file.exists() else 0
        if (uri, inode) not in self._clients:
            signal.alarm(int(told["answer_within_s"]))
            mlflow_runs.ask_server(uri)
            signal.alarm(0)
            try:
                client = mlflow_runs.client_of(uri)
            except mlflow_runs.NoStoreError as error:
                raise RegistryError("missing", str(error)) from error
            self._clients[uri, file.stat().st_ino if is_file else 0] = client
            return client
        return self._clients[uri, inode]


# --- operations -------------------------------------------------------------------------------


def _read(client: MlflowClient, told: dict[str, Any]) -> dict[str, Any] | None:
    """Return tags and aliases of a registered model; None if there is none."""
    model = told["model"]
    try:
        found = client.get_registered_model(model)
    except Exception as error:
        if _is_missing(error):
            return None
        raise
    if found.name != model:
        raise RegistryError("wrong", f"asked for the model {model}, it told of {found.name!r}")
    return {
        "tags": dict(found.tags),
        "aliases": {alias: _number(version) for alias, version in found.aliases.items()},
    }


def _ensure(client: MlflowClient, told: dict[str, Any]) -> None:
    """
    Make the registered model if there is none, else set its tags.

    Either is refused to somebody who may only read.
    """
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - loaded already

    if _read(client, told) is None:
        try:
            client.create_registered_model(
                told["model"], tags=told["tags"], description=told["description"]
            )
        except MlflowException as error:
            # Somebody else was faster.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        else:
            return
    for key, value in told["tags"].items():
        client.set_registered_model_tag(told["model"], key, value)


def _versions(client: MlflowClient, told: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the versions of a model, or of one release of it, oldest first."""
    return [_shown_version(each) for each in _search(client, told["model"], told.get("release"))]


def _search(client: MlflowClient, model: str, release: str | None) -> list[ModelVersion]:
    words = [f"name = '{model}'"]
    if release is not None:
        words.append(f"tags.`{RELEASE_TAG}` = '{release}'")
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(
            " and ".join(words), max_results=_PAGE, page_token=token
        )
        found += page
        token = page.token
        if not token:
            break
    strangers = [each.name for each in found if each.name != model]
    if strangers:
        raise RegistryError("wrong", f"asked for versions of {model}, it told of {strangers[0]!r}")
    return sorted(found, key=lambda each: _number(each.version))


def _shown_version(version: ModelVersion) -> dict[str, Any]:
    return {
        "version": _number(version.version),
        "source": version.source,
        "tags": dict(version.tags),
        "created_ms": version.creation_timestamp,
    }


def _register(client: MlflowClient, told: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Make the versions of a release that are not there, and wait until all are READY.

    A version comes into being with all its tags by one request; so whatever ends us, the next
    search finds it whole or not at all.
    """
    model, release = told["model"], told["release"]
    there = {each.tags.get(TYPE_TAG): each for each in reversed(_search(client, model, release))}
    done = []
    for wanted in told["versions"]:
        signal.alarm(int(told["answer_within_s"]))
        type_ = wanted["tags"][TYPE_TAG]
        version = there.get(type_)
        if version is None:
            version = client.create_model_version(
                model,
                wanted["source"],
                tags=wanted["tags"],
                description=wanted["description"],
                # 0 asks no question, and a wait of mlflow's own prints instead of answering.
                await_creation_for=0,
            )
        version = _ready(client, version, model, told)
        done.append(_shown_version(version))
    return done


def _ready(
    client: MlflowClient, version: ModelVersion, model: str, told: dict[str, Any]
) -> ModelVersion:
    """
    Wait until a version is READY: an alias must not mean one that is not.

    Raises:
        RegistryError: It is not within the time, or will never be.
    """
    deadline = time.monotonic() + told["ready_within_s"]
    while version.status == _PENDING and time.monotonic() < deadline:
        signal.alarm(int(told["answer_within_s"]))
        time.sleep(_READY_POLL_S)
        version = client.get_model_version(model, str(version.version))
    if version.status == _PENDING:
        raise RegistryError(
            "unreachable",
            f"version {version.version} of {model} is not READY after {told['ready_within_s']} s",
        )
    if version.status != _READY:
        raise RegistryError(
            "refused",
            f"version {version.version} of {model} is {version.status}: {version.status_message}",
        )
    return version


def _complete(client: MlflowClient, told: dict[str, Any]) -> None:
    """Say of a version that all of its release are there."""
    client.set_model_version_tag(told["model"], str(told["version"]), COMPLETE_TAG, "true")


def _point(client: MlflowClient, told: dict[str, Any]) -> dict[str, Any] | None:
    """Set aliases (None removes one), then tags, and read all back."""
    model = told["model"]
    for alias, version in told["aliases"].items():
        if version is None:
            client.delete_registered_model_alias(model, alias)
        else:
            client.set_registered_model_alias(model, alias, str(version))
    for key, value in told["tags"].items():
        # A registry that was lost is told hundreds of moves.
        signal.alarm(int(told["answer_within_s"]))
        client.set_registered_model_tag(model, key, value)
    return _read(client, told)


def _delete(client: MlflowClient, told: dict[str, Any]) -> int:
    """Remove the versions of a release; return how many there were."""
    found = _search(client, told["model"], told["release"])
    for each in found:
        signal.alarm(int(told["answer_within_s"]))
        client.delete_model_version(told["model"], str(each.version))
    return len(found)


def _models(client: MlflowClient, told: dict[str, Any]) -> list[str]:
    """Return the registered models that have a tag of ours."""
    found: list[str] = []
    token = None
    while True:
        page = client.search_registered_models(max_results=_PAGE, page_token=token)
        found += [each.name for each in page if told["tag"] in each.tags]
        token = page.token
        if not token:
            return found


_OPERATIONS: Final[dict[str, Callable[[MlflowClient, dict[str, Any]], Any]]] = {
    "read": _read,
    "ensure": _ensure,
    "versions": _versions,
    "register": _register,
    "complete": _complete,
    "point": _point,
    "delete": _delete,
    "models": _models,
}


def _number(version: object) -> int:
    """
    Return a version as a number: a database gives an int, a server a str.

    Raises:
        RegistryError: It is neither.
    """
    text = str(version)
    if not text.isdecimal():
        raise RegistryError("wrong", f"{text[:40]!r} is no number of a version")
    return int(text)


# --- failures ---------------------------------------------------------------------------------


def _is_missing(error: Exception) -> bool:
    # A 404 of something else than MLflow has no error code of MLflow's.
    return (
        getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
        and _STATUS.search(str(error)) is None
    )


def _kind(error: Exception) -> str:
    """Sort an error of mlflow's, which has one class for nearly all of them."""
    text = str(error)
    status = _status(error, text)
    if status in _DENIED:
        return "denied"
    if status == _TOO_MANY or (status is not None and status >= _SERVER_ERROR):
        return "unreachable"
    if status is None and any(words in text for words in _NO_ANSWER):
        return "unreachable"
    if "database is locked" in text:
        return "unreachable"
    if "not in a valid JSON format" in text or type(error).__module__.partition(".")[0] not in {
        "mlflow",
        "sqlalchemy",
    }:
        return "wrong"
    return "refused"


def _status(error: Exception, text: str) -> int | None:
    """Return the HTTP status that a server gave; None if it gave none, or there is none."""
    from mlflow.exceptions import RestException  # noqa: PLC0415 - loaded already

    found = _STATUS.search(text)
    if found is not None:
        return int(found[1] or found[2])
    return int(error.get_http_status_code()) if isinstance(error, RestException) else None


def _text(error: Exception) -> str:
    """Say in a few words what an error says in many."""
    text = str(error)
    status = _STATUS.search(text)
    if status is not None and status[2]:
        return f"the server answers {status[2]}"
    cause = _CAUSE.search(text)
    return (cause[1] if cause else text.removeprefix(_ENDPOINT)) or type(error).__name__


def _shown(text: str) -> str:
    return scrubbed(" ".join(text.split()))[:_TEXT_CHARACTERS]


if __name__ == "__main__":
    sys.exit(main())
