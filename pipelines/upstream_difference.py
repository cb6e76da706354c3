"""
What lies between two revisions of a model, and what it means, before a byte of a weight is fetched.

Compared are the files that a build reads, by name and digest; of those that differ the small ones
are read, and of weights the headers alone. A file that is the same on both sides is never fetched.
What cannot be read is said and never guessed: the worse class stands, and more stages run.

Nothing here asks a network by itself: both sides are handed in with what reads their files.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines import fetch, safetensors_header, wording
from pipelines import upstream_difference_config as config_words
from pipelines import upstream_difference_template as template_words
from pipelines import upstream_difference_tensors as tensor_words
from pipelines import upstream_difference_tokenizer as tokenizer_words
from pipelines import upstream_difference_words as words
from pipelines.errors import UpstreamError
from pipelines.upstream_difference_words import NotToldError, shown
from pipelines.upstream_records import CLASSES, Difference, FileChange, FileState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pipelines.hub import RemoteFile
    from pipelines.upstream_records import ChangeClass, TensorChanges

# How far a change goes: into the GGUF, or no further than the directory with upstream's files.
Reach = Literal["gguf", "source"]

_CARD: Final = "README.md"
_GENERATION: Final = "generation_config.json"
_TOKENIZER: Final = "tokenizer.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_JINJA: Final = "chat_template.jinja"
_TEMPLATE_JSON: Final = "chat_template.json"

# The class of a file by its name alone. Weights are what is not in here.
_CLASSES: Final[dict[str, ChangeClass]] = {
    fetch.CONFIG: "config",
    _GENERATION: "generation",
    _TOKENIZER: "tokenizer",
    _TOKENIZER_CONFIG: "tokenizer",
    "tokenizer.model": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "added_tokens.json": "tokenizer",
    "vocab.json": "tokenizer",
    "vocab.txt": "tokenizer",
    "merges.txt": "tokenizer",
    "tekken.json": "tokenizer",
    "*.tiktoken": "tokenizer",
    "rwkv_vocab_*.txt": "tokenizer",
    _JINJA: "template",
    _TEMPLATE_JSON: "template",
    "preprocessor_config.json": "config",
    "processor_config.json": "config",
    "modules.json": "config",
    fetch.POOLING: "config",
    _CARD: "card",
    "LICENSE": "licence",
    "LICENSE.*": "licence",
    "LICENCE": "licence",
    "LICENCE.*": "licence",
    "NOTICE": "licence",
    "NOTICE.*": "licence",
}

# The stages that run again at most, in the order of the graph, by how far a change goes. Where
# f16.gguf is the same to the byte, nothing is quantized or benchmarked again. What reads upstream's
# own files is: verify, and the load test, which renders prompts with them.
STAGES: Final[dict[Reach, tuple[str, ...]]] = {
    "gguf": (
        "fetch", "convert", "verify", "calibrate", "quantize", "benchmark", "evaluate", "choose",
        "load-test", "publish", "track", "report",
    ),
    "source": (
        "fetch", "convert", "verify", "choose", "load-test", "publish", "track", "report",
    ),
}  # fmt: skip
# How far a change of each class goes at most, and why: what llama.cpp's converter does with it.
REACHES: Final[dict[ChangeClass, tuple[Reach, str]]] = {
    "weights": ("gguf", "every tensor is written into it"),
    "tokenizer": ("gguf", "tokens, scores, merges and special ids are written into it"),
    "template": ("gguf", "it is written into it as tokenizer.chat_template"),
    "config": ("gguf", "hyperparameters and special ids are written into it"),
    "generation": ("gguf", "defaults for sampling are written into it as general.sampling.*"),
    "licence": ("gguf", "the front matter's licence is written into it; a licence text is not"),
    "card": ("gguf", "tags and the like of the front matter are written into it, the rest is not"),
}  # fmt: skip

# The largest tokenizer.json in use has 34 MB; nothing else that is told in words comes near 1 MB.
_MAX_TOKENIZER_BYTES: Final = 48 << 20
_MAX_BYTES: Final = 8 << 20
_MAX_FILES: Final = 100
_MAX_NOTES: Final = 50
_MAX_REFUSALS: Final = 20
_MAX_NOTE: Final = 1500
_MAX_DETAILS: Final = 12
_CODE: Final = "*.py"
# The key of a file that is a list.
_LIST: Final = "(all)"


@dataclass(frozen=True)
class Side:
    """
    One revision of a model.

    Attributes:
        revision: Its commit.
        files: Its listing.
        read: Returns the bytes of a small file of it, held against its digest.
        read_range: Returns the bytes of a file from one position up to, not with, another.
    """

    revision: str
    files: tuple[RemoteFile, ...]
    read: Callable[[RemoteFile], bytes]
    read_range: Callable[[RemoteFile, int, int], bytes]


def difference(
    old: Side,
    new: Side,
    *,
    known_architectures: frozenset[str] | None = None,
    ignore_code: bool = False,
) -> Difference:
    """
    Compare two revisions.

    Args:
        old: What is declared.
        new: What is newer.
        known_architectures: What the pinned llama.cpp converts; None where nobody looked, and then
            nothing is said of it.
        ignore_code: Whether a model that names code of its repository is declared to be taken.

    Raises:
        RetryLaterError, DigestError, UpstreamError: What reading a small file raises. A header of
            weights that is none, or cannot be had, is a note.
    """
    if old.revision == new.revision:
        return Difference(
            classes=(), files=(), files_count=0, tensors=None, stages=(), download_bytes=0
        )
    comparison = _Comparison(old, new, known=known_architectures, ignore_code=ignore_code)
    return comparison.result()


def stages(reaches: Iterable[Reach]) -> tuple[str, ...]:
    """Return the stages that run again at most, in the order of the graph."""
    found = {stage for reach in reaches for stage in STAGES[reach]}
    return tuple(stage for stage in STAGES["gguf"] if stage in found)


@dataclass
class _Changed:
    """One changed file of a build."""

    name: str
    old: RemoteFile | None
    new: RemoteFile | None
    kind: ChangeClass
    reach: Reach = "gguf"
    more: set[ChangeClass] = field(default_factory=set)

    @property
    def label(self) -> str:
        """Its name, as it is shown."""
        return shown(self.name)


class _Comparison:
    """Two sides, and what was found so far."""

    def __init__(
        self, old: Side, new: Side, *, known: frozenset[str] | None, ignore_code: bool
    ) -> None:
        self.old, self.new, self.known, self.ignore_code = old, new, known, ignore_code
        self.notes: dict[ChangeClass, list[str]] = {kind: [] for kind in CLASSES}
        self.refusals: list[str] = []
        self.remarks: list[str] = []
        self.details: dict[str, str] = {}
        self.tensors: TensorChanges | None = None
        # By file: what templates were and are.
        self.templates: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
        self.was = {file.name: file for file in old.files}
        self.now = {file.name: file for file in new.files}

    def result(self) -> Difference:
        """Look at everything and put it together."""
        small = self._small_changes()
        weights, old_weights = self._weight_changes()
        for one in small:
            self._look(one)
        self._tell_templates()
        self._look_around()
        changes = sorted([*weights, *small], key=lambda one: (CLASSES.index(one.kind), one.name))
        kinds = {kind for one in changes for kind in (one.kind, *one.more)}
        here = {
            digest
            for file in (*_small_files(self.was).values(), *old_weights)
            if (digest := _digest(file)) is not None
        }
        return Difference(
            classes=tuple(kind for kind in CLASSES if kind in kinds),
            files=tuple(_file_change(one) for one in changes[:_MAX_FILES]),
            files_count=len(changes),
            tensors=self.tensors,
            stages=stages(one.reach for one in changes),
            download_bytes=sum(
                one.new.size_bytes
                for one in changes
                if one.new is not None and _digest(one.new) not in here
            ),
            notes=self._notes(),
            refusals=self._refusals(),
            details={shown(title): text for title, text in [*self.details.items()][:_MAX_DETAILS]},
        )

    def _refusals(self) -> tuple[str, ...]:
        told = [f"Would be refused: {why}." for why in dict.fromkeys(self.refusals)]
        return tuple(wording.shortened(each, _MAX_NOTE) for each in told[:_MAX_REFUSALS])

    def _notes(self) -> tuple[str, ...]:
        told = [
            *self._refusals(),
            *self.notes["licence"],
            *([_HELD] if self.notes["licence"] else []),
            *(note for kind in _TOLD_FIRST for note in self.notes[kind]),
            *self.remarks,
        ]
        notes = [wording.shortened(note, _MAX_NOTE) for note in told]
        if len(notes) > _MAX_NOTES:
            more = len(notes) - _MAX_NOTES + 1
            notes = [*notes[: _MAX_NOTES - 1], f"And {wording.counted(more, 'more note')}."]
        return tuple(notes)

    # --- which files

    def _small_changes(self) -> list[_Changed]:
        """Return every changed file that is no weight; bytes settle digests of two kinds."""
        before, after = _small_files(self.was), _small_files(self.now)
        found = []
        for name in sorted(before.keys() | after.keys()):
            old, new = before.get(name), after.get(name)
            if old is not None and new is not None and _is_same(old, new):
                continue
            one = _Changed(name=name, old=old, new=new, kind=_kind_of(name))
            if old is not None and new is not None and not _is_comparable(old, new):
                raw = self._raw(one)
                if raw is not None and raw[0] == raw[1]:
                    self.remarks.append(f"{one.label} is the same, stored otherwise.")
                    continue
            found.append(one)
        return found

    def _weight_changes(self) -> tuple[list[_Changed], list[RemoteFile]]:
        """Return every changed file of the weights, and all weights of the old side."""
        index = self.was.get(fetch.INDEX), self.now.get(fetch.INDEX)
        index_differs = _differs(*index)
        before, after = _tops(self.was), _tops(self.now)
        names = sorted(before.keys() | after.keys())
        differing = [name for name in names if _differs(before.get(name), after.get(name))]
        if not differing and not index_differs:
            return [], [*_matching(before).values()]
        old_map = new_map = None
        # Where it is the same and every shard of its pattern is another one, it tells nothing.
        if index_differs or differing != names or not all(map(_is_weight, names)):
            new_map = self._weight_map(self.new, index[1])
            old_map = self._weight_map(self.old, index[0]) if index_differs else new_map
        if new_map is not None:
            self._require_shards(new_map, after)
        before, after = _named(before, old_map), _named(after, new_map)
        changes = [
            _Changed(name=name, old=before.get(name), new=after.get(name), kind="weights")
            for name in sorted(before.keys() | after.keys())
            if _differs(before.get(name), after.get(name))
        ]
        self._compare_tensors(before, after, new_map)
        if index_differs:
            changes.append(_Changed(name=fetch.INDEX, old=index[0], new=index[1], kind="weights"))
        return changes, [*before.values()]

    def _weight_map(self, side: Side, index: RemoteFile | None) -> dict[str, str] | None:
        """Read which tensor lies in which file; None if there is no index, or none that says."""
        if index is None:
            return None
        if index.size_bytes > _MAX_TOKENIZER_BYTES:
            self._untold(index, side, f"it has {index.size_bytes:,} bytes")
            return None
        raw = side.read(index)
        try:
            return safetensors_header.parse_weight_map(raw, name=index.name)
        except UpstreamError as error:
            if side is self.new:
                self.refusals.append(wording.clause(error.message))
            else:
                self._untold(index, side, wording.clause(error.message))
            return None

    def _require_shards(self, weight_map: Mapping[str, str], after: Mapping[str, Any]) -> None:
        missing = sorted(set(weight_map.values()) - after.keys())
        if missing:
            self.refusals.append(
                f"{fetch.INDEX} names {wording.counted(len(missing), 'file')} that "
                f"{'is' if len(missing) == 1 else 'are'} not there: "
                f"{', '.join(shown(name, 80) for name in missing[:3])}"
            )

    def _compare_tensors(
        self,
        before: Mapping[str, RemoteFile],
        after: Mapping[str, RemoteFile],
        new_map: Mapping[str, str] | None,
    ) -> None:
        """Compare the headers of the files that only one side has, whatever they are called."""
        digests = {_digest(file) for file in before.values()}, {_digest(f) for f in after.values()}
        shared = (digests[0] & digests[1]) - {None}
        only_old = [file for file in before.values() if _digest(file) not in shared]
        only_new = [file for file in after.values() if _digest(file) not in shared]
        same = [file for file in after.values() if _digest(file) in shared]
        if not only_old and not only_new:
            what = "their names" if before.keys() != after.keys() else "the index of them"
            self.notes["weights"].append(f"Weights: the same to the byte; {what} changed.")
            return
        try:
            same_count = self._same_count(same, new_map)
            found = tensor_words.compare(
                tensor_words.Weights(files=only_old, read_range=self.old.read_range),
                tensor_words.Weights(files=only_new, read_range=self.new.read_range),
                same_count=same_count,
            )
        except tensor_words.NotWeightsError as error:
            self.refusals.append(error.message)
            return
        except NotToldError as error:
            self.notes["weights"].append(
                f"Weights: what changed in them is not known before they are fetched: "
                f"{error.message}."
            )
            return
        self.tensors = found.changes
        self.notes["weights"] += found.notes
        self.refusals += found.refusals

    def _same_count(self, same: Sequence[RemoteFile], new_map: Mapping[str, str] | None) -> int:
        if new_map is not None:
            by_file = Counter(new_map.values())
            return sum(by_file[file.name] for file in same)
        return tensor_words.count(tensor_words.Weights(files=same, read_range=self.new.read_range))

    # --- what is in them

    def _look(self, one: _Changed) -> None:
        """Say what changed in a small file, and by that its class and how far it goes."""
        if one.new is not None and one.new.size_bytes > fetch.MAX_SMALL_FILE_BYTES:
            self.refusals.append(
                f"{one.label} has {one.new.size_bytes:,} bytes, and no such file needs more than "
                f"{fetch.MAX_SMALL_FILE_BYTES:,}"
            )
        if one.name == _CARD:
            one.kind = "licence"  # until it is known that it is the same
        raw = self._raw(one)
        if raw is None:
            return
        if one.name == fetch.CONFIG and one.new is not None:
            self._judge_config(raw[1])
        try:
            self._tell(one, *raw)
        except NotToldError as error:
            self.notes[one.kind].append(
                f"{one.label}: {error.message}, so it is not told in words."
            )

    def _raw(self, one: _Changed) -> tuple[bytes, bytes] | None:
        """Read both sides of a file, nothing for one that is not there; None if it is too large."""
        limit = _MAX_TOKENIZER_BYTES if one.name in _LONG else _MAX_BYTES
        largest = max(file.size_bytes for file in (one.old, one.new) if file is not None)
        if largest > limit:
            self.notes[one.kind].append(
                f"{one.label} has {largest:,} bytes: what changed in it is not told in words."
            )
            return None
        return (
            self.old.read(one.old) if one.old is not None else b"",
            self.new.read(one.new) if one.new is not None else b"",
        )

    def _tell(self, one: _Changed, old: bytes, new: bytes) -> None:
        match one.name:
            case name if name == _CARD:
                self._tell_card(one, old, new)
            case name if name == _JINJA:
                self._tell_jinja(one, old, new)
            case "merges.txt" | "vocab.txt":
                self._say(one, tokenizer_words.of_lines(old, new))
            case name if name.endswith(".json"):
                self._tell_json(one, old, new)
            case _ if one.kind == "licence":
                self._tell_licence(one, old, new)
            case _:
                both = one.old is not None and one.new is not None
                size = f"{len(old):,} -> {len(new):,} bytes; what differs cannot be told in words"
                self._say(one, [size] if both else [])

    def _say(self, one: _Changed, clauses: Sequence[str]) -> None:
        """Add a sentence about a file that is there on both sides, or the one that it is not."""
        told = wording.shortened(words.several(clauses), _MAX_NOTE - 300)
        if one.old is None or one.new is None:
            fate = f"is new{f': {told}' if told else ''}" if one.old is None else "is gone"
            self.notes[one.kind].append(f"{one.label} {fate}.")
        elif clauses:
            self.notes[one.kind].append(f"{one.label}: {told}.")
        else:
            self.notes[one.kind].append(f"{one.label} is only written anew: it says the same.")

    def _tell_json(self, one: _Changed, old: bytes, new: bytes) -> None:
        was, now = self._loaded(one, old, self.old), self._loaded(one, new, self.new)
        if was is None or now is None:
            return
        self._tell_code(one, was, now)
        match one.name:
            case fetch.CONFIG:
                self._tell_config(one, was, now)
            case name if name == _GENERATION:
                one.reach = "gguf" if config_words.reaches_gguf(was, now) else "source"
                self._say(one, config_words.of_generation(was, now))
            case name if name == _TOKENIZER:
                both = one.old is not None and one.new is not None
                self._say(one, tokenizer_words.of_tokenizer_json(was, now) if both else [])
            case name if name == _TOKENIZER_CONFIG:
                self._tell_tokenizer_config(one, was, now)
            case name if name == _TEMPLATE_JSON:
                then, later = template_words.of_json(was), template_words.of_json(now)
                if then != later:
                    self.templates[one.name] = then, later
                else:
                    self._say(one, config_words.of_config(was, now))
            case "vocab.json" | "added_tokens.json":
                self._say(one, tokenizer_words.of_vocabulary(was, now))
            case _:
                self._say(one, config_words.of_config(was, now))

    def _loaded(self, one: _Changed, raw: bytes, side: Side) -> dict[str, Any] | None:
        """Read an object; an absent file has no keys, and a list is one value."""
        file = one.new if side is self.new else one.old
        if file is None:
            return {}
        try:
            found = words.load(raw)
        except NotToldError as error:
            if side is self.new and self._is_refused(file.name, raw, error):
                self.refusals.append(f"{one.label} cannot be read: {error.message}")
            else:
                self._untold(file, side, error.message, one.kind)
            return None
        return found if isinstance(found, dict) else {_LIST: found}

    def _is_refused(self, name: str, raw: bytes, error: NotToldError) -> bool:
        """Tell whether fetch or the converter stops at a file that we cannot read."""
        if name in _NEEDED and isinstance(error, words.NotJsonError):
            return True  # by the converter, and by the libraries that it calls
        try:
            json.loads(raw)
        except (ValueError, RecursionError):
            return name in fetch.CODE_NAMING and not self.ignore_code
        return False

    def _untold(
        self, file: RemoteFile, side: Side, why: str, kind: ChangeClass = "weights"
    ) -> None:
        which = "new" if side is self.new else "declared"
        self.notes[kind].append(
            f"{shown(file.name)} of the {which} revision cannot be read: {why}. What changed in it "
            "is not told."
        )

    def _tell_code(self, one: _Changed, was: dict[str, Any], now: dict[str, Any]) -> None:
        """Say which code of the repository a file names, by fetch's own rule."""
        if one.name not in fetch.CODE_NAMING:
            return
        old, new = (set(fetch.named_code(one.name, each.get(_LIST, each))) for each in (was, now))
        told = f"{one.label} names code of the repository: {', '.join(map(shown, sorted(new)[:3]))}"
        if new and not self.ignore_code:
            self.refusals.append(f"{told}; `ignore_code` is not declared")
        elif new - old:
            self.remarks.append(f"{told}; it is never fetched, and `ignore_code` is declared.")

    def _tell_config(self, one: _Changed, was: dict[str, Any], now: dict[str, Any]) -> None:
        clauses = config_words.of_config(was, now)
        self._say(one, clauses)
        if one.new is None:
            self.refusals.append(f"{fetch.CONFIG} is gone")
        else:
            self._fold(one.label, clauses)
        if words.written(was.get("license")) != words.written(now.get("license")):
            one.more.add("licence")
            self.notes["licence"].append(f"{one.label}: {words.clause('license', was, now)}.")

    def _judge_config(self, raw: bytes) -> None:
        """Say why fetch would refuse it, by what fetch reads, which is less strict than we are."""
        try:
            told = json.loads(raw)
        except (ValueError, RecursionError) as error:
            why = words.shown(str(error), 120)
            self.refusals.append(f"{fetch.CONFIG} is not JSON: {why}")
            return
        if not isinstance(told, dict):
            self.refusals.append(f"{fetch.CONFIG} is no JSON object")
            return
        self.refusals += config_words.refusals(told, self.known)

    def _tell_tokenizer_config(
        self, one: _Changed, was: dict[str, Any], now: dict[str, Any]
    ) -> None:
        clauses = config_words.of_config(
            *({key: each for key, each in side.items() if key != "chat_template"}
              for side in (was, now))
        )  # fmt: skip
        then, later = template_words.of_json(was), template_words.of_json(now)
        if then != later:
            self.templates[one.name] = then, later
            if clauses or one.old is None or one.new is None:
                one.more.add("template")
            else:
                one.kind = "template"
                return
        self._say(one, clauses)
        self._fold(one.label, clauses)

    def _fold(self, title: str, clauses: Sequence[str]) -> None:
        """Keep for a second look what is too much for a sentence."""
        if len(clauses) > words.MAX_CLAUSES:
            self.details[title] = words.bounded(clauses)

    def _tell_jinja(self, one: _Changed, old: bytes, new: bytes) -> None:
        then = {"default": words.text_of(old)} if one.old is not None else {}
        later = {"default": words.text_of(new)} if one.new is not None else {}
        self.templates[one.name] = then, later

    def _tell_templates(self) -> None:
        """Say what became of the chat templates, of all files together: they are moved about."""
        if not self.templates:
            return
        for name in dict.fromkeys(
            name for pair in self.templates.values() for half in pair for name in half
        ):
            self._tell_move(name)
        for file, (then, later) in self.templates.items():
            notes, details = template_words.told(shown(file), then, later)
            self.notes["template"] += notes
            self.details |= details
        self._tell_other_template()

    def _tell_other_template(self) -> None:
        """
        Warn where two files may hold a template of which only one changed.

        transformers goes by chat_template.jinja, the converter by tokenizer_config.json
        (gguf-py/gguf/vocab.py), and `verify` fails where they differ.
        """
        jinja, config = (self.templates.get(name) for name in (_JINJA, _TOKENIZER_CONFIG))
        if config is not None and config[1] and jinja is None and _JINJA in self.now:
            self.notes["template"].append(
                f"{_JINJA} is there, too, and did not change: transformers goes by it, llama.cpp's "
                f"converter by the template in {_TOKENIZER_CONFIG}."
            )
        is_new = jinja is not None and not jinja[0] and bool(jinja[1])
        if is_new and config is None and _TOKENIZER_CONFIG in self.now:
            self.notes["template"].append(
                f"If {_TOKENIZER_CONFIG}, which did not change, holds a template, llama.cpp's "
                f"converter goes by that one and not by the new {_JINJA}."
            )

    def _tell_move(self, name: str) -> None:
        """Say once that a template went from one file to another one as it is."""
        gone = {f: then[name] for f, (then, now) in self.templates.items()
                if name in then and name not in now}  # fmt: skip
        come = {f: now[name] for f, (then, now) in self.templates.items()
                if name in now and name not in then}  # fmt: skip
        for source, text in gone.items():
            target = next((file for file, other in come.items() if other == text), None)
            if target is None:
                continue
            self.notes["template"].append(
                f"The chat template moved from {shown(source)} to {shown(target)}; not a character "
                "of it changed."
            )
            del self.templates[source][0][name], self.templates[target][1][name], come[target]

    def _tell_licence(self, one: _Changed, old: bytes, new: bytes) -> None:
        one.reach = "source"
        before, after = words.text_of(old), words.text_of(new)
        clauses = []
        try:
            self.details[one.label], size = words.diff(before, after)
        except NotToldError as error:
            clauses.append(f"not compared: {error.message}")
        else:
            clauses += [f"{size} (folded below)"] if one.old is not None else []
        was, now = words.beginning(before), words.beginning(after)
        if one.old is None:
            clauses.append(f"it begins with {now} (folded below)")
        elif was != now:
            clauses.append(f"it begins with {now}, began with {was}")
        self._say(one, clauses)

    def _tell_card(self, one: _Changed, old: bytes, new: bytes) -> None:
        before, after = (raw.decode("utf-8", errors="replace") for raw in (old, new))
        was, now = config_words.card(before), config_words.card(after)
        one.kind = "licence" if config_words.licence_differs(was, now) else "card"
        one.reach = "gguf" if config_words.card_reaches_gguf(was, now) else "source"
        self._say(one, config_words.of_card(was, now))
        if "\ufffd" in after and "\ufffd".encode() not in new:
            self.refusals.append(f"{one.label} is not UTF-8, and the converter reads it")

    # --- what is beside them

    def _look_around(self) -> None:
        """Say what else is new there, and what a build would miss."""
        new = sorted(self.now.keys() - self.was.keys())
        for patterns, what in (
            ((_CODE,), "code of a repository is never fetched"),
            (fetch.PICKLES, "pickles are never fetched"),
        ):
            names = [name for name in new if _matches(name, patterns)]
            if names:
                more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""  # noqa: PLR2004 - named
                some = ", ".join(shown(name, 80) for name in names[:3])
                self.remarks.append(f"New beside the files of a build: {some}{more}; {what}.")
        if fetch.INDEX not in self.now and not _matching(_tops(self.now)):
            self.refusals.append("there are no weights in safetensors")
        names = [*_small_files(self.now)]
        if not any(
            all(any(fnmatchcase(name, pattern) for name in names) for pattern in needed)
            for needed in fetch.TOKENIZERS
        ):
            self.refusals.append("the tokenizer is missing")


