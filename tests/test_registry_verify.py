"""`fleet verify-registry`: everything is read; what is wrong is named, with a remedy."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import release_factory as factory
from release_checkout import MODEL, OTHER, Checkout

if TYPE_CHECKING:
    from pathlib import Path

    from registry_servers import S3Server


@pytest.fixture
def checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Checkout:
    """A fleet whose local registry holds two releases."""
    made = Checkout(tmp_path / "fleet", monkeypatch, capsys)
    made.publish(1)
    made.publish(2)
    return made


def found(checkout: Checkout, registry: str = "local") -> tuple[int, list[tuple[str, str]]]:
    """Verify; return the exit code, and kind and subject of each finding."""
    ran = checkout.fleet("verify-registry", registry, "--json")
    assert ran.out, ran.err
    assert ran.json["exit_code"] == ran.code
    return ran.code, [(each["kind"], each["what"]) for each in ran.json["findings"]]


def gguf(checkout: Checkout, seed: int = 1) -> Any:
    """Return the first GGUF of a release."""
    return checkout.release(seed).release.of("gguf", "Q8_0")[0]


def overwrite(path: Path, data: bytes) -> None:
    """Change a file in place, as a disk does it."""
    path.unlink()
    path.write_bytes(data)


def test_a_registry_in_order_is_read_in_full(checkout: Checkout) -> None:
    """Every file is hashed, every release and alias read; exit 0."""
    ran = checkout.fleet("verify-registry", "local", "--json")

    made = {f.sha256: f.size_bytes for s in (1, 2) for f in checkout.release(s).release.files}
    assert ran.code == 0
    assert ran.json["findings"] == []
    assert ran.json["files_count"] == len(made)
    assert ran.json["read_bytes"] == sum(made.values())
    assert (ran.json["releases_count"], ran.json["aliases_count"]) == (2, 1)
    said = checkout.fleet("verify-registry", "local").out
    assert "2 releases and 1 alias read: all is as it should be." in said


def test_a_flipped_bit_is_found_and_whose_it_is(checkout: Checkout) -> None:
    """Wrong bytes under a right name and size: exit 6, with the releases that name the file."""
    file = gguf(checkout)
    path = checkout.blob_path(file.sha256)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    overwrite(path, bytes(data))

    assert found(checkout) == (6, [("wrong_digest", file.sha256)])
    said = checkout.fleet("verify-registry", "local").err
    assert f"{file.name}, of {MODEL}@{checkout.release(1).id[:12]}" in said
    assert f"fleet publish {MODEL} --to local" in said


def test_a_missing_file_is_found(checkout: Checkout) -> None:
    """A file that a release names and that is gone: exit 8."""
    file = gguf(checkout)
    checkout.blob_path(file.sha256).unlink()

    assert found(checkout) == (8, [("missing_file", file.sha256)])


def test_wrong_bytes_weigh_more_than_missing_ones(checkout: Checkout) -> None:
    """Both: exit 6, and both are told."""
    checkout.blob_path(gguf(checkout, 1).sha256).unlink()
    overwrite(checkout.blob_path(gguf(checkout, 2).sha256), b"x")

    code, findings = found(checkout)

    assert code == 6
    assert {kind for kind, _ in findings} == {"missing_file", "wrong_digest"}


def test_a_release_with_other_bytes_is_found(checkout: Checkout) -> None:
    """release.json that does not have its name's sha256, and one that is none of ours."""
    old = checkout.release(1).id
    folder = checkout.root / "registry/releases" / MODEL
    overwrite(folder / f"{old}.json", b"{}")
    foreign = b'{"schema_version": 99}'
    (folder / f"{factory.sha256(foreign)}.json").write_bytes(foreign)

    code, findings = found(checkout)

    assert code == 6
    assert ("wrong_digest", old) in findings
    assert ("unreadable", factory.sha256(foreign)) in findings


def test_a_release_that_was_copied_under_another_model_is_found(checkout: Checkout) -> None:
    """Right bytes in the wrong place."""
    id_ = checkout.release(1).id
    folder = checkout.root / "registry/releases"
    (folder / OTHER).mkdir()
    shutil.copy(folder / MODEL / f"{id_}.json", folder / OTHER)

    assert found(checkout) == (8, [("unreadable", id_)])


