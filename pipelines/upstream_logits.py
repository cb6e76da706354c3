"""
What upstream's own implementation computes on held-out text: the process that asks it.

It runs apart (`pipelines.apart`), without network and without the code of the model's repository.
transformers computes in float32 on the CPU, with its plain attention. Where memory holds the
weights only as they are stored (16 bits), every module turns its own weights into float32 for the
moment in which it computes (`streamed`): float32 holds each of them exactly, so the numbers are the
same, and only the time is more.

The token ids are upstream's, and whoever is compared gets the same ones: a tokenizer that went
wrong is another layer's find, and must neither hide nor feign a fault of the computation.

What rounding alone does is asked of upstream, too: once more with the weights, and whatever is
multiplied with them, rounded to float16, which is what llama.cpp's CPU backend does to a 16-bit
GGUF. How far that moves the outputs (`rounding` in the answer) depends on the depth of a model and
on how sharp its distributions are, so it is measured on the model at hand.

Writes into the directory of the job: `answer.json`, and the outputs as raw float32 in rows,
`upstream.f32`: the logits of each position of each window, or the pooled state of each text.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import apart, atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

ANSWER: Final = "answer.json"
OUTPUTS: Final = "upstream.f32"
# Tokens of the longest text of an encoder, and words from which on a paragraph is one.
_LONGEST_TEXT_TOKENS: Final = 256
_SHORTEST_TEXT_WORDS: Final = 4
# Rows of logits in float64 at a time: 64 rows of 262,144 tokens have 128 MiB.
_ROWS: Final = 64
# llama.h, enum llama_pooling_type, by the names of sentence-transformers.
_POOLINGS: Final = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_NAMED_POOLINGS: Final = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


class _UnableError(Exception):
    """Upstream's implementation cannot be run here; the text says why."""


def main(argv: Sequence[str]) -> int:
    """Do the job described in JOB, and write the answer beside it."""
    job = json.loads(Path(argv[0]).read_text())
    directory = Path(argv[0]).parent
    try:
        result = _answer(job, directory)
    except ImportError as error:
        if apart.is_ours(error):
            raise
        result = {"failure": {"kind": "import", "text": str(error)}}
    except MemoryError as error:
        result = {"failure": {"kind": "memory", "text": str(error)}}
    except _UnableError as error:
        result = {"failure": {"kind": "unable", "text": str(error)}}
    atomic.write_json(directory / ANSWER, result)
    return 0


def _answer(job: dict[str, Any], directory: Path) -> dict[str, Any]:
    import torch  # noqa: PLC0415 - seconds, and only in this process
    import transformers  # noqa: PLC0415

    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    config = _config(job["source"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        job["source"], trust_remote_code=False, local_files_only=True
    )
    text = Path(job["corpus"]).read_text(encoding="utf-8")
    pooling = job["pooling"]
    if pooling is None:
        windows = _windows(tokenizer, text, job["tokens"], job["window"])
    else:
        pooling = _declared_pooling(Path(job["source"])) or pooling
        windows = _texts(tokenizer, text, job["texts"], job["window"])
    if not windows:
        raise _UnableError("the corpus has not enough text")
    with torch.inference_mode():
        model = _model(job["source"], config, encoder=pooling is not None, streamed=job["streamed"])
        with (directory / OUTPUTS).open("wb") as file:
            width, exact = 0, []
            for ids in windows:
                rows = _outputs(model, ids, pooling)
                width = rows.shape[-1]
                file.write(rows.numpy().tobytes())
                if ids is windows[0] or pooling is not None:
                    exact.append(rows)
        _round(model)
        rounding = [
            figures
            for ids, rows in zip(windows, exact, strict=False)
            for figures in _moved(rows, _outputs(model, ids, pooling), pooling)
        ]
    return {
        "rounding": rounding,
        "transformers": transformers.__version__,
        "implementation": type(model).__name__,
        "width": width,
        "pooling": pooling,
        "windows": windows,
    }


def _config(source: str) -> Any:  # noqa: ANN401 - transformers has no types
    """
    Return upstream's configuration as transformers reads it.

    Raises:
        _UnableError: transformers has no implementation of its own.
    """
    import transformers  # noqa: PLC0415

    stated = json.loads((Path(source) / "config.json").read_text())
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    kind = stated.get("model_type")
    if kind not in known:
        raise _UnableError(f"transformers {transformers.__version__} does not know {kind!r}")
    return transformers.AutoConfig.from_pretrained(
        source, trust_remote_code=False, local_files_only=True
    )


def _model(source: str, config: Any, *, encoder: bool, streamed: bool) -> Any:  # noqa: ANN401
    """
    Load upstream's model with all its weights.

    Raises:
        _UnableError: There is no such implementation, or weights of it are missing.
    """
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    options: dict[str, Any] = {
        "config": config,
        "dtype": "auto" if streamed else torch.float32,
        "trust_remote_code": False,
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
        "attn_implementation": "eager",
    }
    kinds = [transformers.AutoModel]
    if not encoder:
        kinds = [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText]
    found = [kind for kind in kinds if type(config) in kind._model_mapping]  # noqa: SLF001
    if not found:
        raise _UnableError(f"transformers has no language model for {config.model_type!r}")
    try:
        model, info = found[0].from_pretrained(source, **options)
    except (
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        NotImplementedError,
    ) as e:
        raise _UnableError(f"transformers cannot load it: {type(e).__name__}: {e}") from e
    # The head over the first token's state, which embeddings do not pass through.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        lacking = missing or sorted(str(key) for key in info["mismatched_keys"])
        raise _UnableError(f"transformers finds no weights for {lacking[0]} (of {len(lacking)})")
    if streamed:
        _stream(model)
    return model.eval()


def _stream(model: Any) -> None:  # noqa: ANN401 - as above
    """Let each module that owns weights compute in float32, and keep 16 bits in between."""
    import torch  # noqa: PLC0415

    def widen(module: Any, _: Any) -> None:  # noqa: ANN401
        module._kept = {}  # noqa: SLF001 - an attribute of ours
        for name, weight in module.named_parameters(recurse=False):
            if weight.dtype in {torch.bfloat16, torch.float16}:
                module._kept[name] = weight.data  # noqa: SLF001
                weight.data = weight.data.float()

    def narrow(module: Any, *_: Any) -> None:  # noqa: ANN401
        for name, weight in module.named_parameters(recurse=False):
            if name in module._kept:  # noqa: SLF001
                weight.data = module._kept[name]  # noqa: SLF001
        module._kept = {}  # noqa: SLF001

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)


