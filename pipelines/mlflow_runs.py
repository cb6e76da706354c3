"""
The program that tells MLflow about runs: bring the runs of one task into a tracking store.

    python -m pipelines.mlflow_runs TASK.json TOLD.jsonl

A process of its own, since a server that accepts and never answers must not hold up the chain:
SIGALRM, with its default action, ends it in the middle of any call. A run counts as told when its
last tag, `fleet.complete`, is set; what a kill left without it is deleted by the next attempt.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import atomic
from pipelines.track import (
    LOAD_TEST_PREFIX,
    LOAD_TEST_TAG,
    RUN_KEY_TAG,
    SQLITE,
    RunSpec,
    Task,
    scrubbed,
)

if TYPE_CHECKING:
    import sqlite3

    from mlflow.tracking import MlflowClient

COMPLETE_TAG = "fleet.complete"
_CONNECT_WITHIN_S = 2.0
_HEALTH_WITHIN_S = 3.0
_SERVER_ERROR = 500


class NoStoreError(Exception):
    """The store cannot be used; the text says why."""


def main(task_file: Path, told_file: Path) -> int:
    """Do the task; each run that the store holds becomes a line of `told_file`."""
    task = Task.model_validate_json(task_file.read_bytes())
    uri = os.environ["MLFLOW_TRACKING_URI"]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        signal.alarm(task.answer_within_s)
        ask_server(uri)
        left_s = signal.alarm(0)  # the seconds of the import are this machine's, not the server's
        client = client_of(uri)
        signal.alarm(max(left_s, 1))
        experiment = _experiment(client, task)
        with told_file.open("a", encoding="utf-8") as told:
            for spec in task.runs:
                _project(client, experiment, spec)
                told.write(json.dumps({"key": spec.key, "run_key": spec.run_key}) + "\n")
                told.flush()
                sys.stdout.write(f"tracked {spec.key}\n")
                sys.stdout.flush()
                signal.alarm(task.answer_within_s)
    except NoStoreError as error:
        return _say(str(error))
    except Exception as error:  # noqa: BLE001 - whatever a store does is a reason, not a crash
        return _say(f"{type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
    return 0


def _say(reason: str) -> int:
    sys.stderr.write(f"cannot: {scrubbed(' '.join(reason.split()))}\n")
    sys.stderr.flush()
    return 1


def ask_server(uri: str) -> None:
    """
    Find out cheaply whether a server is there, before seconds are spent on importing mlflow.

    Raises:
        NoStoreError: Nobody listens, nobody answers, or the answer is a server error.
    """
    if not uri.startswith(("http://", "https://")):
        return
    import requests  # noqa: PLC0415 - not for a file

    try:
        answer = requests.get(
            f"{uri.rstrip('/')}/health",
            timeout=(_CONNECT_WITHIN_S, _HEALTH_WITHIN_S),
            allow_redirects=False,
        )
    except requests.exceptions.SSLError:
        return  # mlflow has settings of its own for certificates and says what is wrong with them
    except requests.exceptions.ConnectTimeout:
        raise NoStoreError(f"nobody answers within {_CONNECT_WITHIN_S:.0f} s") from None
    except requests.exceptions.Timeout:
        raise NoStoreError(
            f"the server accepts but does not answer within {_HEALTH_WITHIN_S:.0f} s"
        ) from None
    except requests.exceptions.ConnectionError as error:
        raise NoStoreError(f"no connection ({_root_of(error)})") from None
    if answer.status_code >= _SERVER_ERROR:
        raise NoStoreError(f"the server answers {answer.status_code} {answer.reason}")


def _root_of(error: BaseException) -> str:
    """Return the innermost cause in a few words, e.g. `Connection refused`."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return _root_of(reason)
    return str(error).rpartition(": ")[2]


