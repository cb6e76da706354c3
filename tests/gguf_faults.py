"""
Faults that a conversion could have, planted into a good 16-bit GGUF one at a time.

Each is what a converter really gets wrong: a number in the metadata that was not read, tensors in
another order, a token or a template that went missing, bytes that changed. The mutated file is a
GGUF that llama.cpp's own reader accepts, with every other byte as it was; what changed is for the
layers of `verify` to find.

    FAULTS["rope theta"](good, bad)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FORMATS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q",
                   11: "q", 12: "d"}  # fmt: skip
_TYPES: Final = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2)}
_NUMBERS: Final = {name: number for number, (name, _, _) in _TYPES.items()}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_ALIGNMENT: Final = 32


class NotThereError(LookupError):
    """The model has nothing that this fault could be planted into."""


@dataclass
class Tensor:
    """
    One tensor.

    Attributes:
        shape: Row length first, as GGUF has it.
        type: "F32", "F16", "BF16", "Q8_0".
        data: Its bytes.
    """

    shape: tuple[int, ...]
    type: str
    data: bytes

    def values(self) -> Any:
        """Return the numbers, in the order of numpy: the row length is the last of the shape."""
        kind: Any = np.float32 if self.type == "F32" else np.float16
        assert self.type in {"F32", "F16"}
        return np.frombuffer(self.data, dtype=kind).reshape(self.shape[::-1]).copy()

    def replaced(self, values: Any) -> Tensor:
        """Return one of the same type with other numbers."""
        kind: Any = np.float32 if self.type == "F32" else np.float16
        return Tensor(tuple(values.shape[::-1]), self.type, values.astype(kind).tobytes())


class Gguf:
    """A GGUF in memory: values as they are encoded, and tensors."""

    def __init__(self, path: Path) -> None:
        """Read one of version 3."""
        self._bytes = path.read_bytes()
        self._at = 24
        magic, version, n_tensors, n_pairs = struct.unpack_from("<4sIQQ", self._bytes, 0)
        assert (magic, version) == (b"GGUF", 3)
        # key -> (type, its bytes)
        self.pairs: dict[str, tuple[int, bytes]] = {}
        for _ in range(n_pairs):
            key = self._text().decode()
            type_ = self._number("I")
            start = self._at
            self._skip(type_)
            self.pairs[key] = (type_, self._bytes[start : self._at])
        infos = []
        for _ in range(n_tensors):
            name = self._text().decode()
            n_dims = self._number("I")
            shape = tuple(self._number("Q") for _ in range(n_dims))
            infos.append((name, shape, self._number("I"), self._number("Q")))
        start = -(-self._at // _ALIGNMENT) * _ALIGNMENT
        self.tensors: dict[str, Tensor] = {}
        for name, shape, number, offset in infos:
            type_name, block, size = _TYPES[number]
            count = int(np.prod(shape)) // block * size
            data = self._bytes[start + offset : start + offset + count]
            self.tensors[name] = Tensor(shape, type_name, data)

    def _number(self, code: str) -> int:
        found: int = struct.unpack_from(f"<{code}", self._bytes, self._at)[0]
        self._at += struct.calcsize(f"<{code}")
        return found

    def _text(self) -> bytes:
        length = self._number("Q")
        self._at += length
        return self._bytes[self._at - length : self._at]

    def _skip(self, type_: int) -> None:
        if type_ == _STRING:
            self._text()
        elif type_ == _ARRAY:
            element, count = self._number("I"), self._number("Q")
            if element == _STRING:
                for _ in range(count):
                    self._text()
            else:
                self._at += count * _SIZES[element]
        else:
            self._at += _SIZES[type_]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.value("general.architecture"))

    def key(self, name: str) -> str:
        """Return a key of the architecture's own, which must be there."""
        found = f"{self.architecture}.{name}"
        if found not in self.pairs:
            raise NotThereError(f"no {found}")
        return found

    def value(self, key: str) -> Any:
        """Return a value; an array as a list."""
        if key not in self.pairs:
            raise NotThereError(f"no {key}")
        type_, data = self.pairs[key]
        if type_ == _STRING:
            return data[8:].decode()
        if type_ != _ARRAY:
            return struct.unpack(f"<{_FORMATS[type_]}", data)[0]
        element, count = struct.unpack_from("<IQ", data)
        if element != _STRING:
            return list(struct.unpack_from(f"<{count}{_FORMATS[element]}", data, 12))
        texts, at = [], 12
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            texts.append(data[at + 8 : at + 8 + length].decode())
            at += 8 + length
        return texts

    def set(self, key: str, value: Any, type_: int | None = None) -> None:
        """Replace a value by one of the same type, or add one of type `type_`."""
        if type_ is None:
            type_ = self.pairs[key][0]
        if type_ == _STRING:
            data = _packed_text(value)
        elif type_ == _ARRAY:
            element = struct.unpack_from("<I", self.pairs[key][1])[0]
            head = struct.pack("<IQ", element, len(value))
            data = head + (
                b"".join(map(_packed_text, value))
                if element == _STRING
                else struct.pack(f"<{len(value)}{_FORMATS[element]}", *value)
            )
        else:
            data = struct.pack(f"<{_FORMATS[type_]}", value)
        self.pairs[key] = (type_, data)

    def first(self, *names: str) -> str:
        """Return the first of these tensors that is there."""
        for name in names:
            if name in self.tensors:
                return name
        raise NotThereError(f"none of {', '.join(names)}")

    @property
    def last_layer(self) -> int:
        """Number of the last block."""
        return max(int(name.split(".")[1]) for name in self.tensors if name.startswith("blk."))

    def edit(self, name: str, change: Callable[[Any], Any]) -> Self:
        """Replace the numbers of a tensor by what `change` returns for them."""
        tensor = self.tensors[name]
        self.tensors[name] = tensor.replaced(change(tensor.values()))
        return self

    def write(self, path: Path) -> None:
        """Write it with the tensors in their order, without gaps."""
        head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.pairs)))
        for key, (type_, data) in self.pairs.items():
            head += _packed_text(key) + struct.pack("<I", type_) + data
        offset = 0
        for name, tensor in self.tensors.items():
            head += _packed_text(name) + struct.pack("<I", len(tensor.shape))
            head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
            head += struct.pack("<IQ", _NUMBERS[tensor.type], offset)
            offset += -(-len(tensor.data) // _ALIGNMENT) * _ALIGNMENT
        with path.open("wb") as file:
            file.write(head + bytes(-len(head) % _ALIGNMENT))
            for tensor in self.tensors.values():
                file.write(tensor.data + bytes(-len(tensor.data) % _ALIGNMENT))


def _packed_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


# -- numbers in the metadata -----------------------------------------------------------------


def rope_theta(model: Gguf) -> None:
    """Multiply the base of the rotary angles by ten, as if another model's had been read."""
    key = model.key("rope.freq_base")
    model.set(key, model.value(key) * 10)


def rope_scale(model: Gguf) -> None:
    """Lose the scaling of the rotary angles, or halve the angles of a model without any."""
    if "rope_freqs.weight" in model.tensors:
        model.edit("rope_freqs.weight", np.ones_like)
        return
    factor = f"{model.architecture}.rope.scaling.factor"
    if factor in model.pairs:
        model.set(factor, 1.0)
        return
    model.key("rope.freq_base")
    model.set(f"{model.architecture}.rope.scaling.type", "linear", _STRING)
    model.set(factor, 2.0, _F32)


def norm_epsilon(model: Gguf) -> None:
    """Multiply what is added under the root of every norm by a hundred."""
    for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        if f"{model.architecture}.{name}" in model.pairs:
            model.set(model.key(name), model.value(model.key(name)) * 100)
            return
    raise NotThereError("no norm epsilon")


def experts_used(model: Gguf) -> None:
    """Ask one expert where upstream asks more."""
    model.set(model.key("expert_used_count"), 1)


def soft_cap(model: Gguf) -> None:
    """Halve the bound of the logits."""
    key = model.key("final_logit_softcapping")
    model.set(key, model.value(key) / 2)


def logit_scale(model: Gguf) -> None:
    """Double the factor of the logits."""
    key = model.key("logit_scale")
    model.set(key, model.value(key) * 2)


def sliding_window(model: Gguf) -> None:
    """Halve how far back the layers with a window look."""
    key = model.key("attention.sliding_window")
    model.set(key, model.value(key) // 2)


def pooling(model: Gguf) -> None:
    """Let an encoder take the mean where upstream takes the first token, or the reverse."""
    key = model.key("pooling_type")
    model.set(key, 1 if model.value(key) == 2 else 2)


# -- tensors -------------------------------------------------------------------------------


def _swap(model: Gguf, one: str, other: str) -> None:
    model.tensors[one], model.tensors[other] = model.tensors[other], model.tensors[one]


def swapped_layers(model: Gguf) -> None:
    """Exchange the query weights of two layers of equal shape."""
    for kind in ("attn_q", "attn_qkv", "attn_q_a"):
        if f"blk.0.{kind}.weight" in model.tensors:
            _swap(model, f"blk.0.{kind}.weight", f"blk.1.{kind}.weight")
            return
    raise NotThereError("no query weights")


def swapped_query_and_key(model: Gguf) -> None:
    """Exchange query and key of the first layer, or of fused ones their rows."""
    if "blk.0.attn_qkv.weight" in model.tensors:
        rows = model.tensors["blk.0.attn_qkv.weight"].shape[1] // 3
        model.edit(
            "blk.0.attn_qkv.weight",
            lambda w: np.concatenate([w[rows : 2 * rows], w[:rows], w[2 * rows :]]),
        )
        return
    names = ("blk.0.attn_q.weight", "blk.0.attn_k.weight")
    query, key = (model.tensors.get(name) for name in names)
    if query is None or key is None or query.shape != key.shape:
        raise NotThereError("query and key differ in shape")
    _swap(model, *names)


def swapped_gate_and_up(model: Gguf) -> None:
    """Exchange the two halves of a gated feed-forward."""
    gate = model.first("blk.0.ffn_gate.weight", "blk.0.ffn_gate_exps.weight")
    _swap(model, gate, gate.replace("gate", "up"))


def swapped_norms(model: Gguf) -> None:
    """Exchange the norm before attention and the one before the feed-forward."""
    other = model.first(
        "blk.0.ffn_norm.weight", "blk.0.ffn_norm.weight", "blk.0.attn_norm_2.weight"
    )
    _swap(model, model.first("blk.0.attn_norm.weight"), other)


def dropped_bias(model: Gguf) -> None:
    """Take the biases of all query or fused projections out of the file."""
    names = [name for name in model.tensors if name.endswith((".attn_q.bias", ".attn_qkv.bias"))]
    if not names:
        raise NotThereError("no biases in attention")
    for name in names:
        del model.tensors[name]


def zero_bias(model: Gguf) -> None:
    """Write zeros where upstream has the biases of query or fused projections."""
    names = [name for name in model.tensors if name.endswith((".attn_q.bias", ".attn_qkv.bias"))]
    if not names:
        raise NotThereError("no biases in attention")
    for name in names:
        model.edit(name, np.zeros_like)


def _some_matrix(model: Gguf) -> str:
    return model.first("blk.0.attn_output.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight")


def transposed_weight(model: Gguf) -> None:
    """Write one matrix column by column under an unchanged shape."""
    model.edit(_some_matrix(model), lambda w: w.T.copy().reshape(w.shape))


def one_bit(model: Gguf) -> None:
    """Flip the lowest bit of one 16-bit number."""
    name = _some_matrix(model)
    tensor = model.tensors[name]
    data = bytearray(tensor.data)
    data[len(data) // 2 & ~1] ^= 1
    model.tensors[name] = Tensor(tensor.shape, tensor.type, bytes(data))


def layer_scale(model: Gguf) -> None:
    """Multiply what the last layer adds by 1.1."""
    layer = f"blk.{model.last_layer}"
    names = [
        name
        for name in model.tensors
        if name.startswith(layer)
        and name.removeprefix(layer)
        in {".attn_output.weight", ".ffn_down.weight", ".ffn_down_exps.weight"}
    ]
    for name in names:
        model.edit(name, lambda w: w * 1.1)


def expert_order(model: Gguf) -> None:
    """Move each expert of the last layer one place on, but not its place in the router."""
    layer = f"blk.{model.last_layer}"
    for kind in ("gate", "up", "down"):
        model.edit(model.first(f"{layer}.ffn_{kind}_exps.weight"), lambda w: np.roll(w, 1, axis=0))


def tied_embedding_lost(model: Gguf) -> None:
    """Let the embeddings serve as output where upstream has its own, or the reverse."""
    if "output.weight" in model.tensors:
        del model.tensors["output.weight"]
        return
    if model.architecture.endswith("bert"):
        raise NotThereError("an encoder has no output matrix")
    embeddings = model.tensors["token_embd.weight"]
    random = np.random.default_rng(0)
    values = random.normal(0, 0.02, embeddings.shape[::-1])
    model.tensors["output.weight"] = embeddings.replaced(values)


def wrong_dtype(model: Gguf) -> None:
    """Store one matrix of the 16-bit model in 8 bits."""
    import gguf  # noqa: PLC0415 - a library of the extra `convert`

    name = _some_matrix(model)
    values = model.tensors[name].values().astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    model.tensors[name] = Tensor(model.tensors[name].shape, "Q8_0", packed.tobytes())


def misread_dtype(model: Gguf) -> None:
    """Call the bits of one float16 matrix bfloat16."""
    name = _some_matrix(model)
    tensor = model.tensors[name]
    model.tensors[name] = Tensor(tensor.shape, "BF16", tensor.data)


def _with(value: float) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[values.shape[0] // 2, values.shape[1] // 2] = value
        return values

    return change


def not_a_number(model: Gguf) -> None:
    """Write one NaN."""
    model.edit(_some_matrix(model), _with(float("nan")))


def infinite(model: Gguf) -> None:
    """Write one infinity, as a value beyond the range of float16 becomes."""
    model.edit(_some_matrix(model), _with(float("inf")))


def zero_row(model: Gguf) -> None:
    """Write zeros into one row of a matrix."""

    def change(values: Any) -> Any:
        values[values.shape[0] // 2] = 0
        return values

    model.edit(_some_matrix(model), change)


# -- vocabulary and template -----------------------------------------------------------------


def wrong_eos(model: Gguf) -> None:
    """Name another token as the end of a text."""
    key = "tokenizer.ggml.eos_token_id"
    if key not in model.pairs:
        key = "tokenizer.ggml.seperator_token_id"
    model.set(key, model.value(key) - 1 or 7)


def wrong_pre_tokenizer(model: Gguf) -> None:
    """Split text before the merges as another family does."""
    if model.value("tokenizer.ggml.model") != "gpt2":
        raise NotThereError("no pre-tokenizer that merges follow")
    key = "tokenizer.ggml.pre"
    model.set(key, "llama-bpe" if model.value(key) in {"gpt-2", "olmo", "mpt"} else "gpt-2")


def template_edited(model: Gguf) -> None:
    """Change one word of the chat template, which still is one."""
    key = "tokenizer.chat_template"
    model.set(key, model.value(key).replace("add_generation_prompt", "false", 1) + " ")


def added_token_lost(model: Gguf) -> None:
    """Make a plain, unnamed token of the last special one."""
    types = model.value("tokenizer.ggml.token_type")
    tokens = model.value("tokenizer.ggml.tokens")
    last = max(
        id_
        for id_, type_ in enumerate(types)
        if type_ in {_CONTROL, _USER_DEFINED} and not tokens[id_].startswith("[PAD")
    )
    tokens[last], types[last] = f"[PAD{last}]", _NORMAL
    model.set("tokenizer.ggml.tokens", tokens)
    model.set("tokenizer.ggml.token_type", types)


def tokens_exchanged(model: Gguf) -> None:
    """Exchange the names of two tokens in the middle of the vocabulary."""
    tokens = model.value("tokenizer.ggml.tokens")
    middle = len(tokens) // 2
    tokens[middle], tokens[middle + 1] = tokens[middle + 1], tokens[middle]
    model.set("tokenizer.ggml.tokens", tokens)


def merge_lost(model: Gguf) -> None:
    """Drop the first merge of a byte-pair encoding."""
    key = "tokenizer.ggml.merges"
    model.set(key, model.value(key)[1:])


def vocabulary_padded(model: Gguf) -> None:
    """Append 64 tokens that upstream does not have, with rows of zeros."""
    for key, fill in (("tokens", None), ("token_type", 5), ("scores", -1000.0)):
        name = f"tokenizer.ggml.{key}"
        if name in model.pairs:
            old = model.value(name)
            model.set(name, old + [fill or f"[PAD{len(old) + i}]" for i in range(64)])
    for name in ("token_embd.weight", "output.weight"):
        if name in model.tensors:
            model.edit(name, lambda w: np.concatenate([w, np.zeros((64, w.shape[1]))]))
    size = f"{model.architecture}.vocab_size"
    if size in model.pairs:
        model.set(size, model.value(size) + 64)


def bos_policy(model: Gguf) -> None:
    """Begin every text with BOS where upstream does not, or the reverse."""
    key = "tokenizer.ggml.add_bos_token"
    # llama.cpp's own default where the file says nothing, src/llama-vocab.cpp.
    kind, pre = model.value("tokenizer.ggml.model"), "tokenizer.ggml.pre"
    default = kind in {"llama", "bert"} or (
        kind == "gpt2" and pre in model.pairs and model.value(pre) in {"llama-bpe", "tekken"}
    )
    present = bool(model.value(key)) if key in model.pairs else default
    model.set(key, not present, _BOOL)


def _planted(change: Callable[[Gguf], None]) -> Callable[[Path, Path], None]:
    def plant(good: Path, bad: Path) -> None:
        model = Gguf(good)
        change(model)
        model.write(bad)

    plant.__doc__ = change.__doc__
    return plant


# From a good 16-bit GGUF to one with the fault. NotThereError is raised where the model has nothing
# that could be wrong in this way: no experts, no biases.
FAULTS: Final[dict[str, Callable[[Path, Path], None]]] = {
    name: _planted(change)
    for name, change in {
        "rope theta": rope_theta,
        "rope scale": rope_scale,
        "norm epsilon": norm_epsilon,
        "experts used": experts_used,
        "soft cap": soft_cap,
        "logit scale": logit_scale,
        "sliding window": sliding_window,
        "pooling": pooling,
        "swapped layers": swapped_layers,
        "swapped query and key": swapped_query_and_key,
        "swapped gate and up": swapped_gate_and_up,
        "swapped norms": swapped_norms,
        "dropped bias": dropped_bias,
        "zero bias": zero_bias,
        "transposed weight": transposed_weight,
        "one bit": one_bit,
        "layer scale": layer_scale,
        "expert order": expert_order,
        "tied embedding lost": tied_embedding_lost,
        "wrong dtype": wrong_dtype,
        "misread dtype": misread_dtype,
        "NaN": not_a_number,
        "infinity": infinite,
        "zero row": zero_row,
        "wrong eos": wrong_eos,
        "wrong pre-tokenizer": wrong_pre_tokenizer,
        "template edited": template_edited,
        "added token lost": added_token_lost,
        "tokens exchanged": tokens_exchanged,
        "merge lost": merge_lost,
        "vocabulary padded": vocabulary_padded,
        "BOS policy": bos_policy,
    }.items()
}
# Those that change what is computed from given token ids, each by enough that the outputs alone
# betray it.
COMPUTED: Final = (
    "rope theta", "rope scale", "norm epsilon", "experts used", "soft cap", "logit scale",
    "sliding window", "pooling", "swapped layers", "swapped query and key", "swapped gate and up",
    "swapped norms", "dropped bias", "zero bias", "transposed weight", "layer scale",
    "expert order", "tied embedding lost", "misread dtype", "NaN", "infinity",
)  # fmt: skip
