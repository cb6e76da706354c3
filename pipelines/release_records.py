"""
What a release is, who moved an alias to it, and what `publish` leaves behind.

A release is one canonical JSON file; its sha256 is the release id, so that nothing in it can be
changed without another name. It names every byte that readers need by sha256: the GGUFs, and the
small files that Ollama and the other readers of registries want beside them. It holds no time, no
path of a machine, no host name: equal inputs give an equal release.

An alias (`stable`) is a pointer to a release with the history of its moves. The ledger in git
(`pipelines.ledger`) holds the same moves, chained by hash.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, ValidationError

from pipelines import console, migrations
from pipelines.errors import StoreError
from pipelines.load_records import LoadGate  # noqa: TC001 - pydantic reads it
from pipelines.records import AnyQuality, Finite, Part, Record

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
# What every reader of JSON holds exactly. A registry's number of thousands of digits could not even
# be written into an error.
_MAX_INTEGER: Final = 2**53 - 1
Size = Annotated[int, Field(ge=0, le=_MAX_INTEGER)]
# A registry's words are copied into git: not more of them than a person would write.
Words = Annotated[str, StringConstraints(max_length=300)]
Sequence = Annotated[int, Field(ge=1, le=_MAX_INTEGER)]
Action = Literal["publish", "rollback"]

STABLE: Final = "stable"
# How many digits people see of an id; enough to type, and unique within a model.
SHORT_CHARACTERS: Final = 12
# Moves that an alias remembers in its registry; the ledger in git remembers all.
MAX_MOVES: Final = 200

Role = Literal[
    "gguf",  # a quantized model
    "imatrix",  # the importance matrix that some were quantized with
    "modelfile",  # the Modelfile as people read it
    "license",  # a licence text of upstream's
    "ollama-config",  # config blob of a docker-v2 manifest
    "ollama-layer",  # params, system, template, license, messages
    "ollama-manifest",  # what `ollama pull` asks for
    "modelpack-config",  # config blob of a CNCF ModelPack manifest
    "modelpack-manifest",
]


class ReleaseFile(Part):
    """
    One blob of a release.

    Attributes:
        name: File name for people and for stores that keep files by name; unique in the release.
        role: What it is for.
        type: Quant that it belongs to; None of what belongs to all.
        media_type: As registries know it.
    """

    name: Name
    role: Role
    type: str | None
    media_type: str
    size_bytes: Size
    sha256: Sha256


class ReleasedQuant(Part):
    """
    One quant: where it comes from, what is in it, what was measured of it.

    Digests name the records and inputs; `decode_tok_s` is at `decode_depth_tokens`, on the machine
    of the release. `sentence` is what `choose` says of it for the first host that may run it.
    """

    key: str
    type: str
    gguf_sha256: Sha256
    f16_sha256: Sha256
    imatrix_sha256: Sha256 | None
    imatrix_corpus_sha256: Sha256 | None
    bits_per_weight: Finite
    tensor_types: dict[str, int]
    quality: AnyQuality
    memory_mib: Finite
    memory_context_tokens: int
    prefill_tok_s: Finite | None
    decode_tok_s: Finite | None
    decode_depth_tokens: int | None
    sentence: str


class ReleasedHost(Part):
    """The final verdict for one declared host, and the type of the quant that is chosen for it."""

    verdict: Literal["PROMOTE", "HOLD", "REJECT", "INVALID"]
    winner: str | None
    sentence: str


class ReleaseSource(Part):
    """Upstream: `hf:owner/repo` or `path:directory`, and the pinned revision."""

    source: str
    revision: str
    architecture: str
    parameters_count: int


class ReleaseLicense(Part):
    """The licence by the Hub's word for it, and the sha256 of the texts that upstream ships."""

    id: str
    files: dict[str, Sha256]


class ReleaseTools(Part):
    """What made and what served it."""

    llama_cpp_commit: str
    recipe: int
    engine: str
    engine_version: str
    engine_llama_cpp: str
    modelfile: str
    modelfile_version: int
    modelfile_sha256: Sha256


class MachineClass(Part):
    """On what it was measured: kind of hardware, no name and no serial number."""

    hw_id: str
    backend: str
    cpu: str
    cores_count: int
    memory_gib: int
    gpus: tuple[str, ...]


class ReleaseWaiver(Part):
    """A refusal that a person let pass."""

    gate: Literal["hold", "license", "gated"]
    who: str
    why: str
    until: str


class Release(Part):
    """
    A release; `canonical` makes its bytes and `release_id` its name.

    Attributes:
        previous: Id of the release before it; None of the first.
        stable_quant: Type that the alias means where a reader can take only one: the winner of the
            first host that is PROMOTE.
        gates: Every level that was judged, with value and limit.
        choice_gates: Limits that each quant had to keep.
        evidence: sha256 of the records in git behind all of it, by name.
    """

    schema_version: Literal[1] = 1
    kind: Literal["gguf-fleet release"] = "gguf-fleet release"
    model: str
    previous: Sha256 | None
    source: ReleaseSource
    license: ReleaseLicense
    tools: ReleaseTools
    machine: MachineClass
    context_tokens: int
    objective: str
    stable_quant: str
    hosts: dict[str, ReleasedHost]
    quants: tuple[ReleasedQuant, ...]
    files: tuple[ReleaseFile, ...]
    choice_gates: dict[str, Finite]
    gates: tuple[LoadGate, ...]
    waivers: tuple[ReleaseWaiver, ...]
    evidence: dict[str, Sha256]

    def of(self, role: Role, type_: str | None = None) -> tuple[ReleaseFile, ...]:
        """Return the files of a role, of one quant if it is named."""
        return tuple(
            file for file in self.files if file.role == role and type_ in {None, file.type}
        )


