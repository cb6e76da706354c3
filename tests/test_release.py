"""A release: every byte that readers need, named by digest, and no word of whose machine."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema  # type: ignore[import-untyped] # has no types of its own
import pytest
from hypothesis import given
from hypothesis import strategies as st
from publish_factory import (
    LICENSE,
    TODAY,
    as_served,
    change,
    change_load_test,
    digest_of,
    finished,
    publish_slice,
    waiver,
)
from record_factory import MODEL, engine_id, load_gate, winner_test

from pipelines import load_test, records, release, schema
from pipelines.load_records import LoadTestRecord
from pipelines.release import Composed, Refused, compose, leak
from pipelines.release_records import Release, parse_release, release_id
from pipelines.serving import modelfile

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.layout import Layout
    from pipelines.params import PublishSlice

ROOT = Path(__file__).resolve().parent.parent
KEYS = tuple(publish_slice().quants)


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A checkout that is ready to be published."""
    return finished(tmp_path)


def composed(at: Layout, slice_: PublishSlice | None = None) -> Composed:
    """Compose, and be sure that it was not refused."""
    found = compose(slice_ or publish_slice(), at, today=TODAY)
    assert isinstance(found, Composed), found
    return found


def refused(at: Layout, slice_: PublishSlice | None = None) -> tuple[str, ...]:
    """Compose, and be sure that it was refused."""
    found = compose(slice_ or publish_slice(), at, today=TODAY)
    assert isinstance(found, Refused), found.release
    return found.reasons


def bytes_of(found: Composed, name: str) -> bytes:
    """Return the bytes of a file of a release, by the digest under which it is stored."""
    (file,) = (file for file in found.release.files if file.name == name)
    (blob,) = (blob for blob in found.blobs if blob.sha256 == file.sha256)
    return blob.source if isinstance(blob.source, bytes) else blob.source.read_bytes()


# --- what is in it ----------------------------------------------------------------------------


def test_every_file_is_named_with_the_digest_of_its_bytes(at: Layout) -> None:
    """Name, size and sha256 of each file are those of what a store would be sent."""
    found = composed(at)

    for file in found.release.files:
        data = bytes_of(found, file.name)
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file.sha256, file.size_bytes)
    names = [file.name for file in found.release.files]
    assert len(set(names)) == len(names)
    assert {f"{key}.gguf" for key in KEYS} | {f"{key}.Modelfile" for key in KEYS} <= set(names)
    assert {"LICENSE", f"{MODEL}.imatrix.gguf"} <= set(names)


def test_equal_bytes_under_several_names_are_sent_once(at: Layout) -> None:
    """The licence layer is the same for every quant: named twice, stored once."""
    found = composed(at)

    layers = [file.sha256 for file in found.release.files if file.name.endswith("ollama-license")]
    assert len(layers) == 2
    assert len(set(layers)) == 1
    digests = [blob.sha256 for blob in found.blobs]
    assert len(set(digests)) == len(digests) < len(found.release.files)
    assert set(digests) == {file.sha256 for file in found.release.files}


