"""
Make the embedded model: text, tokenizer, weights, and the perplexity the model card states.

    python train.py corpora               write corpora/calibration.txt and corpora/evaluation.txt
    python train.py train --minutes 60    train, or resume, and write the model into this folder
    python train.py evaluate              perplexity on corpora/evaluation.txt, as JSON

Needs torch, transformers, sentencepiece and safetensors; two CPU cores are enough.
"""

# ruff: noqa: INP001, T201 - a folder of scripts that talk to a terminal, no package

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Read when torch loads OpenMP. With active waiting, one busy neighbour on a two-core machine made a
# step 6 times slower: a thread that waits for its sibling burns the core the sibling needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import sentencepiece
import torch
from dialogues import dialogues
from documents import (
    Document,
    SourceError,
    Split,
    corpus_documents,
    download,
    read_documents,
    read_sources,
)
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dialogues import Message
    from numpy.typing import NDArray

    Tokens = NDArray[np.int64]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORPORA = ROOT / "corpora"

SEED = 20_260_101
VOCAB_SIZE = 1_024
CONTEXT_TOKENS = 512
BATCH_ROWS = 4
DIALOGUE_SHARE = 0.15
PEAK_LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE_SHARE = 0.05
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0
EVALUATION_WINDOW_TOKENS = 256

ROLES = ("system", "user", "assistant")
END_OF_TURN = "<|end|>"
CONTROL_TOKENS = (*(f"<|{role}|>" for role in ROLES), END_OF_TURN)

# One control token opens a turn, one closes it; an unknown role is an error, not a silent turn.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('Unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|assistant|>\\n' }}"
    "{%- endif %}"
)


# --- text -----------------------------------------------------------------------------------------


def write_corpora(documents: Sequence[Document], folder: Path) -> None:
    """Write calibration.txt and evaluation.txt, and say which pages they hold."""
    for split in (Split.CALIBRATION, Split.EVALUATION):
        chosen = corpus_documents(documents, split)
        text = "\n\n\n".join(document.text for document in chosen) + "\n"
        _write_atomically(folder / f"{split}.txt", text.encode())
        print(f"{split}.txt: {len(text.encode()):,} bytes from {len(chosen)} documents")
        for document in chosen:
            print(f"  {document.source}: {document.path}")


def _write_atomically(path: Path, content: bytes) -> None:
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(content)
    scratch.replace(path)


