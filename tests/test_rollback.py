"""`fleet rollback`: one line of params.yaml, one move in each registry, no byte of a model."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import release_factory
from github_api import Fault, GitHubApi
from hosted_job import Hosted
from release_checkout import MODEL, OTHER, PARAMS, REASON, Checkout

from pipelines import declaration, pin_lines, publishing, registries, rollback, stable_line
from pipelines.errors import GateError, MachineError, ParamsError, RetryLaterError
from pipelines.params import Registry
from pipelines.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from registry_servers import S3Server

    from pipelines.stores.base import Store

BOTH = ("local", "mirror")


@pytest.fixture
def checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Checkout:
    """A fleet with two directories as registries."""
    return Checkout(tmp_path / "fleet", monkeypatch, capsys)


def back(checkout: Checkout, to: str, *argv: str) -> Any:
    """Roll back."""
    return checkout.fleet("rollback", MODEL, "--to", to, "--reason", REASON, *argv)


# --- what it does -----------------------------------------------------------------------------


def test_a_rollback_moves_every_registry_and_declares_it(checkout: Checkout) -> None:
    """Both registries mean the earlier release; ledger and params.yaml say so, too."""
    old, new = checkout.publish(1, *BOTH), checkout.publish(2, *BOTH)

    ran = back(checkout, "previous")

    assert ran.code == 0, ran.err
    assert declaration.load(checkout.at.params).models[MODEL].stable == old
    for registry in BOTH:
        move = checkout.alias(registry).moves[-1]
        assert (move.release, move.previous, move.action) == (old, new, "rollback")
        assert (move.who, move.why, move.sequence) == ("Ada", REASON, 3)
        assert checkout.ledger().last(registry, "stable") == move


def test_a_rollback_changes_one_line_of_params_yaml(checkout: Checkout) -> None:
    """Comments, order, quotes and spaces stay; a second rollback changes only the value."""
    first, _ = checkout.publish(1), checkout.publish(2)
    third = checkout.publish(3)

    back(checkout, first)

    line = f"    stable: {first}\n"
    before, after = PARAMS.split("  # pinned\n")
    assert checkout.at.params.read_text() == f"{before}  # pinned\n{line}{after}"
    back(checkout, third[:8])
    assert checkout.at.params.read_text() == f"{before}  # pinned\n{line}{after}".replace(
        first, third
    )


def test_latest_ends_a_rollback(checkout: Checkout) -> None:
    """`--to latest` means the newest release again, as if nobody had rolled back."""
    checkout.publish(1)
    new = checkout.publish(2)
    back(checkout, "previous")

    ran = back(checkout, "latest")

    assert ran.code == 0, ran.err
    assert "local: Moved stable forward from " in ran.out
    assert "olled back" not in ran.out
    assert checkout.alias().release == new
    assert declaration.load(checkout.at.params).models[MODEL].stable == "latest"


def test_the_line_that_undoes_it_undoes_it(checkout: Checkout) -> None:
    """What is printed as undo can be typed and brings back what was there."""
    checkout.publish(1, *BOTH)
    new = checkout.publish(2, *BOTH)

    undo = back(checkout, "previous", "--json").json["undo"]
    assert undo.startswith(f"fleet rollback {MODEL} --to latest --reason ")
    ran = checkout.fleet("rollback", MODEL, "--to", "latest", "--reason", "undo")

    assert ran.code == 0, ran.err
    assert [checkout.alias(name).release for name in BOTH] == [new, new]


def test_a_rollback_moves_no_byte_of_a_model(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are looked for by name and size; none is read or written."""
    checkout.publish(1)
    checkout.publish(2)
    from pipelines.stores.local import LocalStore  # noqa: PLC0415 - to forbid it

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a rollback reads and writes no file of a release")

    for name in ("put_blob", "read_blob", "prove_blob", "put_release"):
        monkeypatch.setattr(LocalStore, name, forbidden)

    assert back(checkout, "previous").code == 0


