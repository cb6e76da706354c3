"""
The same load on Ollama, on its OpenAI-compatible route and on llama-server.

The figures go to bench/results/engines.json.

    runs     every route driven by the same plan, turn by turn: a change of the machine meets
             all of them. What is told of a route is the median of its turns
    first    from the start of `fleet load-test` to the first request that its server works on

Needs what `make repro` leaves. Writes the table of docs/load-test.md with `--docs`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.overhead import machine_class, require_quiet
from pipelines import atomic, console, declaration, machine, params, prompts, toolchain, wording
from pipelines.layout import Layout
from pipelines.load_examine import Examiner
from pipelines.load_test import render_modelfile
from pipelines.serving import engine as engines
from pipelines.serving import server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.load_records import LoadRun
    from pipelines.params import LoadTestSlice

ROOT = Path(__file__).resolve().parent.parent
MODEL, TYPE = "tiny-llama", "Q8_0"
TURNS = 3
STARTS = 3
# The server says so as soon as it works on a request.
FIRST_REQUEST = re.compile(r"processing task")
WITHIN_S = 60.0
DOCS = ROOT / "docs/load-test.md"
BEGIN, END = "<!-- engines: begin -->\n", "<!-- engines: end -->\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="only write the table again")
    target = ROOT / "bench/results/engines.json"
    if not parser.parse_args().docs:
        require_quiet()
        atomic.write_json(target, measure())
    figures = json.loads(target.read_text())
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    atomic.write_text(DOCS, f"{before}{BEGIN}\n{table(figures)}\n{END}{after}")
    console.out(table(figures))


def measure() -> dict[str, Any]:
    """Drive every route in turn, and time the starts."""
    at = Layout()
    declared = declaration.load(at.params)
    wanted = params.load_test_slice(declared, MODEL)
    tools = toolchain.load(at)
    facts = machine.probe()
    before = machine_class()
    examiner = Examiner(
        wanted=wanted,
        at=at,
        prompts=prompts.load(at.prompts),
        modelfile=render_modelfile(wanted, at),
        threads=wanted.threads or facts["cpu"]["cores_count"],
    )
    found: dict[str, list[tuple[LoadRun, ...]]] = {}
    versions: dict[str, str] = {}
    for turn in range(TURNS):
        console.step(f"turn {turn + 1} of {TURNS}")
        for name, version, runs in routes(examiner, wanted, tools):
            found.setdefault(name, []).append(runs)
            versions[name] = version
    return {
        "schema_version": 1,
        "machine": before,
        "model": f"{MODEL} {TYPE}",
        "parallel": wanted.serving.parallel,
        "turns": TURNS,
        "routes": [
            {"name": name, "version": versions[name], "runs": medians(turns)}
            for name, turns in found.items()
        ],
        "first_request_s": [round(first_request_s(at), 2) for _ in range(STARTS)],
    }


def routes(
    examiner: Examiner, wanted: LoadTestSlice, tools: toolchain.Toolchain
) -> Iterator[tuple[str, str, tuple[LoadRun, ...]]]:
    """Yield name, version and runs of Ollama, its OpenAI-compatible route, and llama-server."""
    for kind in ("ollama", "llama-server"):
        serving = wanted.serving.model_copy(update={"engine": kind})
        engine = engines.find(serving, tools, log=examiner.log)
        with server.open_host(
            engine, examiner.settings, model=MODEL, at=examiner.at, log=examiner.log
        ) as host:
            with host.load(examiner.file(TYPE)) as loaded:
                name = "Ollama" if kind == "ollama" else "llama-server"
                yield name, engine.id.version, drive(examiner, loaded)
            if kind == "ollama":
                with host.load(examiner.file(TYPE)) as loaded:
                    yield "Ollama, /v1", engine.id.version, drive(examiner, loaded.as_openai())


def drive(examiner: Examiner, loaded: server.Loaded) -> tuple[LoadRun, ...]:
    """Run the declared ladder and the open run."""
    runs: list[LoadRun] = []
    examiner.session(loaded).drive(runs, loaded.verify)
    return tuple(runs)


def medians(turns: list[tuple[LoadRun, ...]]) -> list[dict[str, Any]]:
    """Return each run of the plan with the medians of its turns."""

    def of(runs: tuple[LoadRun, ...], name: str) -> float | None:
        values = []
        for run in runs:
            value = getattr(run, name)
            values.append(getattr(value, "p50", value))
        known = [value for value in values if value is not None]
        return round(statistics.median(known), 3) if known else None

    names = ("ttft_ms", "tpot_ms", "e2e_ms", "output_tok_s", "requests_s", "output_tokens_median",
             "prompt_tokens_median", "effective_slots")  # fmt: skip
    return [
        {
            "name": same[0].name,
            "requests_count": sum(run.requests_count for run in same),
            "ok_count": sum(run.ok_count for run in same),
            **{name: of(same, name) for name in names},
        }
        for same in zip(*turns, strict=True)
    ]


def first_request_s(at: Layout) -> float:
    """Start the verb as a user does, and wait until its server works on a request."""
    log = at.log("load-test", MODEL)
    log.unlink(missing_ok=True)
    started = time.monotonic()
    with subprocess.Popen(  # noqa: S603 - our own argv
        [sys.executable, "-m", "pipelines", "load-test", MODEL, "--prompts"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as verb:
        while not (log.exists() and FIRST_REQUEST.search(log.read_text(errors="replace"))):
            if time.monotonic() - started > WITHIN_S or verb.poll() not in {None, 0}:
                verb.kill()
                raise SystemExit(f"no request within {WITHIN_S:.0f} s; see {log}")
            time.sleep(0.01)
        took_s = time.monotonic() - started
        verb.wait()
    return took_s


def table(figures: dict[str, Any]) -> str:
    """Set the routes side by side."""
    heads = [route["name"] for route in figures["routes"]]
    lines = [
        "| run | | " + " | ".join(heads) + " |",
        "|:--|:--|" + "--:|" * len(heads),
    ]
    words = (
        ("ttft_ms", "TTFT p50, ms"), ("tpot_ms", "TPOT p50, ms"), ("e2e_ms", "e2e p50, ms"),
        ("output_tok_s", "output, tok/s"), ("requests_s", "requests, 1/s"),
    )  # fmt: skip
    for rows in zip(*(route["runs"] for route in figures["routes"]), strict=True):
        for key, label in words:
            cells = " | ".join(wording.number(row[key]) for row in rows)
            lines.append(f"| {rows[0]['name']} | {label} | {cells} |")
    where = figures["machine"]
    starts = ", ".join(f"{each:.1f}" for each in figures["first_request_s"])
    lines.append(
        f"\n{figures['model']}, {figures['parallel']} slots, medians of {figures['turns']} turns; "
        f"{where['cpu']}, {where['cores_count']} cores. From `fleet load-test` to the first "
        f"request: {starts} s.\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