def test_a_gguf_is_not_read_but_for_its_header(at: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest is that of the record; the file itself is what a store is given."""
    opened: list[str] = []
    read_bytes = Path.read_bytes

    def recorded(path: Path) -> bytes:
        opened.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", recorded)
    found = composed(at)

    assert not [name for name in opened if name.endswith(".gguf")]
    sources = {blob.name: blob.source for blob in found.blobs}
    for key in KEYS:
        assert sources[f"{key}.gguf"] == at.gguf(MODEL, key)


def test_equal_inputs_give_an_equal_release(tmp_path: Path) -> None:
    """Two checkouts in other folders and at another time give the same id."""
    first = composed(finished(tmp_path / "one"))
    second = composed(finished(tmp_path / "somewhere/else"))

    assert first.data == second.data
    assert first.id == second.id == hashlib.sha256(first.data).hexdigest()


def test_what_ollama_pulls_is_what_was_load_tested(at: Layout) -> None:
    """The manifest of each quant is byte for byte the one whose digest the load test recorded."""
    found = composed(at)

    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    served = [*(one.served for one in tested.winners), *(one.served for one in tested.smokes)]
    wanted = {one.type: one.manifest_sha256 for one in served if one is not None}
    (q8, q4) = found.release.of("ollama-manifest")
    assert {q8.type: q8.sha256, q4.type: q4.sha256} == wanted
    named = json.loads(bytes_of(found, q4.name))
    digests = [named["config"]["digest"], *(layer["digest"] for layer in named["layers"])]
    stored = {f"sha256:{blob.sha256}" for blob in found.blobs}
    assert set(digests) <= stored


def test_the_modelfile_that_people_read_says_what_is_served(at: Layout) -> None:
    """FROM is the file beside it; the directives are those of the layers."""
    found = composed(at)
    text = bytes_of(found, f"{KEYS[0]}.Modelfile").decode()

    assert text.startswith(f"# version: 3\nFROM ./{KEYS[0]}.gguf\n")
    rendered = load_test.render_modelfile(publish_slice(), at)
    layers = [
        modelfile.Layer(media_type=file.media_type, data=bytes_of(found, file.name))
        for file in found.release.of("ollama-layer", "Q8_0")
    ]
    assert modelfile.from_layers(tuple(layers), version=3) == rendered
    assert text == rendered.text(f"./{KEYS[0]}.gguf")
    assert LICENSE.splitlines()[0] in text


def test_a_release_says_where_it_comes_from(at: Layout) -> None:
    """Source, revision, commit, corpus, gates, licence and machine are those of the records."""
    made = composed(at).release

    fetched = records.read(at.model_record("fetch", MODEL), records.FetchRecord)
    choice = records.read(at.model_record("choose", MODEL), records.ChoiceRecord)
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    assert (made.source.source, made.source.revision) == (fetched.source, fetched.revision)
    assert made.license.id == "apache-2.0"
    assert made.license.files == {"LICENSE": hashlib.sha256(LICENSE.encode()).hexdigest()}
    assert made.stable_quant == choice.hosts[0].winner == "Q4_K_M"
    assert made.choice_gates == choice.gates
    assert made.gates == tested.winners[0].gates
    assert made.machine.hw_id == tested.machine.hw_id
    assert made.tools.modelfile_sha256 == tested.modelfile_sha256
    assert made.quants[1].imatrix_corpus_sha256 is not None
    assert made.previous is None
    files = {at.release(MODEL).parent / name: sha for name, sha in made.evidence.items()}
    assert files == {path: digest_of(path).sha256 for path in files}
    assert len(files) == 7 + 2 * len(KEYS)
    assert {"verify.json", "evaluate.json"} <= set(made.evidence)


def test_a_matrix_that_no_released_quant_needs_is_left_out(at: Layout) -> None:
    """A release holds nothing that nobody asks for."""
    change(
        at.quant_record("quantize", MODEL, "Q4_K_M"),
        records.QuantizeRecord,
        imatrix_sha256=None,
        imatrix_corpus_sha256=None,
    )

    assert not composed(at).release.of("imatrix")


def test_a_model_without_a_licence_text_is_released_under_its_name(at: Layout) -> None:
    """Upstream may state a licence and ship no text of it."""
    change(at.model_record("fetch", MODEL), records.FetchRecord, files=())
    (at.source(MODEL) / "LICENSE").unlink()
    slice_ = publish_slice()
    rendered = load_test.render_modelfile(slice_, at)
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    change_load_test(
        at,
        modelfile_sha256=rendered.digest(),
        winners=(winner_test("Q4_K_M", served=as_served(at, MODEL, "Q4_K_M", slice_)),),
        smokes=tuple(
            one.model_copy(update={"served": as_served(at, MODEL, one.type, slice_)})
            for one in tested.smokes
        ),
    )

    made = composed(at).release

    assert (made.license.id, made.license.files) == ("apache-2.0", {})
    assert not made.of("license")


def test_what_llama_server_served_has_manifests_all_the_same(at: Layout) -> None:
    """Declared as the engine it promotes; readers may still take Ollama's manifest."""
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    own = engine_id(kind="llama-server", version="b1", found_by="toolchain")

    def without(served: Any) -> Any:
        return served.model_copy(update={"manifest_sha256": None})

    change_load_test(
        at,
        engine=own.model_dump(),
        winners=[w.model_copy(update={"served": without(w.served)}) for w in tested.winners],
        smokes=[s.model_copy(update={"served": without(s.served)}) for s in tested.smokes],
    )

    made = composed(at).release

    assert made.tools.engine == "llama-server"
    assert len(made.of("ollama-manifest")) == 2


def test_the_schema_that_is_shipped_describes_a_release(at: Layout) -> None:
    """release.schema.json takes a release, and nothing with another key or a missing one."""
    found = json.loads((ROOT / schema.RELEASE_FILE).read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    made = json.loads(composed(at).data)

    jsonschema.validate(made, found)
    for wrong in (made | {"extra": 1}, {k: v for k, v in made.items() if k != "license"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, found)


# --- the one before ---------------------------------------------------------------------------


def test_the_same_again_is_the_same_release(at: Layout) -> None:
    """With release.json in results/ nothing changes: not even `previous`."""
    first = composed(at)
    at.release(MODEL).write_bytes(first.data)

    again = composed(at)

    assert (again.id, again.data) == (first.id, first.data)


def test_another_content_names_the_release_before(at: Layout) -> None:
    """A chain of three, each naming the one before, and back again is a fourth."""
    first = composed(at)
    at.release(MODEL).write_bytes(first.data)
    change_load_test(at, wall_s=1.0)
    second = composed(at)
    at.release(MODEL).write_bytes(second.data)

    assert second.release.previous == first.id
    assert second.id != first.id
    assert composed(at).id == second.id
    change_load_test(at, wall_s=61.0)
    third = composed(at)
    assert third.release.previous == second.id
    assert third.id != first.id


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data.replace(b'"recipe": 1', b'"recipe": 2'), ""),
        (lambda data: data.replace(b"\n  ", b"\n   "), "was edited"),
        (lambda data: data[:-20], "another schema"),
        (lambda _: b"{}", "another schema"),
        (lambda _: b"\xff", "another schema"),
        (lambda data: data.replace(b'"model": "tiny-llama"', b'"model": "other"'), "another model"),
    ],
)
def test_a_release_json_that_was_edited_is_refused(
    at: Layout, spoil: Callable[[bytes], bytes], said: str
) -> None:
    """It would be the previous one of the next; only canonical bytes of this model may be that."""
    data = spoil(composed(at).data)
    at.release(MODEL).write_bytes(data)

    if not said:  # a whole release, if of other numbers: it is the one before
        assert composed(at).release.previous == release_id(data)
        return
    (reason,) = refused(at)
    assert said in reason
    assert f"git checkout -- results/{MODEL}/release.json" in reason


