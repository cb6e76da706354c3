"""
The best quant of one model for each host, and one sentence for each of the others.

The rule, in order; nothing is weighed against anything else, so that every step can be audited:

1. Doubt first: a quant whose measurement cannot be trusted or compared never wins
   (`pipelines.evidence`).
2. Gates: each declared limit must be kept. A limit that cannot be judged is not kept. A quant that
   the task evals prove harmed (`pipelines.harm`) has missed one.
3. Memory: the worse of predicted and measured memory, plus the margin, must fit the host.
4. Objective: `speed` is decode speed at the deepest measured depth, `quality` the mean divergence,
   `size` the size of the file; of an encoder `speed` is prefill speed and `quality` 1 - the mean
   cosine of its embeddings. A quant leaves the field if another one is *clearly* better: by more
   than the minimum effect and with intervals that do not touch.
5. Who is left is equally good. The incumbent stays if it is among them. Otherwise the order is
   exact: lower divergence, smaller file, faster, name; for `quality` faster before smaller.

Step 4 compares with everybody and step 5 is a total order. So what is worsened never gains, and
leaving out a quant that failed, or that another one clearly beats, never changes the winner.

What "better" means stands in `pipelines.objectives`, the limits in `pipelines.limits`, the rule
itself and its sentences in `pipelines.election`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import atomic, harm, proc, records
from pipelines.election import Election
from pipelines.errors import MachineError
from pipelines.evaluate_records import EvaluateRecord
from pipelines.evidence import Trusted, examine
from pipelines.limits import Miss, applying, gate_notes, memory_notes
from pipelines.load_records import SweepRecord
from pipelines.objectives import dominators
from pipelines.records import BenchmarkRecord, Candidate, ChoiceRecord, QuantizeRecord

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import ChooseSlice

_GIT_EXIT_ABSENT = 128
_GIT_SAYS_ABSENT = (
    "not a git repository",
    "does not exist in",
    "but not in",
    "invalid object name",
)


def choose(
    slice_: ChooseSlice,
    quantized: Mapping[str, QuantizeRecord | str],
    measured: Mapping[str, BenchmarkRecord | str],
    incumbents: Mapping[str, str] | None = None,
    evaluated: EvaluateRecord | None = None,
) -> ChoiceRecord:
    """
    Choose; no file is read or written.

    Args:
        slice_: Quants, gates, objective, minimum effects and hosts.
        quantized: Record of each declared key, or why there is none.
        measured: Record of each declared key, or why there is none.
        incumbents: Type that was chosen for each host in the last commit, if one was.
        evaluated: Task evals, if there are any: a quant that they prove harmed misses a gate.
    """
    evidence = examine(slice_, quantized, measured)
    trusted = [one for one in evidence if isinstance(one, Trusted)]
    above = dominators(trusted, slice_.choose)
    # Those that are trusted are of one kind, and have one depth.
    is_encoder = bool(trusted) and trusted[0].is_encoder
    deepest = trusted[0].deepest_decode if trusted else None
    harmed = {one.type: _harms(one, evaluated) for one in trusted} if evaluated else {}
    return ChoiceRecord(
        model=slice_.model,
        objective=slice_.objective,
        context_tokens=slice_.context_tokens,
        decode_depth_tokens=deepest.depth_tokens if deepest else None,
        hw_id=trusted[0].benchmark.machine.hw_id if trusted else None,
        gates=applying(slice_.gates, to_encoder=is_encoder),
        notes=(
            *memory_notes(trusted, slice_.hosts),
            *gate_notes(slice_.gates, to_encoder=is_encoder),
        ),
        hosts=tuple(
            Election(slice_, host, evidence, above, (incumbents or {}).get(host), harmed).result()
            for host in slice_.hosts
        ),
    )


def _harms(one: Trusted, evaluated: EvaluateRecord) -> list[Miss]:
    """Say on which sets a quant is proven worse than f16, each as a limit that it misses."""
    alpha = evaluated.alpha
    return [
        Miss(harm.clause(set_, quant, alpha).removeprefix(f"{one.type} is "), alpha)
        for set_, quant in harm.found(evaluated, one.type, one.quantized.gguf.sha256)
    ]


# --- files ------------------------------------------------------------------------------------


def run(slice_: ChooseSlice, at: Layout) -> ChoiceRecord:
    """
    Choose among the declared quants of a model, whatever else lies in results/.

    Writes the rows of `dvc plots` and of `dvc metrics`. A record that is missing or unreadable is
    an INVALID candidate, not an error: the other quants of the model still get their verdict.
    """
    incumbents, notes = committed_winners(slice_.model, at)
    choice = decide(slice_, at, incumbents)
    candidates = choice.hosts[0].candidates if choice.hosts else ()
    shown = [one for one in candidates if one.verdict != "INVALID"]
    atomic.write_json(at.frontier(slice_.model), [_frontier_row(one) for one in shown])
    atomic.write_json(at.metrics(slice_.model), {one.type: _metrics_row(one) for one in shown})
    swept = sweep_notes(slice_, at, _read_all(slice_, at, "quantize", QuantizeRecord))
    return choice.model_copy(update={"notes": (*choice.notes, *notes, *swept)})


def decide(slice_: ChooseSlice, at: Layout, incumbents: Mapping[str, str]) -> ChoiceRecord:
    """
    Choose by the records on disk; nothing is written.

    Args:
        slice_: Quants, gates, objective, minimum effects and hosts.
        at: The checkout.
        incumbents: Type that was chosen for each host before.
    """
    # Without sets it says nothing; with one declared, the verdict misses it (`pipelines.verdict`).
    evaluated = records.read_or_reason(at.model_record("evaluate", slice_.model), EvaluateRecord)
    return choose(
        slice_,
        _read_all(slice_, at, "quantize", QuantizeRecord),
        _read_all(slice_, at, "benchmark", BenchmarkRecord),
        incumbents,
        None if isinstance(evaluated, str) else evaluated,
    )


def sweep_notes(
    slice_: ChooseSlice, at: Layout, quantized: Mapping[str, QuantizeRecord | str]
) -> tuple[str, ...]:
    """
    Say of each swept quant what it does with a part of its layers on the GPU.

    A sweep of another file than the declared one, or one that cannot be read, says nothing.
    """
    notes = []
    for key, type_ in slice_.quants.items():
        swept = records.read_or_reason(at.sweep_record(slice_.model, type_), SweepRecord)
        made = quantized[key]
        if isinstance(swept, str) or isinstance(made, str):
            continue
        if swept.gguf_sha256 == made.gguf.sha256:
            notes.append(_sweep_note(swept))
    return tuple(notes)


def _sweep_note(swept: SweepRecord) -> str:
    """Say it in a sentence: `Q8_0 over the layers on the GPU (of 33): 0 4.1 tok/s, 33 no fit.`."""
    points = (
        f"{point.gpu_layers}: "
        + (f"{point.output_tok_s:.3g} tok/s" if point.output_tok_s is not None else "not served")
        for point in swept.points
    )
    return (
        f"{swept.type} with a part of its {swept.layers_count} layers on the GPU, one request at "
        f"a time: {', '.join(points)}."
    )


def _read_all(
    slice_: ChooseSlice, at: Layout, stage: str, kind: type[records.R]
) -> dict[str, records.R | str]:
    return {
        key: records.read_or_reason(at.quant_record(stage, slice_.model, type_), kind)
        for key, type_ in slice_.quants.items()
    }


def _frontier_row(one: Candidate) -> dict[str, str | float | bool | None]:
    embeds = {} if one.cosine_mean is None else {"cosine_mean": one.cosine_mean}
    return {
        "type": one.type,
        "size_mib": one.size_mib,
        "memory_mib": one.memory_mib,
        "decode_tok_s": one.decode_tok_s,
        "kld_mean_nats": one.kld_mean_nats,
        "on_frontier": one.on_frontier,
        "verdict": one.verdict,
        **embeds,
    }


def _metrics_row(one: Candidate) -> dict[str, float]:
    names = (
        "decode_tok_s", "prefill_tok_s", "kld_mean_nats", "kld_p999_nats", "same_top", "ppl_ratio",
        "cosine_mean", "memory_mib", "size_mib",
    )  # fmt: skip
    values = ((name, getattr(one, name)) for name in names)
    return {name: value for name, value in values if value is not None}


def committed_winners(model: str, at: Layout) -> tuple[dict[str, str], tuple[str, ...]]:
    """
    Ask git what was chosen for each host in the last commit.

    A host that was not promoted then keeps what it had before.

    Returns:
        Type by host, and a note if there is an answer that cannot be used. No repository, no
        commit and no choice in it are ordinary: nothing is chosen yet.
    """
    from pipelines import host_records  # noqa: PLC0415 - it reads bundles

    unusable = "so no earlier choice is kept"
    path = at.model_record("choose", model)
    try:
        host = host_records.held(at)
        # Another measured host keeps what it chose itself, and once what was chosen for it.
        own = at.on_hosts(model) / host / path.name if host else path
        shown = _committed(own, model, at)
        if shown.code == _GIT_EXIT_ABSENT and own != path:
            shown = _committed(path, model, at)
    except MachineError:
        return {}, (f"git is not installed, {unusable}.",)
    if shown.code == _GIT_EXIT_ABSENT:
        absent = any(words in shown.stderr for words in _GIT_SAYS_ABSENT)
        return {}, () if absent else (f"git could not read the last commit, {unusable}.",)
    try:
        last = ChoiceRecord.model_validate_json(shown.stdout)
    except ValueError:
        return {}, (f"The committed choice is not one of this version, {unusable}.",)
    chosen = {
        one.host: one.winner if one.verdict == "PROMOTE" else one.incumbent for one in last.hosts
    }
    return {host: type_ for host, type_ in chosen.items() if type_ is not None}, ()


def _committed(path: Path, model: str, at: Layout) -> proc.Completed:
    """Ask git for a file of the last commit."""
    return proc.run(
        ["git", "show", f"HEAD:./{path.relative_to(at.root).as_posix()}"],
        cwd=at.root,
        log=at.log("choose", model),
        env={"LC_ALL": "C"},
        ok_codes=(0, _GIT_EXIT_ABSENT),
    )
