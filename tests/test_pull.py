"""`fleet pull`: verified, whole or not at all, gone on with, and never from the past."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from release_checkout import MODEL, REASON, Checkout

from pipelines import registries
from pipelines.params import Registry
from pipelines.release_records import canonical, release_id
from pipelines.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from registry_servers import S3Server


@pytest.fixture
def checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Checkout:
    """A fleet with two directories as registries."""
    return Checkout(tmp_path / "fleet", monkeypatch, capsys)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every reading of a file of a registry: its digest and the offset."""
    seen: list[tuple[str, int]] = []
    real = LocalStore.read_blob

    def read(self: LocalStore, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:
        seen.append((sha256, offset))
        return real(self, model, sha256, offset=offset)

    monkeypatch.setattr(LocalStore, "read_blob", read)
    return seen


def digest(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_pull_brings_the_stable_quant_its_modelfile_and_the_release(checkout: Checkout) -> None:
    """The default folder has the model and the release in its name; every digest is right."""
    id_ = checkout.publish(1)

    ran = checkout.fleet("pull", MODEL)

    assert ran.code == 0, ran.err
    folder = checkout.root / "pulled" / f"{MODEL}-{id_[:12]}"
    assert digest(folder / "release.json") == id_
    (gguf,) = checkout.release(1).release.of("gguf", "Q8_0")
    assert digest(folder / gguf.name) == gguf.sha256
    modelfile = (folder / f"{MODEL}-Q8_0.Modelfile").read_text()
    assert modelfile.startswith(f"FROM ./{gguf.name}\n")
    assert not (folder / f"{MODEL}-Q4_K_M.gguf").exists()
    assert gguf.sha256 in ran.out


def test_quants_are_named_or_all_taken(checkout: Checkout) -> None:
    """--quant may be repeated, --all takes every one."""
    checkout.publish(1)

    one = checkout.fleet("pull", MODEL, "--quant", "Q4_K_M", "--to", "one", "--json").json
    every = checkout.fleet("pull", MODEL, "--all", "--to", "all", "--json").json

    assert one["quants"] == ["Q4_K_M"]
    assert every["quants"] == ["Q8_0", "Q4_K_M"]
    assert {path.name for path in (checkout.root / "all").glob("*.gguf")} == {
        f"{MODEL}-Q8_0.gguf",
        f"{MODEL}-Q4_K_M.gguf",
    }


def test_a_release_can_be_named_by_its_first_digits_or_as_previous(checkout: Checkout) -> None:
    """MODEL@0123abcd and MODEL@previous bring that release, whatever stable means."""
    old, _new = checkout.publish(1), checkout.publish(2)

    for wanted in (old[:8], old, "previous"):
        told = checkout.fleet("pull", f"{MODEL}@{wanted}", "--to", "x", "--json").json
        assert told["release"] == old


def test_a_pull_again_hashes_and_fetches_nothing(
    checkout: Checkout, given: list[tuple[str, int]]
) -> None:
    """What is there and right is not read from the registry a second time."""
    checkout.publish(1)
    checkout.fleet("pull", MODEL, "--to", "x")
    given.clear()

    assert checkout.fleet("pull", MODEL, "--to", "x").code == 0

    (gguf,) = checkout.release(1).release.of("gguf", "Q8_0")
    assert gguf.sha256 not in {sha256 for sha256, _ in given}


def test_a_file_that_was_changed_is_fetched_again(checkout: Checkout) -> None:
    """An existing file is hashed, not believed: same size and other bytes are replaced."""
    checkout.publish(1)
    checkout.fleet("pull", MODEL, "--to", "x")
    (gguf,) = checkout.release(1).release.of("gguf", "Q8_0")
    path = checkout.root / "x" / gguf.name
    path.chmod(0o644)
    path.write_bytes(b"\0" * gguf.size_bytes)

    assert checkout.fleet("pull", MODEL, "--to", "x").code == 0

    assert digest(path) == gguf.sha256


def test_a_pull_that_was_cut_off_goes_on(
    checkout: Checkout, given: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run begins where the first one stopped; until then there is no release.json."""
    checkout.publish(1, size_bytes=3_000_000)
    (gguf,) = checkout.release(1, size_bytes=3_000_000).release.of("gguf", "Q8_0")
    real = LocalStore.read_blob

    def cut(self: LocalStore, *args: Any, **options: Any) -> Iterator[bytes]:
        for number, chunk in enumerate(real(self, *args, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read_blob", cut)
        assert checkout.fleet("pull", MODEL, "--to", "x").code == 130
    assert not (checkout.root / "x/release.json").exists()
    assert not (checkout.root / "x" / gguf.name).exists()
    given.clear()

    assert checkout.fleet("pull", MODEL, "--to", "x").code == 0

    assert (gguf.sha256, 2 * 2**20) in given
    assert digest(checkout.root / "x" / gguf.name) == gguf.sha256


def test_rotten_bytes_are_refused(checkout: Checkout) -> None:
    """A file of the registry that is not its name: exit 6, nothing of it is kept."""
    checkout.publish(1)
    (gguf,) = checkout.release(1).release.of("gguf", "Q8_0")
    path = checkout.blob_path(gguf.sha256)
    path.unlink()
    path.write_bytes(b"\0" * gguf.size_bytes)

    ran = checkout.fleet("pull", MODEL, "--to", "x")

    assert ran.code == 6
    assert "gave other bytes" in ran.err
    assert list((checkout.root / "x").glob("*.gguf*")) == []
    assert not (checkout.root / "x/release.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("files", 0, "name", "../../x.gguf"), "of another schema: files.0.name"),
        (("files", 0, "name", "/etc/x"), "of another schema: files.0.name"),
        (("files", 0, "name", "release.json\n"), "of another schema: files.0.name"),
        (("files", 0, "size_bytes", 10**4000), "of another schema: files.0.size_bytes"),
        (("files", 0, "size_bytes", 2**60), "of another schema: files.0.size_bytes"),
        (("files", 0, "name", "LICENSE"), "gives two files one name"),
        (("model", "\x1b[31mx"), 'is of "'),
        (("stable_quant", "\x1b]0;x\x07Q8_0"), None),
        (("quants", 0, "type", "::error::\x1b[31m"), None),
    ],
)
def test_a_release_of_a_hostile_registry_writes_nowhere_else(
    checkout: Checkout, change: tuple[Any, ...], says: str | None
) -> None:
    """It has the id that the alias names, and is refused, or pulled, without a trace of escapes."""
    made = checkout.release(1)
    value = json.loads(made.data)
    place = value
    for key in change[:-2]:
        place = place[key]
    place[change[-2]] = change[-1]
    data = canonical(value)
    id_ = release_id(data)
    checkout.publish(1)
    alias = checkout.root / "registry/aliases" / MODEL / "stable.json"
    alias.write_bytes(alias.read_bytes().replace(made.id.encode(), id_.encode()))
    (checkout.root / f"registry/releases/{MODEL}/{id_}.json").write_bytes(data)
    checkout.at.ledger(MODEL).unlink()
    before = set(checkout.root.rglob("*"))

    ran = checkout.fleet("pull", MODEL, "--to", str(checkout.root / "pulled"), "--quant", "Q4_K_M")

    said = ran.out + ran.err
    assert "\x1b]" not in said
    assert "::error" not in said
    assert "Traceback" not in said
    if says is not None:
        assert ran.code == 8
        assert says in said
    new = {path for path in set(checkout.root.rglob("*")) - before if path.is_file()}
    assert all({"pulled", "state"} & set(path.parts) for path in new), new


def test_numbers_of_a_hostile_registry_are_refused(checkout: Checkout) -> None:
    """A move of thousands of digits comes neither into an error nor into the ledger."""
    checkout.publish(1)
    alias = checkout.root / "registry/aliases" / MODEL / "stable.json"
    alias.write_bytes(alias.read_bytes().replace(b'"sequence": 1', b'"sequence": 1' + b"0" * 4200))

    ran = checkout.fleet("pull", MODEL)

    assert ran.code == 8
    assert "no alias of a release" in ran.err


def test_a_missing_file_is_named(checkout: Checkout) -> None:
    """A registry that lost a file: exit 8."""
    checkout.publish(1)
    (gguf,) = checkout.release(1).release.of("gguf", "Q8_0")
    checkout.blob_path(gguf.sha256).unlink()

    assert checkout.fleet("pull", MODEL).code == 8


def test_an_old_state_of_a_registry_is_refused_by_the_ledger(checkout: Checkout) -> None:
    """The registry was put back: the ledger in git knows a later move."""
    checkout.publish(1)
    checkout.copy("registry")
    checkout.publish(2)
    checkout.put_back("registry")

    ran = checkout.fleet("pull", MODEL)

    assert ran.code == 8
    assert "old state" in ran.err


def test_an_old_state_of_a_registry_is_refused_by_who_has_seen_a_later_one(
    checkout: Checkout,
) -> None:
    """Without a ledger, what this user pulled last is remembered."""
    checkout.publish(1)
    checkout.copy("registry")
    checkout.publish(2)
    assert checkout.fleet("pull", MODEL).code == 0
    checkout.at.ledger(MODEL).unlink()
    checkout.put_back("registry")

    ran = checkout.fleet("pull", MODEL)

    assert ran.code == 8
    assert "old state" in ran.err


def test_a_rollback_is_no_replay(checkout: Checkout) -> None:
    """An older release with a higher number is what the operator wants."""
    old, _new = checkout.publish(1), checkout.publish(2)
    checkout.fleet("pull", MODEL)
    checkout.fleet("rollback", MODEL, "--to", old, "--reason", REASON)

    told = checkout.fleet("pull", MODEL, "--json").json

    assert told["release"] == old


def test_another_release_in_the_same_folder_replaces_the_first(checkout: Checkout) -> None:
    """--to names a folder: after the second pull it holds the second release, whole."""
    checkout.publish(1)
    checkout.fleet("pull", MODEL, "--to", "x")
    new = checkout.publish(2)

    assert checkout.fleet("pull", MODEL, "--to", "x").code == 0

    (gguf,) = checkout.release(2).release.of("gguf", "Q8_0")
    assert digest(checkout.root / "x" / gguf.name) == gguf.sha256
    assert digest(checkout.root / "x/release.json") == new


def test_a_dry_run_writes_nothing(checkout: Checkout) -> None:
    """It names the files and their digests."""
    id_ = checkout.publish(1)

    ran = checkout.fleet("pull", MODEL, "--dry-run")

    assert ran.code == 0
    assert "would fetch" in ran.out
    assert not (checkout.root / "pulled" / f"{MODEL}-{id_[:12]}").exists()


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("Nope!",), 2, "is no model and release"),
        ((f"{MODEL}@",), 2, "is no model and release"),
        ((f"{MODEL}@../../x",), 2, "is no model and release"),
        ((f"{MODEL}@abc",), 8, "8 or more digits"),
        ((f"{MODEL}@{'f' * 12}",), 8, "no release"),
        ((MODEL, "--from", "nope"), 2, "not declared"),
        ((MODEL, "--quant", "Q8_1"), 2, 'did you mean "Q8_0"?'),
        (("other-model",), 8, "no stable release"),
    ],
)
def test_bad_words_are_answered(
    checkout: Checkout, argv: tuple[str, ...], code: int, said: str
) -> None:
    """Each mistake has its sentence and its exit code."""
    checkout.publish(1)

    ran = checkout.fleet("pull", *argv)

    assert ran.code == code
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_what_is_pulled_is_nothing_to_git_and_dvc() -> None:
    """The default folder is ignored by both, so that no model slips into a commit."""
    root = Path(__file__).resolve().parents[1]

    assert "/pulled/" in (root / ".gitignore").read_text().splitlines()
    assert "/pulled" in (root / ".dvcignore").read_text().splitlines()


def test_a_model_that_nobody_knows_gets_a_suggestion(checkout: Checkout) -> None:
    """Neither declared nor published: a slip of the finger, most likely."""
    checkout.publish(1)

    ran = checkout.fleet("pull", "tiny-lama")

    assert ran.code == 8
    assert f'did you mean "{MODEL}"?' in ran.err
    assert "fleet publish tiny-lama" not in ran.err


def test_a_registry_that_is_silent_is_not_waited_for(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first question has a bound in every verb that reads; no word of what was sent."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setattr(registries, "ANSWERS_WITHIN_S", 1.0)
    checkout.publish(1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        checkout.declare("silent", Registry(url="s3://bucket/fleet", endpoint=endpoint))

        for argv in (
            ("pull", MODEL, "--from", "silent"),
            ("releases", MODEL, "--registry", "silent"),
            ("releases", MODEL),
            ("audit",),
        ):
            ran = checkout.fleet(*argv)

            assert ran.code == 75, argv
            assert ran.err.count("silent did not answer within 1 s") >= 1, argv
            assert "sent" not in ran.err
            assert "Ask again when it can be reached" in ran.err


def test_a_pull_from_s3_is_the_same_pull(checkout: Checkout, s3_server: S3Server) -> None:
    """Over HTTP from a server of S3: the same digests; an old state of it is not believed."""
    checkout.declare("production", s3_server.registry(prefix="fleet"))
    checkout.publish(1, "production")
    old = checkout.store("production").read_alias(MODEL, "stable")[0]
    id_ = checkout.publish(2, "production")

    ran = checkout.fleet("pull", MODEL, "--from", "production", "--all", "--to", "x")

    assert ran.code == 0, ran.err
    assert digest(checkout.root / "x/release.json") == id_
    for gguf in checkout.release(2).release.of("gguf"):
        assert digest(checkout.root / "x" / gguf.name) == gguf.sha256
    store = checkout.store("production")
    assert old is not None
    store.write_alias(old, checkout.release(1).release, store.read_alias(MODEL, "stable")[1])
    checkout.at.ledger(MODEL).unlink()
    assert "old state" in checkout.fleet("pull", MODEL, "--from", "production").err
