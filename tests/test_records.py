"""Records are read strictly and written so that they diff well."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from record_factory import benchmark_record, encoder_record, fetch_record

from pipelines import records

if TYPE_CHECKING:
    from pathlib import Path

RECEIPT = records.TrackReceipt(model="tiny", status="pending", reason="down", runs=())


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    """What is written is what is read."""
    path = tmp_path / "a.json"

    records.write(path, RECEIPT)

    assert records.read(path, records.TrackReceipt) == RECEIPT


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"status": "fine"}, "status"),
        ({"extra": 1}, "extra"),
        ({"runs": None}, "runs"),
    ],
)
def test_another_shape_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    """A record of another version, with an unknown key or a wrong value, is not half-understood."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(json.loads(RECEIPT.model_dump_json()) | change))

    with pytest.raises(records.RecordError, match=named):
        records.read(path, records.TrackReceipt)


def test_a_key_of_a_stranger_is_shown_harmless(tmp_path: Path) -> None:
    """The place of a mistake is spelt by the file itself; no command of it reaches the runner."""
    path = tmp_path / "a.json"
    hostile = {"\n::set-output name=x::y\x1b[31m": 1}
    path.write_text(json.dumps(json.loads(RECEIPT.model_dump_json()) | hostile))

    with pytest.raises(records.RecordError) as info:
        records.read(path, records.TrackReceipt)

    assert not {"\n", "\x1b"}.intersection(info.value.message)
    assert "::" not in info.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_cut_record_is_an_error_with_a_next_step(tmp_path: Path, content: bytes) -> None:
    """An empty or cut file names itself and says what to do."""
    path = tmp_path / "a.json"
    path.write_bytes(content)

    with pytest.raises(records.RecordError, match=r"a\.json") as info:
        records.read(path, records.TrackReceipt)

    assert "fleet repro" in info.value.hint


def test_a_missing_record_says_how_to_make_it(tmp_path: Path) -> None:
    """A record that is not there yet is made by `fleet repro`."""
    with pytest.raises(records.RecordError, match="does not exist") as info:
        records.read(tmp_path / "none.json", records.TrackReceipt)

    assert info.value.hint == "fleet repro"


def test_no_record_can_hold_a_number_that_is_not_one() -> None:
    """NaN and infinity are refused when a record is made, not when it is compared."""
    with pytest.raises(ValueError, match="finite"):
        records.Memory(
            context_tokens=1, estimate_mib=float("nan"), measured_mib=1, method="rss",
            model_mib=1, context_mib=1, compute_mib=1,
        )  # fmt: skip


def test_a_fetch_record_of_before_there_were_gates_reads_and_stays_as_it_is(tmp_path: Path) -> None:
    """Nothing is written of a model that everybody may have, so no lock and no review changes."""
    path = tmp_path / "fetch.json"
    records.write(path, fetch_record())
    old = path.read_bytes()
    assert b"gated" not in old

    records.write(path, records.read(path, records.FetchRecord))

    assert path.read_bytes() == old
    records.write(path, fetch_record(gated="manual"))
    assert records.read(path, records.FetchRecord).gated == "manual"


def test_a_wrong_field_of_either_kind_of_quality_is_named_by_the_keys_of_the_file(
    tmp_path: Path,
) -> None:
    """Which kind it was taken for is no key; one of an unknown kind is refused."""
    path = tmp_path / "Q8_0.json"
    for made in (benchmark_record(), encoder_record()):
        written = json.loads(made.model_dump_json())
        written["quality"]["corpus_sha256"] = 5
        path.write_text(json.dumps(written))
        with pytest.raises(records.RecordError, match=r": quality\.corpus_sha256: "):
            records.read(path, records.BenchmarkRecord)
    unknown = json.loads(encoder_record().model_dump_json())
    unknown["quality"]["kind"] = "guesses"
    path.write_text(json.dumps(unknown))
    with pytest.raises(records.RecordError, match="is not a BenchmarkRecord"):
        records.read(path, records.BenchmarkRecord)


def test_a_divergence_is_written_without_a_kind() -> None:
    """Records of before there were encoders stay as they are, and are read."""
    written = json.loads(benchmark_record().model_dump_json())

    assert "kind" not in written["quality"]
    encoder = json.loads(encoder_record().model_dump_json())
    assert encoder["quality"]["kind"] == "embeddings"
