"""`fleet init` begins a fleet, or adds to one, and takes nothing from an operator."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sample
from checkpoints import CONFIG, SHAPES, TOKENIZER, safetensors, tiny
from hub import Hub

from pipelines import (
    __main__,
    atomic,
    console,
    declaration,
    dvc_state,
    fetch,
    gpu,
    init,
    init_change,
    init_plan,
    init_proposal,
    init_repository,
    init_settings,
    init_source,
    init_state,
    params,
    toolchain,
)
from pipelines.errors import FleetError, MachineError, ParamsError, UpstreamError
from pipelines.init_answers import Answers
from pipelines.init_plan import Room
from pipelines.init_sizes import Shape
from pipelines.init_source import Subject
from pipelines.layout import Layout
from pipelines.safetensors_header import Tensor
from pipelines.serving import modelfile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DESK = ("--host", "desk", "--memory", "4096", "--owner", "@me")
RTX_3090 = Room(host="desk", total_mib=24_576, margin_mib=1024, has_cards=True)
AUTHOR = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """The template as somebody has it who begins: its records, a model of his own beside them."""
    root = tmp_path / "fork"
    sample.lay(root)
    sample.take(root, "examples")
    tiny(root / "models/My.Model")
    monkeypatch.chdir(root)
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    # Whether this machine has built a llama.cpp is no matter of these tests.
    monkeypatch.setattr(toolchain, "there", lambda _spec: None)
    return Layout()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process uses, and no other."""
    with Hub() as hub:
        hub.use(monkeypatch)
        yield hub
        assert hub.unexpected == []


def typed(*argv: str) -> int:
    """Type a command line, with an owner where none is named."""
    return __main__.main(["init", *argv])


def tree(root: Path) -> dict[str, bytes]:
    """Every file of a checkout but those that a lock leaves."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".dvc/tmp" not in path.as_posix()
    }


def repository(**config: Any) -> dict[str, bytes]:
    """Files of a repository of the Hub: a Llama of one layer."""
    return {
        "config.json": json.dumps(CONFIG | config).encode(),
        "README.md": b"---\nlicense: mit\n---\n# A model\n",
        "tokenizer.model": (TOKENIZER / "tokenizer.model").read_bytes(),
        "tokenizer_config.json": (TOKENIZER / "tokenizer_config.json").read_bytes(),
        "model.safetensors": safetensors({name: ("BF16", s) for name, s in SHAPES.items()}),
    }


# --- a fleet begins ---------------------------------------------------------------------------


def test_a_fleet_begins_without_a_network_and_no_trace_of_the_example_is_left(
    at: Layout, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Declaration, owners, lock and records; a second run with the same answers changes nothing."""
    argv = ("path:models/My.Model", "--name", "my-model", *DESK, "--yes")

    assert typed(*argv) == 0

    shown = capsys.readouterr().out
    assert re.search(r"▸ Q4_K_M +0\.\d+ .* fits", shown)
    assert "+  my-model:" in shown
    assert re.search(r"(?m)^removed: results/tiny-llama/ \(\d+ files\)$", shown)
    declared = declaration.check(at)
    assert list(declared.models) == ["my-model"]
    model = declared.models["my-model"]
    assert model.revision == fetch.content_digest(Path("models/My.Model"))
    assert (model.context_tokens, model.calibration) == (256, "calibration")
    assert declared.hosts["desk"].memory_mib == 4096
    assert declared.hosts["desk"].runs_on == ("self-hosted", "gpu", "desk")
    assert not Path("dvc.lock").exists()
    left = [path for path in Path("results").rglob("*") if path.is_file()]
    assert not [path for path in left if "tiny" in str(path) or path.name.startswith("report")]
    assert "tiny-llama" not in Path("params.yaml").read_text()
    assert init_state.PLACEHOLDER not in Path(".github/CODEOWNERS").read_text()
    assert re.search(r"(?m)^/pipelines/ +@me$", Path(".github/CODEOWNERS").read_text())
    assert hub.requests == []

    before = tree(Path())
    assert typed(*argv) == 0
    assert "Nothing changes" in capsys.readouterr().err
    assert tree(Path()) == before
    assert not list(Path().rglob("*.part"))


def test_hosts_that_were_declared_before_the_first_model_stay(at: Layout) -> None:
    """Whoever declares his rack first begins with it; this machine is then no host."""
    rack = ("--host", "rack", "--vram", "48000", "--runner-label", "gpu,rack-1", "--owner", "@me")
    assert typed("--keep-example", *rack, "--yes") == 0

    assert typed("path:models/My.Model", "--host", "desk", "--memory", "4096", "--yes") == 0

    declared = declaration.check(at)
    assert list(declared.models) == ["my-model"]
    assert list(declared.hosts) == ["local", "rack", "desk"]
    assert declared.hosts["rack"].runs_on == ("self-hosted", "gpu", "rack-1")


def test_a_second_run_leaves_what_was_measured_of_the_example_that_was_begun_with(
    at: Layout,
) -> None:
    """Whoever tries the fleet with the template's own files has records of his own."""
    argv = ("path:examples/tiny-llama", "--name", "trial", *DESK, "--yes")
    assert typed(*argv) == 0
    record = at.root / "results/trial/choice.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    Path("dvc.lock").write_text("stages: {}\n")
    written = tree(Path())

    assert typed(*argv) == 0

    assert tree(Path()) == written