# --- the files on the disk --------------------------------------------------------------------


def test_a_gguf_that_is_gone_or_of_another_size_is_refused(at: Layout) -> None:
    """Each is named below the checkout, with the command that makes it again."""
    path = at.gguf(MODEL, KEYS[0])
    data = path.read_bytes()
    path.write_bytes(data + b"\0")
    (size,) = refused(at)
    path.unlink()
    (gone,) = refused(at)

    name = f"work/{MODEL}/gguf/{KEYS[0]}.gguf"
    assert size.startswith(f"{name} has {len(data) + 1:,} bytes, its record says {len(data):,}.")
    assert gone == f"{name} does not exist. Run `fleet repro {MODEL}`."
    assert str(at.root) not in size + gone


def test_a_licence_that_is_not_the_fetched_text_is_refused(at: Layout) -> None:
    """People would read other terms than upstream's."""
    path = at.source(MODEL) / "LICENSE"
    path.write_text(path.read_text().replace("like", "hate"))

    (reason,) = refused(at)

    name = f"work/{MODEL}/source/LICENSE"
    assert reason == f"{name} is not the text that was fetched. Run `fleet repro {MODEL}`."


def test_a_file_that_is_no_gguf_is_refused(at: Layout) -> None:
    """The right size is not enough: the header is read."""
    path = at.gguf(MODEL, KEYS[0])
    path.write_bytes(b"\0" * path.stat().st_size)

    (reason,) = refused(at)

    assert f"{KEYS[0]}.gguf" in reason
    assert str(at.root) not in reason


