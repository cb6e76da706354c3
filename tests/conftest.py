"""What several test files share: the real toolchain, and a checkout to break."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sample

# Started only where a test asks for one by name.
from registry_servers import moto_s3, oci, oci_tls, s3_server, versitygw

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.serving.engine import Engine
    from pipelines.toolchain import Toolchain

__all__ = ["moto_s3", "oci", "oci_tls", "s3_server", "versitygw"]

ROOT = Path(__file__).resolve().parent.parent

# A shell starts what it puts into the background with SIGINT ignored, and children would inherit
# that: tests of Ctrl-C would wait for an end that never comes.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing here may reach a hub, whatever the environment of the machine says.
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in ("HF_TOKEN", "GITHUB_ACTIONS", "GGUF_FLEET_PROGRESS", "GGUF_FLEET_REPRO"):
    os.environ.pop(_name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests so that those which measure come last."""
    import alone_last  # noqa: PLC0415 - beside this file, which is no package

    alone_last.sort(config, items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Spread the tests over the cores, but not those which measure."""
    import alone_last  # noqa: PLC0415 - the same

    return alone_last.AloneLast(config, log)


@pytest.fixture(scope="session")
def tools() -> Toolchain:
    """The llama.cpp that this repository pins, built before the tests start by `make test`."""
    from pipelines import declaration, toolchain  # noqa: PLC0415 - only tests that need it

    spec = toolchain.spec_of(declaration.load(ROOT / "params.yaml"))
    return toolchain.ensure(spec)


@pytest.fixture(scope="session")
def family(
    tools: Toolchain, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Tiny models of real architectures: from a name to source and 16-bit GGUF, made once."""
    import architecture_factory  # noqa: PLC0415 - only tests that need it
    from verify_factory import converted  # noqa: PLC0415

    root = tmp_path_factory.mktemp("families")
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if not made:
            architecture_factory.fixtures(root / "fixtures", tools)
        if name not in made:
            source = architecture_factory.build(name, root / name, root / "fixtures")
            made[name] = source, converted(source, root / f"{name}-gguf", tools)
        return made[name]

    return make


@pytest.fixture(scope="session")
def engine(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The real Ollama, of PATH or of this repository's pin; installed once, as the toolchain is."""
    from pipelines import declaration, params  # noqa: PLC0415 - only tests that need it
    from pipelines.serving import engine as engines  # noqa: PLC0415

    log = tmp_path_factory.mktemp("engine") / "log"
    here = declaration.load(ROOT / "params.yaml").serving
    wanted = params.Serving(
        engine="ollama", ollama=here.ollama, ollama_archive_sha256=here.ollama_archive_sha256
    )
    return engines.find(wanted, tools, log=log)


@pytest.fixture
def fleet(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in `tmp_path` as a user does, and return what it printed."""

    def run(*argv: str, cwd: Path = tmp_path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines", *argv],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the template as a fork has it: a git repository with DVC, and no cache of ours."""
    root = tmp_path / "fork"
    sample.take(root, *sample.CHECKOUT, "tests/data")
    for argv in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "template"]):
        subprocess.run(["git", *_AUTHOR, *argv], cwd=root, check=True)
    return root


_AUTHOR = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")


@pytest.fixture(scope="session")
def vocabularies(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vocabularies of real models that the pinned source has, with texts and token ids."""
    from architecture_factory import fixtures  # noqa: PLC0415 - only tests that need it

    return fixtures(tmp_path_factory.mktemp("vocabularies"), tools)
