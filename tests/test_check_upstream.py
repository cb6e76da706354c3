"""What is newer upstream, what of it is proven, and what only a person can decide."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import struct
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import sample
from hub import INSIDER, Fault, Hub
from record_factory import fetch_record

from pipelines import check_upstream, declaration, records, report, upstream_due, upstream_words
from pipelines.errors import ParamsError
from pipelines.hub_metadata import HubReader
from pipelines.layout import Layout
from pipelines.params import report_slice
from pipelines.upstream_records import EngineUpstream, UpstreamNotices, UpstreamRecord
from pipelines.version_tags import newest_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from subprocess import CompletedProcess

    from hub import Repo

    from pipelines.hub_metadata import Head
    from pipelines.upstream_records import ModelUpstream

    Fleet = Callable[..., CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent
REPO = "acme/Tiny"
MODEL = "tiny"
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=30)


def weights(value: int) -> bytes:
    """Make a safetensors file with one tensor of four bytes."""
    head = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
    ).encode()
    return struct.pack("<Q", len(head)) + head + bytes([value] * 4)


FILES = {
    "config.json": json.dumps(
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 2, "torch_dtype": "float16"}
    ).encode(),
    "model.safetensors": weights(0),
    "tokenizer.json": b'{"model": {"type": "BPE"}}',
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"---\nlicense: mit\n---\nA model.\n",
}


@pytest.fixture(name="hub")
def _hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        hub.use(monkeypatch)
        yield hub


@pytest.fixture(name="repo")
def _repo(hub: Hub) -> Repo:
    return hub.create(REPO, files=FILES, at=LONG_AGO)


class Operator:
    """A fork that declares models of the Hub, and looks at them now and later."""

    def __init__(self, root: Path) -> None:
        """Begin with nothing declared."""
        self.at = Layout(root)
        self.now = NOW
        self.last: UpstreamRecord | None = None
        self.declared: dict[str, dict[str, Any]] = {}
        self.section: dict[str, Any] = {"engines": False, "deadline_seconds": 20}

    def declare(self, revision: str, *, model: str = MODEL, **spec: Any) -> None:
        """Declare a model; the look before stays known."""
        self.declared[model] = {"source": f"hf:{REPO}", "revision": revision, **spec}
        self.write()

    def write(self) -> None:
        """Write params.yaml."""
        text = sample.of("params.yaml").read_text()
        before, rest = text.split("  tiny-llama:\n", 1)
        rest = rest[rest.index("\n# One line for each GGUF") :]
        common = {"context_tokens": 512, "objective": "size"}
        lines = [f"  {name}: {json.dumps(one | common)}" for name, one in self.declared.items()]
        rest = re.sub(
            r"(?ms)^quants:\n.*?\n\n",
            "quants:\n"
            + "".join(f"  {m}-Q8_0: {{model: {m}, type: Q8_0}}\n" for m in self.declared)
            + "\n",
            rest,
        )
        rest += f"\ncheck_upstream: {json.dumps(self.section)}\n"
        self.at.params.write_text(f"{before}{chr(10).join(lines)}\n{rest}")

    def look(self, *, days: float = 0, **options: Any) -> ModelUpstream:
        """Look, some days after the last time; return what is said of the only model."""
        self.now += timedelta(days=days)
        declared = declaration.load(self.at.params)
        options.setdefault("previous", self.last)
        self.last = check_upstream.look(self.at, declared, clock=lambda: self.now, **options)
        return self.last.models[0]


@pytest.fixture(name="operator")
def _operator(tmp_path: Path, repo: Repo) -> Operator:
    operator = Operator(tmp_path)
    operator.declare(repo.head)
    return operator


# --- what it costs ----------------------------------------------------------------------------


def test_what_did_not_move_costs_one_request(hub: Hub, operator: Operator, repo: Repo) -> None:
    """The answer that says so has everything; the next look, and the one after it, the same."""
    for _ in range(2):
        hub.forget()
        found = operator.look()

        assert (found.state, found.newest) == ("current", repo.head)
        assert len(hub.requests) == 1
        assert operator.last is not None
        assert operator.last.requests_count == 1
    assert hub.unexpected == []


def test_a_hundred_models_cost_a_hundred_requests(hub: Hub, tmp_path: Path) -> None:
    """One each and not one more, also where some of them moved and were described before."""
    operator = Operator(tmp_path)
    for number in range(100):
        repo = hub.create(f"acme/m{number}", files=FILES, at=LONG_AGO)
        operator.declared[f"m{number}"] = {"source": f"hf:acme/m{number}", "revision": repo.head}
        if number % 10 == 0:
            repo.commit({"model.safetensors": weights(1)}, "Better", at=LONG_AGO)
    operator.write()
    operator.look()
    hub.forget()

    operator.look()

    assert operator.last is not None
    assert {each.state for each in operator.last.models} == {"current", "moved"}
    assert len(hub.requests) == operator.last.requests_count == 100


def test_the_way_back_may_take_several_pages(hub: Hub, operator: Operator, repo: Repo) -> None:
    """Every commit between is met once; the declared one is found where it is."""
    hub.page = 2
    for number in range(5):
        repo.commit({"model.safetensors": weights(number + 1)}, f"Step {number}", at=LONG_AGO)

    found = operator.look()

    assert found.state == "moved"
    assert found.commits == tuple(f"Step {number}" for number in (4, 3, 2, 1, 0))
    assert len(hub.asked("*/commits/*")) == 3


def test_what_moved_is_described_once(hub: Hub, operator: Operator, repo: Repo) -> None:
    """The listing of the old, the way between, the changed files; afterwards one request."""
    new = repo.commit({"chat_template.jinja": b"{{ messages }}!"}, "Fix the template", at=LONG_AGO)

    first = operator.look()
    asked = [each.path for each in hub.requests]
    hub.forget()
    second = operator.look(days=1)

    assert (first.state, first.newest) == ("moved", new)
    assert first.difference is not None
    assert first.difference.classes == ("template",)
    assert first.commits == ("Fix the template",)
    assert first.next_step == f"fleet bump {MODEL}"
    assert not any(path.endswith(".safetensors") for path in asked)
    assert len(hub.requests) == 1
    assert second.difference == first.difference
    assert second.commits == first.commits


def test_no_weight_is_fetched_to_know_what_changed(
    hub: Hub, operator: Operator, repo: Repo
) -> None:
    """Other weights of 4 MB are told by their headers."""
    large = bytes(4 << 20)
    head = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "F16", "shape": [2 << 20],
                                       "data_offsets": [0, 4 << 20]}}
    ).encode()  # fmt: skip
    repo.commit({"model.safetensors": struct.pack("<Q", len(head)) + head + large}, at=LONG_AGO)

    found = operator.look()

    assert found.state == "moved"
    assert found.difference is not None
    assert found.difference.classes == ("weights",)
    assert found.difference.tensors is not None
    assert hub.sent_bytes() < 1 << 19


# --- what follows -----------------------------------------------------------------------------


def test_a_change_is_proposed_when_it_is_old_enough(operator: Operator, repo: Repo) -> None:
    """It waits for `cooldown_days` of its model or of the fleet, by the clock of the Hub."""
    repo.commit({"model.safetensors": weights(1)}, at=NOW - timedelta(days=2))

    young = operator.look()
    ripe = operator.look(days=1)
    operator.declare(operator.declared[MODEL]["revision"], cooldown_days=10)
    own = operator.look()

    assert (young.state, ripe.state, own.state) == ("waiting", "moved", "waiting")
    assert "2026-11-21 12:00" in young.next_step


class Timeless(HubReader):
    """A Hub that does not say when."""

    def look(self, repo: str, track: str) -> Head:
        """Look, and forget the time."""
        return dataclasses.replace(super().look(repo, track), last_modified=None)


@pytest.mark.parametrize("told", [LONG_AGO, NOW + timedelta(days=400), None])
def test_a_time_that_upstream_tells_does_not_shorten_the_wait(
    operator: Operator, repo: Repo, told: datetime | None
) -> None:
    """Set back, to come, or none: what a look of yesterday did not see is a day old at most."""
    assert operator.look().state == "current"
    repo.commit({"model.safetensors": weights(1)}, at=told or NOW, authored_at=LONG_AGO)
    kind = HubReader if told else Timeless

    states = [operator.look(days=days, reader=_reader(kind)).state for days in (1, 1, 0.5, 0.6)]

    assert states == ["waiting", "waiting", "waiting", "moved"]


def test_where_nobody_tells_a_time_it_begins_with_our_first_look(
    operator: Operator, repo: Repo
) -> None:
    """No time of the Hub and no look before: three days from now on."""
    repo.commit({"model.safetensors": weights(1)})

    states = [operator.look(days=days, reader=_reader(Timeless)).state for days in (0, 2.9, 0.2)]

    assert states == ["waiting", "waiting", "moved"]


def test_a_card_alone_is_not_proposed_unless_that_is_declared(
    operator: Operator, repo: Repo
) -> None:
    """A new text in README.md is said and nothing more; so is a file that no build reads."""
    pinned = repo.head
    repo.commit({"README.md": FILES["README.md"] + b"More words.\n"}, at=LONG_AGO)

    alone = operator.look()
    repo.commit({"README.md": FILES["README.md"], "notes.txt": b"x"}, at=LONG_AGO)
    nothing = operator.look()
    repo.commit({"README.md": FILES["README.md"] + b"More words.\n"}, at=LONG_AGO)
    operator.section["cards"] = True
    operator.declare(pinned)
    wanted = operator.look(days=4)

    assert [each.state for each in (alone, nothing, wanted)] == ["card", "card", "moved"]
    assert alone.difference is not None
    assert alone.difference.classes == ("card",)
    assert nothing.difference is not None
    assert nothing.difference.classes == ()


def test_an_ignored_commit_is_passed_over_and_the_next_one_is_not(
    hub: Hub, operator: Operator, repo: Repo
) -> None:
    """`ignore` names one commit; nothing is asked about it."""
    pinned = repo.head
    bad = repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    operator.declare(pinned, ignore=[bad])

    hub.forget()
    ignored = operator.look()
    assert len(hub.requests) == 1
    repo.commit({"model.safetensors": weights(2)}, at=LONG_AGO)

    assert (ignored.state, operator.look(days=4).state) == ("ignored", "moved")


def test_the_newest_tag_is_that_of_the_highest_version(
    hub: Hub, operator: Operator, repo: Repo
) -> None:
    """v1.10 is newer than v1.9; what is on main and has no tag is not proposed."""
    repo.tag("v1.9", repo.head)
    pinned = repo.head
    repo.tag("v1.10", repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO))
    repo.commit({"model.safetensors": weights(2)}, at=LONG_AGO)
    operator.declare(pinned, track="v*")

    found = operator.look()
    hub.forget()
    assert operator.look().state == "moved"
    assert len(hub.requests) == 2
    operator.declare(repo.head, track="v*")
    ahead = operator.look()

    assert (found.state, found.newest_tag, found.newest) == ("moved", "v1.10", repo.tags["v1.10"])
    assert ahead.state == "current"
    assert "newer than" in ahead.reason
    hub.forget()
    assert operator.look().state == "current"
    assert len(hub.requests) == 2


@pytest.mark.parametrize(
    ("pattern", "tags", "newest"),
    [
        ("v*", ["v1.9", "v1.10", "v1.2"], "v1.10"),
        ("v*", ["v1.0", "v1.0-rc2"], "v1.0"),
        ("v*", ["v1.0", "v2.0-rc1", "v2.0.dev3", "v2.0b"], "v2.0b"),
        ("v*", ["v2.0-rc1", "v2.0-rc10", "v2.0-beta"], "v2.0-rc10"),
        ("v*-rc*", ["v2.0-rc1", "v3.0"], "v2.0-rc1"),
        ("v*", ["1.0", "release"], None),
        ("2026*", ["2026-01-31", "2026-11-02", "2025-12-01"], "2026-11-02"),
        ("*", [], None),
        ("v1.*", ["v1.5.1", "v1.5", "v10.0"], "v1.5.1"),
    ],
)
def test_tags_are_in_the_order_of_versions(
    pattern: str, tags: list[str], newest: str | None
) -> None:
    """Numbers count as numbers; a pre-release only where there is no plain one, or by its name."""
    assert newest_tag(pattern, dict.fromkeys(tags)) == newest
    assert newest_tag(pattern, dict.fromkeys(reversed(tags))) == newest


# --- what a person has to decide --------------------------------------------------------------


def _renamed(repo: Repo) -> None:
    repo.rename("acme/New")


def _recreated(repo: Repo) -> None:
    repo.recreate({**FILES, "model.safetensors": weights(3)})


def _deleted(repo: Repo) -> None:
    repo.delete()


def _disabled(repo: Repo) -> None:
    repo.disable()


def _rewritten(repo: Repo) -> None:
    repo.rewrite({**FILES, "model.safetensors": weights(3)}, at=LONG_AGO)


def _another_line(repo: Repo) -> None:
    """Force-push where the old commit stays to be had: the Hub keeps what it has."""
    old = repo.branches.pop("main")
    repo.commit({**FILES, "model.safetensors": weights(3)}, at=LONG_AGO)
    repo.branch("old", old)


def _gated_and_moved(repo: Repo) -> None:
    repo.gate("manual")
    repo.commit({"chat_template.jinja": b"other"}, at=LONG_AGO)


def _without_a_tokenizer(repo: Repo) -> None:
    repo.commit({"tokenizer.json": None}, at=LONG_AGO)


def _without_main(repo: Repo) -> None:
    repo.branch("trunk", repo.head)
    del repo.branches["main"]


@pytest.mark.parametrize(
    ("what", "doubt", "said"),
    [
        (_renamed, "renamed", "answers as acme/New"),
        (_recreated, "owner", "another repository under the same name"),
        (_deleted, "gone", "is private or gated for us"),
        (_disabled, "disabled", "was disabled by the Hub"),
        (_rewritten, "revision-gone", "it is mistyped, or upstream rewrote its history"),
        (_another_line, "history", "is not in the history of"),
        (_gated_and_moved, "gated", "we have no access"),
        (_without_a_tokenizer, "unusable", "the tokenizer is missing"),
        (_without_main, "track-gone", "no such branch or tag"),
    ],
)
def test_without_a_proof_a_person_is_asked(
    operator: Operator, repo: Repo, what: Callable[[Repo], None], doubt: str, said: str
) -> None:
    """Each doubt has its word and a next step, and stays a doubt at the next look."""
    assert operator.look().state == "current"
    what(repo)

    for _ in range(2):
        found = operator.look(days=5)

        assert (found.state, found.doubt) == ("asks", doubt)
        assert said in found.reason
        assert found.next_step
    assert operator.last is not None
    assert operator.last.alarms == ()


def test_a_commit_that_was_fetched_is_gone_and_not_mistyped(operator: Operator, repo: Repo) -> None:
    """What is here stays, and can be served."""
    fetched = fetch_record(MODEL, source=f"hf:{REPO}", revision=repo.head)
    records.write(operator.at.model_record("fetch", MODEL), fetched)
    operator.look()
    _rewritten(repo)

    found = operator.look(days=5)

    assert found.doubt == "revision-gone"
    assert "its history was rewritten" in found.reason
    assert "can be served" in found.reason


def test_another_owner_is_asked_about_until_somebody_pins_by_hand(
    hub: Hub, operator: Operator, repo: Repo
) -> None:
    """The same name, made again with the same bytes: no PR until a person has taken it on."""
    operator.look()
    other = repo.recreate(FILES)
    other.commit({"model.safetensors": weights(3)}, at=LONG_AGO)

    assert [operator.look(days=1).doubt for _ in range(2)] == ["owner", "owner"]
    operator.declare(other.head)

    assert operator.look(days=1).state == "current"
    other.commit({"model.safetensors": weights(4)}, at=LONG_AGO)
    assert operator.look(days=9).state == "moved"
    assert hub.unexpected == []


def test_a_branch_that_went_back_is_asked_about(operator: Operator, repo: Repo) -> None:
    """Older than what is declared: no bump backwards."""
    old = repo.head
    operator.declare(repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO))
    repo.branch("kept", repo.head)
    repo.branch("main", old)

    found = operator.look()

    assert (found.state, found.doubt) == ("asks", "history")
    assert "went back" in found.reason


def test_what_is_taken_back_is_no_longer_proposed(operator: Operator, repo: Repo) -> None:
    """Upstream's branch means the declared commit again."""
    pinned = repo.head
    new = repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    assert operator.look().state == "moved"
    repo.branch("main", pinned)

    found = operator.look()

    assert found.state == "current"
    assert f"{new[:12]}, which was seen before, is taken back" in found.reason


