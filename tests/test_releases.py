"""`fleet releases`: who moved `stable` to which release, when, why, and what is still there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from release_checkout import MODEL, PARAMS, REASON, Checkout, waiver

if TYPE_CHECKING:
    from pathlib import Path

BOTH = ("local", "mirror")


@pytest.fixture
def checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Checkout:
    """A fleet with two directories as registries."""
    return Checkout(tmp_path / "fleet", monkeypatch, capsys)


def test_the_history_is_a_line_for_each_move(checkout: Checkout) -> None:
    """Number, time, action, release, files, who and why; the one that counts now is marked."""
    first, second = checkout.publish(1), checkout.publish(2)
    checkout.fleet("rollback", MODEL, "--to", first, "--reason", REASON)

    ran = checkout.fleet("releases", MODEL)

    assert ran.code == 0
    head, *rows = [line for line in ran.out.splitlines() if line.strip()][1:]
    assert head.split() == ["#", "when", "(UTC)", "action", "release", "files", "who", "why"]
    assert rows[0].split()[:7] == [
        "1", "2025-01-01", "12:00", "publish", first[:12], "whole", "Ada",
    ]  # fmt: skip
    assert rows[1].split()[3:6] == ["publish", second[:12], "whole"]
    assert rows[2].startswith("→  3")
    assert rows[2].endswith(f"rollback  {first[:12]}  whole  Ada  {REASON}")
    assert f"params.yaml wants {first[:12]}" in ran.out


def test_json_has_every_field_of_every_move(checkout: Checkout) -> None:
    """What a machine reads is the moves themselves, in full."""
    first, second = checkout.publish(1), checkout.publish(2, waivers=(waiver(),))

    told = checkout.fleet("releases", MODEL, "--json").json

    (local,) = told["registries"]
    assert (local["registry"], local["stable"], told["wanted"]) == ("local", second, "latest")
    assert [(m["sequence"], m["release"], m["previous"]) for m in local["moves"]] == [
        (1, first, None),
        (2, second, first),
    ]
    assert [m["is_stable"] for m in local["moves"]] == [False, True]
    assert local["moves"][1]["waivers"][0]["who"] == "Grace"
    assert all(m["in_ledger"] and m["in_registry"] for m in local["moves"])


def test_a_waiver_is_shown_where_the_release_is(checkout: Checkout) -> None:
    """Who let what pass stands in the row."""
    checkout.publish(1, waivers=(waiver(),))

    assert "waiver for hold by Grace" in checkout.fleet("releases", MODEL).out


def test_collected_and_damaged_releases_are_told_apart(checkout: Checkout) -> None:
    """`whole`, `collected`, `1 file missing`, `unreadable`: each in its row."""
    ids = [checkout.publish(seed) for seed in range(1, 5)]
    checkout.store().delete_release(MODEL, ids[0])
    checkout.blob_path(checkout.release(2).release.of("gguf", "Q8_0")[0].sha256).unlink()
    path = checkout.root / "registry/releases" / MODEL / f"{ids[2]}.json"
    path.chmod(0o644)
    path.write_bytes(b"<html>")

    moves = checkout.fleet("releases", MODEL, "--json").json["registries"][0]["moves"]

    assert [move["state"] for move in moves] == [
        "collected", "1 file missing", "unreadable", "whole",
    ]  # fmt: skip


def test_a_release_that_was_never_stable_is_listed(checkout: Checkout) -> None:
    """Published while another was pinned: it is there and can be rolled to."""
    old = checkout.publish(1)
    new = checkout.publish(2, stable=old)

    ran = checkout.fleet("releases", MODEL)

    assert f"stored   {new[:12]}  whole" in ran.out
    assert "never stable" in ran.out


def test_every_registry_that_holds_the_model_is_shown(checkout: Checkout) -> None:
    """One table for each; `--registry` names one."""
    checkout.publish(1, *BOTH)

    assert checkout.fleet("releases", MODEL).out.count("params.yaml wants") == 2
    assert checkout.fleet("releases", MODEL, "--registry", "mirror").out.count("wants") == 1


def test_moves_that_one_side_does_not_know_are_marked(checkout: Checkout) -> None:
    """Not in the ledger of this commit; not in a registry that was put back."""
    checkout.publish(1)
    ledger = checkout.at.ledger(MODEL).read_bytes()
    checkout.publish(2)
    both = checkout.at.ledger(MODEL).read_bytes()
    checkout.at.ledger(MODEL).write_bytes(ledger)
    assert "not in the ledger" in checkout.fleet("releases", MODEL).out

    checkout.at.ledger(MODEL).write_bytes(both)
    alias = checkout.root / "registry/aliases" / MODEL / "stable.json"
    alias.unlink()
    assert "not in the registry" in checkout.fleet("releases", MODEL).out


def test_a_registry_that_serves_something_else_than_declared_is_named(
    checkout: Checkout,
) -> None:
    """params.yaml says one release, the registry another: the command that moves it is given."""
    old = checkout.publish(1)
    checkout.publish(2)
    checkout.at.params.write_text(PARAMS.replace("# pinned\n", f"# pinned\n    stable: {old}\n"))

    ran = checkout.fleet("releases", MODEL)

    assert f"fleet publish {MODEL} --to local" in ran.err


def test_a_registry_that_cannot_be_asked_keeps_nobody_from_the_others(
    checkout: Checkout,
) -> None:
    """It is named with its cause; the exit code is its own."""
    checkout.publish(1)
    (checkout.root / "mirror").mkdir()
    alias = checkout.root / "mirror/aliases" / MODEL / "stable.json"
    alias.parent.mkdir(parents=True)
    alias.write_text("<html>")

    ran = checkout.fleet("releases", MODEL, "--json")

    assert ran.code == 8
    assert [one["registry"] for one in ran.json["registries"]] == ["local"]
    assert "mirror" in ran.json["errors"]


def test_a_model_without_releases_says_so(checkout: Checkout) -> None:
    """No table, the next step."""
    ran = checkout.fleet("releases", MODEL)

    assert ran.code == 0
    assert "was never published" in ran.out
    assert "fleet repro" in ran.err


def test_an_undeclared_model_gets_a_suggestion(checkout: Checkout) -> None:
    """Exit 2 and the name that was meant."""
    ran = checkout.fleet("releases", "tiny-lama")

    assert ran.code == 2
    assert f'did you mean "{MODEL}"?' in ran.err