def canonical(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """
    Write JSON in the one way that has a digest: sorted keys, two spaces, UTF-8, a newline.

    Raises:
        ValueError: It holds a NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def release_bytes(release: Release) -> bytes:
    """Return the canonical bytes of a release; their sha256 is its id."""
    return canonical(json.loads(release.model_dump_json()))


def release_id(data: bytes) -> str:
    """Return the id of a release's bytes: `sha256sum release.json` prints the same."""
    return hashlib.sha256(data).hexdigest()


def short(id_: str | None) -> str:
    """Return an id as people see it."""
    return id_[:SHORT_CHARACTERS] if id_ else "none"


def parse_release(data: bytes, expected_id: str, where: str) -> Release:
    """
    Read a release that a store gave, strictly.

    Args:
        data: Its bytes.
        expected_id: The id that was asked for.
        where: Where it came from, for the error.

    Raises:
        StoreError: These are other bytes than those of that id, or they are no release.
    """
    if release_id(data) != expected_id:
        raise StoreError(
            f"{where} gave other bytes than those of release {short(expected_id)}: they are "
            f"{short(release_id(data))}. Nothing of it was used.",
            hint="fleet verify-registry NAME names everything there that is not what it should be.",
        )
    try:
        release = Release.model_validate_json(data)
    except ValidationError as error:
        otherwise = "It was published by another version of this template; use that one to read it."
        if (told := migrations.refusal(data)) is not None:
            raise StoreError(
                f"release {short(expected_id)} of {where} {told}.",
                hint=migrations.advice(data, otherwise),
            ) from error
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise StoreError(
            f"release {short(expected_id)} of {where} is of another schema: "
            f"{console.clean(place)[:100]}: {first['msg']}.",
            hint=otherwise,
        ) from error
    names = [file.name for file in release.files]
    if len(set(names)) < len(names):
        raise StoreError(
            f"release {short(expected_id)} of {where} gives two files one name: it was not made by "
            "this template. Nothing of it was used.",
        )
    return release


# --- aliases ----------------------------------------------------------------------------------


class Move(Part):
    """
    One move of an alias.

    Attributes:
        sequence: 1, 2, 3, ... for each alias of a model in a registry. Order is by this, not by
            time: clocks are wrong.
        action: A rollback may go to an older release; nothing else may.
        release: To which release.
        previous: From which; None of the first.
        at: UTC, for people.
        who: Person or workflow.
        why: Reason.
        run: Address of the workflow run; None outside one.
        waivers: Refusals that were let pass for it.
    """

    sequence: Sequence
    action: Action
    release: Sha256
    previous: Sha256 | None
    at: Annotated[str, StringConstraints(max_length=40)]
    who: Words
    why: Words
    run: Words | None
    waivers: tuple[ReleaseWaiver, ...] = ()


class Alias(Part):
    """What a registry holds under the name of an alias: the last moves, the newest at the end."""

    schema_version: Literal[1] = 1
    model: str
    alias: str
    moves: Annotated[tuple[Move, ...], Field(min_length=1, max_length=MAX_MOVES)]

    @property
    def release(self) -> str:
        """The release that it means."""
        return self.moves[-1].release

    @property
    def sequence(self) -> int:
        """Number of the last move."""
        return self.moves[-1].sequence

    def moved(self, move: Move) -> Alias:
        """Return the alias after one more move."""
        assert move.sequence > self.sequence, "moves are numbered upwards"
        return self.model_copy(update={"moves": (*self.moves, move)[-MAX_MOVES:]})


def alias_bytes(alias: Alias) -> bytes:
    """Return the canonical bytes of an alias."""
    return canonical(json.loads(alias.model_dump_json()))


def parse_alias(data: bytes, where: str) -> Alias:
    """
    Read an alias that a store gave.

    Raises:
        StoreError: It is no alias, or its moves are not numbered upwards.
    """
    try:
        alias = Alias.model_validate_json(data)
    except ValidationError as error:
        stranger = (
            "Something else than this template wrote there. `fleet audit` compares it with the "
            "ledger in git."
        )
        if (told := migrations.refusal(data)) is not None:
            advice = migrations.advice(data, stranger)
            raise StoreError(f"{where} {told}.", hint=advice) from error
        first = error.errors(include_url=False)[0]
        raise StoreError(
            f"{where} is no alias of a release: {first['msg']}.", hint=stranger
        ) from error
    numbers = [move.sequence for move in alias.moves]
    if numbers != sorted(set(numbers)):
        raise StoreError(f"the moves of {where} are not in order: {numbers}.")
    return alias


# --- what `publish` leaves --------------------------------------------------------------------


class PublishRecord(Record):
    """
    What the local registry holds after `publish`; equal inputs give an equal record.

    Attributes:
        status: `released`, or `refused` with the reasons, each with the next step.
        release: Id of the release that was composed; None if refused.
        stable: Release that the alias means now; None if there is none.
        sequence: Number of the last move of the alias.
        size_bytes: Of all files of the release.
    """

    stage: Literal["publish"] = "publish"
    model: str
    status: Literal["released", "refused"]
    registry: str
    release: Sha256 | None
    stable: Sha256 | None
    sequence: int | None
    files_count: int
    size_bytes: int
    reasons: tuple[str, ...]
    waivers: tuple[ReleaseWaiver, ...]