def test_one_model_in_doubt_does_not_keep_the_others_back(
    hub: Hub, operator: Operator, repo: Repo
) -> None:
    """Each has its own state."""
    other = hub.create("acme/Other", files=FILES, at=LONG_AGO)
    operator.declare(other.head, model="other", source="hf:acme/Other")
    other.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    repo.delete()

    operator.look()

    assert operator.last is not None
    assert [each.state for each in operator.last.models] == ["asks", "moved"]


def test_our_token_sees_what_is_private_and_goes_nowhere_else(
    hub: Hub, operator: Operator, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the repository is not there, or not for us: both are said."""
    repo.private = True

    stranger = operator.look()
    monkeypatch.setenv("HF_TOKEN", INSIDER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)

    assert (stranger.state, stranger.doubt) == ("asks", "gone")
    assert "HF_TOKEN" in stranger.next_step
    assert operator.look().state == "current"
    repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    hub.forget()
    assert operator.look(days=4).state == "moved"
    # Weights lie with a storage of another origin, which has no business with our token.
    assert {each.authorized for each in hub.asked("/api/*")} == {True}
    assert {each.authorized for each in hub.requests} == {True, False}


# --- trouble ----------------------------------------------------------------------------------

PASSING = ("reset_before", "reset_mid", "status", "cut_mid", "gzip", "chunked", "no_length")
LASTING = (
    "html", "listing_html", "listing_nonsense", "listing_cut", "empty", "short", "redirect_other",
    "redirect_loop", "reset_before", "status", "allowance", "retry_after", "retry_date",
    "chunked_short", "gzip_lie", "listing_huge",
)  # fmt: skip


@pytest.mark.parametrize("kind", PASSING)
def test_a_fault_that_passes_changes_nothing(
    hub: Hub, operator: Operator, repo: Repo, kind: str
) -> None:
    """It is asked again."""
    repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    hub.fault("/api/*", Fault(kind))

    assert operator.look(reader=_reader()).state == "moved"


@pytest.mark.parametrize("kind", LASTING)
def test_a_hub_that_fails_is_unknown_and_what_was_known_stays(
    hub: Hub, operator: Operator, repo: Repo, kind: str
) -> None:
    """Never an exception, never another state; the next success goes on from the last one."""
    repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    known = operator.look()
    hub.fault("/api/*", Fault(kind), times=None)

    found = operator.look(days=1, reader=_reader())

    assert found.state == "unknown"
    assert found.reason
    assert found.next_step
    kept = ("newest", "difference", "commits", "owner", "repository_id", "last_success_at")
    assert [getattr(found, name) for name in kept] == [getattr(known, name) for name in kept]
    assert (found.last_state, found.last_reason) == (known.state, known.reason)


class _LedAway(BaseHTTPRequestHandler):
    """Answers everything with a redirect."""

    place = ""

    def do_GET(self) -> None:
        """Lead away."""
        self.send_response(302)
        self.send_header("Location", self.place)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    "place", ["http://[::1", "//127.0.0.1:1/x", "", "javascript:alert(1)", "http://a" + "b" * 9000]
)
def test_a_redirect_to_nowhere_is_followed_nowhere(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """No address, another scheme, another host, a circle: unknown, in words."""
    handler = type("Handler", (_LedAway,), {"place": place})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")

        found = operator.look(reader=_reader())

        server.shutdown()
    assert found.state == "unknown"
    assert found.reason.startswith("hf:acme/Tiny: ")


@pytest.mark.parametrize("kind", ["stall_before", "stall_mid", "drip", "listing_endless"])
def test_an_answer_that_does_not_end_ends_with_the_look(
    hub: Hub, operator: Operator, kind: str
) -> None:
    """No second longer than the time for the look, and its grace."""
    operator.section["deadline_seconds"] = 5  # the least that may be declared
    operator.declare(operator.declared[MODEL]["revision"])
    hub.fault("/api/*", Fault(kind, pause_s=0.01), times=None)
    started = datetime.now(UTC)

    found = operator.look(reader=_reader(seconds=0.4))

    assert found.state == "unknown"
    assert datetime.now(UTC) - started < timedelta(seconds=6)


def test_a_hub_that_asks_for_an_hour_is_left_alone(hub: Hub, operator: Operator) -> None:
    """Retry-After beyond the deadline: no pause, one request, and the time is named."""
    hub.fault("/api/*", Fault("retry_after", status=429, retry_after="3600"), times=None)
    pauses: list[float] = []

    found = operator.look(reader=_reader(pause=pauses.append))

    assert found.state == "unknown"
    assert "left alone until" in found.reason
    assert pauses == []
    assert len(hub.requests) == 1


def test_a_file_that_is_not_as_listed_proves_nothing(
    hub: Hub, operator: Operator, repo: Repo
) -> None:
    """A mirror that flips a bit of a small file: unknown, and right when the mirror is."""
    repo.commit({"chat_template.jinja": b"{{ other }}"}, at=LONG_AGO)
    hub.fault("*/resolve/*", Fault("flip"), times=None)

    found = operator.look()

    assert found.state == "unknown"
    assert "not what the Hub lists" in found.reason


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("listing_missing_digest", "without size or digest"),
        ("listing_missing_size", "without size or digest"),
        ("listing_twice", "twice"),
    ],
)
def test_files_that_nobody_could_verify_are_not_proposed(
    hub: Hub, operator: Operator, repo: Repo, kind: str, said: str
) -> None:
    """A listing without digests, or with two of them for one name."""
    repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    hub.fault("*/revision/*", Fault(kind), times=None)

    found = operator.look()

    assert (found.state, found.doubt) == ("asks", "unusable")
    assert said in found.reason


@pytest.mark.parametrize(
    "kind", ["moved_mid", "gated_mid", "gone_mid", "renamed_mid", "rewritten_mid", "replaced_mid"]
)
def test_what_changes_while_we_look_proposes_nothing_unproven(
    hub: Hub, operator: Operator, repo: Repo, kind: str
) -> None:
    """Either it is what the first answer said, all of it, or a person is asked."""
    new = repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    hub.fault("*/commits/*", Fault(kind))

    found = operator.look()

    assert (found.state, found.newest) in {("moved", new), ("asks", new)}
    assert (found.state == "moved") == (kind == "moved_mid")


def test_text_of_a_stranger_is_harmless_wherever_it_is_shown(
    operator: Operator, repo: Repo, capsys: pytest.CaptureFixture[str]
) -> None:
    """Titles of commits: no runner command, no escape, no mention, no link."""
    repo.commit(
        {"model.safetensors": weights(1)},
        "::error::boo \x1b[31m @team ![x](https://evil.example) " + "x" * 500,
        at=LONG_AGO,
    )
    operator.look()
    assert operator.last is not None

    shown = "\n".join(upstream_words.lines(operator.last))
    summary = upstream_words.markdown(operator.last)

    assert "::error::" not in shown + summary
    assert "\x1b" not in shown + summary
    assert "](" not in summary
    assert max(map(len, operator.last.models[0].commits)) <= 200
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("where", "state"), [("commits/{head}", "moved"), ("revision/main?blobs=true", "asks")]
)
def test_text_that_no_file_can_hold_breaks_no_record(
    hub: Hub, operator: Operator, repo: Repo, where: str, state: str
) -> None:
    """Half a surrogate pair in a title, in a name: the look ends well and can be written."""
    repo.commit({"model.safetensors": weights(1), "LICENSE.xxxxxx": b""}, "xxxxxx", at=LONG_AGO)
    path = where.format(head=repo.head)
    told = requests.get(f"{hub.url}/api/models/{REPO}/{path}", timeout=9).content
    other = told.replace(b"xxxxxx", rb"\ud800")
    hub.fault(f"*/{path.partition('?')[0]}", Fault("swapped", content=other), times=None)

    found = operator.look()

    assert other != told
    assert found.state == state
    assert "?" in (found.commits or (found.reason,))[0]
    assert operator.last is not None
    records.write(operator.at.upstream, operator.last)
    assert check_upstream.read(operator.at) == operator.last


# --- silence ----------------------------------------------------------------------------------


def test_silence_for_two_periods_is_an_alarm_in_the_report(hub: Hub, operator: Operator) -> None:
    """Not before; and when it speaks again the report is what it was, byte for byte."""

    def look(days: float) -> tuple[bool, str]:
        operator.look(days=days, reader=_reader())
        assert operator.last is not None
        return bool(operator.last.alarms), _reported(operator)

    _, quiet = look(0)
    hub.fault("/api/*", Fault("status"), times=None)

    assert look(1) == (False, quiet)
    silent, loud = look(1.5)
    assert silent
    assert "nothing was heard of it for two periods of 24 h" in loud
    assert "Upstream" not in quiet
    # The same alarm a day later is the same bytes.
    assert look(1) == (True, loud)
    hub.forget()
    assert look(1) == (False, quiet)


def test_a_model_that_never_answered_is_an_alarm_too(hub: Hub, operator: Operator) -> None:
    """Silence is counted from the first time that it was asked."""
    hub.fault("/api/*", Fault("status"), times=None)

    alarms = []
    for days in (0, 1, 1.1):
        operator.look(days=days, reader=_reader())
        assert operator.last is not None
        alarms.append(bool(operator.last.alarms))

    assert alarms == [False, False, True]


def test_an_engine_that_is_silent_is_an_alarm_when_it_was_asked(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same rule. Looks that do not ask engines hand on what is known, an alarm too."""
    silent = EngineUpstream(
        engine="ollama", pinned="0.33.0", state="unknown", reason="No index.",
        last_success_at=NOW - timedelta(days=3),
    )  # fmt: skip
    monkeypatch.setattr("pipelines.upstream_engines.look", lambda *_, **__: (silent,))
    operator.section["engines"] = True
    operator.declare(operator.declared[MODEL]["revision"])

    operator.look()
    assert operator.last is not None
    (alarm,) = operator.last.alarms
    engines = operator.last.engines
    operator.look(days=9, is_stage=True)
    handed_on = operator.last
    operator.look(previous=handed_on.model_copy(update={"alarms": ()}), is_stage=True)

    assert alarm.startswith("ollama: nothing was heard of it for two periods of 24 h;")
    assert engines[0].first_asked_at == NOW
    assert (handed_on.engines, handed_on.alarms) == (engines, (alarm,))
    assert operator.last.alarms == ()


def test_what_waits_for_a_person_and_what_moved_are_in_the_report(
    hub: Hub, operator: Operator, repo: Repo
) -> None:
    """With the reason, without a time; a Hub that is away for a day does not change that."""
    other = hub.create("acme/Other", files=FILES, at=LONG_AGO)
    operator.declare(other.head, model="other", source="hf:acme/Other")
    other.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    repo.delete()
    operator.look()

    told = _reported(operator)
    hub.fault("/api/*", Fault("status"), times=None)
    operator.look(days=1, reader=_reader())

    assert "- **asks**: tiny: hf:acme/Tiny is not there" in told
    assert "- **newer**: other: " in told
    assert _reported(operator) == told


def _reported(operator: Operator) -> str:
    """Write what the verb writes, and return the report of it, Markdown and HTML."""
    assert operator.last is not None
    declared = declaration.load(operator.at.params)
    operator.at.upstream_notices.parent.mkdir(exist_ok=True)
    operator.at.upstream_notices.write_text(upstream_words.notices_json(operator.last, declared))
    operator.at.report_markdown.parent.mkdir(exist_ok=True)
    report.run(report_slice(declared), operator.at)
    return operator.at.report_markdown.read_text() + operator.at.report_html.read_text()


# --- the command line -------------------------------------------------------------------------


@pytest.fixture(name="fork")
def _fork(tmp_path: Path) -> Path:
    """The embedded model, declared as the sample does."""
    sample.take(tmp_path, "params.yaml", "examples")
    return tmp_path


OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


def test_a_directory_is_held_against_its_digest_without_a_network(fleet: Fleet, fork: Path) -> None:
    """Current; after an edit it moved, whatever its age, and the next step is a local branch."""
    same = fleet("check-upstream", "tiny-llama", "--json", "--strict", **OFFLINE)
    path = fork / "examples/tiny-llama/chat_template.jinja"
    if not path.exists():
        path = fork / "examples/tiny-llama/generation_config.json"
    path.write_text(path.read_text() + "\n")
    other = fleet("check-upstream", "tiny-llama", "--json", **OFFLINE)
    strict = fleet("check-upstream", "tiny-llama", "--strict", **OFFLINE)

    assert same.returncode == other.returncode == 0, same.stderr + other.stderr
    assert strict.returncode == 5
    (current,) = json.loads(same.stdout)["models"]
    (moved,) = json.loads(other.stdout)["models"]
    assert (current["state"], moved["state"]) == ("current", "moved")
    assert moved["next_step"] == "fleet bump tiny-llama --local"
    assert json.loads(other.stdout)["requests_count"] == 0
    assert "tiny-llama  moved" in strict.stdout


def test_a_file_that_cannot_be_read_is_no_reason_to_look_at_no_other_model(
    fork: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's refusal is what is said of that model, with the file."""

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path / "model.safetensors"))

    monkeypatch.setattr("pipelines.fetch.content_digest", refused)
    at = Layout(fork)

    (model,) = check_upstream.look(at, declaration.load(at.params), models=["tiny-llama"]).models

    assert model.state == "unknown"
    assert "examples/tiny-llama/model.safetensors: Permission denied." in model.reason


