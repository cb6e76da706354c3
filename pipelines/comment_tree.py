"""
What a comment on a pull request says, as one tree of words and numbers.

`pipelines.comment` fills it from two trees of records, `pipelines.comment_render` shows it. Nothing
here is Markdown: every text may come from a stranger and is escaped where it is put.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from pipelines import wording

if TYPE_CHECKING:
    from pipelines.ci_records import Conclusion, PlanProblem, PlanRecord
    from pipelines.report_tree import ModelReport

# Where a pull request stands. `judged` has verdicts; of the others there is nothing to judge.
State = Literal[
    "measuring",  # a run was asked for, or is at work
    "judged",
    "empty",  # no model differs from the base
    "problems",  # params.yaml cannot be read as a declaration
    "over-budget",  # it costs more than params.yaml allows, and nobody agreed
    "cancelled",
    "waiting",  # GitHub starts the run when somebody has approved it
    "failed",  # a job ended before there was something to judge
]
Outcome = Literal["PASS", "HOLD", "FAIL", "INVALID"]
# In how many columns a table is still read beside a pull request.
MAX_COLUMNS: Final = 9


@dataclass(frozen=True, kw_only=True)
class Cell:
    """
    One cell: what is there now, small below it what changed, and a mark before it.

    Attributes:
        text: A number or a word.
        change: `+0.4 % ~`, `new`; empty if nothing can be said.
        interval: In which the change lies: `[-0.6, +1.4]`.
        mark: An emoji; only cells that are gated have one.
    """

    text: str
    change: str = ""
    interval: str = ""
    mark: str = ""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of a table; `is_strong` is the winner, the only line in bold."""

    cells: tuple[Cell, ...]
    is_strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """
    A table of cells.

    Attributes:
        heads: One for each column, with its unit.
        numbers: Columns that stand to the right, from 0.
        rows: In the order of the declaration.
        notes: What has to be known to read it, as sentences.
    """

    heads: tuple[str, ...]
    numbers: frozenset[int]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Hold the promise of few columns."""
        assert len(self.heads) <= MAX_COLUMNS, "a table of a comment is narrow"
        assert all(len(row.cells) == len(self.heads) for row in self.rows), "rows are whole"


@dataclass(frozen=True, kw_only=True)
class GateLine:
    """
    One gate of a winner: what was found and what was due.

    Attributes:
        name: `max_kld_mean_nats`, `load test: ttft`, `conversion`.
        outcome: What follows; HOLD and INVALID are those of the verdict.
        value: With its unit.
        limit: With its unit.
        host: For which host it was judged; empty if for all.
        sentence: The whole of it in words, of one that does not pass.
    """

    name: str
    outcome: Outcome
    value: str
    limit: str
    host: str = ""
    sentence: str = ""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that differs from the base: `revision`, what it was, what it is."""

    what: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """One record of the past: decode speed in tokens a second, with its interval."""

    commit: str
    day: str
    value_tok_s: float
    low_tok_s: float
    high_tok_s: float


@dataclass(frozen=True, kw_only=True)
class History:
    """Decode speed of one quant on one kind of hardware, the oldest record first."""

    type: str
    what: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class HostLine:
    """The verdict for one host, or for several of which the same is to be said."""

    where: str
    verdict: str
    sentence: str
    next_step: str = ""


@dataclass(frozen=True, kw_only=True)
class HostTable:
    """What a second machine measured."""

    host: str
    table: Table
    report: ModelReport


