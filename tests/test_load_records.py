"""The headline numbers of a load test, as `dvc metrics diff` and MLflow show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from record_factory import degenerate, load_run, load_test_record, winner_test

from pipelines import records
from pipelines.layout import Layout
from pipelines.load_records import LoadTestRecord, metrics_rows

if TYPE_CHECKING:
    from pathlib import Path


def test_each_number_says_of_which_run_it_is() -> None:
    """A closed run is named by its concurrency, the open one as such; units stand in the names."""
    rows = metrics_rows(load_test_record())["Q4_K_M"]

    assert rows["ttft_p50_ms_c1"] == 20.0
    assert rows["ttft_p50_ms_c4"] == 80.0
    assert rows["ttft_p50_ms_open"] == 20.0
    assert rows["goodput_open_local"] == 1.0
    assert rows["error_rate_c2"] == 0.0
    assert rows["cold_load_ms"] == 640.0


def test_what_was_not_measured_has_no_number() -> None:
    """No p95 of 40 requests, no excess over an f16 that was not served: absent, never zero."""
    test = winner_test(
        runs=(load_run(1, ttft_ms=10.0, tpot_ms=None),),
        degenerate=degenerate(f16_degenerate_count=None, excess=None),
    )
    rows = metrics_rows(load_test_record(winners=(test,)))["Q4_K_M"]

    assert rows["ttft_p50_ms_c1"] == 10.0
    assert not {"ttft_p95_ms_c1", "tpot_p50_ms_c1", "degenerate_excess"} & set(rows)


def test_a_test_that_is_not_to_be_trusted_has_no_numbers() -> None:
    """A client that was too slow never becomes a baseline."""
    invalid = winner_test(invalid=("the client was too slow",))

    assert metrics_rows(load_test_record(winners=(invalid,))) == {}


def test_a_load_test_survives_the_disk(tmp_path: Path) -> None:
    """What is written is what is read, and a record without its levels is refused."""
    path = Layout(tmp_path).model_record("load-test", "tiny-llama")
    record = load_test_record()

    records.write(path, record)
    assert records.read(path, LoadTestRecord) == record

    path.write_text(record.model_dump_json(exclude={"slos"}))
    with pytest.raises(records.RecordError, match="slos"):
        records.read(path, LoadTestRecord)