def test_the_stage_looks_once_a_period_and_again_after_an_edit(fleet: Fleet, fork: Path) -> None:
    """The second time nothing is even imported; the record and what the report reads stay."""
    at = Layout(fork)
    first = fleet("check-upstream", "--if-due", **OFFLINE)
    written = at.upstream.read_bytes(), at.upstream.stat().st_mtime_ns
    second = fleet("check-upstream", "--if-due", PYTHONPROFILEIMPORTTIME="1", **OFFLINE)
    kept = at.upstream.read_bytes(), at.upstream.stat().st_mtime_ns
    at.params.write_text(at.params.read_text() + "\n# A comment.\n")
    fleet("check-upstream", "--if-due", **OFFLINE)

    assert first.returncode == second.returncode == 0
    assert "tiny-llama  current" in first.stdout
    assert second.stdout == ""
    assert not re.search(r"\b(pydantic|huggingface_hub|ruamel)", second.stderr)
    assert kept == written
    assert at.upstream.read_bytes() != written[0]
    assert json.loads(at.upstream_notices.read_text()) == json.loads(
        UpstreamNotices().model_dump_json()
    )


@pytest.mark.parametrize(
    ("name", "hours"),
    [("checked_at", 2), ("next_at", -2), ("params_sha256", None), ("next_at", None), ("all", None)],
)
def test_a_record_that_is_odd_or_old_is_due(fork: Path, name: str, hours: int | None) -> None:
    """Of a time to come, over, of a part of the fleet, broken: the stage looks again."""
    at = Layout(fork)
    check_upstream.main(at, if_due=True)
    assert upstream_due.is_fresh(at)
    told = json.loads(at.upstream.read_text())
    now = datetime.now(UTC)

    told[name] = None if hours is None else (now + timedelta(hours=hours)).isoformat()
    at.upstream.write_text("{" if name == "all" else json.dumps(told))

    assert not upstream_due.is_fresh(at)
    assert check_upstream.main(at, if_due=True) == 0
    assert upstream_due.is_fresh(at)
    at.upstream_notices.unlink()
    assert not upstream_due.is_fresh(at)