@dataclass(frozen=True, kw_only=True)
class ModelComment:
    """
    What a pull request means for one model.

    Attributes:
        name: Its key.
        verdict: The worst over its hosts; UNMEASURED, or REMOVED if it is no more.
        verb: What the verdict does with it: `promote`, `hold`, `measure again`.
        winner: Type of the quant that is shown first; empty if none is chosen.
        was: What that is in the base: `was Q8_0`, `as before`, `new`; empty if nothing is chosen.
        why: Why nothing is chosen, or not to be believed, as a clause; empty otherwise.
        hosts: The verdict in words, for each host.
        next_step: What to do, as a sentence; empty where nothing is.
        against: The winner against that of the base, as a sentence; empty if there is none.
        table: Its quants against the base; None if nothing is measured.
        row: Its winner as one line of the fleet's table.
        gates: All of the winner.
        changes: Upstream and what was made of it, against the base.
        declared: What was edited in params.yaml, as sentences.
        covered: Whether nothing had to be measured.
        rollback: How to take it back: commands, or why there is none.
        rollback_note: What that does, as a sentence.
        cost: What measuring it took or takes, as clauses.
        history: None where git holds fewer than two records.
        others: What second machines measured.
        report: Everything else, as the report tells it; None of a model that is no more.
    """

    name: str
    verdict: str
    verb: str
    winner: str = ""
    was: str = ""
    why: str = ""
    hosts: tuple[HostLine, ...] = ()
    next_step: str = ""
    against: str = ""
    table: Table | None = None
    row: tuple[Cell, ...] = ()
    gates: tuple[GateLine, ...] = ()
    changes: tuple[Change, ...] = ()
    declared: tuple[str, ...] = ()
    covered: bool = False
    rollback: tuple[str, ...] = ()
    rollback_note: str = ""
    cost: tuple[str, ...] = ()
    history: History | None = None
    others: tuple[HostTable, ...] = ()
    report: ModelReport | None = None

    @property
    def against_promotion(self) -> tuple[GateLine, ...]:
        """The gates that do not hold."""
        return tuple(one for one in self.gates if one.outcome != "PASS")

    @property
    def headline(self) -> str:
        """The verdict in a few words: `promote Q4_K_M (was Q8_0): 7 of 7 gates pass`."""
        was = f"({self.was})" if self.was else ""
        text = " ".join(filter(None, (self.verb, self.winner, was)))
        return f"{text}: {self.reason}" if self.reason else text

    @property
    def reason(self) -> str:
        """What the headline ends with: how many gates hold, or why nothing is chosen."""
        return self.why or self.gates_words

    @property
    def gates_words(self) -> str:
        """Return `7 of 7 gates pass`; nothing if none was looked at."""
        if not self.gates:
            return ""
        verb = "passes" if len(self.gates) == 1 else "pass"
        passed_count = len(self.gates) - len(self.against_promotion)
        return f"{passed_count} of {wording.counted(len(self.gates), 'gate')} {verb}"


@dataclass(frozen=True, kw_only=True)
class Comment:
    """
    The whole comment.

    Attributes:
        state: Where the pull request stands.
        verdict: The worst of the models; None if nothing is judged.
        conclusion: Of the check run; None while a run is at work.
        title: The verdict in one line, without its mark; the title of the check run too.
        next_step: What to do, as a sentence; empty where nothing is.
        base: Commit of the base, 40 digits, or words; empty if unknown.
        head: The same of what was measured.
        models: Every affected one, in the order of the declaration.
        table: The winners of several models; None of one model.
        problems: What is wrong in params.yaml.
        failures: What went wrong before there was something to judge, as sentences.
        plan: What is to be measured, where, and what that costs.
        cost: Of all models, as a sentence; empty if unknown.
        run_url: Page of the run; empty outside Actions.
        commands: That make this comment again.
    """

    state: State
    verdict: str | None = None
    conclusion: Conclusion | None = None
    title: str
    next_step: str = ""
    base: str = ""
    head: str = ""
    models: tuple[ModelComment, ...] = ()
    table: Table | None = None
    problems: tuple[PlanProblem, ...] = ()
    failures: tuple[str, ...] = ()
    plan: PlanRecord | None = None
    cost: str = ""
    run_url: str = ""
    commands: tuple[str, ...] = ()