def test_a_bucket_is_rolled_back_with_the_rest_and_no_object_of_it_is_written(
    checkout: Checkout, s3_server: S3Server
) -> None:
    """Local and S3 in one command: of the bucket only the alias is another object afterwards."""
    server = s3_server.registry(prefix="fleet")
    checkout.declare("production", server)
    old, _new = (checkout.publish(seed, "local", "production") for seed in (1, 2))
    client = s3_server.client()

    def objects() -> dict[str, Any]:
        listed = client.list_objects_v2(Bucket=server.url.split("/")[2])["Contents"]
        return {each["Key"]: (each["ETag"], each["LastModified"]) for each in listed}

    before = objects()
    ran = back(checkout, "previous")
    after = objects()
    client.close()

    assert ran.code == 0, ran.err
    assert [checkout.alias(name).release for name in ("local", "production")] == [old, old]
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {f"fleet/aliases/{MODEL}/stable.json"}


def test_the_same_again_says_that_nothing_changed(checkout: Checkout) -> None:
    """A second rollback to the same release makes no move and touches no file."""
    old = checkout.publish(1)
    checkout.publish(2)
    back(checkout, old)
    before = checkout.at.params.stat().st_mtime_ns, checkout.at.ledger(MODEL).read_bytes()

    ran = back(checkout, old)

    assert ran.code == 0
    assert "nothing changed" in ran.out
    assert (checkout.at.params.stat().st_mtime_ns, checkout.at.ledger(MODEL).read_bytes()) == before


def test_a_dry_run_says_everything_and_changes_nothing(checkout: Checkout) -> None:
    """Neither params.yaml, nor a registry, nor the ledger is touched."""
    old, new = checkout.publish(1, *BOTH), checkout.publish(2, *BOTH)
    ledger = checkout.at.ledger(MODEL).read_bytes()

    ran = back(checkout, "previous", "--dry-run")

    assert ran.code == 0
    assert old[:12] in ran.out
    assert "would become" in ran.out
    assert checkout.at.params.read_text() == PARAMS
    assert checkout.at.ledger(MODEL).read_bytes() == ledger
    assert [checkout.alias(name).release for name in BOTH] == [new, new]


def test_one_registry_can_be_named(checkout: Checkout) -> None:
    """Only its alias moves; what the others serve is left to the next publish."""
    old, new = checkout.publish(1, *BOTH), checkout.publish(2, *BOTH)

    ran = back(checkout, old, "--registry", "mirror")

    assert ran.code == 0
    assert (checkout.alias("mirror").release, checkout.alias("local").release) == (old, new)