def _round(model: Any) -> None:  # noqa: ANN401 - as above
    """Let each module that owns matrices multiply numbers of float16, and add up in float32."""
    import torch  # noqa: PLC0415

    def rounded(module: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401
        for weight in module.parameters(recurse=False):
            if weight.ndim > 1:
                weight.data = weight.data.half().float()
        return tuple(
            each.half().to(each.dtype)
            if isinstance(each, torch.Tensor) and each.is_floating_point()
            else each
            for each in values
        )

    for module in model.modules():
        if any(weight.ndim > 1 for weight in module.parameters(recurse=False)):
            module.register_forward_pre_hook(rounded)


def _moved(exact: Any, rounded: Any, pooling: str | None) -> list[list[float]]:  # noqa: ANN401
    """
    Say how far rounding moved each row.

    Returns:
        [divergence in nats, 1 if the most probable token is another] of each row of logits, or
        [1 - cosine] of a pooled state.
    """
    import torch  # noqa: PLC0415

    if pooling is not None:
        cosine = torch.nn.functional.cosine_similarity(exact.double(), rounded.double())
        return [[float(1 - cosine)]]
    figures = []
    for one, other in zip(exact.split(_ROWS), rounded.split(_ROWS), strict=True):
        p, q = (torch.log_softmax(each.double(), -1) for each in (one, other))
        terms = torch.nan_to_num(p.exp() * (p - q), nan=0.0)
        flips = (p.argmax(-1) != q.argmax(-1)).double()
        figures += torch.stack([terms.sum(-1), flips], -1).tolist()
    return figures


def _outputs(model: Any, ids: list[int], pooling: str | None) -> Any:  # noqa: ANN401 - as above
    """
    Run one window.

    Returns:
        Float32 on the CPU: (tokens, vocabulary) logits, or (1, width) with the pooled state.
    """
    import torch  # noqa: PLC0415

    inputs = torch.tensor([ids])
    if pooling is None:
        return model(input_ids=inputs, use_cache=False).logits[0].float().contiguous()
    # No mask of padding: each text is alone.
    state = model(input_ids=inputs).last_hidden_state[0].float()
    pooled = {"mean": state.mean(0), "cls": state[0], "last": state[-1]}[pooling]
    return pooled.unsqueeze(0).contiguous()


def _windows(tokenizer: Any, text: str, tokens: int, window: int) -> list[list[int]]:  # noqa: ANN401
    """
    Split the first tokens of a text into windows, each begun as upstream begins a text.

    Args:
        tokenizer: Upstream's.
        text: Held-out text; one token has seldom more than 16 characters, so as much is read.
        tokens: Tokens in all, those that begin a window included.
        window: Tokens of one window, with the one that begins it.
    """
    before = [id_ for id_ in _added(tokenizer) if id_ != tokenizer.eos_token_id][:1]
    piece = text[: 16 * tokens]
    ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    windows: list[list[int]] = []
    while ids and tokens > len(before) + 1:
        here = min(window, tokens) - len(before)
        windows.append(before + ids[:here])
        ids, tokens = ids[here:], tokens - len(windows[-1])
    # Of a window of one token nothing could be said but for what follows nothing.
    return [each for each in windows if len(each) > 1]


def _added(tokenizer: Any) -> list[int]:  # noqa: ANN401 - as above
    """Return what upstream puts around an empty text."""
    return list(tokenizer("", add_special_tokens=True, verbose=False)["input_ids"])


def _texts(tokenizer: Any, text: str, count: int, window: int) -> list[list[int]]:  # noqa: ANN401
    """Take paragraphs spread evenly over the corpus, as upstream tokenizes a text by itself."""
    paragraphs = [
        each.strip()
        for each in re.split(r"\n\s*\n", text)
        if len(each.split()) >= _SHORTEST_TEXT_WORDS
    ]
    step = max(1, len(paragraphs) // count)
    longest = min(window, _LONGEST_TEXT_TOKENS)
    return [
        list(tokenizer(each, truncation=True, max_length=longest, verbose=False)["input_ids"])
        for each in paragraphs[::step][:count]
    ]


def _declared_pooling(source: Path) -> str | None:
    """Return how upstream pools, as sentence-transformers declares it; None: it does not."""
    try:
        modules = json.loads((source / "modules.json").read_text())
        path = next(each["path"] for each in modules if each["type"].endswith("Pooling"))
        declared = json.loads((source / path / "config.json").read_text())
    except (OSError, ValueError, KeyError, StopIteration, TypeError):
        return None
    if not isinstance(declared, dict):
        return None
    found = next((name for key, name in _POOLINGS.items() if declared.get(key) is True), None)
    # sentence-transformers 5 names the mode instead of one switch for each.
    return found or _NAMED_POOLINGS.get(str(declared.get("pooling_mode")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
