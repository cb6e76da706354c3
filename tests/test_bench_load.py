"""The benchmark of the load generator pools what it measured, and says what it could not."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import load, peer


def test_turns_are_pooled_and_processor_time_is_their_median() -> None:
    """A percentile is one of all values; no percentile is averaged."""
    samples = [
        {
            "delays_ms": [1.0] * 99 + [50.0 * turn],
            "added_ttft_ms": [float(turn)],
            "late_ms": [0.5],
            "cpu_s_per_1000_chunks": 0.01 * turn,
        }
        for turn in (1, 2, 9)
    ]

    assert load.figures(samples) == {
        "requests_count": 3,
        "chunks_count": 300,
        "added_ttft_p50_ms": 2.0,
        "added_ttft_p99_ms": 9.0,
        "delay_p50_ms": 1.0,
        "delay_p99_ms": 1.0,
        "null_server_late_p99_ms": 0.5,
        "cpu_s_per_1000_chunks": 0.02,
    }


def test_a_peer_is_timed_by_the_same_rule_as_we_are() -> None:
    """Added to the first token is what the server did not take; stamps are in nanoseconds."""
    answers = [(1_000_000, [(9_000_000, "8000000:0:3000000"), (12_000_000, "11500000:0:3000000")])]

    found = peer.summary(answers, cpu_s=0.004, name="pytest")

    assert found["delays_ms"] == [1.0, 0.5]
    # 8 ms from start to chunk, 5 ms of them within the server.
    assert found["added_ttft_ms"] == [3.0]
    assert found["cpu_s_per_1000_chunks"] == pytest.approx(2.0)


def test_a_client_that_cannot_be_had_is_said_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the others stand; nothing is invented for it."""
    monkeypatch.setattr(load, "STREAMS", 2)
    monkeypatch.setattr(load, "CHUNKS", 10)
    monkeypatch.setattr(load, "environment", lambda *_: "PyPI could not be reached")

    found = load.client(tmp_path, argparse.Namespace(turns=1, rounds=2))

    assert found["not_measured"] == dict.fromkeys(load.PEERS, "PyPI could not be reached")
    assert set(found["clients"]) == {"fleet (Ollama's lines)", "fleet (OpenAI's events)"}
    for each in found["clients"].values():
        assert (each["requests_count"], each["chunks_count"]) == (4, 40)
        assert each["cpu_s_per_1000_chunks"] > 0


def test_a_peer_reads_the_null_server_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to a peer and back, with a client of Ollama that has the shape of the real one."""
    package = tmp_path / "ollama"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_OLLAMA)
    (tmp_path / "ollama-1.2.3.dist-info").mkdir()
    (tmp_path / "ollama-1.2.3.dist-info/METADATA").write_text("Name: ollama\nVersion: 1.2.3\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(load, "STREAMS", 2)
    monkeypatch.setattr(load, "CHUNKS", 10)

    sample: dict[str, Any] = load._peer(
        Path(sys.executable), "ollama", tmp_path / "log", 3, batch=True
    )()

    assert sample["version"] == "1.2.3"
    assert (len(sample["added_ttft_ms"]), len(sample["delays_ms"])) == (6, 60)
    assert min(sample["delays_ms"]) > 0


FAKE_OLLAMA = """
import json, urllib.request
from types import SimpleNamespace

class Client:
    def __init__(self, host):
        self.host = host

    def chat(self, **body):
        data = json.dumps(body).encode()
        with urllib.request.urlopen(f"{self.host}/api/chat", data) as answer:
            for line in answer:
                message = json.loads(line)["message"]
                yield SimpleNamespace(message=SimpleNamespace(**message))
"""


def test_a_section_alone_leaves_the_others_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record holds what was measured last of each section."""
    out = tmp_path / "record.json"
    out.write_text(json.dumps({"schema_version": 1, "other": {"kept": True}}))
    monkeypatch.setattr(load, "client", lambda *_: {"new": True})
    monkeypatch.setitem(load.SECTIONS, "client", load.client)

    load.main(["--only", "client", "--out", str(out)])

    record = json.loads(out.read_text())
    assert (record["other"], record["client"]) == ({"kept": True}, {"new": True})


def test_a_section_of_another_machine_is_not_put_under_the_name_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record names one machine, so the figures in it are of one."""
    out = tmp_path / "record.json"
    before = json.dumps({"machine": {"hw_id": "another"}, "other": {"kept": True}})
    out.write_text(before)
    monkeypatch.setitem(load.SECTIONS, "client", lambda *_: pytest.fail("it was measured"))

    with pytest.raises(SystemExit, match="on another machine"):
        load.main(["--only", "client", "--out", str(out)])

    assert out.read_text() == before
