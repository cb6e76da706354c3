"""Each example is a declaration that can be copied, and what it says of sizes is what fits."""

from __future__ import annotations

import dataclasses
import http.client
import http.server
import importlib.util
import json
import re
import sys
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sample
from hub import Hub

from pipelines import declaration, params, prompts
from pipelines.layout import Layout

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from pipelines.params import Declaration
    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.yaml"))}
PAGE = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| ([a-z0-9-]+) \| (\S+) \| ([A-Z0-9_]+) \| (\S+) \| ([0-9, |]+) \|$", re.MULTILINE
)
UNKNOWN_COMMIT = "0" * 40


@cache
def program() -> ModuleType:
    """Load examples/sizes.py, a program beside the examples."""
    spec = importlib.util.spec_from_file_location("example_sizes", ROOT / "examples/sizes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def declared(name: str) -> Declaration:
    """Read an example."""
    return declaration.load(EXAMPLES[name])


def rows(name: str) -> list[tuple[str, str, str, list[int]]]:
    """Return model, quant, host and figures of the rows that the page has for an example."""
    return [
        (model, quant, host, [int(each.replace(",", "")) for each in figures.split("|")])
        for example, model, quant, host, figures in ROW.findall(PAGE)
        if example == name
    ]


def numbers(name: str) -> set[int]:
    """Return the numbers above a thousand in the comment at the head of an example."""
    comment = EXAMPLES[name].read_text(encoding="utf-8").split("\n\n")[0]
    return {int(each.replace(",", "")) for each in re.findall(r"\d{1,3},\d{3}", comment)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_copied_example_is_a_valid_declaration(tmp_path: Path, name: str) -> None:
    """With every file that it names, in a checkout that holds nothing but the template's."""
    sample.take(tmp_path, "corpora", "modelfiles", "examples/tiny-llama")
    (tmp_path / "params.yaml").write_bytes(EXAMPLES[name].read_bytes())

    found = declaration.check(Layout(tmp_path))

    assert f"[{name}.yaml](../examples/{name}.yaml)" in PAGE
    for model in found.models.values():
        # One that is copied unread finds no such commit, and no other model's.
        assert model.source.startswith("path:") or model.revision == UNKNOWN_COMMIT


def test_the_examples_have_one_llama_cpp_and_the_page_has_them_all() -> None:
    """A copy of two of them goes together, and no row or link is of one that is gone."""
    pins = {
        (found.llama_cpp_python, found.sha256)
        for found in (declared(name).toolchain for name in EXAMPLES)
    }

    assert len(pins) == 1
    assert set(re.findall(r"\.\./examples/([a-z0-9-]+)\.yaml", PAGE)) == set(EXAMPLES)
    assert {row[0] for row in ROW.findall(PAGE)} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_an_example_declares_fits_its_hosts_with_their_margin(name: str) -> None:
    """Each quant on each host that serves it has a row; its sum, its cache and its limit hold."""
    one, models = declared(name), program().MODELS
    found = rows(name)

    known = [model for model, spec in one.models.items() if spec.source in models]
    assert [row[:3] for row in found] == [
        (model, type_, host)
        for model in known
        for type_ in params.quants_of(one, model).values()
        for host in params.judged_hosts(one, model)
    ]
    for model, _, host, (file, cache_, working, beside, needed, limit) in found:
        slots = params.served_as(one, model).parallel
        tokens = one.models[model].context_tokens * slots
        spec = params.judged_hosts(one, model)[host]
        assert cache_ == round(program().cache_mib(models[one.models[model].source], tokens))
        assert abs(file + cache_ + working - beside - needed) <= 2
        assert needed <= limit == (spec.vram_mib or 0) - spec.margin_mib
        assert bool(beside) == bool(params.served_as(one, model).cpu_moe_layers)


@pytest.mark.toolchain
@pytest.mark.parametrize("name", ["chat-8b", "moe-cpu-experts"])
def test_the_figures_are_llama_cpps_own(tmp_path: Path, tools: Toolchain, name: str) -> None:
    """The pinned tools say each row of the page; the example's own words add nothing to them."""
    types = {"Q8_0", "Q6_K", "Q4_K_M"} if name == "moe-cpu-experts" else {"Q8_0", "Q4_K_M"}

    fits = program().fits(EXAMPLES[name], tmp_path, tools, types=types)

    assert len(fits) == 2
    assert {f"| {name} {fit.row()}" for fit in fits} <= set(PAGE.splitlines())
    said = {round(figure) for fit in fits for figure in dataclasses.astuple(fit)[3:]}
    said |= {round(fit.needed_mib) for fit in fits}
    one = declared(name)
    (model,), (host,) = one.models, one.hosts.values()
    said |= {host.vram_mib or 0, host.margin_mib, one.models[model].context_tokens}
    slots = params.served_as(one, model).parallel
    each = round(fits[0].cache_mib / slots)
    said |= {each, round(fits[0].needed_mib) + each}
    assert numbers(name) <= said
    if name == "chat-8b":
        # One user more fits, as the comment says, and two do not.
        assert fits[0].needed_mib + each <= fits[0].limit_mib < fits[0].needed_mib + 2 * each


def test_an_encoder_has_the_weights_that_the_example_counts() -> None:
    """By the defaults of transformers' BertConfig, which are those of bge-base: 109 million."""
    hidden, inner, layers, words, positions = 768, 3072, 12, 30522, 512
    attention = 4 * (hidden * hidden + hidden) + 2 * hidden
    feed_forward = 2 * hidden * inner + inner + hidden + 2 * hidden
    count = (words + positions + 2) * hidden + 2 * hidden + layers * (attention + feed_forward)
    text = EXAMPLES["embedding"].read_text(encoding="utf-8")
    found = re.search(r"(\d+) million weights: (\d+) MiB with 16 bits each, (\d+) with", text)

    assert found is not None
    assert [int(each) for each in found.groups()] == [
        round(count / 1e6), round(2 * count / 2**20), round(8.5 / 8 * count / 2**20)
    ]  # fmt: skip


def test_the_regression_on_the_page_can_be_copied(tmp_path: Path) -> None:
    """It is read as corpora/prompts.yaml is, and expects a call of the tool that it declares."""
    snippet = next(
        block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "tool_call" in block
    )
    lines = [line[3:] for line in snippet.splitlines()]
    path = tmp_path / "prompts.yaml"
    shipped = sample.of("corpora/prompts.yaml").read_text(encoding="utf-8")
    path.write_text(shipped[: shipped.index("\nregressions:")] + "\n" + "\n".join(lines) + "\n")

    (one,) = prompts.load(path).regressions

    call = one.expect.tool_call
    assert call is not None
    assert (call.name, call.arguments) == ("read_file", {"path": "src/main.py"})
    assert set(one.models or ()) <= set(declared("coder-tools").models)


def test_the_two_hosts_measure_what_is_theirs() -> None:
    """The coder is routed to the large card alone, and the chat model to both."""
    one = declared("two-hosts")
    routed: dict[str, Any] = {model: set(params.judged_hosts(one, model)) for model in one.models}

    assert routed == {"qwen3-8b": {"rack-a", "rack-b"}, "qwen2-5-coder-14b": {"rack-a"}}


@contextmanager
def mirror(hub: Hub, path: str, asked: list[str]) -> Iterator[str]:
    """Pass on what is asked below `path` to a Hub, redirects as they are, and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            """Ask the Hub the same, without the path."""
            asked.append(self.path)
            inside = self.path.startswith(f"{path}/")
            connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
            connection.request(
                self.command,
                self.path.removeprefix(path) if inside else "/nothing/of/the/kind",
                headers={name: value for name, value in self.headers.items() if name != "Host"},
            )
            answer = connection.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                    self.send_header(name, value)
            said = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", said or str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            connection.close()

        do_HEAD = do_GET  # noqa: N815 - the same

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}{path}"
        server.shutdown()
        thread.join()


@pytest.mark.toolchain
def test_the_air_gapped_example_is_fetched_from_a_mirror_and_its_commit_is_named(
    checkout: Path, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A mirror with a path behind the host: look, pin what is named, fetch; nothing goes beside."""
    source = ROOT / "examples/tiny-llama"
    names = ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")
    text = EXAMPLES["air-gapped"].read_text(encoding="utf-8")
    text = text.replace("hf:Qwen/Qwen3-8B", "hf:acme/tiny").replace("16384", "512")
    asked: list[str] = []
    with Hub() as hub, mirror(hub, "/artifacts/hf", asked) as address:
        repo = hub.create("acme/tiny", files={name: (source / name).read_bytes() for name in names})
        env = hub.env() | {"HF_ENDPOINT": address}
        (checkout / "params.yaml").write_text(text)
        looked = fleet("check-upstream", cwd=checkout, **env)
        (checkout / "params.yaml").write_text(text.replace(UNKNOWN_COMMIT, repo.head))
        fetched = fleet("fetch", "qwen3-8b", cwd=checkout, **env)
        again = fleet("check-upstream", cwd=checkout, **env)

    assert f"the newest is {repo.head}." in looked.stdout, looked
    assert fetched.returncode == 0, fetched.stderr
    record = json.loads((checkout / "results/qwen3-8b/fetch.json").read_text())
    assert (record["revision"], len(record["files"])) == (repo.head, len(names))
    assert re.search(r"qwen3-8b +current", again.stdout), again
    assert all(each.startswith("/artifacts/hf/") for each in asked)
    assert hub.unexpected == []