def test_an_alias_to_nothing_is_found(checkout: Checkout) -> None:
    """`stable` means a release that is not there."""
    id_ = checkout.release(2).id
    checkout.store().delete_release(MODEL, id_)

    code, findings = found(checkout)

    assert code == 8
    assert ("missing_release", id_) in findings


def test_an_alias_that_is_none_is_found(checkout: Checkout) -> None:
    """Something else wrote there."""
    (checkout.root / "registry/aliases" / MODEL / "stable.json").write_text("<html>")

    code, findings = found(checkout)

    assert code == 8
    assert ("unreadable", f"{MODEL}@stable") in findings


def test_an_old_state_of_the_registry_is_found(checkout: Checkout) -> None:
    """Put back from a backup: the ledger in git knows a later move."""
    checkout.copy("registry")
    checkout.publish(3)
    checkout.put_back("registry")

    assert found(checkout) == (8, [("behind", f"{MODEL}@stable")])
    said = checkout.fleet("verify-registry", "local").err
    assert "it is at 2, the ledger at 3" in said


def test_two_stories_of_one_move_are_found(checkout: Checkout) -> None:
    """The registry's last move is rewritten."""
    path = checkout.root / "registry/aliases" / MODEL / "stable.json"
    value = json.loads(path.read_bytes())
    value["moves"][-1]["who"] = "Mallory"
    path.write_text(json.dumps(value))

    assert found(checkout) == (8, [("two_stories", f"{MODEL}@stable")])


def test_a_ledger_of_an_older_commit_is_only_a_note(checkout: Checkout) -> None:
    """The registry is ahead: somebody else published; exit 0, and how to get his lines."""
    checkout.at.ledger(MODEL).unlink()

    assert found(checkout) == (0, [("ahead", f"{MODEL}@stable")])


def test_an_empty_local_registry_is_only_a_note(checkout: Checkout) -> None:
    """A fresh clone has the ledger and no registry."""
    shutil.rmtree(checkout.root / "registry")

    assert found(checkout) == (0, [("empty", f"{MODEL}@stable")])


def test_files_that_nobody_names_are_a_note(checkout: Checkout) -> None:
    """They are hashed, too, and counted; gc is named."""
    orphan = b"a killed publisher left this"
    checkout.blob_path(factory.sha256(orphan)).write_bytes(orphan)

    assert found(checkout) == (0, [("unnamed", factory.sha256(orphan))])
    assert "fleet gc --registry local" in checkout.fleet("verify-registry", "local").err


def test_an_undeclared_registry_gets_a_suggestion(checkout: Checkout) -> None:
    """Exit 2 and the name that was meant."""
    ran = checkout.fleet("verify-registry", "locl")

    assert ran.code == 2
    assert 'did you mean "local"?' in ran.err


def test_nothing_is_changed(checkout: Checkout) -> None:
    """A registry in disorder is as it was afterwards."""
    overwrite(checkout.blob_path(gguf(checkout).sha256), b"x")
    files = sorted(path for path in (checkout.root / "registry").rglob("*") if path.is_file())
    before = [(path, path.read_bytes()) for path in files]

    checkout.fleet("verify-registry", "local")

    after = sorted(path for path in (checkout.root / "registry").rglob("*") if path.is_file())
    assert [(path, path.read_bytes()) for path in after] == before


def test_a_bucket_is_verified_as_a_folder_is(checkout: Checkout, s3_server: S3Server) -> None:
    """Over HTTP: everything is read; a changed object is found."""
    checkout.declare("production", s3_server.registry(prefix="fleet"))
    checkout.publish(1, "production")
    assert found(checkout, "production") == (0, [])

    file = gguf(checkout)
    bucket = checkout.store("production").shown.split("/")[2]
    client = s3_server.client()
    key = f"fleet/blobs/sha256/{file.sha256}"
    client.put_object(Bucket=bucket, Key=key, Body=b"x" * file.size_bytes)
    client.close()

    assert found(checkout, "production") == (6, [("wrong_digest", file.sha256)])