def test_what_the_template_brings_and_this_has_no_answer_for_stays_as_it_is_written(
    at: Layout,
) -> None:
    """The pins, the texts, the gates, and whatever somebody has added before he began."""
    own = "\n# Ours.\ntrack: {experiment: ours}  # with a comment\n"
    at.params.write_text(at.params.read_text() + own)
    before = at.params.read_text()

    assert typed("path:models/My.Model", *DESK, "--check-every", "6", "--yes") == 0

    after = at.params.read_text()
    assert own.strip() in after
    for key in ("toolchain", "corpora", "gates", "serving"):
        block = re.search(rf"(?ms)^{key}:\n.*?\n\n", before)
        assert block is not None, key
        assert block[0] in after, key
    assert declaration.check(at).check_upstream.period_hours == 6
    assert list(declaration.check(at).models) == ["my-model"]


@pytest.mark.parametrize("trained", [256, 300, 512, 2048, 40_960])
@pytest.mark.parametrize("vocabulary", [1024, 152_064])
@pytest.mark.parametrize("cards", [True, False])
@pytest.mark.parametrize("is_encoder", [True, False])
def test_what_a_fleet_begins_with_fits_the_context_and_the_texts_that_it_has(
    trained: int, vocabulary: int, *, cards: bool, is_encoder: bool
) -> None:
    """No test is longer than the context, no more windows are asked for than a text fills."""
    subject = a_subject(trained=trained, vocabulary=vocabulary, is_encoder=is_encoder)
    room = Room(host="desk", total_mib=64_000, margin_mib=1024, has_cards=cards)
    plan = init_plan.make(subject, Answers(), room, slots=2, has_calibration=True)
    found = init_settings.make(subject, plan, corpus_bytes=118_988)

    assert plan.context_tokens <= trained
    assert plan.context_tokens % 256 == 0
    assert max(found.depths) + max(found.prompt_tokens, found.generate_tokens) <= trained
    load = found.load_prompt_tokens + found.load_generate_tokens + params.TEMPLATE_TOKENS
    assert load <= plan.context_tokens
    assert found.window_tokens <= trained
    # Measured: 48,000 tokens of the embedded model's 1,024, 28,000 of a vocabulary of 128,000.
    fills = 48_000 if vocabulary == 1024 else 27_000
    assert 2 <= found.chunks <= fills // found.window_tokens
    assert plan.uses_matrix is not is_encoder


def a_subject(
    *,
    trained: int | None = 32_768,
    vocabulary: int = 152_064,
    is_encoder: bool = False,
    layers: int = 28,
    **more: Any,
) -> Subject:
    """A model of the sizes of Qwen2.5-7B."""
    hidden, inner, kv = 3584, 18_944, 512
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj": (hidden, hidden),
            f"model.layers.{layer}.self_attn.k_proj": (kv, hidden),
            f"model.layers.{layer}.self_attn.v_proj": (kv, hidden),
            f"model.layers.{layer}.self_attn.o_proj": (hidden, hidden),
            f"model.layers.{layer}.mlp.gate_proj": (inner, hidden),
            f"model.layers.{layer}.mlp.up_proj": (inner, hidden),
            f"model.layers.{layer}.mlp.down_proj": (hidden, inner),
        }
    config = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": vocabulary,
    }  # fmt: skip
    tensors = [
        Tensor(name=f"{name}.weight", dtype="BF16", shape=shape, size_bytes=2 * math.prod(shape))
        for name, shape in shapes.items()
    ]
    return Subject(
        source="hf:Qwen/Qwen2.5-7B-Instruct", revision="a" * 40, track=None,
        architecture="Qwen2ForCausalLM", license="apache-2.0", is_gated=False,
        source_bytes=15_000_000_000, trained_tokens=trained, has_template=True,
        shape=Shape(config=config, tensors=tensors, is_encoder=is_encoder), notes=(), **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("total_mib", "context", "quants"),
    [
        (24_576, 16_384, "Q8_0 Q6_K Q5_K_M Q4_K_M"),
        (10_240, 16_384, "Q6_K Q5_K_M Q4_K_M"),
        # The cache gives way before the 4-bit quant does.
        (6_500, 4_096, "Q4_K_M IQ4_XS"),
        (5_200, 2_048, "Q3_K_M Q2_K"),
    ],
)
def test_the_usual_quants_that_fit_are_taken_at_the_largest_context_that_does(
    total_mib: int, context: int, quants: str
) -> None:
    """Of a model of 7 billion weights; sizes are those of its files on the Hub."""
    room = Room(host="desk", total_mib=total_mib, margin_mib=1024, has_cards=True)
    plan = init_plan.make(a_subject(), Answers(), room, slots=2, has_calibration=True)

    assert plan.context_tokens == context
    assert " ".join(each.type for each in plan.quants) == quants
    sizes = {row.estimate.type: row.estimate.size_bytes / 1e9 for row in plan.rows}
    assert sizes["Q4_K_M"] == pytest.approx(4.68, rel=0.01)
    assert sizes["Q8_0"] == pytest.approx(8.10, rel=0.01)
    for row in plan.rows:
        free_mib = total_mib - 1024
        assert row.fits == (row.estimate.memory_bytes / 2**20 <= free_mib)
    table = init_plan.table(plan)
    assert len(re.findall(r"(?m)^▸ \w", table)) == len(plan.quants) + 1
    assert {each.type for each in plan.quants if each.imatrix} <= {
        "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K",
    }  # fmt: skip