def test_both_ways_lead_to_the_same_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Writing `stable:` by hand and publishing gives the alias that the command gives."""
    states = []
    for name in ("command", "hand"):
        checkout = Checkout(tmp_path / name, monkeypatch, capsys)
        old = checkout.publish(1)
        checkout.publish(2)
        if name == "command":
            assert back(checkout, old).code == 0
        else:
            text = PARAMS.replace("# pinned\n", f"# pinned\n    stable: {old}\n")
            checkout.at.params.write_text(text)
        # What the stage does next, in either case.
        checkout.publish(2, stable=declaration.load(checkout.at.params).models[MODEL].stable)
        alias = checkout.alias()
        states.append(
            (
                [(m.sequence, m.action, m.release, m.previous) for m in alias.moves],
                checkout.ledger().moves("local", "stable") == alias.moves,
                checkout.at.params.read_text(),
            )
        )
    assert states[0] == states[1]
    assert states[0][1]


# --- what it refuses --------------------------------------------------------------------------


def test_what_was_never_published_is_refused_with_what_can_be_had(checkout: Checkout) -> None:
    """The error lists the releases that are there; nothing was changed anywhere."""
    old = checkout.publish(1)
    checkout.publish(2)

    ran = back(checkout, "f" * 64)

    assert ran.code == 8
    assert f"it can go to: {old[:12]}" in ran.err
    assert "fleet releases" in ran.err
    assert checkout.at.params.read_text() == PARAMS


def test_a_release_of_another_model_is_refused(checkout: Checkout) -> None:
    """An id that is published, but of another model, is no target."""
    checkout.publish(1)
    foreign = checkout.publish(2, model=OTHER)

    ran = back(checkout, foreign)

    assert ran.code == 8
    assert "Nothing was changed" in ran.err


def test_a_target_without_its_files_is_refused_before_anything_is_changed(
    checkout: Checkout,
) -> None:
    """Whole in one registry and not in the other: neither is moved, the missing file is named."""
    old, new = checkout.publish(1, *BOTH), checkout.publish(2, *BOTH)
    gguf = checkout.release(1).release.of("gguf", "Q8_0")[0]
    checkout.blob_path(gguf.sha256, "mirror").unlink()

    ran = back(checkout, old)

    assert ran.code == 8
    assert f"it lacks {gguf.name}" in ran.err
    assert [checkout.alias(name).release for name in BOTH] == [new, new]
    assert checkout.at.params.read_text() == PARAMS


def test_a_collected_target_is_refused(checkout: Checkout) -> None:
    """A release that was collected is offered nowhere and refused by its id."""
    old = checkout.publish(1)
    checkout.publish(2)
    checkout.store().delete_release(MODEL, old)

    ran = back(checkout, "previous")

    assert ran.code == 8
    assert "it can go to: nothing" in ran.err


def test_previous_has_to_be_the_same_everywhere(checkout: Checkout) -> None:
    """Registries with different histories: the error asks for the release by its id."""
    first = checkout.publish(1)
    checkout.publish(2, "mirror")
    checkout.publish(3, *BOTH)

    ran = back(checkout, "previous")

    assert ran.code == 8
    assert "is not the same everywhere" in ran.err
    assert f"--to {first[:12]}" in ran.err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("nope", "--to", "previous", "--reason", "x"), 2, "is not declared"),
        ((MODEL, "--to", "previous", "--reason", " "), 2, "--reason"),
        ((MODEL, "--to", "previous", "--reason", "x" * 400), 2, "400"),
        ((MODEL, "--to", "abc", "--reason", "x"), 8, "8 or more digits"),
        ((MODEL, "--to", "previous", "--reason", "x", "--registry", "nope"), 2, "not declared"),
    ],
)
def test_bad_words_are_answered(
    checkout: Checkout, argv: tuple[str, ...], code: int, said: str
) -> None:
    """Each mistake has its sentence and its exit code, and changes nothing."""
    checkout.publish(1)

    ran = checkout.fleet("rollback", *argv)

    assert ran.code == code
    assert said in ran.err
    assert checkout.at.params.read_text() == PARAMS


def test_a_model_that_was_never_published_says_so(checkout: Checkout) -> None:
    """There is nothing to roll back to."""
    ran = back(checkout, "previous")

    assert ran.code == 8
    assert "was never published" in ran.err


def test_a_broken_ledger_stops_it(checkout: Checkout) -> None:
    """A line that somebody edited is named with its place; nothing is moved."""
    checkout.publish(1)
    checkout.publish(2)
    path = checkout.at.ledger(MODEL)
    path.write_text(path.read_text().replace("release 1", "release 9"))

    ran = back(checkout, "previous")

    assert ran.code == 8
    assert "ledger.jsonl:1: this line was edited" in ran.err
    assert checkout.at.params.read_text() == PARAMS


def test_a_registry_that_was_put_back_is_not_believed(checkout: Checkout) -> None:
    """`previous` of an old state of the registry is refused."""
    checkout.publish(1)
    checkout.publish(2)
    checkout.copy("registry")
    checkout.publish(3)
    checkout.put_back("registry")

    ran = back(checkout, "previous")

    assert ran.code == 8
    assert "old state" in ran.err


def test_hostile_words_reach_neither_terminal_nor_ledger(checkout: Checkout) -> None:
    """Escapes and commands for the runner are taken out of a reason."""
    checkout.publish(1)
    checkout.publish(2)

    ran = checkout.fleet(
        "rollback", MODEL, "--to", "previous", "--reason", "\x1b[31mred\n::error::x"
    )

    assert ran.code == 0
    why = checkout.alias().moves[-1].why
    assert "\x1b" not in why
    assert "\n" not in why
    assert "::error" not in why


# --- registries that are not there ------------------------------------------------------------


def test_a_registry_that_cannot_be_reached_is_named_and_the_others_are_moved(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 75; the command that is printed names the release and moves the one that was left."""
    old = checkout.publish(1, *BOTH)
    new = checkout.publish(2, *BOTH)
    real = open_store

    def flaky(name: str, *rest: Any) -> Store:
        store: Store = real(name, *rest)
        if name == "mirror":

            def refuse(*_: object) -> None:
                raise RetryLaterError("mirror cannot be reached.")

            monkeypatch.setattr(store, "read_alias", refuse)
        return store

    monkeypatch.setattr("pipelines.rollback.open_store", flaky)
    ran = back(checkout, old)
    monkeypatch.setattr("pipelines.rollback.open_store", real)

    assert ran.code == 75
    assert "error: mirror cannot be reached." in ran.err
    assert (checkout.alias("local").release, checkout.alias("mirror").release) == (old, new)
    assert back(checkout, old).code == 0
    assert checkout.alias("mirror").release == old
    assert checkout.alias("local").sequence == 3