def test_a_gguf_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    """Ollama would make up a format of its own."""
    at = finished(tmp_path, template=None)
    change_load_test(at, engine=engine_id(kind="llama-server").model_dump())

    (reason,) = refused(at)

    assert "has no chat template" in reason


def test_another_manifest_than_the_one_that_was_served_is_refused(at: Layout) -> None:
    """What is pulled has to be what was under load."""
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    winner = tested.winners[0]
    assert winner.served is not None
    other = winner.served.model_copy(update={"manifest_sha256": "0" * 64})
    change_load_test(at, winners=(winner.model_copy(update={"served": other}),))

    (reason,) = refused(at)

    assert reason.startswith("Q4_K_M would be published under Ollama's manifest ")
    assert reason.endswith(f"the load test served 000000000000. Run `fleet repro {MODEL}`.")


def test_another_modelfile_than_the_one_that_was_served_is_refused(at: Layout) -> None:
    """An edit of the template is tested before it is published."""
    path = at.root / "modelfiles/chat.Modelfile.j2"
    path.write_text(path.read_text().replace("briefly", "at length"))

    (reason,) = refused(at)

    assert "makes another Modelfile than the one that was load-tested" in reason


# --- what must not get out --------------------------------------------------------------------

LEAKS = {
    "hf_" + "a1B2" * 8: "a token",
    "ghp_" + "a1B2" * 9: "a token",
    "github_pat_11ABC" + "x" * 20: "a token",
    "AKIAIOSFODNN7EXAMPLE": "a token",
    "Authorization: Bearer abcdef0123456789": "a token",
    "sk-proj-abcdefgh12345678": "a token",
    "https://me:secret@example.org/x": "a token",
    "s3://key:secret@bucket": "a token",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "a token",
    "/home/ada/models/x.gguf": "an absolute path",
    "read (/var/lib/models)": "an absolute path",
    "it lies in /data": "an absolute path",
    "file:///etc/passwd": "an absolute path",
    "C:\\Users\\ada\\x": "an absolute path",
    "\\\\nas\\share\\x": "an absolute path",
    "~/models": "an absolute path",
}
FINE = [
    "36.4/s", "tok/s", "3,900 tok/s at depth 256", "application/vnd.ollama.image.model",
    "path:examples/tiny-llama", "hf:owner/repo", "https://huggingface.co/owner/repo",
    "/api/ps shows 256 tokens", "/v1/chat/completions", "and/or", "n/a", "28 / 30", "sk-learn",
    "a bearer of news", "the server took 68 MiB", "quantize/Q4_K_M.json",
    "modelfiles/x.Modelfile.j2",
    "Intel(R) Xeon(R) Processor", "b6500 (0c1e5709)",
]  # fmt: skip


@pytest.mark.parametrize("text", LEAKS)
def test_a_secret_or_a_path_is_found_in_any_text(text: str) -> None:
    """Tokens, keys, credentials in addresses, folders of somebody's machine."""
    for around in (text, f"before {text} after", f'"{text}"', f"x={text}"):
        assert LEAKS[text] in leak(around, ())


