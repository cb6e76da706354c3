"""
The fleet that the tests are about: tests/sample holds one operator's paths, frozen.

    sample.of("corpora/prompts.yaml")          where a path of the repository is, for a test
    sample.take(root, "pipelines", ".dvc")     copy such paths
    sample.lay(root)                           overlay the frozen fleet on a whole checkout

In a fork params.yaml, corpora/, results/ and the like are the operator's, so a test that read them
would hold for the template alone. What the template owns is taken from this checkout.

Records tell of the llama.cpp that made them. A checkout with the sample's records therefore keeps
the sample's pins (`frozen=True`); one without records gets the pins of this repository, so that a
fork which raised them tests the llama.cpp and the Ollama that it runs.

Frozen means that the declaration and the records stay those of one run. Where the graph, or what a
stage reads, changes so that they do not cover it any more (test_sample.py says so), the fleet is
measured again in a checkout with `lay`, and its paths are copied here.
"""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import owners

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
SAMPLE: Final = ROOT / "tests/sample"
# What a checkout without records is made of.
CHECKOUT: Final = (
    "pipelines", "examples", "corpora", "modelfiles", ".dvc", "dvc.yaml", "params.yaml",
    ".dvcignore", ".gitignore",
)  # fmt: skip
# What DVC, a run or Python leaves beside tracked files.
_LEFT = shutil.ignore_patterns("cache", "tmp", "remote", "config.local", "__pycache__", "*.pyc")


def of(name: str) -> Path:
    """Return where a file or folder of the repository is: in the sample if it is the operator's."""
    return (SAMPLE if owners.is_operators(name) or owners.is_operators(f"{name}/") else ROOT) / name


def take(root: Path, *names: str, frozen: bool = False) -> None:
    """
    Copy files and folders of the repository, the operator's as the sample has them.

    Args:
        root: The checkout, made if it is not there.
        names: Paths of the repository. A folder of the template brings the sample's part of it.
        frozen: The pins of llama.cpp and Ollama stay the sample's; its records are of those.
    """
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if of(name).is_dir():
            shutil.copytree(of(name), root / name, ignore=_others, dirs_exist_ok=True)
            for path in _files(SAMPLE / name):
                _copy(SAMPLE, path, root)
        else:
            shutil.copy(of(name), root / name)
    if "params.yaml" in names and not frozen:
        (root / "params.yaml").write_text(params_text(), encoding="utf-8")


def lay(root: Path, *, records: bool = True) -> None:
    """
    Make the operator's paths of a checkout those of the sample.

    Args:
        root: A checkout of the template or of a fork.
        records: Bring results/ and the locks as well. Without them the fleet has the pins of this
            repository, with them the sample's.
    """
    for name in owners.OPERATOR:
        if name.endswith("/"):
            shutil.rmtree(root / name, ignore_errors=True)
        else:
            (root / name).unlink(missing_ok=True)
    for path in _files(SAMPLE):
        name = path.relative_to(SAMPLE).as_posix()
        if records or not (name.startswith("results/") or name.endswith("dvc.lock")):
            _copy(SAMPLE, path, root)
    if not records:
        (root / "params.yaml").write_text(params_text(), encoding="utf-8")


@functools.cache
def params_text() -> str:
    """Return the sample's params.yaml with the pins of llama.cpp and Ollama of this repository."""
    from pipelines import declaration  # noqa: PLC0415 - pydantic, only where a test asks

    here = declaration.load(ROOT / "params.yaml")
    pins = {
        "llama_cpp_python": here.toolchain.llama_cpp_python,
        "sha256": here.toolchain.sha256,
        "backend": here.toolchain.backend,
        "recipe": here.toolchain.recipe,
        "ollama": here.serving.ollama,
    }
    text = (SAMPLE / "params.yaml").read_text(encoding="utf-8")
    for key, value in pins.items():
        # Corpora have a sha256, too, further in.
        text, count = re.subn(rf"(?m)^  {key}: .*$", f"  {key}: {value}", text)
        assert count == 1, f"{key} is {count} times in the sample"
    if here.serving.ollama_archive_sha256 is not None:
        archive = f"\n  ollama_archive_sha256: {here.serving.ollama_archive_sha256}"
        text = re.sub(r"(?m)^  ollama: .*$", rf"\g<0>{archive}", text)
    return text


def _others(folder: str, names: list[str]) -> set[str]:
    """Leave out what is no part of a checkout, and what the sample has."""
    at = Path(folder)
    left = set(_LEFT(folder, names))
    if at.is_relative_to(ROOT) and not at.is_relative_to(SAMPLE):
        below = at.relative_to(ROOT)
        left |= {name for name in names if owners.is_operators((below / name).as_posix())}
    return left


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _copy(origin: Path, path: Path, root: Path) -> None:
    target = root / path.relative_to(origin)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