def test_a_registry_that_does_not_answer_keeps_nobody_waiting(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes connections and says nothing: the others are moved, exit 75."""
    old = checkout.publish(1)
    checkout.publish(2)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setattr(registries, "ANSWERS_WITHIN_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        checkout.declare("silent", Registry(url="s3://bucket/fleet", endpoint=endpoint))

        ran = back(checkout, old)

    assert ran.code == 75
    assert "error: silent did not answer within 1 s" in ran.err
    assert checkout.alias().release == old


def unreachable(monkeypatch: pytest.MonkeyPatch, down: str) -> None:
    """Let one registry be as a server that is down."""

    def flaky(name: str, *rest: Any) -> Store:
        store: Store = open_store(name, *rest)
        if name == down:

            def refuse(*_: object) -> None:
                raise RetryLaterError("no route to it.", hint="What was sent is not sent again.")

            monkeypatch.setattr(store, "read_alias", refuse)
        return store

    monkeypatch.setattr("pipelines.rollback.open_store", flaky)


def typed(line: str) -> list[str]:
    """What a hint says can be typed."""
    return shlex.split(line.partition("fleet rollback ")[2].splitlines()[0])


def test_after_half_a_rollback_the_hint_brings_the_other_half(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`previous` with one registry down: what is printed as next names id, registry and reason."""
    old, new = checkout.publish(1, *BOTH), checkout.publish(2, *BOTH)
    with monkeypatch.context() as while_down:
        unreachable(while_down, "mirror")
        ran = back(checkout, "previous")

        assert ran.code == 75
        command = f'fleet rollback {MODEL} --to {old[:12]} --registry mirror --reason "{REASON}"'
        assert command in ran.err
        assert "same command" not in ran.err
        again = back(checkout, "previous")

        assert again.code == 8
        assert f"local has gone to {old[:12]} already" in again.err
        assert checkout.alias("local").release == old
    ran = checkout.fleet("rollback", *typed(ran.err))

    assert ran.code == 0, ran.err
    assert [checkout.alias(name).release for name in BOTH] == [old, old]
    assert f"undo: fleet rollback {MODEL} --to {new[:12]} --registry mirror" in ran.err


def test_the_only_registry_that_is_down_is_an_error_with_the_command_for_later(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was moved, so that what was typed still means the same."""
    checkout.publish(1, *BOTH)
    new = checkout.publish(2, *BOTH)
    unreachable(monkeypatch, "mirror")

    ran = back(checkout, "previous", "--registry", "mirror")

    assert ran.code == 75
    assert "mirror: no route to it. Nothing was changed." in ran.err
    assert f"fleet rollback {MODEL} --to previous --registry mirror --reason" in ran.err
    assert checkout.alias("mirror").release == new


def test_previous_after_half_a_rollback_names_where_the_others_have_gone(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry is back: which means what, which has moved, and never the bad release."""
    old, new = checkout.publish(1, *BOTH), checkout.publish(2, *BOTH)
    with monkeypatch.context() as while_down:
        unreachable(while_down, "mirror")
        back(checkout, "previous")

    ran = back(checkout, "previous")

    assert ran.code == 8
    assert f"{new[:12]} in local (now {old[:12]})" in ran.err
    assert f"{old[:12]} in mirror (now {new[:12]})" in ran.err
    assert f"local has gone to {old[:12]} already" in ran.err
    hint = ran.err.partition("next:")[2]
    assert new[:12] not in hint
    assert checkout.fleet("rollback", *typed(hint)).code == 0
    assert [checkout.alias(name).release for name in BOTH] == [old, old]


def test_a_repeat_by_id_is_undone_to_what_was_stable_before(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moved the rest; undo is never the release that it has set, and nothing has no undo."""
    old, new = checkout.publish(1, *BOTH), checkout.publish(2, *BOTH)
    with monkeypatch.context() as while_down:
        unreachable(while_down, "mirror")
        back(checkout, old)

    ran = back(checkout, old)
    assert f"undo: fleet rollback {MODEL} --to {new[:12]} --reason" in ran.err

    ran = back(checkout, old)
    assert "undo:" not in ran.err
    assert back(checkout, old, "--json").json["undo"] == ""


def test_a_missing_login_keeps_nobody_from_rolling_back_the_others(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bucket and no AWS_*: named and left with exit 8, the others are moved."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    old = checkout.publish(1, *BOTH)
    checkout.publish(2, *BOTH)
    checkout.declare("cloud", Registry(url="s3://bucket/fleet", endpoint="http://127.0.0.1:9"))

    ran = back(checkout, "previous")

    assert ran.code == 8
    assert "cloud: " in ran.err
    assert "there is no login to AWS" in ran.err
    assert "Set AWS_ACCESS_KEY_ID" in ran.err
    assert f"Then: fleet rollback {MODEL} --to {old[:12]} --registry cloud" in ran.err
    assert [checkout.alias(name).release for name in BOTH] == [old, old]


def test_a_fresh_clone_rolls_back_the_others(checkout: Checkout) -> None:
    """An empty local registry, as in a clone, keeps nobody from rolling back production."""
    old = checkout.publish(1, *BOTH)
    checkout.publish(2, *BOTH)
    (checkout.root / "registry").rename(checkout.root / "elsewhere")

    ran = back(checkout, old)

    assert ran.code == 0, ran.err
    assert "local holds nothing" in ran.err
    assert checkout.alias("mirror").release == old


# --- kills ------------------------------------------------------------------------------------

_DIES = """
import os, signal, sys
from pipelines import rollback, stable_line, __main__, publishing
from pipelines.stores.local import LocalStore
from pipelines.ledger import Ledger

def dying(owner, name, after):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        if not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)

owner, name, when = sys.argv[1].split(":")
dying({"line": stable_line, "store": LocalStore, "ledger": Ledger}[owner], name, when == "after")
sys.exit(__main__.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "where",
    [
        "line:write:before",
        "line:write:after",
        "store:write_alias:before",
        "store:write_alias:after",
        "ledger:append:before",
        "ledger:append:after",
    ],
)
def test_after_a_kill_the_same_command_ends_what_was_begun(checkout: Checkout, where: str) -> None:
    """Killed at each step, the next run moves what was not moved, once."""
    old = checkout.publish(1, *BOTH)
    checkout.publish(2, *BOTH)
    argv = ("rollback", MODEL, "--to", old, "--reason", REASON)

    died = subprocess.run(
        [sys.executable, "-c", _DIES, where, *argv],
        cwd=checkout.root,
        env={**os.environ, "PYTHONPATH": str(rollback.__file__).rsplit("/pipelines", 1)[0]},
        capture_output=True,
        timeout=60,
        check=False,
    )
    ran = checkout.fleet(*argv)

    assert died.returncode == -signal.SIGKILL, died.stderr
    assert ran.code == 0, ran.err
    assert declaration.load(checkout.at.params).models[MODEL].stable == old
    for registry in BOTH:
        alias = checkout.alias(registry)
        assert (alias.release, alias.sequence) == (old, 3)
        assert checkout.ledger().moves(registry, "stable") == alias.moves


@pytest.mark.parametrize("where", ["line:write:after", "store:write_alias:after"])
def test_after_a_kill_publishing_ends_what_was_begun(checkout: Checkout, where: str) -> None:
    """Declared and not moved, or moved and not written down: what the stage does converges."""
    old = checkout.publish(1)
    checkout.publish(2)
    subprocess.run(
        [sys.executable, "-c", _DIES, where, "rollback", MODEL, "--to", old, "--reason", REASON],
        cwd=checkout.root,
        env={**os.environ, "PYTHONPATH": str(rollback.__file__).rsplit("/pipelines", 1)[0]},
        capture_output=True,
        timeout=60,
        check=False,
    )

    checkout.publish(2, stable=declaration.load(checkout.at.params).models[MODEL].stable)

    alias = checkout.alias()
    assert (alias.release, alias.sequence, alias.moves[-1].action) == (old, 3, "rollback")
    assert checkout.ledger().moves("local", "stable") == alias.moves


def test_what_is_declared_wins_over_an_alias_that_was_moved(checkout: Checkout) -> None:
    """Rolled back, then params.yaml taken back by git: publishing moves the alias back, once."""
    old, new = checkout.publish(1), checkout.publish(2)
    back(checkout, old)
    checkout.at.params.write_text(PARAMS)

    checkout.publish(2)

    alias = checkout.alias()
    assert (alias.release, alias.sequence) == (new, 4)


# --- the line of params.yaml ------------------------------------------------------------------

ID = "ab" * 32


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("    stable: latest   # why\n", f"    stable: {ID}   # why\n"),
        ('    stable: "latest"\n', f'    stable: "{ID}"\n'),
        ("    'stable':   'latest' \n", f"    'stable':   '{ID}' \n"),
        ("    stable:\n      latest\n", f"    stable:\n      {ID}\n"),
    ],
)
def test_only_the_value_is_exchanged(checkout: Checkout, written: str, expected: str) -> None:
    """Quotes, comments and spaces around it stay, whatever they are."""
    text = PARAMS.replace("# pinned\n", f"# pinned\n{written}")
    checkout.at.params.write_text(text)

    assert stable_line.write(checkout.at.params, MODEL, ID)

    assert checkout.at.params.read_text() == text.replace(written, expected)


