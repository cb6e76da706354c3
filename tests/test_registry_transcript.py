"""The commands of docs/registry.md: publish, `ollama pull`, chat, again, roll back, pull."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import publish_factory
import pytest
import requests
from record_factory import MODEL, sha256
from serving_factory import settings

from pipelines import hashing
from pipelines.layout import Layout
from pipelines.release_records import parse_release, release_id
from pipelines.serving import server
from pipelines.serving.ollama import OllamaHost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from registry_servers import OciServer

    from pipelines.release_records import Release
    from pipelines.serving.engine import Engine

pytestmark = pytest.mark.toolchain
ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs/registry.md"

PARAMS: Final = f"""\
toolchain: {{llama_cpp_python: 0.3.36, sha256: {"a" * 64}}}
corpora:
  calibration: {{path: corpora/calibration.txt, sha256: {"c" * 64}}}
  evaluation: {{path: corpora/evaluation.txt, sha256: {sha256("evaluation")}}}
models:
  {MODEL}:
    source: path:examples/{MODEL}
    revision: {sha256(MODEL)[:40]}
    context_tokens: 512
    calibration: calibration
quants:
  {MODEL}-Q8_0: {{model: {MODEL}, type: Q8_0}}
  {MODEL}-Q4_K_M: {{model: {MODEL}, type: Q4_K_M, imatrix: true}}
hosts:
  local: {{memory_mib: 2048}}
# As the records that stand for a run were judged.
gates: {{max_kld_mean_nats: 0.06}}
load_test: {{slo: {{ttft_ms: 300, tpot_ms: 50}}}}
"""
# Short answers: these weights know no end.
MODELFILE: Final = """\
# version: 1
PARAMETER temperature 0
PARAMETER num_predict 24
SYSTEM You answer briefly.
{% if license %}LICENSE {{ license }}{% endif %}
"""
CHAT: Final = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# What stands for the measurements of `fleet repro`, which take minutes; its last stage is real.
FLEET: Final = """\
#!{python}
import sys
sys.path[:0] = [{root!r}, {tests!r}]
if sys.argv[1:] == ["repro"]:
    import publish_factory
    from pipelines.layout import Layout
    publish_factory.served_again(Layout())
    sys.argv[1:] = ["publish", "tiny-llama"]
from pipelines.__main__ import main
raise SystemExit(main())
"""


class Terminal:
    """A shell in a fork, with `fleet` and `ollama` on PATH, and an Ollama of its own."""

    def __init__(self, root: Path, oci: OciServer, ollama: Path, url: str, models: Path) -> None:
        """Sit down in the fork `root`, beside the Ollama at `url`, whose files are in `models`."""
        self._models = models
        self.at = Layout(root)
        self._oci = oci
        self.ollama_url = url
        programs = root.parent / "bin"
        programs.mkdir()
        text = FLEET.format(python=sys.executable, root=str(ROOT), tests=str(ROOT / "tests"))
        (programs / "fleet").write_text(text)
        (programs / "fleet").chmod(0o755)
        self._environment = {
            **os.environ,
            **oci.environment("production"),
            "PATH": f"{programs}:{ollama.parent}:{os.environ['PATH']}",
            "OLLAMA_HOST": url.removeprefix("http://"),
            "HOME": str(root.parent),
            "XDG_STATE_HOME": str(root.parent / "state"),
            "GITHUB_ACTOR": "ada",
        }

    def here(self, text: str) -> str:
        """Put the ports of this run in the place of the page's."""
        return text.replace("localhost:5000", self._oci.pull).replace(
            "localhost:5010", self._oci.push
        )

    def type(self, command: str) -> str:
        """Type a command of the page; return what it printed."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.here(command)],
            cwd=self.at.root,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    @property
    def release(self) -> tuple[str, Release]:
        """Id and content of results/tiny-llama/release.json."""
        data = self.at.release(MODEL).read_bytes()
        return release_id(data), parse_release(data, release_id(data), "results")

    def pulled(self) -> str:
        """Return the digest of `stable` by Ollama's own list, sha256 of its manifest."""
        told = requests.get(f"{self.ollama_url}/api/tags", timeout=30).json()["models"]
        found = {each["name"]: each["digest"] for each in told}
        digest: str = found[self.here(f"localhost:5000/fleet/{MODEL}:stable")]
        return digest

    def served_by_registry(self, tag: str) -> str:
        """Return the digest that the registry gives a tag, as Ollama asks for it."""
        answer = requests.head(
            f"http://{self._oci.pull}/v2/fleet/{MODEL}/manifests/{tag}",
            headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json"},
            timeout=30,
        )
        assert answer.status_code == 200
        return answer.headers["Docker-Content-Digest"].removeprefix("sha256:")

    def require_files(self, release: Release) -> None:
        """Hash what Ollama has on its disk for `stable`: files of that release, byte for byte."""
        named = {file.sha256 for file in release.files}
        name = f"{self._oci.pull}/fleet/{MODEL}/stable"
        manifest = json.loads((self._models / "manifests" / name).read_bytes())
        for layer in (manifest["config"], *manifest["layers"]):
            path = self._models / "blobs" / layer["digest"].replace(":", "-")
            found = hashing.digest(path)
            assert f"sha256:{found.sha256}" == layer["digest"]
            assert found.size_bytes == layer["size"]
            assert found.sha256 in named

    def chats(self) -> str:
        """Have a conversation through the API; return what was answered."""
        body = {
            "model": self.here(f"localhost:5000/fleet/{MODEL}:stable"),
            "messages": [{"role": "user", "content": "What is a registry?"}],
            "stream": False,
        }
        told = requests.post(f"{self.ollama_url}/api/chat", json=body, timeout=120).json()
        assert told["done"] is True, told
        assert told["eval_count"] > 0
        content: str = told["message"]["content"]
        return content