@pytest.mark.parametrize("text", FINE)
def test_what_releases_say_every_day_is_no_secret(text: str) -> None:
    """A check that refuses sound releases would be switched off."""
    assert not leak(text, ())


@given(
    st.from_regex(re.compile(r"(?:hf_|ghp_|github_pat_|sk-)[A-Za-z0-9]{20,40}"), fullmatch=True),
    st.text(max_size=30),
)
def test_a_token_is_found_whatever_surrounds_it(token: str, around: str) -> None:
    """Anywhere in a text, unless letters before it make it a part of another word."""
    assert leak(f"{around} {token}{around}", ())


@given(st.from_regex(r"/(?:home|root|Users|tmp|srv)(?:/[a-z0-9._-]{1,9}){1,4}", fullmatch=True))
def test_a_folder_of_a_machine_is_found(path: str) -> None:
    """However deep, at the start of a text or in the middle of a sentence."""
    assert leak(path, ())
    assert leak(f"cannot read {path}: no such file", ())


def plant_engine(at: Layout, text: str) -> None:
    """Put a text where the version of a server is told."""
    change_load_test(at, engine=engine_id(version=text).model_dump())


def plant_gate(at: Layout, text: str) -> None:
    """Put a text into the sentence of a level."""
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    gates = (*tested.winners[0].gates, load_gate("e2e", sentence=text))
    change_load_test(at, winners=(tested.winners[0].model_copy(update={"gates": gates}),))


def plant_machine(at: Layout, text: str) -> None:
    """Put a text where a card is named."""
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    change_load_test(at, machine=tested.machine.model_dump() | {"gpus": (text,)})


def plant_choice(at: Layout, text: str) -> None:
    """Put a text into what `choose` says of a quant."""
    path = at.model_record("choose", MODEL)
    choice = records.read(path, records.ChoiceRecord)
    host = choice.hosts[0]
    candidates = tuple(one.model_copy(update={"sentence": text}) for one in host.candidates)
    change(path, records.ChoiceRecord, hosts=(host.model_copy(update={"candidates": candidates}),))


def plant_tensors(at: Layout, text: str) -> None:
    """Put a text where only a key of a mapping is."""
    path = at.quant_record("quantize", MODEL, "Q8_0")
    change(path, records.QuantizeRecord, tensor_types={text: 1})


@pytest.mark.parametrize("text", ["hf_" + "a1B2" * 8, "/home/ada/x"])
@pytest.mark.parametrize(
    ("plant", "place"),
    [
        (plant_engine, "tools.engine_version"),
        (plant_gate, "gates."),
        (plant_machine, "machine.gpus.0"),
        (plant_choice, "quants.0.sentence"),
        (plant_tensors, "quants.0.tensor_types"),
    ],
)
def test_a_record_cannot_carry_a_secret_into_a_release(
    at: Layout, plant: Callable[[Layout, str], None], place: str, text: str
) -> None:
    """It is refused with the place, and the secret itself is not repeated as a value."""
    plant(at, text)

    reasons = refused(at)

    assert all("does not belong into a release" in reason for reason in reasons)
    assert any(reason.startswith(f"release.json, {place}") for reason in reasons)
    assert not any(text in reason for reason in reasons)


