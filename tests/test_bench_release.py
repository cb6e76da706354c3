"""The proofs of a release prove what they say, and fail where a promise is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import release

ROOT = Path(__file__).resolve().parent.parent


def test_a_small_run_counts_kills_reads_and_bytes(tmp_path: Path) -> None:
    """A few kills of real publishers, readers beside them, and a file that is read once."""
    output = tmp_path / "proofs.json"
    words = ["--only", "local", "--kills", "3", "--reads", "50", "--large-mib", "32"]
    subprocess.run(
        [sys.executable, "-m", "bench.release", *words, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "GGUF_FLEET_CACHE": str(tmp_path / "cache")},
        check=True,
        capture_output=True,
        timeout=300,
    )

    found = json.loads(output.read_text())["stores"]["local"]
    assert (found["kills"]["count"], sum(found["kills"]["left_behind"].values())) == (3, 3)
    assert (found["kills"]["half_releases"], found["kills"]["next_run_failed"]) == (0, 0)
    assert found["reads"]["count"] >= 50
    assert found["reads"]["wrong"] == 0
    assert found["rollback"] == {"moves": 2, "files_sent": 0, "blob_bytes_read": 0}
    assert found["large"]["file_reads_put_and_proof"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("kills", "half_releases"),
        ("kills", "next_run_failed"),
        ("reads", "wrong"),
        ("large", "peak_rss_mib"),
        ("rollback", "files_sent"),
        ("rollback", "blob_bytes_read"),
    ],
)
def test_a_broken_promise_is_no_success(part: str, name: str) -> None:
    """One wrong read of a hundred thousand ends the run with an error."""
    kept: dict[str, dict[str, Any]] = {
        "kills": {"half_releases": 0, "next_run_failed": 0},
        "reads": {"wrong": 0},
        "large": {"peak_rss_mib": 90.0},
        "rollback": {"files_sent": 0, "blob_bytes_read": 0},
    }
    release.require_kept({"stores": {"s3": kept}})

    kept[part][name] = 201
    with pytest.raises(SystemExit, match="s3: a promise was broken"):
        release.require_kept({"stores": {"s3": kept}})
