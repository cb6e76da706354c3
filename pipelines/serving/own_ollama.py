"""
The operator's own Ollama: which folder it reads, what it says of a name, how a name is switched.

It runs already, with its own settings and other models in it, and is asked over HTTP; files are
laid where it looks for them, which works while it runs. Nothing is taken for proven that was only
written: a manifest has to be listed by /api/tags with its digest, which is the sha256 of its bytes,
and has to answer a chat to its end. The digest proves the manifest, not the GGUF: Ollama hashes no
blob, so the bytes are hashed here before they get their name.

Traps (run with 0.33.0): two names with the same GGUF and the same options share one llama-server,
and /api/ps goes on showing the name by which it was loaded; a folder of another user's can often be
read and not written; blobs that no manifest names and that are older than an hour go when Ollama
starts, so a manifest that is replaced takes its model with it unless another name keeps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pipelines import console
from pipelines.errors import MachineError, ParamsError, RetryLaterError
from pipelines.serving import ollama_store, server
from pipelines.serving.ollama_store import ModelName
from pipelines.serving.server import ServerGone, ServingError, WrongContext, WrongDigest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_URL: Final = "http://127.0.0.1:11434"
# What Ollama completes a name with (types/model/name.go).
_DEFAULT_HOST: Final = "registry.ollama.ai"
_DEFAULT_NAMESPACE: Final = "library"
_DEFAULT_TAG: Final = "latest"
_DEFAULT_PORT: Final = 11434
_PORTS: Final = {"http": 80, "https": 443}
# docs/linux.mdx: the home of the user that the service of a Linux installation runs as.
SERVICE_MODELS: Final = Path("/usr/share/ollama/.ollama/models")
# A manifest has a kilobyte.
_MAX_MANIFEST_BYTES: Final = 4 << 20
_QUESTION: Final = "Say hello."
_ANSWER_TOKENS: Final = 8
_LOAD_WITHIN_S: Final = 300.0
# A hard disk, or a share on the network.
_SLOWEST_READ_BYTES_PER_S: Final = 50e6
_PORT_AT_END: Final = re.compile(r":\d+$")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """
    What a name said when it was asked.

    Attributes:
        manifest_sha256: Digest by which /api/tags lists it.
        tokens_count: Tokens that it generated.
        context_tokens: Of the llama-server that answered.
        size_bytes: Memory of the loaded model.
        size_vram_bytes: What of it is on a GPU.
    """

    manifest_sha256: str
    tokens_count: int
    context_tokens: int
    size_bytes: int
    size_vram_bytes: int


class Ollama(server.Client):
    """An Ollama that somebody else started."""

    def __init__(self, url: str) -> None:
        """
        Ask the server at `url`, as `address` makes it; nothing is asked yet.

        Raises:
            ParamsError: That is no address.
        """
        super().__init__("ollama", _port_of(url))
        self.url = url

    def require_up(self) -> str:
        """
        Return its version.

        Raises:
            RetryLaterError: Nobody answers.
            ServingError: Something else than Ollama answers.
        """
        try:
            version = self.get("/api/version", timeout_s=10.0).get("version")
        except ServerGone:
            raise RetryLaterError(
                f"no Ollama answers at {self.url}. Nothing was placed and nothing was switched.",
                hint="Start it (`ollama serve`, or the system's service), or name its address: "
                "--url http://HOST:PORT.",
            ) from None
        if not isinstance(version, str):
            raise ServingError(f"what answers at {self.url} does not say a version of Ollama.")
        return console.clean(version)

    def digests(self) -> dict[str, str]:
        """Return the digest of every name that it lists; names are complete, in lower case."""
        found = {}
        for each in self._models("/api/tags"):
            name, digest = each.get("name"), each.get("digest")
            if isinstance(name, str) and isinstance(digest, str):
                found[_completed(name)] = digest
        return found

    def loaded(self) -> list[dict[str, Any]]:
        """Return what it has in memory, each with a complete name in lower case."""
        return [
            each | {"name": _completed(str(each.get("name")))} for each in self._models("/api/ps")
        ]

    def _models(self, path: str) -> list[dict[str, Any]]:
        entries = self.get(path).get("models")
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise ServingError(f"ollama answered {path} with no list of models.")
        return entries

    def require_listed(self, name: ModelName, manifest_sha256: str) -> None:
        """
        See that a name is listed with a digest.

        Raises:
            WrongDigest: It is not, or with another one.
        """
        found = self.digests().get(str(name).lower())
        if found is None:
            raise WrongDigest(
                f"the Ollama at {self.url} does not list {shown(name)}, whose manifest was placed: "
                "it reads another folder, or the manifest is not one that it takes."
            )
        if found != manifest_sha256:
            raise WrongDigest(
                f"the Ollama at {self.url} lists {shown(name)} with the digest "
                f"{console.clean(found)[:80]}; the release's is {manifest_sha256}."
            )

    def require_answers(
        self, name: ModelName, manifest_sha256: str, *, context_tokens: int, size_bytes: int
    ) -> Answer:
        """
        Have a name loaded, and let it say a few words.

        Args:
            name: Who is asked.
            manifest_sha256: Digest that it has to be listed with, before and afterwards.
            context_tokens: Context that it has to have in memory.
            size_bytes: Of its GGUF: how long a load may take depends on it.

        Raises:
            WrongDigest: It is listed otherwise.
            WrongContext: It has another context.
            ServingError: It cannot be loaded, or does not answer to the end.
        """
        self.require_listed(name, manifest_sha256)
        within_s = _LOAD_WITHIN_S + size_bytes / _SLOWEST_READ_BYTES_PER_S
        body = {
            "model": str(name),
            "messages": [{"role": "user", "content": _QUESTION}],
            "stream": False,
            "think": False,
            "options": {"num_predict": _ANSWER_TOKENS, "temperature": 0},
        }
        with console.Progress(f"asking {shown(name)}"):
            told = self.post("/api/chat", body, timeout_s=within_s)
        if told.get("done") is not True or told.get("done_reason") not in {"stop", "length"}:
            raise ServingError(f"{shown(name)} did not answer to the end.")
        tokens_count = server.count_of(told, "eval_count", f"ollama, of {shown(name)},")
        self.require_listed(name, manifest_sha256)
        entry = self._entry(name, manifest_sha256, context_tokens)
        return Answer(
            manifest_sha256=manifest_sha256,
            tokens_count=tokens_count,
            context_tokens=context_tokens,
            size_bytes=_size(entry, "size"),
            size_vram_bytes=_size(entry, "size_vram"),
        )

    def _entry(self, name: ModelName, manifest_sha256: str, context_tokens: int) -> dict[str, Any]:
        """Return what /api/ps says of a name that has just answered."""
        entries = self.loaded()
        mine = [
            each
            for each in entries
            if each["name"] == str(name).lower() or each.get("digest") == manifest_sha256
        ]
        # Another name with the same GGUF and options had been loaded, and answered for it.
        for each in mine or entries:
            if each.get("context_length") == context_tokens:
                return each
        found = mine[0].get("context_length") if mine else None
        raise WrongContext(
            f"ollama serves {shown(name)} with a context of {found} tokens; the release declares "
            f"{context_tokens:,}."
        )

    def unload(self, name: ModelName) -> None:
        """
        Have it take a name out of its memory; the next request loads it again.

        Raises:
            ServingError: It does not.
        """
        self.post("/api/generate", {"model": str(name), "keep_alive": 0, "stream": False})

    def remove(self, name: ModelName) -> None:
        """
        Have it delete a name, and the blobs that no other name needs.

        Raises:
            ServingError: It does not.
        """
        import requests  # noqa: PLC0415 - loaded before

        try:
            # As everything else: past the proxies of the environment, which do not know this host.
            answer = self._session.delete(
                f"{self.url}/api/delete", json={"model": str(name)}, timeout=server.ANSWER_WITHIN_S
            )
        except requests.RequestException as error:
            raise ServerGone(f"ollama no longer answers (/api/delete): {error}") from error
        if not answer.ok:
            raise ServingError(
                f"ollama does not remove {shown(name)}: {console.clean(answer.text)[:300]}"
            )


# --- addresses and names ----------------------------------------------------------------------


def address(given: str | None) -> str:
    """
    Return the address of the Ollama that is meant: what was given, OLLAMA_HOST, or its default.

    Raises:
        ParamsError: That is none, or has a password in it.
    """
    text = (given or os.environ.get("OLLAMA_HOST") or DEFAULT_URL).strip()
    where = "--url" if given else "OLLAMA_HOST"
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc:
        raise ParamsError(
            f"{where} is no address of an Ollama: {console.clean(text.rpartition('@')[2])[:100]}.",
            hint=f"As in {DEFAULT_URL}, without user and password.",
        )
    # As Ollama reads it (envconfig/config.go, Host): its own port where no scheme is given.
    port = _port_of(url) if _PORT_AT_END.search(parts.netloc) or "://" in text else _DEFAULT_PORT
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    # What a server listens on is no address to ask.
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - compared
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}"


def _port_of(url: str) -> int:
    parts = urlsplit(url)
    try:
        return parts.port or _PORTS[parts.scheme]
    except ValueError as error:
        raise ParamsError(f"{console.clean(url)[:100]} has no port: {error}.") from None


def name_of(text: str) -> ModelName:
    """
    Read a name as Ollama does: `[host/][namespace/]model[:tag]`.

    Raises:
        ParamsError: It is none that Ollama takes.
    """
    *places, last = text.lower().split("/")
    model, _, tag = last.partition(":")
    if len(places) > 2:  # noqa: PLR2004 - host and namespace
        raise ParamsError(
            f"{console.clean(text)[:100]} is no name of a model in Ollama: it has too many parts.",
            hint="[host/][namespace/]model[:tag]",
        )
    namespace = places[-1] if places else _DEFAULT_NAMESPACE
    host = places[0] if len(places) == 2 else _DEFAULT_HOST  # noqa: PLR2004 - the same
    return ModelName(model=model, tag=tag or _DEFAULT_TAG, namespace=namespace, host=host)


def shown(name: ModelName) -> str:
    """Write a name as Ollama shows it and people type it."""
    text = str(name).removeprefix(f"{_DEFAULT_HOST}/")
    return text.removeprefix(f"{_DEFAULT_NAMESPACE}/")


def _completed(text: str) -> str:
    try:
        return str(name_of(text))
    except ParamsError:
        return text.lower()


# --- its folder -------------------------------------------------------------------------------


def models_dir(given: Path | None, ollama: Ollama) -> Path:
    """
    Find the folder that an Ollama reads: what it lists has to be there.

    Looked at are what was given; OLLAMA_MODELS or the home of the process that listens, if it is
    ours to see; OLLAMA_MODELS here; ~/.ollama/models; the one of the Linux service. A server that
    lists nothing reads the first of them that is there; whether it does is proven before any name
    is switched, since it has to list what is placed.

    Raises:
        MachineError: None of them has what the server lists, or it cannot be written to.
    """
    listed = set(ollama.digests().values())
    places = [given] if given else list(dict.fromkeys(_candidates(ollama.url)))
    unread = []
    for place in places:
        try:
            if listed <= _manifests_in(place) and (listed or place.is_dir()):
                return _writable(place)
        except PermissionError:
            unread.append(place)
    if not listed and not unread:
        return _writable(places[0])
    tried = ", ".join(str(place) for place in places)
    why = f" {', '.join(str(p) for p in unread)} cannot be read by you." if unread else ""
    raise MachineError(
        f"the Ollama at {ollama.url} lists models that are not in {tried}: it reads another "
        f"folder, or runs on another machine.{why} Nothing was placed.",
        hint="--models-dir DIR: its OLLAMA_MODELS (`systemctl show ollama -p Environment`), as this"
        " machine sees it; "
        + (_as_owner(unread[0]) if unread else "of a container, the folder that is mounted there."),
    )


def _candidates(url: str) -> Iterator[Path]:
    yield from _of_process(url)
    if own := os.environ.get("OLLAMA_MODELS"):
        yield Path(own)
    yield Path.home() / ".ollama/models"
    yield SERVICE_MODELS


def _of_process(url: str) -> Iterator[Path]:
    """Ask the process that listens; that of another user says nothing."""
    import psutil  # noqa: PLC0415 - not at CLI start

    port = _port_of(url)
    for process in psutil.process_iter(["name"]):
        if process.info["name"] != "ollama":
            continue
        try:
            listens = any(
                each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port
                for each in process.net_connections(kind="tcp")
            )
            environment = process.environ() if listens else {}
        except (psutil.Error, OSError):
            continue
        if "OLLAMA_MODELS" in environment:
            yield Path(environment["OLLAMA_MODELS"])
        elif "HOME" in environment:
            yield Path(environment["HOME"], ".ollama/models")


def _manifests_in(place: Path) -> set[str]:
    """Return the digests of all manifests below a folder."""
    root = place / "manifests"
    if place.is_dir():
        # glob is silent about what it may not read.
        with os.scandir(place):
            pass
    return {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.glob("*/*/*/*")
        if path.is_file() and path.stat().st_size <= _MAX_MANIFEST_BYTES
    }


def _writable(place: Path) -> Path:
    """
    See that we may write where blobs and manifests go.

    Raises:
        MachineError: We may not; says who may.
    """
    place = place.absolute()
    for path in (place, place / "blobs", place / "manifests"):
        there = next(each for each in (path, *path.parents) if each.exists())
        if not (there.is_dir() and _may_write(there)):
            raise MachineError(
                f"{there}, where that Ollama keeps its models, cannot be written to by you. "
                "Nothing was placed.",
                hint=_as_owner(there),
            )
    return place


def _may_write(directory: Path) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=effective)


def _as_owner(path: Path) -> str:
    """Say who may write there, and what else helps."""
    try:
        owner = f"as its owner, {path.owner()},"
    except (KeyError, OSError):
        owner = "as its owner"
    return (
        f"Run `fleet serve` {owner} or let your group write to it; or run an Ollama of your own: "
        "OLLAMA_MODELS=DIR OLLAMA_HOST=127.0.0.1:PORT ollama serve."
    )


# --- manifests --------------------------------------------------------------------------------


def meaning(folder: Path, name: ModelName) -> bytes | None:
    """Return the manifest that a name means now; None if it means nothing."""
    try:
        return ollama_store.manifest_path(folder, name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def tags_of(folder: Path, name: ModelName) -> list[ModelName]:
    """Return the names of the same model with other tags, the one written last at the end."""
    directory = ollama_store.manifest_path(folder, name).parent
    written = []
    for path in directory.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # that Ollama, or its owner, removed it now
            written.append((path.stat().st_mtime_ns, path.name, path))
    found = [path for *_, path in sorted(written)]
    return [
        ModelName(model=name.model, tag=path.name, namespace=name.namespace, host=name.host)
        for path in found
        if path.is_file() and path.name != name.tag and path.name == path.name.lower()
    ]


def users_of(folder: Path, sha256: str) -> list[str]:
    """Return the names, of whomever, whose manifests name a blob; as people type them."""
    found = []
    for path in sorted((folder / "manifests").glob("*/*/*/*")):
        with contextlib.suppress(FileNotFoundError):
            if (
                path.is_file()
                and path.stat().st_size <= _MAX_MANIFEST_BYTES
                and sha256.encode() in path.read_bytes()
            ):
                # Not a ModelName: other people's tags have capitals.
                text = f"{'/'.join(path.parts[-4:-1])}:{path.name}"
                text = text.removeprefix(f"{_DEFAULT_HOST}/")
                found.append(console.clean(text.removeprefix(f"{_DEFAULT_NAMESPACE}/")))
    return found


def forget(folder: Path, name: ModelName) -> None:
    """Let a name mean nothing; its blobs stay until Ollama starts the next time."""
    ollama_store.manifest_path(folder, name).unlink(missing_ok=True)


def blobs_of(data: bytes, where: str) -> list[tuple[str, int]]:
    """
    Return sha256 and size of everything that a manifest names, the config first.

    Raises:
        ServingError: It is none.
    """
    try:
        value = json.loads(data)
        return [_blob(each) for each in (value["config"], *value["layers"])]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ServingError(f"the manifest of {where} is none that Ollama takes.") from None


def _blob(described: Mapping[str, Any]) -> tuple[str, int]:
    algorithm, _, sha256 = str(described["digest"]).partition(":")
    if algorithm != "sha256" or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError
    size_bytes = described["size"]
    if not isinstance(size_bytes, int) or size_bytes < 0:
        raise ValueError
    return sha256, size_bytes


def _size(entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key)
    return value if isinstance(value, int) else 0
