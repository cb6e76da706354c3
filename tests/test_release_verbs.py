"""`fleet publish --to`, and what all verbs about releases have in common."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from publish_factory import change, change_load_test, finished, publish_slice
from record_factory import MODEL, compare_record, sha256, side
from release_checkout import REASON, Checkout

from pipelines import records
from pipelines.ledger import Ledger
from pipelines.records import FetchRecord
from pipelines.release_records import release_id

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from registry_servers import S3Server

    Fleet = Callable[..., subprocess.CompletedProcess[str]]

VERBS = ("publish", "rollback", "releases", "pull", "serve", "gc", "verify-registry", "audit")
HEAVY = ("dvc", "mlflow", "huggingface_hub", "pydantic", "ruamel", "requests", "botocore", "jinja2")
SECOND = "second-model"
ROOT = Path(__file__).resolve().parent.parent


def params_of(*models: str, **extra: Any) -> str:
    """Write the declaration of what `publish_factory.finished` makes."""
    value = {
        "toolchain": {"llama_cpp_python": "0.3.36", "sha256": "0" * 64},
        "corpora": {
            "evaluation": {"path": "corpora/evaluation.txt", "sha256": sha256("evaluation")}
        },
        "models": {
            model: {
                "source": f"path:examples/{model}",
                "revision": publish_slice(model=model).revision,
                "context_tokens": 512,
                **extra,
            }
            for model in models
        },
        "quants": {
            key: {"model": model, "type": type_}
            for model in models
            for key, type_ in publish_slice(model=model).quants.items()
        },
        "hosts": {"local": {"memory_mib": 2048}},
        # As the records of `finished` were judged.
        "gates": {"max_kld_mean_nats": 0.06},
        "load_test": {"slo": {"ttft_ms": 300.0, "tpot_ms": 50.0}},
    }
    # Block style, so that a registry can be added at the end.
    return (
        "".join(f"{key}: {json.dumps(part)}\n" for key, part in value.items())
        + 'registries:\n  local: {"url": "file:registry"}\n  mirror: {"url": "file:mirror"}\n'
    )


@pytest.fixture
def checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Checkout:
    """A fleet in which every stage before `publish` has run."""
    root = tmp_path / "fleet"
    finished(root)
    (root / "params.yaml").write_text(params_of(MODEL))
    return Checkout(root, monkeypatch, capsys)


def stage(checkout: Checkout) -> str:
    """Run the stage `publish`, as DVC does; return the id of the release."""
    ran = checkout.fleet("publish", MODEL, "--json")
    assert ran.code == 0, ran.err
    id_: str = ran.json["release"]
    return id_


# --- the command line -------------------------------------------------------------------------


def test_every_verb_explains_itself(fleet: Fleet) -> None:
    """`fleet VERB --help` works and says what the verb does."""
    overview = fleet("--help").stdout
    for verb in VERBS:
        done = fleet(verb, "--help")

        assert done.returncode == 0
        assert done.stdout.startswith(f"usage: fleet {verb}")
        assert f"\n    {verb}" in overview


def test_help_of_a_verb_imports_nothing_heavy(fleet: Fleet) -> None:
    """Nobody waits for a library to read what an option means."""
    for verb in VERBS:
        done = fleet(verb, "--help", PYTHONPROFILEIMPORTTIME="1")

        loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.split("\n")}
        assert not loaded.intersection(HEAVY), verb


@pytest.mark.parametrize(
    "argv",
    [
        ("rollback", MODEL, "--to", "previous", "--reason", REASON),
        ("releases", MODEL),
        ("pull", MODEL),
        ("gc", "--registry", "local"),
        ("verify-registry", "local"),
        ("audit",),
        ("publish", "--to", "local"),
    ],
)
def test_a_declaration_that_is_wrong_is_named_by_every_verb(
    checkout: Checkout, argv: tuple[str, ...]
) -> None:
    """Exit 2, file and line, no traceback."""
    checkout.at.params.write_text("models: [1\n")

    ran = checkout.fleet(*argv)

    assert ran.code == 2
    assert "params.yaml:" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    "argv",
    [("publish",), ("publish", MODEL, "--dry-run"), ("publish", MODEL, "--reason", REASON)],
)
def test_the_stage_and_the_verb_are_not_mixed(checkout: Checkout, argv: tuple[str, ...]) -> None:
    """`fleet publish MODEL` is what DVC runs; everything else wants a registry."""
    ran = checkout.fleet(*argv)

    assert ran.code == 2
    assert "--to NAME" in ran.err


# --- publish --to -----------------------------------------------------------------------------


def test_what_passed_its_gates_goes_to_another_registry(checkout: Checkout) -> None:
    """Composed from work/, even if the stage never ran: blobs, release, alias, ledger line."""
    ran = checkout.fleet("publish", MODEL, "--to", "mirror", "--reason", REASON)

    assert ran.code == 0, ran.err
    assert "next: git add results && git commit" in ran.err
    alias = checkout.alias("mirror", MODEL)
    move = alias.moves[-1]
    assert (move.sequence, move.action, move.who, move.why) == (1, "publish", "Ada", REASON)
    assert checkout.ledger(MODEL).last("mirror", "stable") == move
    assert release_id(checkout.at.release(MODEL).read_bytes()) == alias.release
    assert checkout.fleet("verify-registry", "mirror").code == 0


def test_the_release_of_the_stage_is_the_release_that_is_sent(checkout: Checkout) -> None:
    """One release, one id, wherever it goes."""
    id_ = stage(checkout)

    told = checkout.fleet("publish", MODEL, "--to", "mirror", "--json").json

    assert told["models"][MODEL]["release"] == id_
    assert checkout.alias("mirror", MODEL).release == id_


def test_publishing_again_changes_nothing_and_says_so(checkout: Checkout) -> None:
    """No file, no move, no line; byte for byte."""
    checkout.fleet("publish", MODEL, "--to", "mirror")
    before = checkout.at.ledger(MODEL).read_bytes(), checkout.at.release(MODEL).read_bytes()

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")

    assert ran.code == 0
    assert "nothing changed" in ran.out
    assert (checkout.at.ledger(MODEL).read_bytes(), checkout.at.release(MODEL).read_bytes()) == (
        before
    )


def test_a_dry_run_sends_and_writes_nothing(checkout: Checkout) -> None:
    """It says how much would be sent."""
    ran = checkout.fleet("publish", MODEL, "--to", "mirror", "--dry-run")

    assert ran.code == 0
    assert "Would send" in ran.out
    assert not (checkout.root / "mirror").exists()
    assert not checkout.at.ledger(MODEL).exists()
    assert not checkout.at.release(MODEL).exists()


def test_a_clone_without_work_publishes_from_the_local_registry(
    checkout: Checkout, s3_server: S3Server
) -> None:
    """Records, release.json and the registry are enough to publish to S3: the same release."""
    checkout.declare("production", s3_server.registry(prefix="fleet"))
    id_ = stage(checkout)
    shutil.rmtree(checkout.root / "work")

    ran = checkout.fleet("publish", MODEL, "--to", "production")

    assert ran.code == 0, ran.err
    assert checkout.alias("production", MODEL).release == id_
    assert checkout.fleet("verify-registry", "production").code == 0


def test_a_clone_without_work_and_registry_publishes_from_any_registry(
    checkout: Checkout, s3_server: S3Server
) -> None:
    """What production holds goes to a mirror; nothing of it stays in work/."""
    checkout.declare("production", s3_server.registry(prefix="fleet"))
    checkout.fleet("publish", MODEL, "--to", "production")
    shutil.rmtree(checkout.root / "work")

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")

    assert ran.code == 0, ran.err
    assert checkout.alias("mirror", MODEL).release == checkout.alias("production", MODEL).release
    assert checkout.fleet("verify-registry", "mirror").code == 0
    assert not list((checkout.root / "work").rglob("*.gguf"))
    assert not (checkout.at.scratch(MODEL) / "publish").exists()


def test_a_clone_without_any_of_it_is_told_what_to_do(checkout: Checkout) -> None:
    """No work/, no registry: refused with the next step."""
    stage(checkout)
    shutil.rmtree(checkout.root / "work")
    shutil.rmtree(checkout.root / "registry")

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")

    assert ran.code == 5
    assert "does not exist" in ran.err
    assert "fleet repro" in ran.err


def test_records_that_changed_since_are_not_published_under_the_old_release(
    checkout: Checkout,
) -> None:
    """Another load test: what is sent is composed anew, and follows the old release."""
    old = stage(checkout)
    change_load_test(checkout.at, MODEL, wall_s=123.0)

    assert checkout.fleet("publish", MODEL, "--to", "mirror").code == 0

    alias = checkout.alias("mirror", MODEL)
    assert alias.release != old
    release = json.loads(checkout.store("mirror").read_release(MODEL, alias.release))
    assert release["previous"] == old


def test_a_comparison_that_was_made_since_is_part_of_what_is_published(checkout: Checkout) -> None:
    """The release that names it as evidence is another one than that of before."""
    old = stage(checkout)
    local = json.loads(checkout.at.release(MODEL).read_bytes())
    (quant,) = [one for one in local["quants"] if one["type"] == local["stable_quant"]]
    compared = compare_record(
        model=MODEL, challenger=side(model=MODEL, gguf_sha256=quant["gguf_sha256"])
    )
    records.write(checkout.at.comparison(MODEL), compared)

    assert checkout.fleet("publish", MODEL, "--to", "mirror").code == 0

    alias = checkout.alias("mirror", MODEL)
    assert alias.release != old
    release = json.loads(checkout.store("mirror").read_release(MODEL, alias.release))
    assert "compare.json" in release["evidence"]


def test_a_refusal_names_every_reason_and_sends_nothing(checkout: Checkout) -> None:
    """Exit 5; the release before stays, in results/, too."""
    stage(checkout)
    before = checkout.at.release(MODEL).read_bytes()
    change(
        checkout.at.model_record("fetch", MODEL),
        FetchRecord,
        license=None,
        source="path:elsewhere",
    )

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")

    assert ran.code == 5
    assert "2 reasons" in ran.err
    assert "licence" in ran.err
    assert "source" in ran.err
    assert not (checkout.root / "mirror/releases").exists()
    assert checkout.at.release(MODEL).read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('{"max_kld_mean_nats": 0.06}', '{"max_kld_mean_nats": 0.001}', "other gates"),
        ('{"ttft_ms": 300.0', '{"ttft_ms": 200.0', "other service levels"),
        ('"hosts": {"local"', '"hosts": {"edge": {"memory_mib": 64}, "local"', "other hosts"),
        ('"context_tokens"', '"objective": "quality", "context_tokens"', "other objective"),
    ],
)
@pytest.mark.parametrize("released", [False, True])
def test_a_limit_that_was_tightened_since_is_not_kept_by_old_verdicts(
    checkout: Checkout, old: str, new: str, says: str, *, released: bool
) -> None:
    """What DVC sees to before the stage is seen to here: the records were judged as declared."""
    if released:
        stage(checkout)
    text = checkout.at.params.read_text().replace("hosts: {", '"hosts": {')
    assert old in text
    checkout.at.params.write_text(text.replace(old, new))

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")

    assert ran.code == 5
    assert f"was made by {says} than params.yaml declares now. Run `fleet repro" in ran.err
    assert not (checkout.root / "mirror").exists()


def test_a_waiver_that_has_ended_lets_nothing_pass_any_more(checkout: Checkout) -> None:
    """The release of last week is judged by the waivers of today."""
    licenceless = {"license": None}
    change(checkout.at.model_record("fetch", MODEL), FetchRecord, **licenceless)
    words = {"gate": "license", "who": "Ada Lovelace", "why": "read by our lawyer"}

    def declare(until: str) -> None:
        checkout.at.params.write_text(params_of(MODEL, waivers=[{**words, "until": until}]))

    declare("2999-12-31")
    stage(checkout)
    assert checkout.fleet("publish", MODEL, "--to", "mirror").code == 0
    assert checkout.alias("mirror", MODEL).moves[-1].waivers[0].who == "Ada Lovelace"
    shutil.rmtree(checkout.root / "mirror")
    declare("2020-01-01")

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")

    assert ran.code == 5
    assert "ended on 2020-01-01" in ran.err


def test_one_model_that_is_refused_keeps_no_other_from_being_published(
    checkout: Checkout,
) -> None:
    """Without a model all are published; the exit code is that of the first that was not."""
    finished(checkout.root, model=SECOND)
    checkout.at.params.write_text(params_of(MODEL, SECOND))
    checkout.at.model_record("load-test", MODEL).unlink()

    ran = checkout.fleet("publish", "--to", "mirror", "--json")

    assert ran.code == 5
    assert list(ran.json["models"]) == [SECOND]
    assert ran.json["errors"][MODEL]["exit_code"] == 5
    assert checkout.alias("mirror", SECOND).sequence == 1


def test_a_refusal_and_an_undeclared_registry_are_said_once_with_the_next_step(
    checkout: Checkout,
) -> None:
    """The model is named once, and the section to declare a registry in is named."""
    checkout.at.model_record("load-test", MODEL).unlink()

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")
    assert f"error: {MODEL} is not published" in ran.err
    assert f"{MODEL}: {MODEL}" not in ran.err

    ran = checkout.fleet("publish", MODEL, "--to", "production")
    assert ran.code == 2
    assert "under `registries` of params.yaml (docs/params.md)" in ran.err


def test_a_pinned_release_goes_before_the_newest(checkout: Checkout) -> None:
    """`stable: <id>`: another registry gets that one and means it; the new one is stored."""
    old = stage(checkout)
    change_load_test(checkout.at, MODEL, wall_s=123.0)
    new = stage(checkout)
    checkout.at.params.write_text(params_of(MODEL, stable=old))

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")

    assert ran.code == 0, ran.err
    assert checkout.alias("mirror", MODEL).release == old
    assert set(checkout.store("mirror").list_releases(MODEL)) == {old, new}


def test_a_pin_to_what_nobody_has_says_how_to_end_it(checkout: Checkout) -> None:
    """The release is in no registry: an error before anything is moved."""
    stage(checkout)
    checkout.at.params.write_text(params_of(MODEL, stable="f" * 64))

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")

    assert ran.code == 8
    assert f"fleet rollback {MODEL} --to latest" in ran.err
    assert not (checkout.root / "mirror").exists()


def test_a_file_that_is_not_its_record_is_refused(checkout: Checkout) -> None:
    """A GGUF of the right size and other bytes: exit 6, the alias is where it was."""
    path = checkout.at.gguf(MODEL, f"{MODEL}-Q8_0")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    ran = checkout.fleet("publish", MODEL, "--to", "mirror")

    assert ran.code == 6
    assert not (checkout.root / "mirror/aliases").exists()


def test_the_commands_of_the_page_about_releases_can_be_typed_as_they_stand(
    checkout: Checkout,
) -> None:
    """docs/releases.md, line by line; for `fleet repro` the stage runs, on new records."""
    text = checkout.at.params.read_text().replace("mirror", "production")
    checkout.at.params.write_text(text)
    page = (ROOT / "docs/releases.md").read_text()
    commands = [line[8:] for line in page.splitlines() if line.startswith("$ fleet ")]
    printed = ""

    for number, command in enumerate(commands):
        if command == "repro":
            change_load_test(checkout.at, MODEL, wall_s=100.0 + number)
            stage(checkout)
            continue
        ran = checkout.fleet(*shlex.split(command))
        assert ran.code == 0, f"{command}: {ran.err}"
        printed += ran.out

    assert len(commands) == 12
    assert "nothing changed" in printed
    assert "(move 3) in production" in printed
    assert "all is as it should be" in printed
    assert checkout.alias("production", MODEL).sequence == 4


# --- the stage and the verbs agree ------------------------------------------------------------


def test_after_a_rollback_the_stage_changes_nothing_more(checkout: Checkout) -> None:
    """The stage sees the new `stable:`, finds it done, and writes no line."""
    old = stage(checkout)
    change_load_test(checkout.at, MODEL, wall_s=123.0)
    stage(checkout)
    assert checkout.fleet("rollback", MODEL, "--to", old, "--reason", REASON).code == 0
    before = checkout.at.ledger(MODEL).read_bytes(), checkout.alias(model=MODEL)

    told = checkout.fleet("publish", MODEL, "--json").json

    assert told["stable"] == old
    assert (checkout.at.ledger(MODEL).read_bytes(), checkout.alias(model=MODEL)) == before


def test_stable_by_hand_and_the_command_end_in_the_same_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alias, ledger but for who, when and why, and params.yaml: equal."""
    states = []
    old = ""
    for name in ("command", "hand"):
        root = tmp_path / name
        finished(root)
        (root / "params.yaml").write_text(params_of(MODEL, stable="latest"))
        checkout = Checkout(root, monkeypatch, capsys)
        old = stage(checkout)
        change_load_test(checkout.at, MODEL, wall_s=123.0)
        stage(checkout)
        if name == "command":
            assert checkout.fleet("rollback", MODEL, "--to", old, "--reason", REASON).code == 0
        else:
            text = checkout.at.params.read_text()
            checkout.at.params.write_text(text.replace('"latest"', f'"{old}"'))
        stage(checkout)
        ledger = Ledger.load(checkout.at.ledger(MODEL), MODEL)
        states.append(
            (
                [
                    (move.sequence, move.action, move.release, move.previous)
                    for move in ledger.moves("local", "stable")
                ],
                checkout.alias(model=MODEL).moves == ledger.moves("local", "stable"),
                checkout.at.params.read_text(),
            )
        )
    assert states[0] == states[1]
    assert states[0][0][-1][:3] == (3, "rollback", old)