def test_what_does_not_fit_is_refused_unless_somebody_says_so() -> None:
    """With the numbers; said explicitly it is declared, and warned about."""
    room = Room(host="nano", total_mib=3_000, margin_mib=1024, has_cards=False)

    with pytest.raises(ParamsError, match=r"does not fit on nano: Q2_K takes about 3,\d+ MiB"):
        init_plan.make(a_subject(), Answers(), room, slots=2, has_calibration=True)
    plan = init_plan.make(
        a_subject(), Answers(quants=("q4_k_m",)), room, slots=2, has_calibration=False
    )
    assert [(each.type, each.imatrix) for each in plan.quants] == [("Q4_K_M", False)]
    assert "Q4_K_M will probably not fit on nano" in plan.notes[0]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (Answers(quants=("Q4_K_N",)), 'did you mean "Q4_K'),
        (Answers(quants=("IQ2_XS",)), "without an importance matrix"),
        (Answers(quants=("MXFP4_MOE",)), "has no experts"),
        (Answers(context_tokens=1000), "multiples of 256"),
        (Answers(context_tokens=65_536), "was trained with 32,768"),
        (Answers(context_tokens=99_999), "was trained with 32,768"),
    ],
)
def test_an_answer_that_the_chain_would_refuse_is_refused_now(answers: Answers, said: str) -> None:
    """With what to type instead."""
    with pytest.raises(ParamsError, match=said) as refused:
        init_plan.make(a_subject(), answers, RTX_3090, slots=2, has_calibration=False)
    assert refused.value.hint


# --- models of the Hub ------------------------------------------------------------------------