# --- tokenizer ------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """
    Train the SentencePiece model and write it with the files transformers reads beside it.

    Text passes unchanged: no normalization and no space put in front, so that the transformers and
    llama.cpp tokenizers agree on every text, also right after a control token.
    """
    # All lines, in order: sampling would make another tokenizer each time. A stream, since a model
    # file named by its path would hold that path.
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
        model_writer=stream,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        control_symbols=list(CONTROL_TOKENS),
        byte_fallback=True,
        character_coverage=0.9999,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        shuffle_input_sentence=False,
        num_threads=2,
        minloglevel=1,
    )
    _write_atomically(folder / "tokenizer.model", stream.getvalue())
    ids = _token_ids(folder)
    special = ["<unk>", "<s>", "</s>", *CONTROL_TOKENS]
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {
            str(ids[token]): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in special
        },
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(CONTROL_TOKENS),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": CONTEXT_TOKENS,
    }
    special_tokens_map = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(CONTROL_TOKENS),
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "special_tokens_map.json", special_tokens_map)


def _write_json(path: Path, content: object) -> None:
    _write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _load_pieces(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def _token_ids(folder: Path) -> dict[str, int]:
    pieces = _load_pieces(folder)
    return {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}


# --- training rows --------------------------------------------------------------------------------


def training_rows(documents: Sequence[Document], folder: Path) -> Tokens:
    """
    Tokenize documents and dialogues into rows of CONTEXT_TOKENS + 1.

    The extra token is the last one to predict. Dialogue rows are DIALOGUE_SHARE of all rows.
    """
    pieces = _load_pieces(folder)
    prose: list[int] = []
    for document in documents:
        prose += [pieces.bos_id(), *pieces.encode(document.text), pieces.eos_id()]
    wanted_tokens = int(len(prose) * DIALOGUE_SHARE / (1 - DIALOGUE_SHARE))
    chat: list[int] = []
    for messages in dialogues(SEED):
        if len(chat) >= wanted_tokens:
            break
        chat += encode_dialogue(pieces, messages)
    return np.concatenate([_rows(prose), _rows(chat)])


def encode_dialogue(
    pieces: sentencepiece.SentencePieceProcessor, messages: Sequence[Message]
) -> list[int]:
    """Tokenize a conversation exactly as the chat template renders it."""
    newline = pieces.encode("\n")
    tokens = [pieces.bos_id()]
    for message in messages:
        tokens.append(pieces.piece_to_id(f"<|{message['role']}|>"))
        tokens += pieces.encode("\n" + message["content"])
        tokens += [pieces.piece_to_id(END_OF_TURN), *newline]
    return tokens


def _rows(tokens: list[int]) -> Tokens:
    # Rows overlap by one token, so that every token but the first is predicted once per epoch.
    count = (len(tokens) - 1) // CONTEXT_TOKENS
    starts = np.arange(count)[:, None] * CONTEXT_TOKENS
    rows: Tokens = np.asarray(tokens, dtype=np.int64)[starts + np.arange(CONTEXT_TOKENS + 1)]
    return rows


def batch_of(rows: Tokens, step: int) -> torch.Tensor:
    """Give the rows of one step: every epoch visits each row once, in an order of its own."""
    per_epoch = len(rows) // BATCH_ROWS
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng((SEED, epoch)).permutation(len(rows))
    return torch.from_numpy(rows[order[position * BATCH_ROWS : (position + 1) * BATCH_ROWS]])


# --- model ----------------------------------------------------------------------------------------


def new_model(folder: Path) -> LlamaForCausalLM:
    """Build the model with seeded random weights."""
    ids = _token_ids(folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["</s>"],
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [ids["</s>"], ids[END_OF_TURN]]
    return model


def next_token_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood in nats of tokens 1.. given those before them."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Write bf16 weights and configuration; a reader never sees half a file."""
    scratch = folder / ".export"
    shutil.rmtree(scratch, ignore_errors=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(scratch)
    for path in scratch.iterdir():
        path.chmod(0o644)  # safetensors lets only the owner read what it writes
        path.replace(folder / path.name)
    scratch.rmdir()


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or else seconds counted over all resumed runs."""

    steps: int | None
    seconds: float

    def share_used(self, step: int, elapsed_seconds: float) -> float:
        """How much of the budget is spent, in [0, 1]."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, elapsed_seconds / self.seconds)

    def minutes_left(self, step: int, elapsed_seconds: float, steps_per_second: float) -> float:
        """How long the rest of the budget takes at the present speed."""
        if self.steps is not None:
            return (self.steps - step) / steps_per_second / 60
        return (self.seconds - elapsed_seconds) / 60


def learning_rate(step: int, share_used: float) -> float:
    """Linear warm-up, then a cosine to FINAL_LEARNING_RATE_SHARE of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * share_used))
    floor = FINAL_LEARNING_RATE_SHARE
    return PEAK_LEARNING_RATE * warmup * (floor + (1 - floor) * cosine)


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))


def train(
    rows: Tokens, folder: Path, checkpoint: Path, budget: Budget, export_minutes: float
) -> None:
    """
    Train until the budget is spent, resuming from the checkpoint when there is one.

    Every export_minutes the checkpoint and the model files are replaced, so that a run that is
    killed leaves a model that loads.
    """
    model = new_model(folder)
    optimizer = new_optimizer(model)
    step, elapsed_seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed_seconds = state["step"], state["elapsed_seconds"]
        print(f"resumed at step {step}")
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)

    resumed_at = time.monotonic() - elapsed_seconds
    first_step, first_second = step, elapsed_seconds
    saved_second = elapsed_seconds
    smoothed_loss = math.nan
    while (used := budget.share_used(step, elapsed_seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, used)
        loss = next_token_loss(model, batch_of(rows, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        step += 1
        elapsed_seconds = time.monotonic() - resumed_at
        value = loss.item()
        smoothed_loss = value if math.isnan(smoothed_loss) else 0.98 * smoothed_loss + 0.02 * value
        if step % 20 == 0:
            rate = (step - first_step) / (elapsed_seconds - first_second)
            print(
                f"step {step}  loss {smoothed_loss:.3f} nats/token  "
                f"{rate * BATCH_ROWS * CONTEXT_TOKENS:,.0f} tok/s  "
                f"epoch {step * BATCH_ROWS / len(rows):.2f}  "
                f"{budget.minutes_left(step, elapsed_seconds, rate):.0f} min left",
                flush=True,
            )
        if elapsed_seconds - saved_second > export_minutes * 60:
            saved_second = elapsed_seconds
            _save(model, optimizer, checkpoint, step, elapsed_seconds)
            export(model, folder)
    _save(model, optimizer, checkpoint, step, elapsed_seconds)
    export(model, folder)
    print(f"finished after {step} steps, {step * BATCH_ROWS * CONTEXT_TOKENS:,} tokens")


def _save(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    checkpoint: Path,
    step: int,
    elapsed_seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "elapsed_seconds": elapsed_seconds,
    }
    scratch = checkpoint.with_suffix(".part")
    torch.save(state, scratch)
    scratch.replace(checkpoint)


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(folder: Path, text: Path) -> dict[str, float]:
    """
    Perplexity per token of the model and of the best unigram model on the same tokens.

    The text is cut into windows of EVALUATION_WINDOW_TOKENS; each starts with <s> and every token
    of it counts. The unigram model knows the frequencies of the evaluation text itself, so no
    unigram model does better.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    content = text.read_text(encoding="utf-8")
    # Not the tokenizer itself: it warns about a text longer than the context, which we cut below.
    ids = np.asarray(tokenizer.backend_tokenizer.encode(content, add_special_tokens=False).ids)
    count = len(ids) // EVALUATION_WINDOW_TOKENS
    ids = ids[: count * EVALUATION_WINDOW_TOKENS]
    windows = ids.reshape(count, EVALUATION_WINDOW_TOKENS)
    starts = np.full((count, 1), tokenizer.bos_token_id)
    batch = torch.from_numpy(np.concatenate([starts, windows], axis=1))
    with torch.inference_mode():
        losses = [next_token_loss(model, rows).item() * len(rows) for rows in batch.split(8)]
    model_nats = sum(losses) / count
    frequencies = np.bincount(ids) / len(ids)
    frequencies = frequencies[frequencies > 0]
    unigram_nats = float(-(frequencies * np.log(frequencies)).sum())
    return {
        "tokens": len(ids),
        "model_perplexity": round(math.exp(model_nats), 3),
        "unigram_perplexity": round(math.exp(unigram_nats), 3),
    }


# --- command line ---------------------------------------------------------------------------------


def _documents(work: Path) -> list[Document]:
    sources = read_sources(HERE / "sources.toml")
    return read_documents(sources, download(sources, work / "sdists"))


def _train_command(arguments: argparse.Namespace) -> None:
    documents = [
        document for document in _documents(arguments.work) if document.split is Split.TRAINING
    ]
    if not (HERE / "tokenizer.model").exists():
        train_tokenizer((document.text for document in documents), HERE)
    rows = training_rows(documents, HERE)
    print(f"{rows.size:,} tokens in {len(rows):,} rows")
    budget = Budget(arguments.steps, arguments.minutes * 60)
    train(rows, HERE, arguments.work / "checkpoint.pt", budget, arguments.export_minutes)


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["corpora", "train", "evaluate"])
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "work" / "train-tiny-llama",
        help="folder of the archives and the checkpoint (default: %(default)s)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="train for this many steps")
    length.add_argument("--minutes", type=float, default=60.0, help="train this long (default: 60)")
    parser.add_argument("--export-minutes", type=float, default=5.0, help="between two exports")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    try:
        if arguments.command == "corpora":
            write_corpora(_documents(arguments.work), CORPORA)
        elif arguments.command == "train":
            _train_command(arguments)
        else:
            print(json.dumps(evaluate(HERE, CORPORA / "evaluation.txt"), indent=2))
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
