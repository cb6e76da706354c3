"""
What llama.cpp's own tokenizer makes of strings: the process that asks it about one GGUF.

It loads the vocabulary alone, through the toolchain's bindings, and writes one line for each string
as soon as it has it: should native code die of a string, the number of lines says which.

The answer's first line holds what llama.cpp knows of the vocabulary, each further one the token ids
of one string: those with special tokens parsed, those with special tokens read as text, and those
with what the vocabulary adds (BOS, EOS), in the order of `upstream_tokens.MODES`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

# (add_special, parse_special) in the order of upstream_tokens.MODES.
_MODES: Final = ((False, True), (False, False), (True, True))
_SPECIAL: Final = ("bos", "eos", "eot", "sep", "pad", "mask")


def main(argv: Sequence[str]) -> int:
    """Tokenize the strings of REQUEST with the vocabulary of GGUF and write ANSWER."""
    gguf, request, answer = (Path(word) for word in argv)
    from llama_cpp import llama_cpp  # noqa: PLC0415 - the toolchain's, and only in this process

    asked = json.loads(request.read_bytes())
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), options)
    with answer.open("w", encoding="ascii") as lines:
        if not model:
            lines.write(json.dumps({"failure": "llama.cpp cannot load the vocabulary"}) + "\n")
            return 0
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        lines.write(json.dumps(_described(llama_cpp, vocabulary)) + "\n")
        for text, modes in asked:
            data = text.encode()
            found = [
                _tokenized(llama_cpp, vocabulary, data, *mode) if wanted else None
                for mode, wanted in zip(_MODES, modes, strict=True)
            ]
            lines.write(json.dumps(found) + "\n")
            lines.flush()
    return 0


def _described(llama: Any, vocabulary: Any) -> dict[str, Any]:  # noqa: ANN401 - ctypes
    count = llama.llama_vocab_n_tokens(vocabulary)
    return {
        "tokens_count": count,
        "special": {word: getattr(llama, f"llama_vocab_{word}")(vocabulary) for word in _SPECIAL},
        "adds": {
            word: bool(getattr(llama, f"llama_vocab_get_add_{word}")(vocabulary))
            for word in ("bos", "eos", "sep")
        },
        "controls": [id_ for id_ in range(count) if llama.llama_vocab_is_control(vocabulary, id_)],
        "ends": [id_ for id_ in range(count) if llama.llama_vocab_is_eog(vocabulary, id_)],
    }


def _tokenized(
    llama: Any,  # noqa: ANN401 - ctypes
    vocabulary: Any,  # noqa: ANN401 - ctypes
    data: bytes,
    add_special: bool,  # noqa: FBT001 - in the order of llama_tokenize
    parse_special: bool,  # noqa: FBT001 - as above
) -> list[int]:
    """Ask for the ids; a token is a byte at least, and a few are added."""
    room = len(data) + 16
    while True:
        ids = (llama.llama_token * room)()
        count = llama.llama_tokenize(
            vocabulary, data, len(data), ids, room, add_special, parse_special
        )
        if count >= 0:
            return [int(id_) for id_ in ids[:count]]
        room = -count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