def client_of(uri: str) -> MlflowClient:
    """
    Return a client; a database that is not there is made first.

    Raises:
        NoStoreError: mlflow is not installed.
    """
    try:
        from mlflow.tracking import MlflowClient  # noqa: PLC0415 - 2 to 7 s
    except ImportError:
        raise NoStoreError(
            "mlflow is not installed here; it is in the extra `track`: pip install -e '.[track]'"
        ) from None
    file = Path(uri.removeprefix(SQLITE))
    if uri.startswith(SQLITE) and "?" not in uri and not file.exists():
        _create_store(file)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create_store(file: Path) -> None:
    """
    Make the tables of a new store under a temporary name, without sqlite's journal.

    MLflow makes them by all migrations that it ever had: 10 MB written with a journal, 1 MB
    without. A kill in between costs nothing, since the file has no final name yet.
    """
    from mlflow.tracking import MlflowClient  # noqa: PLC0415 - loaded already
    from sqlalchemy import event  # noqa: PLC0415 - loaded with it
    from sqlalchemy.engine import Engine  # noqa: PLC0415 - the same

    opened: list[sqlite3.Connection] = []

    def unguard(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        opened.append(connection)

    with atomic.replacing(file) as part:
        event.listen(Engine, "connect", unguard)
        try:
            MlflowClient(tracking_uri=f"{SQLITE}{part}").search_experiments(max_results=1)
        finally:
            event.remove(Engine, "connect", unguard)
        for connection in opened:
            connection.close()


def _experiment(client: MlflowClient, task: Task) -> str:
    """
    Return the id of the experiment, made first if there is none.

    Raises:
        NoStoreError: It was deleted, or it keeps artifacts where this checkout was before.
    """
    found = client.get_experiment_by_name(task.experiment)
    if found is None:
        return str(client.create_experiment(task.experiment, artifact_location=task.artifacts))
    if found.lifecycle_stage != "active":
        raise NoStoreError(f"the experiment {task.experiment!r} was deleted in MLflow")
    if task.artifacts is not None and found.artifact_location.rstrip("/") != task.artifacts:
        raise NoStoreError(
            "the store keeps its artifacts in another directory, so it was made in another place: "
            "remove it and run `fleet track --rebuild`"
        )
    return str(found.experiment_id)


def _project(client: MlflowClient, experiment: str, spec: RunSpec) -> None:
    """Make the store hold the run as it has to be."""
    found = client.search_runs(
        [experiment],
        filter_string=f"tags.`{RUN_KEY_TAG}` = '{spec.run_key}'",
        order_by=["attributes.start_time ASC"],
    )
    complete = [run for run in found if run.data.tags.get(COMPLETE_TAG) == "true"]
    for run in found:
        if run not in complete:
            client.delete_run(run.info.run_id)
    if complete:
        _follow(client, complete[0], spec)
    else:
        _create(client, experiment, spec)


def _follow(client: MlflowClient, run: Any, spec: RunSpec) -> None:  # noqa: ANN401
    """Bring an existing run up to date: choice and load test change, what it measured does not."""
    different = {
        name: value for name, value in spec.tags.items() if run.data.tags.get(name) != value
    }
    if not different:
        return
    if LOAD_TEST_TAG in different:
        _log_load_test(client, run, spec)
    for name, path in spec.artifacts.items():
        _upload(client, run.info.run_id, name, path)
    for name, value in different.items():
        client.set_tag(run.info.run_id, name, value)


def _log_load_test(client: MlflowClient, run: Any, spec: RunSpec) -> None:  # noqa: ANN401
    """
    Log what a load test measured over what an earlier one did.

    MLflow shows the value with the latest time. That is the time of telling, not of measuring: a
    test that came back with a reverted commit is older than the one that it replaces.
    """
    from mlflow.entities import Metric  # noqa: PLC0415 - loaded already

    now_ms = int(time.time() * 1000)
    gone = {
        name: math.nan
        for name in run.data.metrics
        if name.startswith(LOAD_TEST_PREFIX) and name not in spec.load_metrics
    }
    values = spec.load_metrics | gone
    if values:
        client.log_batch(
            run.info.run_id,
            metrics=[Metric(name, value, now_ms, 0) for name, value in values.items()],
        )


def _create(client: MlflowClient, experiment: str, spec: RunSpec) -> None:
    """Write a run; its last tag says that nothing is missing."""
    from mlflow.entities import Metric, Param, RunTag  # noqa: PLC0415 - loaded already

    run = client.create_run(
        experiment,
        start_time=spec.started_ms,
        run_name=spec.key,
        tags={RUN_KEY_TAG: spec.run_key, "mlflow.source.name": "gguf-fleet"},
    )
    run_id = str(run.info.run_id)
    client.log_batch(
        run_id,
        metrics=[
            Metric(name, value, spec.ended_ms, 0)
            for name, value in (spec.metrics | spec.load_metrics).items()
        ],
        params=[Param(name, value) for name, value in spec.params.items()],
        tags=[RunTag(name, value) for name, value in spec.tags.items()],
    )
    for name, path in spec.artifacts.items():
        _upload(client, run_id, name, path)
    client.set_terminated(run_id, status="FINISHED", end_time=spec.ended_ms)
    client.set_tag(run_id, COMPLETE_TAG, "true")


def _upload(client: MlflowClient, run_id: str, name: str, path: str) -> None:
    """Put a record of ours under `name`, a folder and a file name, into a run's artifacts."""
    client.log_text(run_id, Path(path).read_text(encoding="utf-8"), name)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
