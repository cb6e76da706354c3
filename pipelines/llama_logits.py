"""
What llama.cpp computes from the 16-bit GGUF for the same tokens: the process that asks it.

Through the toolchain's own bindings, since no program of llama.cpp takes token ids and hands out
all logits. On the CPU, with keys and values in 32 bits and without fused attention, so that what is
left of a difference comes from the GGUF: its 16-bit weights, and the activations, which llama.cpp's
CPU backend rounds to 16 bits before it multiplies them with 16-bit weights.

Reads what `pipelines.upstream_logits` wrote and compares row by row in float64, so that neither
side is ever held as a whole. Writes `compared.json` beside the job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from pipelines import apart, atomic
from pipelines.upstream_logits import ANSWER, OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Sequence

COMPARED: Final = "compared.json"
# Rows of logits in float64 at a time: 64 rows of 262,144 tokens have 128 MiB.
_ROWS: Final = 64


class _RefusedError(Exception):
    """llama.cpp does not accept the GGUF; the text says at which step."""


def main(argv: Sequence[str]) -> int:
    """Compare as the job in JOB says."""
    job = json.loads(Path(argv[0]).read_text())
    directory = Path(argv[0]).parent
    answer = json.loads((directory / ANSWER).read_text())
    try:
        result = _compared(job, answer, directory)
    except ModuleNotFoundError as error:
        if not apart.is_package(error):
            raise
        result = {"failure": {"kind": "import", "text": str(error)}}
    except _RefusedError as error:
        result = {"failure": {"kind": "refused", "text": str(error)}}
    atomic.write_json(directory / COMPARED, result)
    return 0


def _compared(job: dict[str, Any], answer: dict[str, Any], directory: Path) -> dict[str, Any]:
    import numpy as np  # noqa: PLC0415 - only in this process

    windows, width = answer["windows"], answer["width"]
    encoder = answer["pooling"] is not None
    rows = len(windows) if encoder else sum(map(len, windows))
    upstream = np.memmap(directory / OUTPUTS, dtype=np.float32, mode="r", shape=(rows, width))
    longest = max(map(len, windows))
    position = 0
    result: dict[str, Any] = {"cosines": []} if encoder else {
        "same_top": [], "kld_nats": [], "nll_upstream_nats": [], "nll_gguf_nats": [],
    }  # fmt: skip
    with _Model(job, longest, encoder=encoder) as model:
        result["width"] = model.width
        for ids in windows:
            count = 1 if encoder else len(ids)
            wanted = upstream[position : position + count]
            position += count
            got = model.outputs(ids)
            if not np.isfinite(got).all():
                raise _RefusedError("what llama.cpp computes from it is not finite")
            if encoder:
                result["cosines"].append(_cosine(wanted[0], got[0]))
                continue
            for key, values in _differences(wanted, got, ids).items():
                result[key] += values
    return result


def _differences(wanted: Any, got: Any, ids: list[int]) -> dict[str, list[Any]]:  # noqa: ANN401
    """
    Compare the logits of a window.

    Args:
        wanted: (tokens, vocabulary) of upstream.
        got: (tokens, vocabulary) of llama.cpp; the common part counts where one is longer.
        ids: The tokens, of which each but the first is what the one before should predict.

    Returns:
        For each position same_top and kld_nats, the divergence of llama.cpp's distribution from
        upstream's; for each but the last, what both lose on the next token, in nats.
    """
    import numpy as np  # noqa: PLC0415

    width = min(wanted.shape[1], got.shape[1])
    found: dict[str, list[Any]] = {
        "same_top": [], "kld_nats": [], "nll_upstream_nats": [], "nll_gguf_nats": [],
    }  # fmt: skip
    for start in range(0, len(ids), _ROWS):
        ours = _log_softmax(wanted[start : start + _ROWS, :width])
        theirs = _log_softmax(got[start : start + _ROWS, :width])
        found["same_top"] += (ours.argmax(1) == theirs.argmax(1)).tolist()
        with np.errstate(invalid="ignore"):
            terms = np.exp(ours) * (ours - theirs)
        # A token that upstream rules out (-inf) adds nothing, whatever llama.cpp thinks of it.
        terms[np.isneginf(ours)] = 0.0
        found["kld_nats"] += terms.sum(1).tolist()
        following = np.array(ids[start + 1 : start + 1 + len(ours)], dtype=np.int64)
        at = np.arange(len(following))
        known = following < width
        found["nll_upstream_nats"] += (-ours[at[known], following[known]]).tolist()
        found["nll_gguf_nats"] += (-theirs[at[known], following[known]]).tolist()
    return found


def _log_softmax(logits: Any) -> Any:  # noqa: ANN401 - numpy arrays
    """Turn rows of logits into logarithms of probabilities, in float64."""
    import numpy as np  # noqa: PLC0415

    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(1, keepdims=True))


def _cosine(one: Any, other: Any) -> float:  # noqa: ANN401 - numpy arrays
    import numpy as np  # noqa: PLC0415

    if len(one) != len(other):
        raise _RefusedError(f"embeddings have {len(other)} numbers, upstream's {len(one)}")
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


class _Model:
    """The GGUF in llama.cpp."""

    def __init__(self, job: dict[str, Any], longest: int, *, encoder: bool) -> None:
        """
        Load it.

        Args:
            job: `gguf`, `threads`.
            longest: Tokens of the longest window, which is computed in one batch.
            encoder: Hand out pooled embeddings in place of logits.

        Raises:
            _RefusedError: llama.cpp cannot load it.
        """
        import llama_cpp as llama  # noqa: PLC0415 - of the toolchain's prefix

        self._llama = llama
        self._encoder = encoder
        llama.llama_backend_init()
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = False
        self._model = llama.llama_model_load_from_file(job["gguf"].encode(), options)
        if not self._model:
            raise _RefusedError("llama.cpp cannot load it")
        context = llama.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = longest
        context.n_seq_max = 1
        context.n_threads = context.n_threads_batch = job["threads"]
        context.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context.type_k = context.type_v = llama.GGML_TYPE_F32
        context.offload_kqv = context.op_offload = False
        context.embeddings = encoder
        context.no_perf = True
        self._context = llama.llama_init_from_model(self._model, context)
        if not self._context:
            raise _RefusedError("llama.cpp cannot make a context for it")
        vocabulary = llama.llama_model_get_vocab(self._model)
        self._tokens_count = llama.llama_vocab_n_tokens(vocabulary)
        self.width = llama.llama_model_n_embd(self._model) if encoder else self._tokens_count
        self._batch = llama.llama_batch_init(longest, 0, 1)

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free it."""
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def outputs(self, ids: list[int]) -> Any:  # noqa: ANN401 - numpy array
        """
        Compute a window from an empty memory.

        Returns:
            Float32 of (tokens, vocabulary), or (1, width) for an encoder; valid until the next.

        Raises:
            _RefusedError: A token is not in its vocabulary, or it cannot be computed.
        """
        import numpy as np  # noqa: PLC0415

        if max(ids) >= self._tokens_count:
            raise _RefusedError(
                f"token {max(ids)} of upstream is not among its {self._tokens_count} tokens"
            )
        llama, batch = self._llama, self._batch
        memory = llama.llama_get_memory(self._context)
        if memory:
            llama.llama_memory_clear(memory, True)  # noqa: FBT003 - C has no names
        batch.n_tokens = len(ids)
        for place, id_ in enumerate(ids):
            batch.token[place] = id_
            batch.pos[place] = place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = True
        code = llama.llama_decode(self._context, batch)
        if code != 0:
            raise _RefusedError(f"llama.cpp cannot compute {len(ids)} tokens (code {code})")
        if self._encoder:
            pooled = llama.llama_get_embeddings_seq(self._context, 0)
            if not pooled:
                raise _RefusedError("it makes no pooled embedding: it names no pooling")
            return np.ctypeslib.as_array(pooled, shape=(1, self.width))
        logits = llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(len(ids), self.width))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