@pytest.fixture
def terminal(tmp_path: Path, oci: OciServer, engine: Engine) -> Iterator[Terminal]:
    """A fork that `fleet repro` has gone through, an empty Ollama, and a registry."""
    root = tmp_path / "fork"
    at = publish_factory.finished(root, template=CHAT, modelfile=MODELFILE)
    declared = re.search(r"```yaml\n(registries:\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert declared is not None
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    empty = Layout(tmp_path / "ollama")
    with server.open_host(engine, settings(), model="none", at=empty, log=tmp_path / "log") as host:
        assert isinstance(host, OllamaHost)
        assert engine.ollama is not None
        with host._place.store() as models, host._running(models, on_card=False) as running:
            shell = Terminal(at.root, oci, engine.ollama, running.client.url, models)
            at.params.write_text(PARAMS + shell.here(declared[1]))
            yield shell


def commands() -> list[tuple[str, list[str]]]:
    """Return what a reader of the page types, in order, and what the page shows of the answers."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def shape(text: str) -> str:
    """Return what is the same in each run: no digest, number, size, time, address or width."""
    text = re.sub(r"(?:localhost|127\.0\.0\.1):[0-9]+", "HOST", text)
    text = re.sub(r"\b[0-9a-f]{12}\b", "DIGEST", text)
    text = re.sub(r"[0-9][0-9.:-]*", "0", text)
    return " ".join(text.split())


def test_the_page_does_what_it_says_digest_for_digest(terminal: Terminal) -> None:
    """Every command of the page, and after each pull the digest that release.json names."""
    typed = commands()
    releases: list[tuple[str, Release]] = []
    pulls: list[str] = []
    rolled_back = False
    for command, shown in typed:
        said = terminal.type(command)
        for line in shown:
            assert shape(line) in shape(said), f"$ {command}\n{said}"
        if command.startswith("fleet publish"):
            known = terminal.release
            if known not in releases:
                releases.append(known)
                assert "moved stable" in said
            else:
                assert "nothing changed" in said
        elif command.startswith("ollama pull"):
            pulls.append(terminal.pulled())
            terminal.require_files(releases[0 if rolled_back else -1][1])
            assert terminal.chats()
        elif command == "ollama list":
            assert pulls[-1][:12] in said
        elif command.startswith("fleet rollback"):
            assert "rolled back" in said.lower()
            rolled_back = True

    manifests = [
        release.of("ollama-manifest", release.stable_quant)[0].sha256 for _, release in releases
    ]
    assert len(releases) == 2
    assert len(set(manifests)) == 2
    assert pulls == [manifests[0], manifests[1], manifests[0]]
    assert terminal.served_by_registry("stable") == manifests[0]