def test_the_names_of_this_machine_stay_here(at: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host name, home and checkout are refused wherever a tool may have printed them."""
    monkeypatch.setattr(socket, "gethostname", lambda: "ci-7f3a.internal")
    monkeypatch.setenv("HOME", "/nethome/ada")

    for text in ("built on ci-7f3a", "ci-7f3a.internal:8080", f"b1 {at.root}", "b1:/nethome/ada"):
        plant_engine(at, text)
        reasons = refused(at)
        where = [reason.split(" holds ")[0].split(", ")[1] for reason in reasons]
        # The final verdict names the engine, too.
        assert sorted(where) == ["hosts.local.sentence", "tools.engine_version"], text
    plant_engine(at, "ci-7f3ab and ci-7, models/nethome/ada")
    assert composed(at)


def test_a_host_name_that_is_a_word_is_known_by_its_surroundings(
    at: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine called `server` does not stop every release that speaks of one."""
    monkeypatch.setattr(socket, "gethostname", lambda: "server")
    plant_engine(at, "a server of 2027")
    assert composed(at)

    for text in ("ada@server", "server:8080", "http://server/x", "server.local"):
        plant_engine(at, text)
        assert refused(at), text


def test_labels_that_the_operator_declared_are_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host of params.yaml may be called as the machine is."""
    monkeypatch.setattr(socket, "gethostname", lambda: "GPU-01")
    hosts = {"gpu-01": {"memory_mib": 2048}}
    at = finished(tmp_path, hosts=hosts)

    assert list(composed(at, publish_slice(hosts=hosts)).release.hosts) == ["gpu-01"]


def test_a_modelfile_cannot_carry_a_secret_either(at: Layout) -> None:
    """A token in a system text would be served to everybody; a path in it may be meant."""
    path = at.root / "modelfiles/chat.Modelfile.j2"
    original = path.read_text()
    for word, is_refused in (("hf_" + "a1B2" * 8, True), ("/etc/hosts", False)):
        path.write_text(original.replace("briefly", f"with {word}"))
        slice_ = publish_slice()
        rendered = load_test.render_modelfile(slice_, at)
        tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
        change_load_test(
            at,
            modelfile_sha256=rendered.digest(),
            winners=(winner_test("Q4_K_M", served=as_served(at, MODEL, "Q4_K_M", slice_)),),
            smokes=tuple(
                one.model_copy(update={"served": as_served(at, MODEL, one.type, slice_)})
                for one in tested.smokes
            ),
        )
        if is_refused:
            assert {reason.split(" holds ")[0] for reason in refused(at)} == {
                f"{key}.Modelfile" for key in KEYS
            }
        else:
            assert composed(at)


@given(st.sampled_from(sorted(LEAKS)), st.data())
def test_no_string_of_a_release_is_left_unread(text: str, data: st.DataObject) -> None:
    """A secret is found under every path of the document, be it a value or a key."""
    document: dict[str, Any] = {"a": {"b": ["x", {"c": "y"}]}, "d": "z", "e": {"f": "g"}}
    places = [place for place, _ in release._strings(document)]
    chosen = data.draw(st.sampled_from(places))

    def planted(value: Any, place: tuple[str, ...] = ()) -> Any:
        if isinstance(value, str):
            return text if place == chosen else value
        if isinstance(value, dict):
            return {
                text if (*place, "a key") == chosen else key: planted(each, (*place, key))
                for key, each in value.items()
            }
        return [planted(each, (*place, str(i))) for i, each in enumerate(value)]

    found = [leak(each, ()) for _, each in release._strings(planted(document))]

    assert any(found)


# --- waivers ----------------------------------------------------------------------------------


def test_a_waiver_is_in_the_release_only_if_it_was_needed(at: Layout) -> None:
    """What nothing was refused for is nobody's decision."""
    slice_ = publish_slice(waivers=(waiver("gated"), waiver("hold")))
    assert composed(at, slice_).release.waivers == ()

    change(at.model_record("fetch", MODEL), records.FetchRecord, gated="manual")
    (used,) = composed(at, slice_).release.waivers

    assert (used.gate, used.who, used.until) == ("gated", "Ada Lovelace", TODAY)


def test_a_release_reads_back_as_what_was_composed(at: Layout) -> None:
    """Its bytes are canonical: whoever parses and writes them gets the same."""
    found = composed(at)

    assert parse_release(found.data, found.id, "here") == found.release
    assert Release.model_validate_json(found.data) == found.release