def test_a_model_in_braces_gets_its_line_inside(checkout: Checkout) -> None:
    """Flow style stays flow style."""
    assert stable_line.write(checkout.at.params, OTHER, ID)

    assert "context_tokens: 512}\n" in checkout.at.params.read_text()
    assert f"revision: {'d' * 40}, stable: {ID}, context" in checkout.at.params.read_text()


def test_line_ends_of_windows_stay(checkout: Checkout) -> None:
    """A file with CRLF has CRLF afterwards, the new line too."""
    checkout.at.params.write_bytes(PARAMS.replace("\n", "\r\n").encode())

    stable_line.write(checkout.at.params, MODEL, ID)

    data = checkout.at.params.read_bytes()
    assert f"    stable: {ID}\r\n".encode() in data
    assert data.count(b"\n") == data.count(b"\r\n")


def test_a_link_stays_a_link(checkout: Checkout) -> None:
    """params.yaml may be a link to the file of a mono-repository."""
    real = checkout.root / "real.yaml"
    checkout.at.params.rename(real)
    checkout.at.params.symlink_to("real.yaml")

    stable_line.write(checkout.at.params, MODEL, ID)

    assert checkout.at.params.is_symlink()
    assert ID in real.read_text()


def test_an_edit_at_the_same_moment_is_not_lost(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody saves params.yaml while we write: his words stay, ours are refused."""
    real = pin_lines._require_only

    def slow(*args: Any) -> None:
        real(*args)
        checkout.at.params.write_text(PARAMS + "# mine\n")

    monkeypatch.setattr(pin_lines, "_require_only", slow)

    with pytest.raises(MachineError, match="saved by somebody else"):
        stable_line.write(checkout.at.params, MODEL, ID)
    assert checkout.at.params.read_text() == PARAMS + "# mine\n"


@pytest.mark.parametrize(
    "hostile",
    [
        PARAMS.replace("context_tokens:   512", "context_tokens: &a 512"),
        PARAMS.replace(f"  {OTHER}:", f"  {MODEL}:"),
        PARAMS + "models: {}\n",
        "\ufeff" + PARAMS,
        PARAMS.replace("# the small one", "\x1b[31m"),
        "",
        "- 1\n",
    ],
)
def test_a_file_that_is_refused_is_left_as_it_is(checkout: Checkout, hostile: str) -> None:
    """Aliases, duplicate keys, invisible letters: named, and not a byte is changed."""
    checkout.publish(1)
    checkout.publish(2)
    checkout.at.params.write_text(hostile)

    ran = back(checkout, "previous")

    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert checkout.at.params.read_text() == hostile


def test_where_no_single_line_can_be_added_the_error_gives_the_line_to_write(
    checkout: Checkout,
) -> None:
    """Keys behind question marks are YAML, too; nothing is guessed."""
    keys = f'    ? source\n    : "path:examples/tiny-llama"\n    ? revision\n    : {"c" * 40}\n'
    begin, end = PARAMS.index('    source: "path'), PARAMS.index("    context_tokens:   512")
    text = PARAMS[:begin] + keys + PARAMS[end:]
    checkout.at.params.write_text(text)

    with pytest.raises(ParamsError) as caught:
        stable_line.write(checkout.at.params, MODEL, ID)

    assert f"stable: {ID}" in caught.value.hint
    assert checkout.at.params.read_text() == text


# --- from a hosted machine --------------------------------------------------------------------


@pytest.fixture
def hosted(checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosted]:
    """A job on main; both registries hold two releases, and git knows of every move."""
    for seed in (1, 2):
        checkout.publish(seed, *BOTH)
    with GitHubApi(tmp_path / "origin.git") as api:
        yield Hosted(checkout, api, monkeypatch)


def dispatched(hosted: Hosted, to: str = "previous", reason: str = REASON) -> Any:
    """Type what the workflow types, in a fresh checkout of main."""
    hosted.clone()
    return hosted.checkout.fleet(
        "rollback", MODEL, "--to", to, "--registry", "mirror", "--reason", reason, "--pr"
    )


def test_a_dispatch_moves_the_alias_and_opens_the_pull_request_that_agrees(hosted: Hosted) -> None:
    """One registry; params.yaml and ledger by pull request; merged, nothing is left to do."""
    new = hosted.checkout.alias("mirror").release

    ran = dispatched(hosted)

    assert ran.code == 0, ran.err
    old = hosted.checkout.alias("mirror").release
    assert hosted.checkout.alias("local").release == new
    outputs = hosted.outputs()
    assert (outputs["from"], outputs["to"], outputs["registries"]) == (new, old, "mirror")
    assert outputs["pull_request"].startswith("https://")
    (pull,) = hosted.open_pulls()
    assert (pull["head"], pull["base"]) == (f"fleet/rollback-{MODEL}", "main")
    hosted.merge()
    hosted.clone()
    assert declaration.load(hosted.checkout.at.params).models[MODEL].stable == old
    assert (
        hosted.checkout.ledger().last("mirror", "stable")
        == (hosted.checkout.alias("mirror").moves[-1])
    )
    ran = dispatched(hosted, "latest")
    assert ran.code == 0, ran.err
    assert hosted.checkout.alias("mirror").release == new
    hosted.merge()
    hosted.clone()
    assert declaration.load(hosted.checkout.at.params).models[MODEL].stable == "latest"


def test_an_environment_means_the_registries_whose_logins_the_job_has(hosted: Hosted) -> None:
    """Without a registry only those of the environment move; one of another is refused."""
    new = hosted.checkout.alias("local").release
    params = hosted.checkout.at.params
    text = params.read_text()
    assert text.count("mirror: {") == 1
    params.write_text(text.replace("mirror: {", "mirror: {environment: production, "))
    hosted.push()
    hosted.clone()
    back = ("rollback", MODEL, "--to", "previous", "--reason", REASON, "--pr", "--environment")

    for other in (("bot",), ("production", "--registry", "local")):
        ran = hosted.checkout.fleet(*back, *other)
        assert ran.code == 2, ran.err
        assert "environment" in ran.err
    assert hosted.checkout.alias("mirror").release == new
    ran = hosted.checkout.fleet(*back, "production", "--registry=")

    assert ran.code == 0, ran.err
    assert hosted.outputs()["registries"] == "mirror"
    assert hosted.checkout.alias("mirror").release != new
    assert hosted.checkout.alias("local").release == new


def test_what_github_refuses_leaves_the_alias_where_it_was_moved(hosted: Hosted) -> None:
    """403 at each write: the alias stands, the error says what to do, the same run ends it."""
    dispatched(hosted)
    old = hosted.checkout.alias("mirror").release
    writes = [str(seen) for seen in hosted.api.requests if seen.is_write]
    assert len(writes) == 4
    for what in writes:
        for pull in hosted.open_pulls():
            hosted.api.close_pull(pull["number"])
        hosted.api.git.git("update-ref", "-d", f"refs/heads/fleet/rollback-{MODEL}")
        hosted.api.forget()
        hosted.api.strike(Fault(kind="status", status=403, body={"message": "no"}), matches=what)

        ran = dispatched(hosted)

        assert ran.code == 8, what
        assert hosted.checkout.alias("mirror").release == old
        assert f"means {old[:12]} in mirror, but params.yaml on GitHub does not say so" in ran.err
        assert "start this job again" in ran.err
        assert "does not say so" in hosted.summary()
        assert dispatched(hosted).code == 0
        assert hosted.checkout.alias("mirror").release == old
        assert len(hosted.open_pulls()) == 1


def test_a_run_that_was_killed_before_its_pull_request_ends_it_when_started_again(
    hosted: Hosted,
) -> None:
    """`previous` means by then what was left: the same run knows what it began, another asks."""
    hosted.checkout.fleet(
        "rollback", MODEL, "--to", "previous", "--registry", "mirror", "--reason", REASON
    )
    moved = hosted.checkout.alias("mirror")

    assert dispatched(hosted).code == 0
    assert hosted.checkout.alias("mirror") == moved
    assert len(hosted.open_pulls()) == 1

    hosted.run(2)
    ran = dispatched(hosted)
    assert ran.code == 8
    assert "`previous` would take that back" in ran.err
    assert f"--to {moved.release[:12]} --registry mirror" in ran.err
    assert hosted.checkout.alias("mirror") == moved
    assert dispatched(hosted, moved.release[:12]).code == 0


def test_a_publish_run_between_rollback_and_merge_moves_nothing(hosted: Hosted) -> None:
    """Main says `latest` still: what the rollback left is not published over it."""
    dispatched(hosted)
    held = hosted.checkout.alias("mirror")
    hosted.clone()
    hosted.checkout.publish(3)
    made = hosted.checkout.release(3)
    ledger = hosted.checkout.ledger()

    with pytest.raises(GateError, match="was rolled back to"):
        publishing.publish(
            made, hosted.checkout.store("mirror"), ledger, stable="latest", by=release_factory.by()
        )

    assert hosted.checkout.alias("mirror") == held


def test_a_reason_of_a_stranger_is_text_and_nothing_else(hosted: Hosted) -> None:
    """No mention, link, table, comment of ours, output or command comes from it."""
    reason = "$(id) `id` @team #1 | [x](http://x) <!-- fleet:end --> ::set-output name=a::b\nto=x"

    ran = dispatched(hosted, reason=reason)

    assert ran.code == 0, ran.err
    (pull,) = hosted.open_pulls()
    for text in (pull["body"], hosted.summary()):
        assert "@team" not in text
        assert "http://x" not in text
        assert "<!-- fleet:end --> ::" not in text
    assert pull["body"].count("<!-- fleet:end -->") == 1
    assert set(hosted.outputs()) == {"from", "to", "registries", "pull_request"}
    message = hosted.api.git.text("log", "-1", "--format=%B", f"fleet/rollback-{MODEL}")
    assert "team" not in message
    assert hosted.checkout.alias("mirror").moves[-1].why.startswith("$(id) `id` @team")


@pytest.mark.parametrize(
    "model", ["nobody", "../../etc", "tiny-llama; id", "-x", "tiny-llama\nlocal", ""]
)
def test_a_model_that_is_none_reaches_neither_registry_nor_github(
    hosted: Hosted, model: str
) -> None:
    """Exit 2, nothing was asked of anybody."""
    hosted.api.forget()

    ran = hosted.checkout.fleet("rollback", model, "--to", "previous", "--reason", REASON, "--pr")

    assert ran.code == 2
    assert not hosted.api.requests
    assert hosted.checkout.alias("mirror").sequence == 2


def test_a_dry_run_asks_nothing_of_github(hosted: Hosted) -> None:
    """No branch, no pull request, no output."""
    hosted.api.forget()

    ran = hosted.checkout.fleet(
        "rollback", MODEL, "--to", "previous", "--reason", REASON, "--pr", "--dry-run"
    )

    assert ran.code == 0, ran.err
    assert not hosted.api.requests
    assert not (hosted.files / "output").exists()
