"""Experts in main memory: what is declared is planned, measured, served and judged, or refused."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import record_factory
import sample
import serving_factory
import test_benchmark
from gguf_factory import converted_model, tiny_llama_gguf

from pipelines import architectures, benchmark, declaration, gguf_header, params, records
from pipelines.errors import ParamsError
from pipelines.layout import Layout
from pipelines.serving import engine, server
from pipelines.verdict_chain import experts

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.toolchain import Toolchain

MODEL = "tiny-llama"
FIELD = "cpu_moe_layers"


def declared(folder: Path, *, own: str = "", fleet: str = "auto") -> params.Declaration:
    """Read the sample with an engine, and with `own` below `serving` of its model."""
    text = sample.params_text().replace("engine: auto", f"engine: {fleet}")
    if own:
        text = text.replace("    context_tokens: 512\n", f"    context_tokens: 512\n    {own}\n")
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return declaration.load(path)


@pytest.mark.parametrize("fleet", ["auto", "ollama"])
def test_ollama_is_refused_with_what_to_write_instead(tmp_path: Path, fleet: str) -> None:
    """On the line of the key; the same if a slice says so that no declaration could."""
    with pytest.raises(ParamsError) as caught:
        declared(tmp_path, own=f"serving: {{{FIELD}: all}}", fleet=fleet)
    (problem,) = caught.value.problems
    serving = params.Serving.model_validate({"engine": fleet, FIELD: 4})

    assert "needs `engine: llama-server` beside it: Ollama has no such option" in problem.text
    assert problem.text.startswith(f"models.{MODEL}.serving.{FIELD}: ")
    with pytest.raises(ParamsError, match="Ollama has no such option"):
        engine.find(serving, None, log=tmp_path / "log")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["0", "-1", "some", "1.5"])
def test_layers_with_experts_beside_the_card_are_a_number_or_all(
    tmp_path: Path, value: str
) -> None:
    """One line says both, whatever was written."""
    with pytest.raises(ParamsError, match=r"from 1 to 9,999 or all$") as found:
        declared(tmp_path, own=f"serving: {{engine: llama-server, {FIELD}: {value}}}")

    assert len(found.value.problems) == 1


def test_one_model_has_llama_server_and_its_slices_alone_change(tmp_path: Path) -> None:
    """Without the key no slice has a trace of it, so nothing is measured or tested again."""
    before = declaration.slices(declared(tmp_path))
    found = declared(tmp_path, own=f"serving: {{engine: llama-server, {FIELD}: 3}}")
    after = declaration.slices(found)

    assert not [key for key, slice_ in before.items() if FIELD in slice_.model_dump_json()]
    changed = {key[0] for key in after if after[key] != before[key]}
    assert changed == {"benchmark", "load-test", "publish", "report"}
    assert found.serving.engine == "auto"
    assert params.served_as(found, MODEL).engine == "llama-server"
    assert params.benchmark_slice(found, f"{MODEL}-Q8_0").cpu_moe_layers == 3


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers with four experts each."""
    return tiny_llama_gguf(
        tmp_path_factory.mktemp("moe") / "moe-F16.gguf",
        n_layer=3, n_expert=4, n_ff=256, chat_template=serving_factory.CHAT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "layers"), [(None, 0), (1, 1), (3, 3), ("all", 3), (4, None), (9999, None)]
)
def test_a_number_of_layers_is_one_that_the_model_has(
    moe: Path, value: int | str | None, layers: int | None
) -> None:
    """`all` is their number; more than there are is a mistake that llama.cpp would not tell."""
    header = gguf_header.read(moe)

    if layers is None:
        with pytest.raises(ParamsError, match=r"layers 0 to 2.*") as caught:
            architectures.cpu_moe_layers(header, value)
        assert "Declare 1 to 3, or all" in caught.value.hint
    else:
        assert architectures.cpu_moe_layers(header, value) == layers


@pytest.mark.toolchain
def test_the_server_is_told_and_a_model_without_experts_is_refused(
    moe: Path, tmp_path: Path, tools: Toolchain
) -> None:
    """The real llama-server takes it, and its plan for the memory does; a dense model is named."""
    at, log = Layout(tmp_path / "fork"), tmp_path / "serve.log"
    at.root.mkdir()
    dense = serving_factory.model(tmp_path / "dense-F16.gguf")
    chosen = serving_factory.engine("llama-server", tools, tools.tool("llama-server"))
    settings = serving_factory.settings(cpu_moe_layers="all")
    with server.open_host(chosen, settings, model="moe", at=at, log=log) as host:
        with host.load(serving_factory.file(moe)) as loaded:
            (process,) = serving_factory.programs_in(at)
            argv = " ".join(process.cmdline())
            words = [{"role": "user", "content": "Hi"}]
            assert loaded.prompt_tokens(words) > 0
            assert loaded.served.cpu_moe_layers == "all"
        with (
            pytest.raises(ParamsError, match=r"dense-F16\.gguf has no experts"),
            host.load(serving_factory.file(dense)),
        ):
            pass

    assert " --n-cpu-moe 3 " in argv
    assert re.search(r"llama-fit-params.* -ncmoe 3", log.read_text())


@pytest.mark.alone
@pytest.mark.toolchain
def test_a_benchmark_runs_as_the_model_is_served_and_says_so(
    tmp_path: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-bench confirms the number in each line; the plan and the divergence have it as well."""
    monkeypatch.setattr(benchmark, "SPEED_ATTEMPTS", 1)
    at = converted_model(tmp_path / "fleet", n_layer=3, n_expert=4, n_ff=256)
    (at.root / "corpora").mkdir()
    (at.root / "corpora/evaluation.txt").write_text(test_benchmark.WORDS * 20)
    test_benchmark.add_quant(at, "Q8_0", tools)
    wanted = test_benchmark.slice_of(at, depths=(0,)).model_copy(update={FIELD: 2})

    record = benchmark.benchmark(wanted, at, tools, lock=tmp_path)

    assert record.cpu_moe_layers == 2
    assert json.loads(record.model_dump_json())[FIELD] == 2
    lines = at.log("benchmark", wanted.key).read_text().splitlines()
    told = [line for line in lines if " -ngl 0 " in line]
    assert len(told) == 5
    assert all(" -ncmoe 2" in line for line in told), told


@pytest.mark.parametrize("value", [None, 3, "all"])
def test_records_of_before_stay_as_they_are_and_others_are_held_against_it(
    value: int | str | None,
) -> None:
    """A verdict compares both with the declaration; what is not declared is not written."""
    changes: dict[str, Any] = {} if value is None else {FIELD: value}
    serving = params.Serving.model_validate({"engine": "llama-server", FIELD: value})
    for record in (
        records.BenchmarkRecord.model_validate(
            record_factory.benchmark_record().model_dump() | changes
        ),
        record_factory.served(**changes),
    ):
        assert (FIELD in record.model_dump_json()) == (value is not None)
        assert len(set(experts(record, serving))) == 1
        assert len(set(experts(record, serving.model_copy(update={FIELD: 7})))) == 2
