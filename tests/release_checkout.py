"""
A checkout with registries and releases: what the verbs about releases are tested in.

Registries are real directories (or whatever a test declares), releases are those of
`release_factory`, and every verb is typed as a user types it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import release_factory as factory

from pipelines import __main__, declaration, publishing
from pipelines.layout import Layout
from pipelines.ledger import Ledger
from pipelines.release_records import STABLE
from pipelines.stores import open_store

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from pipelines.params import Registry
    from pipelines.release import Composed
    from pipelines.release_records import Alias, ReleaseWaiver
    from pipelines.stores.base import Store

MODEL: Final = factory.MODEL
OTHER: Final = "other-model"
REASON: Final = "it was too slow"
PARAMS: Final = f"""\
# The fleet of a test; every line of it has to survive a rollback.
toolchain: {{llama_cpp_python: 0.3.36, sha256: {"a" * 64}}}
corpora:
  evaluation: {{path: corpora/evaluation.txt, sha256: {"b" * 64}}}

models:
  {MODEL}:   # the small one
    source: "path:examples/tiny-llama"
    revision: {"c" * 40}  # pinned
    context_tokens:   512
    gates: {{max_kld_mean_nats: 0.005}}   # tight
  {OTHER}: {{source: "hf:owner/repo", revision: {"d" * 40}, context_tokens: 512}}

quants:
  {MODEL}-Q8_0: {{model: {MODEL}, type: Q8_0}}
  {MODEL}-Q4_K_M: {{model: {MODEL}, type: Q4_K_M}}
  {OTHER}-Q8_0: {{model: {OTHER}, type: Q8_0}}
hosts:
  local: {{memory_mib: 4096}}
registries:
  local: {{url: "file:registry"}}
  mirror: {{url: "file:mirror"}}
"""


@dataclass(frozen=True)
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The result as JSON."""
        return json.loads(self.out)


class Checkout:
    """A fleet in a folder."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Make it, and stand in it as somebody called Ada; nothing of the user's is touched."""
        self.root = root
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        root.mkdir(parents=True, exist_ok=True)
        if not self.at.params.exists():
            self.at.params.write_text(PARAMS)
        monkeypatch.setenv("XDG_STATE_HOME", str(root / "state"))
        monkeypatch.setenv("GITHUB_ACTOR", "Ada")
        for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(root)

    def of(self, root: Path) -> Checkout:
        """Return another checkout, and stand in it."""
        return Checkout(root, self._monkeypatch, self._capsys)

    @property
    def at(self) -> Layout:
        """Its paths, absolute."""
        return Layout(self.root)

    def fleet(self, *argv: str) -> Ran:
        """Type `fleet ARGV` in it."""
        self._monkeypatch.chdir(self.root)
        self._capsys.readouterr()
        try:
            code = __main__.main(argv)
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        printed = self._capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    def store(self, registry: str = "local") -> Store:
        """Open a registry of it."""
        return open_store(registry, declaration.load(self.at.params), self.root)

    def ledger(self, model: str = MODEL) -> Ledger:
        """Read the ledger of a model."""
        return Ledger.load(self.at.ledger(model), model)

    def release(self, seed: int, model: str = MODEL, **options: Any) -> Composed:
        """Make a release; its GGUFs lie beside the checkout."""
        return factory.composed(self.root.parent / "ggufs", seed, model=model, **options)

    def publish(
        self,
        seed: int,
        *registries: str,
        stable: str = "latest",
        model: str = MODEL,
        year: int = 2025,
        **options: Any,
    ) -> str:
        """Publish a release as the stage does, to `local` if none is named; return its id."""
        made = self.release(seed, model, **options)
        for registry in registries or ("local",):
            publishing.publish(
                made,
                self.store(registry),
                self.ledger(model),
                stable=stable,
                by=factory.by(f"release {seed}", at=f"{year}-01-{seed:02}T12:00:00Z"),
            )
        self.at.release(model).parent.mkdir(parents=True, exist_ok=True)
        self.at.release(model).write_bytes(made.data)
        return made.id

    def alias(self, registry: str = "local", model: str = MODEL) -> Alias:
        """Read `stable`."""
        alias, _token = self.store(registry).read_alias(model, STABLE)
        assert alias is not None
        return alias

    def blob_path(self, sha256: str, registry: str = "registry") -> Path:
        """Where a `file:` registry keeps a file."""
        return self.root / registry / "blobs/sha256" / sha256

    def declare(self, name: str, registry: Registry) -> None:
        """Add a registry to params.yaml."""
        fields = registry.model_dump(exclude_defaults=True)
        with self.at.params.open("a", encoding="utf-8") as file:
            file.write(f"  {name}: {json.dumps(fields)}\n")

    def copy(self, name: str) -> None:
        """Keep what the folder `name` holds now, for `put_back`."""
        shutil.copytree(self.root / name, self.root / f"{name}.kept")

    def put_back(self, name: str) -> None:
        """Replay: let the folder `name` be as it was."""
        shutil.rmtree(self.root / name)
        (self.root / f"{name}.kept").rename(self.root / name)


def waiver(**changes: str) -> ReleaseWaiver:
    """Build a waiver of a HOLD."""
    from pipelines.release_records import ReleaseWaiver  # noqa: PLC0415

    fields = {"gate": "hold", "who": "Grace", "why": "the customer waits", "until": "2027-12-31"}
    return ReleaseWaiver.model_validate(fields | changes)