# After the licence, which no measurement shows: what people look at first.
_TOLD_FIRST: Final[tuple[ChangeClass, ...]] = (
    "template", "tokenizer", "config", "generation", "weights", "card",
)  # fmt: skip
_HELD: Final = "A release waits until somebody has read the licence and accepts it (`license`)."
# What the converter cannot do without where it is there.
_NEEDED: Final = frozenset({_TOKENIZER, _TOKENIZER_CONFIG})
_LONG: Final = frozenset({_TOKENIZER, "vocab.json", "merges.txt", "vocab.txt", "tekken.json"})


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _small_files(files: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    """Return what a build reads besides weights: at the top, and how an encoder pools."""
    return {
        name: file
        for name, file in files.items()
        if name != fetch.INDEX
        and (name == fetch.POOLING or ("/" not in name and _matches(name, fetch.SMALL_FILES)))
    }


def _tops(files: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    return {
        name: f for name, f in files.items() if name.endswith(".safetensors") and "/" not in name
    }


def _is_weight(name: str) -> bool:
    return fnmatchcase(name, fetch.WEIGHTS)


def _matching(tops: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    return {name: file for name, file in tops.items() if _is_weight(name)}


def _named(
    tops: Mapping[str, RemoteFile], weight_map: Mapping[str, str] | None
) -> dict[str, RemoteFile]:
    """Return the weights that a build takes: those of the index, or by their names without one."""
    if weight_map is None:
        return _matching(tops)
    wanted = set(weight_map.values())
    return {name: file for name, file in tops.items() if name in wanted}


def _kind_of(name: str) -> ChangeClass:
    return next(kind for pattern, kind in _CLASSES.items() if fnmatchcase(name, pattern))


def _digest(file: RemoteFile) -> str | None:
    return file.sha256 or file.git_sha1


def _is_comparable(old: RemoteFile, new: RemoteFile) -> bool:
    """Tell whether both have a digest of the same kind."""
    if old.sha256 is not None or new.sha256 is not None:
        return old.sha256 is not None and new.sha256 is not None
    return old.git_sha1 is not None and new.git_sha1 is not None


def _is_same(old: RemoteFile, new: RemoteFile) -> bool:
    return (
        _is_comparable(old, new)
        and _digest(old) == _digest(new)
        and old.size_bytes == new.size_bytes
    )


def _differs(old: RemoteFile | None, new: RemoteFile | None) -> bool:
    if old is None or new is None:
        return old is not new
    return not _is_same(old, new)


def _file_change(one: _Changed) -> FileChange:
    return FileChange(name=one.label, kind=one.kind, old=_state(one.old), new=_state(one.new))


def _state(file: RemoteFile | None) -> FileState | None:
    if file is None:
        return None
    return FileState(size_bytes=file.size_bytes, sha256=file.sha256, git_sha1=file.git_sha1)
