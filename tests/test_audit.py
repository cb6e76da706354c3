"""`fleet audit`: which bytes ran when, made from what, on which evidence, by whose decision."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import release_factory as factory
from release_checkout import MODEL, OTHER, PARAMS, REASON, Checkout, waiver

from pipelines import publishing

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN = """\
tiny-llama
  local (file:registry): 3 moves of `stable`; agrees with the ledger.
    1. 2025-01-01 12:00 UTC: Ada published {old}: release 1. Served for 24 hours.
       let pass: `hold` by Grace until 2027-12-31: the customer waits
    2. 2025-01-02 12:00 UTC: Ada published {new} in place of {old}: release 2. Served for 31 days.
    3. 2025-02-02 18:30 UTC: Bob rolled back to {old} in place of {new}: it was too slow \
(run https://forge.example/runs/7). Served since then.
       let pass: `hold` by Grace until 2027-12-31: the customer waits
  params.yaml wants {old}.

  Release {old} (sha256 {old_id})
    made from path:examples/tiny-llama at {revision}: LlamaForCausalLM, 3.40 million parameters, \
licence apache-2.0
    by llama.cpp 0c1e57098a3f, recipe 1; load-tested with ollama 0.33.0 and \
modelfiles/chat.Modelfile.j2, version 1
    measured on a CPU (cpu, 2 cores, 8 GiB)
    Q8_0: sha256 {gguf_1}
       max_kld_mean_nats: 0.0100, limit 0.06
    local: PROMOTE, {winner}. It kept every limit.
       ttft: 0.990, limit 0.95: PASS. 99 % of requests had their first token within 1,000 ms.

  Release {new} (sha256 {new_id})
    made from path:examples/tiny-llama at {revision}: LlamaForCausalLM, 3.40 million parameters, \
licence apache-2.0
    by llama.cpp 0c1e57098a3f, recipe 1; load-tested with ollama 0.33.0 and \
modelfiles/chat.Modelfile.j2, version 1
    measured on a CPU (cpu, 2 cores, 8 GiB)
    Q8_0: sha256 {gguf_2}
       max_kld_mean_nats: 0.0100, limit 0.06
    local: PROMOTE, {winner}. It kept every limit.
       ttft: 0.990, limit 0.95: PASS. 99 % of requests had their first token within 1,000 ms.
    composed after {old}
"""


@pytest.fixture
def checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Checkout:
    """A fleet with two directories as registries."""
    return Checkout(tmp_path / "fleet", monkeypatch, capsys)


def roll_back(checkout: Checkout, to: str) -> None:
    """Roll back as somebody called Bob, in a workflow run, at a known time."""
    by = publishing.By(
        who="Bob", why=REASON, run="https://forge.example/runs/7", at="2025-02-02T18:30:00Z"
    )
    publishing.point(MODEL, to, checkout.store(), checkout.ledger(), by=by)
    checkout.at.params.write_text(PARAMS.replace("# pinned\n", f"# pinned\n    stable: {to}\n"))


def kinds(checkout: Checkout) -> tuple[int, list[str]]:
    """Audit; return the exit code and the kinds of findings."""
    ran = checkout.fleet("audit", MODEL, "--json")
    (story,) = ran.json["models"]
    found = [each["kind"] for one in story["registries"] for each in one["findings"]]
    return ran.code, found


def test_the_story_of_a_model_in_words(checkout: Checkout) -> None:
    """The whole text, word for word."""
    options: dict[str, Any] = {"types": ("Q8_0",)}
    old = checkout.publish(1, waivers=(waiver(),), **options)
    new = checkout.publish(2, previous=old, **options)
    roll_back(checkout, old)

    ran = checkout.fleet("audit", MODEL)

    first = checkout.release(1, waivers=(waiver(),), **options).release
    second = checkout.release(2, previous=old, **options).release
    assert ran.code == 0
    assert ran.err == ""
    assert ran.out == GOLDEN.format(
        old=old[:12],
        new=new[:12],
        old_id=old,
        new_id=new,
        revision=first.source.revision,
        winner=first.hosts["local"].winner,
        gguf_1=first.of("gguf")[0].sha256,
        gguf_2=second.of("gguf")[0].sha256,
    )


def test_json_has_moves_findings_and_releases(checkout: Checkout) -> None:
    """What a machine needs to answer the same questions."""
    old = checkout.publish(1)
    new = checkout.publish(2)

    (story,) = checkout.fleet("audit", MODEL, "--json").json["models"]

    assert story["is_sound"]
    assert story["ledger"] == "unbroken"
    assert [move["release"] for move in story["registries"][0]["moves"]] == [old, new]
    assert set(story["releases"]) == {old, new}
    assert story["releases"][old]["gates"][0]["limit"] == 0.95


def test_every_model_is_told_if_none_is_named(checkout: Checkout) -> None:
    """Declared ones, and those that only the ledger remembers."""
    checkout.publish(1)
    checkout.publish(1, model="retired-model")

    told = checkout.fleet("audit").out

    assert f"{OTHER}\n  was never published." in told
    assert "retired-model\n" in told
    assert told.count("It is not declared in params.yaml any more.") == 1


def test_an_edited_ledger_is_named_with_its_line(checkout: Checkout) -> None:
    """The chain is broken: exit 8; what the registry tells is told all the same."""
    checkout.publish(1)
    checkout.publish(2)
    path = checkout.at.ledger(MODEL)
    path.write_text(path.read_text().replace("release 2", "release x"))

    ran = checkout.fleet("audit", MODEL)

    assert ran.code == 8
    assert "The ledger is broken: results/tiny-llama/ledger.jsonl:2" in ran.out
    assert "2. 2025-01-02" in ran.out


def test_a_line_that_was_cut_out_of_the_ledger_is_noticed(checkout: Checkout) -> None:
    """The chain shows a gap in the middle; the registry shows one at the end."""
    for seed in (1, 2, 3):
        checkout.publish(seed)
    path = checkout.at.ledger(MODEL)
    lines = path.read_bytes().splitlines(keepends=True)

    path.write_bytes(lines[0] + lines[2])
    assert checkout.fleet("audit", MODEL).code == 8

    path.write_bytes(lines[0] + lines[1])
    assert kinds(checkout) == (0, ["ahead"])


def test_a_registry_that_was_put_back_is_told(checkout: Checkout) -> None:
    """An old state is replayed: exit 8, and how many moves it has forgotten."""
    checkout.publish(1)
    checkout.copy("registry")
    checkout.publish(2)
    checkout.put_back("registry")

    ran = checkout.fleet("audit", MODEL)

    assert ran.code == 8
    assert "differs from the ledger" in ran.out
    assert "it is at 1, the ledger at 2" in ran.out
    assert "somebody put an old state back" in ran.out


def test_a_registry_that_tells_another_story_is_told(checkout: Checkout) -> None:
    """The same move to another release in the registry than in the ledger: both are shown."""
    old, new = checkout.publish(1), checkout.publish(2)
    path = checkout.root / "registry/aliases" / MODEL / "stable.json"
    value = json.loads(path.read_bytes())
    value["moves"][-1]["release"] = old
    path.write_text(json.dumps(value))

    assert kinds(checkout) == (8, ["two_stories"])
    told = checkout.fleet("audit", MODEL).out
    assert "move 2 of tiny-llama@stable is told in two ways" in told
    assert f"published {old[:12]}" in told
    assert f"published {new[:12]}" in told
    assert "[not in the ledger]" in told


def test_a_fresh_clone_is_no_alarm(checkout: Checkout) -> None:
    """The local registry is empty there; the story comes from the ledger; exit 0."""
    old = checkout.publish(1)
    (checkout.root / "registry").rename(checkout.root / "elsewhere")

    assert kinds(checkout) == (0, ["empty"])
    assert old[:12] in checkout.fleet("audit", MODEL).out


def test_a_release_that_nobody_holds_any_more_is_said_to_be_gone(checkout: Checkout) -> None:
    """Collected: the moves stay, the bytes cannot be described."""
    old = checkout.publish(1)
    checkout.publish(2)
    checkout.store().delete_release(MODEL, old)

    ran = checkout.fleet("audit", MODEL)

    assert ran.code == 0
    assert f"Release {old[:12]}: its release.json is in no registry any more." in ran.out


def test_a_registry_that_cannot_be_asked_is_named_and_the_story_goes_on(
    checkout: Checkout,
) -> None:
    """Its own exit code; what the ledger tells of it is told."""
    checkout.publish(1, "local", "mirror")
    (checkout.root / "mirror/aliases" / MODEL / "stable.json").write_text("<html>")

    ran = checkout.fleet("audit", MODEL)

    assert ran.code == 8
    assert "mirror, tiny-llama:" in ran.err
    assert "mirror: 1 move of `stable`; could not be compared with the ledger." in ran.out


def test_a_registry_that_is_not_declared_any_more_keeps_its_chapter(checkout: Checkout) -> None:
    """What was served there once stays in the story."""
    checkout.publish(1, "local", "mirror")
    checkout.at.params.write_text(PARAMS.replace('  mirror: {url: "file:mirror"}\n', ""))

    ran = checkout.fleet("audit", MODEL)

    assert ran.code == 0
    assert "mirror: 1 move of `stable`" in ran.out


def test_clocks_that_run_backwards_are_said_to(checkout: Checkout) -> None:
    """Order is by number; a time before the one before it is not turned into a length."""
    checkout.publish(2)
    checkout.publish(1)

    told = checkout.fleet("audit", MODEL).out

    assert "Served for a time that the clocks of two machines disagree about." in told


def test_words_of_others_are_harmless(checkout: Checkout) -> None:
    """A registry may hold anything in a reason: no escape, no command, no new line is shown."""
    made = checkout.release(1)
    by = factory.by("x")
    hostile = publishing.By(who="\x1b[31mM\nallory", why="::error::\x07", run=None, at=by.at)
    publishing.publish(made, checkout.store(), checkout.ledger(), stable="latest", by=hostile)

    told = checkout.fleet("audit", MODEL).out

    assert "\x1b" not in told
    assert "\x07" not in told
    assert "::error" not in told


def test_an_undeclared_model_gets_a_suggestion(checkout: Checkout) -> None:
    """Exit 2 and the name that was meant."""
    ran = checkout.fleet("audit", "tiny-lama")

    assert ran.code == 2
    assert f'did you mean "{MODEL}"?' in ran.err


def test_json_is_harmless_and_says_the_same_words(checkout: Checkout) -> None:
    """What a CI runner would obey is escaped as JSON escapes: a parser reads it as it was."""
    hostile = publishing.By(who="x ##[error]", why="::stop::\x1b[31m\u202e", run=None, at="never")
    publishing.publish(
        checkout.release(1), checkout.store(), checkout.ledger(), stable="latest", by=hostile
    )

    for argv in (("audit", MODEL), ("releases", MODEL)):
        ran = checkout.fleet(*argv, "--json")

        assert ran.out.isascii()
        assert "::" not in ran.out
        assert "##[" not in ran.out
        told = ran.json["models" if argv[0] == "audit" else "registries"][0]
        move = (told["registries"][0] if argv[0] == "audit" else told)["moves"][0]
        assert (move["who"], move["why"]) == ("x ##[error]", "::stop::\x1b[31m\u202e")