def test_without_a_network_the_look_says_so_and_exits_0(fleet: Fleet, fork: Path) -> None:
    """A port on which nobody listens; --strict does not call that a change. Asked again sooner."""
    at = Layout(fork)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    text = at.params.read_text()
    at.params.write_text(text.replace("path:examples/tiny-llama", "hf:acme/Tiny"))

    done = fleet(
        "check-upstream", "--if-due", "--strict", "--out", "copy.json",
        HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HUB_OFFLINE="0",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    record = check_upstream.read(fork / "copy.json")
    assert record == check_upstream.read(at)
    (model,) = record.models
    assert model.state == "unknown"
    assert "cannot be reached" in model.reason
    assert record.next_at is not None
    assert record.next_at - record.checked_at == timedelta(hours=1)


def test_the_stage_does_not_wait_for_a_hub_that_never_says_a_word(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that are not resolved, packets that vanish: no wait for the deadline."""
    monkeypatch.setattr("pipelines.check_upstream._FIRST_ANSWER_S", 0.1)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        began = time.monotonic()

        found = operator.look(is_stage=True)

    assert found.state == "unknown"
    assert time.monotonic() - began < operator.section["deadline_seconds"] / 2


def test_a_pin_that_changed_makes_an_engine_unknown(operator: Operator) -> None:
    """What was found of the engine before a bump is not said of the one after it."""
    operator.look()
    assert operator.last is not None
    known = EngineUpstream(
        engine="llama.cpp", pinned="0.1.0", newest="0.2.0", state="moved", reason="Newer."
    )
    operator.section["engines"] = True
    operator.declare(operator.declared[MODEL]["revision"])

    before = operator.last.model_copy(update={"engines": (known,)})
    operator.look(previous=before, is_stage=True)

    assert operator.last.engines == ()


def test_a_part_of_the_fleet_leaves_the_rest_as_it_was(
    hub: Hub, operator: Operator, repo: Repo
) -> None:
    """What is known of the others stays; a model that is not declared is a mistake."""
    other = hub.create("acme/Other", files=FILES, at=LONG_AGO)
    operator.declare(other.head, model="other", source="hf:acme/Other")
    operator.look()
    before = operator.last
    assert before is not None
    repo.commit({"model.safetensors": weights(1)}, at=LONG_AGO)
    hub.forget()

    operator.look(days=1, models=["tiny"])

    assert operator.last is not None
    assert [each.state for each in operator.last.models] == ["waiting", "current"]
    assert operator.last.models[1] == before.models[1]
    assert not any("Other" in each.path for each in hub.requests)
    assert operator.last.params_sha256 is None
    with pytest.raises(ParamsError, match='"tinny" is not declared; did you mean "tiny"'):
        operator.look(models=["tinny"])


def test_a_workflow_gets_what_moved_and_a_summary(
    hub: Hub, operator: Operator, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and a table; the record of the last run may be missing or broken."""
    repo.commit({"model.safetensors": weights(1)}, "Better | faster", at=LONG_AGO)
    for name in ("OUTPUT", "STEP_SUMMARY"):
        monkeypatch.setenv(f"GITHUB_{name}", str(tmp_path / name))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    broken = tmp_path / "broken.json"
    broken.write_text("[]")

    codes = [
        check_upstream.main(operator.at, previous=tmp_path / "none.json"),
        check_upstream.main(operator.at, previous=broken),
    ]

    assert codes == [0, 0]
    outputs = (tmp_path / "OUTPUT").read_text()
    assert re.search(r"moved<<(\S+)\ntiny\n\1", outputs)
    assert re.search(r"any<<(\S+)\ntrue\n\1", outputs)
    assert "| tiny | moved |" in (tmp_path / "STEP_SUMMARY").read_text()
    assert hub.unexpected == []


def test_a_wrong_call_changes_nothing(operator: Operator) -> None:
    """No folder for the record; no record to read."""
    with pytest.raises(ParamsError, match="there is no folder"):
        check_upstream.main(operator.at, out=operator.at.root / "no/record.json")
    with pytest.raises(ParamsError, match="does not exist") as caught:
        check_upstream.read(operator.at)

    assert caught.value.hint == "fleet check-upstream"
    assert not operator.at.upstream.exists()
    records.write(operator.at.upstream, UpstreamNotices())
    with pytest.raises(ParamsError, match="is not a UpstreamRecord"):
        check_upstream.read(operator.at)


def _reader(
    kind: type[HubReader] = HubReader,
    *,
    seconds: float = 20,
    pause: Callable[[float], None] = lambda _: None,
) -> HubReader:
    """Ask as the verb does, without pauses."""
    return kind(deadline=time.monotonic() + seconds, attempts=3, pause=pause)