def test_a_model_of_the_hub_is_pinned_to_the_commit_of_its_branch_by_its_small_files_alone(
    at: Layout, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the weights but their headers is asked for."""
    repo = hub.create("Acme/Tiny.2-Chat", repository())
    hub.moved["acme/tiny.2-chat"] = repo.name
    repo.branch("stable", repo.head)
    pinned = repo.head
    repo.commit({"README.md": b"later"}, "main moves")

    assert typed("hf:acme/tiny.2-chat", "--revision", "stable", *DESK, "--yes") == 0

    model = declaration.check(at).models["tiny-2-chat"]
    assert (model.source, model.revision, model.track) == ("hf:Acme/Tiny.2-Chat", pinned, "stable")
    asked = hub.asked("*model.safetensors", "GET")
    assert asked
    assert all(request.range for request in asked)
    assert "The Hub spells it hf:Acme/Tiny.2-Chat" in capsys.readouterr().err
    # Rows of 64 and 96 are no blocks of 256: so many matrices need a wider type.
    quant = declaration.check(at).quants["tiny-2-chat-Q4_K_M"]
    assert (quant.imatrix, quant.max_fallbacks) == (True, 8)
    assert declaration.check(at).quants["tiny-2-chat-Q8_0"].max_fallbacks == 0


def gguf_only() -> dict[str, bytes]:
    """What a repository of quants holds."""
    return {"config.json": b"{}", "tiny-Q4_K_M.gguf": b"GGUF", "README.md": b""}


def without(files: dict[str, bytes], *names: str, **more: bytes) -> dict[str, bytes]:
    """Leave files out, and add others."""
    kept = {name: data for name, data in files.items() if name not in names}
    return kept | {name.replace("__", "."): data for name, data in more.items()}


QUANTIZED = repository(quantization_config={"quant_method": "awq"})
OF_CODE = repository(auto_map={"AutoModel": "modeling_x.X"})
EIGHT_BIT = safetensors({name: ("F8_E4M3", shape) for name, shape in SHAPES.items()})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (gguf_only(), "holds GGUFs only"),
        (without(repository(), "model.safetensors", pytorch_model__bin=b"x"), "only there as pick"),
        (without(repository(), "tokenizer.model"), "the tokenizer is missing"),
        (QUANTIZED, "quantized already"),
        (without(repository(), "", model__safetensors=EIGHT_BIT), "stored in F8_E4M3"),
        (OF_CODE, "names code of the repository"),
        (repository(architectures=[]), "names no architecture"),
        (repository(model_type="bert"), "does not say how they become one of a text"),
        (
            repository(model_type="bert", architectures=["BertForSequenceClassification"]),
            "ranks pairs of texts",
        ),
        (repository(max_position_embeddings=128), "the least that is served is 256"),
    ],
)
def test_a_repository_that_no_build_can_be_made_of_is_refused_before_anything_is_written(
    at: Layout, hub: Hub, files: dict[str, bytes], said: str
) -> None:
    """In the words of the stage that would refuse it hours later."""
    hub.create("acme/odd", files)
    before = tree(Path())

    with pytest.raises(UpstreamError, match=said) as refused:
        init.proposed(at, Answers(source="hf:acme/odd", host="desk", vram_mib=24_576))
    assert refused.value.hint
    assert typed("hf:acme/odd", *DESK, "--yes") == UpstreamError.exit_code
    assert tree(Path()) == before


def test_a_model_that_is_not_for_us_or_is_no_more_is_said_to_be(at: Layout, hub: Hub) -> None:
    """Gated without a token, renamed, gone, and a Hub that does not answer."""

    def refused(source: str) -> FleetError:
        with pytest.raises(FleetError) as error:
            init.proposed(at, Answers(source=source, host="desk", vram_mib=24_576))
        return error.value

    hub.create("acme/gated", repository()).gate("manual")
    hub.create("acme/old", repository()).rename("acme/new")
    assert "HF_TOKEN" in refused("hf:acme/gated").hint
    assert "fleet init hf:acme/new" in refused("hf:acme/old").hint
    assert "is not there, or is private" in refused("hf:acme/never").message


def test_an_architecture_is_looked_up_in_the_table_of_the_pinned_llama_cpp(
    at: Layout, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where it is built; where it is not, nobody claims to have looked."""
    hub.create("acme/odd", repository(architectures=["OddForCausalLM"]))
    answers = Answers(source="hf:acme/odd", host="desk", vram_mib=24_576)

    assert "nobody has looked whether it converts OddForCausalLM" in " ".join(
        init.proposed(at, answers).notes
    )
    table = tmp_path / "share/llama.cpp/conversion/__init__.py"
    table.parent.mkdir(parents=True)
    table.write_text('TEXT_MODEL_MAP = {"LlamaForCausalLM": "llama"}\n')
    tools = toolchain.Toolchain(prefix=tmp_path, manifest={"llama_cpp_commit": "0c1e57098" * 5})
    monkeypatch.setattr(toolchain, "there", lambda _spec: tools)
    with pytest.raises(UpstreamError, match="does not convert OddForCausalLM"):
        init.proposed(at, answers)


def test_a_model_without_a_chat_template_is_served_without_one_and_said_to_be_unreleasable(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a Modelfile of its own, in which Ollama finds no ChatML; the verdict will be REJECT."""
    Path("models/My.Model/tokenizer_config.json").write_text('{"add_bos_token": true}')

    assert typed("path:models/My.Model", *DESK, "--yes") == 0

    model = declaration.check(at).models["my-model"]
    assert model.modelfile == init_source.COMPLETION_MODELFILE
    assert "nothing of it is released" in capsys.readouterr().err
    made = modelfile.render(
        Path(model.modelfile), context_tokens=256, model="my-model", license="MIT"
    )
    assert made.template == "{{ range .Messages }}{{ .Content }}{{ end }}"


# --- a fleet that is there --------------------------------------------------------------------


OWN = """\
# Our fleet.
toolchain: {llama_cpp_python: 0.3.36, sha256: "%s"}
corpora:
  evaluation: {path: corpora/evaluation.txt, sha256: b98b58b01dd0a98cde6ab631a2c35f9be13dabf0d948ee83b1c418db1b802dd7}
models:
    ours:  # the first one
        source: path:models/My.Model
        revision: %s
        context_tokens: 256

quants:
    # wide
    ours-Q8_0:
        model: ours
        type: Q8_0   # keep

benchmark: {prompt_tokens: 64, generate_tokens: 16, depths: [0, 128], quality: {context_tokens: 256}}
load_test: {prompt_tokens: 96, generate_tokens: 48}
hosts:
    desk: {memory_mib: 4096}
    # the end
"""  # noqa: E501 - as an operator writes it


def test_a_fleet_grows_by_lines_and_every_other_byte_stays(at: Layout) -> None:
    """Comments, indentation and order are the operator's; a second run adds nothing."""
    tiny(Path("models/second"), seed=2)
    at.params.write_text(OWN % ("a" * 64, fetch.content_digest(Path("models/My.Model"))))
    before = at.params.read_text()
    argv = (
        "path:models/second", "--quants", "Q8_0,q6_k", "--objective", "size", "--host", "rack",
        "--vram", "24576", "--runner-label", "gpu,rack-1", "--registry", "s3://bucket/models",
        "--owner", "@acme/ops", "--yes",
    )  # fmt: skip

    assert typed(*argv) == 0

    after = at.params.read_text()
    rest = iter(after.splitlines())
    assert all(line in rest for line in before.splitlines()), "a line is gone, or moved"
    declared = declaration.check(at)
    assert list(declared.models) == ["ours", "second"]
    assert declared.models["second"].objective == "size"
    assert declared.models["second"].calibration is None
    assert list(declared.quants) == ["ours-Q8_0", "second-Q8_0", "second-Q6_K"]
    assert declared.hosts["rack"].vram_mib == 24_576
    assert declared.hosts["rack"].runs_on == ("self-hosted", "gpu", "rack-1")
    assert declared.registries["production"].url == "s3://bucket/models"
    assert declared.registries["production"].environment == "production"
    assert declared.registries["local"].url == "file:registry"
    assert Path("dvc.lock").exists()
    assert Path("results/tiny-llama/choice.json").exists()

    written = tree(Path())
    assert typed(*argv) == 0
    assert tree(Path()) == written
    assert typed("path:models/second", "--quants", "Q5_K_M", "--yes") == 0
    assert list(declaration.check(at).quants)[-1] == "second-Q5_K_M"


def test_line_ends_stay_those_of_the_operator(at: Layout) -> None:
    """An editor of Windows wrote the file; a line more is one of its kind."""
    tiny(Path("models/second"), seed=2)
    text = OWN % ("a" * 64, fetch.content_digest(Path("models/My.Model")))
    at.params.write_bytes(text.replace("\n", "\r\n").encode())

    assert typed("path:models/second", "--quants", "Q8_0", "--owner", "@me", "--yes") == 0

    after = at.params.read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n")
    assert b"\r\n    second-Q8_0: {model: second, type: Q8_0}\r\n" in after


def test_lines_of_two_kinds_of_editors_stay_as_each_wrote_them(at: Layout) -> None:
    """A line that somebody pasted in has another end; no line but the new ones changes."""
    tiny(Path("models/second"), seed=2)
    text = OWN % ("a" * 64, fetch.content_digest(Path("models/My.Model")))
    mixed = text.replace("\n", "\r\n", 3).rstrip("\n").encode()
    at.params.write_bytes(mixed)

    argv = ("path:models/second", "--quants", "Q8_0", "--registry", "s3://bucket/models")
    assert typed(*argv, "--host", "rack", "--vram", "24576", "--owner", "@me", "--yes") == 0

    rest = iter(at.params.read_bytes().split(b"\n"))
    assert all(line in rest for line in mixed.split(b"\n"))


def test_what_cannot_be_added_by_lines_is_left_to_its_operator(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the lines to write; nothing is guessed of a section in one line."""
    tiny(Path("models/second"), seed=2)
    text = OWN % ("a" * 64, fetch.content_digest(Path("models/My.Model")))
    quants = re.compile(r"(?s)quants:\n.*?\n\n")
    one_line = "quants: {ours-Q8_0: {model: ours, type: Q8_0}}\n\n"
    at.params.write_text(quants.sub(one_line, text))
    before = tree(Path())

    assert typed("path:models/second", "--quants", "Q8_0", "--owner", "@me", "--yes") == 2

    told = capsys.readouterr().err
    assert "`quants` of params.yaml is written in one line" in told
    assert "second-Q8_0: {model: second, type: Q8_0}" in told
    assert tree(Path()) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("path:models/My.Model", "--context", "512"), "with context_tokens: 256"),
        (("path:models/second", "--name", "ours"), '"ours" is taken'),
        (("path:models/My.Model", "--revision", "v2"), "`--revision` moves nothing"),
        (("path:models/second", "--name", "1e5"), '"1e5" is not a word'),
        (("path:models/second", "--name", "1e-5"), '"1e-5" is not a word'),
        (("path:models/second", "--host", "0x1f", "--vram", "1"), '--host "0x1f" is not'),
        (("path:models/second", "--host", "desk", "--runner-label", "b200"), "lacks b200"),
        (("path:models/second", "--name", "serving"), "is taken"),
        (("path:models/second", "--host", "desk", "--memory", "1"), "with memory_mib: 4096"),
        (("path:models/second", "--vram", "24576"), "which host"),
        (("path:../outside",), "not a directory below this repository"),
        (("path:models/second", "--revision", "main"), "is for the Hub"),
        (("Qwen/Qwen2.5-7B-Instruct",), "is no source"),
        (("--registry", "s3://user:secret@bucket"), "--registry is not"),
        (("--environment", "production"), "none is named"),
        (("--remote", "s3://user:secret@bucket/dvc"), "holds a user, a password"),
        (("--remote", "gs://bucket/dvc"), "has no such remotes"),
        (("--remote", "store\n[core]\nremote = evil"), "is no name of a folder"),
        (("--owner", "me@example.com"), "is no account"),
        (("path:models/long",), "too short for what this fleet measures"),
    ],
)
def test_an_answer_that_contradicts_what_is_there_changes_nothing(
    at: Layout, argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, a sentence with the next step, and no secret in it."""
    tiny(Path("models/second"), seed=2)
    tiny(Path("models/long"), seed=3)
    at.params.write_text(OWN % ("a" * 64, fetch.content_digest(Path("models/My.Model"))))
    if "models/long" in argv[0]:
        at.params.write_text(at.params.read_text().replace("depths: [0, 128]", "depths: [0, 256]"))
    before = tree(Path())

    assert typed(*argv, *(() if "--owner" in argv else ("--owner", "@me")), "--yes") == 2

    told = capsys.readouterr().err
    assert said in told
    assert "next:" in told
    assert "secret" not in told
    assert tree(Path()) == before


def test_the_example_stays_if_it_shall(at: Layout) -> None:
    """Its declaration, its records and the settings that its records were made with."""
    before = at.params.read_text()

    assert typed("path:models/My.Model", "--keep-example", *DESK, "--yes") == 2
    tiny(Path("models/wide"), max_position_embeddings=2048)
    assert typed("path:models/wide", "--keep-example", *DESK, "--yes") == 0

    rest = iter(at.params.read_text().splitlines())
    assert all(line in rest for line in before.splitlines())
    assert list(declaration.check(at).models) == ["tiny-llama", "wide"]
    assert Path("results/tiny-llama/choice.json").exists()


@pytest.mark.usefixtures("at")
def test_dvc_finds_the_remote_that_was_named() -> None:
    """A folder from the root of the repository, or a bucket; the other settings stay."""
    before = Path(".dvc/config").read_text()

    for said, found in (("../store", "../store"), ("s3://bucket/dvc", "s3://bucket/dvc")):
        assert typed("--keep-example", "--owner", "@me", "--remote", said, "--yes") == 0
        remote = dvc_state.remote(Path())
        assert remote is not None
        where = remote[1] if "://" in remote[1] else Path(remote[1]).resolve()
        assert where == (found if "://" in found else Path(found).resolve())
    after = Path(".dvc/config").read_text().splitlines()
    assert len([line for line in after if line not in before.splitlines()]) == 1


# --- all or nothing ---------------------------------------------------------------------------


def answers_of_my_model() -> Answers:
    """What is said on the command line of most tests here."""
    return Answers(source="path:models/My.Model", host="desk", memory_mib=4096, owners=("@me",))


@pytest.mark.parametrize("after", range(4))
def test_a_stop_at_any_moment_leaves_a_state_in_which_the_same_command_goes_on(
    at: Layout, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was removed or renamed before it; the end is that of a run without a stop."""
    whole = Path("whole")
    shutil.copytree(".", "../whole", symlinks=True)
    proposal = init.proposed(at, answers_of_my_model())
    moves = 0

    def stopping(do: Callable[..., None]) -> Callable[..., None]:
        def stop(*args: Any) -> None:
            nonlocal moves
            if moves == after * 9:
                raise KeyboardInterrupt
            moves += 1
            do(*args)

        return stop

    with monkeypatch.context() as patch:
        for name in ("put_in_place", "remove"):
            whole_function = getattr(atomic, name)
            patch.setattr(atomic, name, stopping(whole_function))
        with pytest.raises(KeyboardInterrupt):
            init_proposal.write(at, proposal)
    assert declaration.load(at.params)
    init_proposal.write(at, init.proposed(at, answers_of_my_model()))
    monkeypatch.chdir("../whole")
    init_proposal.write(at, init.proposed(at, answers_of_my_model()))
    assert whole.name == "whole"

    assert tree(Path("../fork")) == tree(Path())


def test_a_file_that_somebody_saved_in_the_meantime_is_not_overwritten(at: Layout) -> None:
    """Nor is anything else written then; the same command tries again."""
    proposal = init.proposed(at, answers_of_my_model())
    at.params.write_text(at.params.read_text() + "# mine\n")
    before = tree(Path())

    with pytest.raises(MachineError, match=r"params\.yaml was changed by somebody else"):
        init_proposal.write(at, proposal)
    assert tree(Path()) == before


def test_a_file_that_cannot_be_written_keeps_all_of_them(
    at: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full before the first file has its name."""
    proposal = init.proposed(at, answers_of_my_model())
    before = tree(Path())

    def full(path: Path) -> None:
        if "params" in path.name:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(atomic, "sync", full)
    with pytest.raises(MachineError, match="the disk filled up"):
        init_proposal.write(at, proposal)
    assert tree(Path()) == before


@pytest.mark.parametrize("path", [".github/CODEOWNERS", "params.yaml"])
def test_a_name_that_the_system_does_not_give_leaves_the_declaration_and_a_way_on(
    at: Layout, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that nobody may replace is an error in words; the records go after the first names."""
    before = tree(Path())
    replace = Path.replace

    def refused(self: Path, target: Path) -> Path:
        if target == at.root / path:
            raise PermissionError(1, "Operation not permitted", str(target))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        with pytest.raises(MachineError, match="not permitted"):
            init_proposal.write(at, init.proposed(at, answers_of_my_model()))
    after = tree(Path())
    assert after["params.yaml"] == before["params.yaml"]
    assert not [name for name in after if name.endswith(".part")]
    assert (after == before) == (path != "params.yaml")
    init_proposal.write(at, init.proposed(at, answers_of_my_model()))
    assert list(declaration.check(at).models) == ["my-model"]


def test_a_link_is_not_written_through(at: Layout, tmp_path: Path) -> None:
    """What it names may be somebody else's, outside of the repository."""
    owners = Path(".github/CODEOWNERS")
    outside = tmp_path / "outside"
    owners.rename(outside)
    owners.symlink_to(outside)
    before, text = tree(Path()), outside.read_bytes()
    with pytest.raises(MachineError, match="is a link"):
        init_proposal.write(at, init.proposed(at, answers_of_my_model()))
    assert (tree(Path()), outside.read_bytes()) == (before, text)


# --- who is asked -----------------------------------------------------------------------------


@pytest.mark.usefixtures("at")
def test_without_a_terminal_what_is_missing_is_named_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model, and the word that it may be written; a dry run needs no such word."""
    before = tree(Path())

    for argv, said in (
        (DESK, "which model shall it be?"),
        (("--owner", "@me"), "Add --yes"),
        (("path:models/My.Model", *DESK), "Add --yes"),
    ):
        assert typed(*argv) == 2
        assert said in capsys.readouterr().err
    assert typed("path:models/My.Model", *DESK, "--dry-run") == 0
    assert "+  my-model:" in capsys.readouterr().out
    assert typed("path:models/My.Model", *DESK, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["is_written"], told["model"], told["host"]) == (False, "my-model", "desk")
    assert "params.yaml" in told["changed"]
    assert "dvc.lock" in told["removed"]
    assert tree(Path()) == before


def test_at_a_terminal_every_answer_is_asked_for_and_shown_before_it_is_written(
    at: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty line takes what stands in brackets: this machine, its cards, the owner."""
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(
        ["git", "remote", "add", "origin", "git@github.com:acme/our-models.git"], check=True
    )
    card = gpu.Card(
        name="NVIDIA GeForce RTX 3090", vram_mib=24_576, compute_capability="8.6",
        power_limit_w=350, pcie_generation=4, pcie_lanes=16,
    )  # fmt: skip
    monkeypatch.setattr(gpu, "cards", lambda: (card,))
    monkeypatch.setattr("platform.node", lambda: "Desk.lan")
    monkeypatch.setattr(console, "can_ask", lambda: True)

    def answering(*lines: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert typed() == 0
        return capsys.readouterr().err

    before = tree(Path())
    told = answering("path:models/My.Model", "", "", "", "", "Q8_0", "no")
    assert "here: NVIDIA GeForce RTX 3090) [24576]" in told
    assert "Nothing was written" in told
    assert tree(Path()) == before
    answering("path:models/My.Model", "", "", "", "oci://ghcr.io/acme", "Q8_0", "yes")

    declared = declaration.check(at)
    assert declared.hosts["desk"].vram_mib == 24_576
    assert list(declared.quants) == ["my-model-Q8_0"]
    assert declared.registries["production"].url == "oci://ghcr.io/acme"
    assert "@acme" in Path(".github/CODEOWNERS").read_text()
    subprocess.run(["git", *AUTHOR, "status", "--short"], check=True, capture_output=True)


@pytest.mark.usefixtures("at")
def test_an_owner_that_nobody_named_is_said_since_an_organisation_is_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """GitHub passes over a line of CODEOWNERS that names an organisation, and asks nobody."""
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(
        ["git", "remote", "add", "origin", "git@github.com:acme/our-models.git"], check=True
    )
    assert typed("path:models/My.Model", *DESK[:4], "--yes") == 0
    told = capsys.readouterr().err
    assert "--owner @acme/TEAM" in told
    assert "@acme" in Path(".github/CODEOWNERS").read_text()


def test_a_host_elsewhere_has_its_own_memory_and_a_slip_is_asked_for_again(
    at: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A notebook without a card says nothing of the box in the cellar."""
    monkeypatch.setattr(gpu, "cards", tuple)
    monkeypatch.setattr("platform.node", lambda: "notebook.lan")
    monkeypatch.setattr(console, "can_ask", lambda: True)

    def answering(*lines: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return typed(), capsys.readouterr().err

    (tiny(Path("models/2024")) / "README.md").unlink()
    Path("models/none").mkdir()
    code, told = answering(
        "Qwen/Qwen3-8B", "path:models/mine", "path:models/none", "path:models/2024",
        "0x1f", "ours", "my license!", "mine", "My Desk", "my-desk", "24 GB", "24576",
        "me@mail.invalid", "@me", "s3://KEY:SECRET@bucket", "", "Q4_K_N", "Q8_0", "yes",
    )  # fmt: skip
    assert code == 0, told
    for cause in (
        "hf:Qwen/Qwen3-8B",
        "models/mine is no directory",
        "safetensors",
        "--name model-2024",
        "--name model-0x1f",
        "--license mine",
        "--host my-desk",
        "is no number of MiB",
        "is no account on GitHub",
        "--registry is not",
        "Q4_K_",
    ):
        assert cause in told
    assert "MiB of all cards of my-desk" in told
    declared = declaration.check(at)
    assert list(declared.quants) == ["ours-Q8_0"]
    assert declared.models["ours"].license == "other"
    host = declared.hosts["my-desk"]
    assert (host.vram_mib, host.memory_mib) == (24_576, None)


def test_answers_that_do_not_go_together_are_given_back_as_a_command(
    at: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What fits nowhere is seen when all is known; nobody types the rest again."""
    monkeypatch.setattr(gpu, "cards", tuple)
    monkeypatch.setattr(console, "can_ask", lambda: True)
    Path("models/My.Model/README.md").unlink()
    told = "path:models/My.Model\nmine\ndesk\n0\n1025\n\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(told))
    before = tree(at.root)

    assert typed("--context", "99999") == 2

    said = capsys.readouterr().err
    assert "was trained with 256 tokens" in said
    assert "fleet init path:models/My.Model --context 99999 --license mine --host desk" in said
    assert tree(at.root) == before


@pytest.mark.parametrize("option", ["--remote", "--registry"])
@pytest.mark.usefixtures("at")
def test_a_password_in_an_option_is_refused_before_a_question_and_never_repeated(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command that gives the answers back may hold it."""
    monkeypatch.setattr(console, "can_ask", lambda: True)

    assert typed(option, "s3://KEY:SECRET@bucket/models") == 2

    told = capsys.readouterr().err
    assert "Credentials come from the environment" in told
    assert "SECRET" not in told


def test_a_clone_without_github_begins_and_names_its_owners_later(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is guessed: CODEOWNERS stays, and one line says what to type once it is known."""
    codeowners = Path(".github/CODEOWNERS")
    before = codeowners.read_bytes()
    Path("models/My.Model/README.md").unlink()
    rest = ("--license", "mine", "--registry", "file:production", "--yes")

    assert typed("path:models/My.Model", *DESK[:4], *rest) == 0

    assert capsys.readouterr().err.count("fleet init --owner @login") == 1
    assert codeowners.read_bytes() == before
    declared = declaration.check(at)
    assert declared.models["my-model"].license == "other"
    assert declared.registries["production"].url == "file:production"
    held = tree(at.root)
    assert typed("--owner", "@me", "--yes") == 0
    changed = {path for path, data in tree(at.root).items() if held.get(path) != data}
    assert changed == {".github/CODEOWNERS"}
    assert re.search(r"(?m)^/pipelines/ +@me$", codeowners.read_text())


def test_owners_alone_are_named_in_a_repository_in_which_nobody_has_begun(
    at: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No question about a model, and the example stays."""
    monkeypatch.setattr(console, "can_ask", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    held = tree(at.root)

    assert typed("--owner", "@acme/fleet") == 0

    assert "Model" not in capsys.readouterr().err
    changed = {path for path, data in tree(at.root).items() if held.get(path) != data}
    assert changed == {".github/CODEOWNERS"}


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("path:models/MyModel", "--host", "My Desk"), 3, "models/MyModel is no directory"),
        (("path:models/none", "--host", "My Desk"), 3, "safetensors"),
        (("path:models/My.Model", "--host", "my desk"), 2, "--host my-desk"),
        (("path:models/My.Model", *DESK[:4], "--name", "My Model"), 2, "--name my-model"),
        (("path:models/My.Model", *DESK[:4], "--license", "my own"), 2, "--license mine"),
        (("--license", "mine", "--keep-example"), 2, "none is named"),
    ],
)
def test_a_slip_is_answered_with_its_own_cause_and_the_source_comes_first(
    at: Layout, argv: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody who mistyped a folder is asked for owners."""
    (at.root / "models/none").mkdir()
    assert typed(*argv, "--yes") == code
    assert said in capsys.readouterr().err


def test_a_licence_is_declared_once_and_its_lack_is_said_with_the_line_to_add(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of one's own states none, and without one no release is ever made of it."""
    at.params.write_text(OWN % ("a" * 64, fetch.content_digest(Path("models/My.Model"))))
    second = tiny(Path("models/second"), seed=2)
    (second / "README.md").unlink()
    added = ("--quants", "Q8_0", "--yes")

    assert typed("path:models/second", *added) == 0
    told = capsys.readouterr().err
    assert "config.json (`license`) and LICENSE" in told
    assert "add `license: other` below `second:`" in told

    for name, license_, written in (("a", "mine", "other"), ("b", "apache-2.0", "apache-2.0")):
        argv = ("path:models/second", "--name", name, "--license", license_, *added)
        assert typed(*argv) == 0
        assert "states no licence" not in capsys.readouterr().err
        assert re.search(rf"(?m)^ +#.*\n +license: {written}$", at.params.read_text())
        assert declaration.check(at).models[name].license == written
        assert typed(*argv) == 0
        assert "Nothing changes" in capsys.readouterr().err

    third = tiny(Path("models/third"), seed=3)
    (third / "README.md").unlink()
    (third / "LICENSE").write_text("MIT License\n")
    assert typed("path:models/third", *added, "--license", "apache-2.0") == 2
    assert "state mit" in capsys.readouterr().err
    assert typed("path:models/third", *added) == 0
    assert "states no licence" not in capsys.readouterr().err


def test_main_memory_is_called_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of what, asked somebody who has 24 GiB of several things."""
    monkeypatch.setattr(gpu, "cards", tuple)
    kind, _, of_what = init_repository.memory()
    assert kind == "memory_mib"
    assert of_what.endswith("MiB of main memory")


def test_a_workflow_passes_every_input_and_takes_nothing_from_its_machine(at: Layout) -> None:
    """A blank is no answer; a host without a number is nobody's guess."""
    assert init_state.is_untouched(at.params.read_bytes(), Path(".github/CODEOWNERS").read_bytes())
    proposal = init.proposed(at, Answers(owners=("@acme",), detects=False))

    assert list(proposal.files) == [".github/CODEOWNERS"]
    hosts = Answers(source="path:models/My.Model", host="desk", detects=False)
    with pytest.raises(ParamsError, match="how much memory desk has"):
        init.proposed(at, hosts)
    kept = init.proposed(at, Answers(source="path:models/My.Model", detects=False))
    assert b"\n  local:\n" in (kept.files["params.yaml"] or b"")
    assert init_change.owners(at, Answers()) == ()
