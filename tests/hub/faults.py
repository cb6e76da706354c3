"""
What goes wrong between a Hub and who asks it: one table, from a name to how it is done.

    hub.fault("*/model.safetensors", Fault("flip"))                     # once
    hub.fault("/api/models/*", Fault("status", status=503), times=None) # always
    hub.fault("/storage/*", Fault("cut_mid"), method="GET")

A fault changes an answer that would have been right (its bytes, its head, its listing), or loses,
cuts or delays it; or something happens in the repository before the answer is made. A pattern is a
glob over the decoded path; a fault strikes only the requests for which its kind means something, so
that one of bytes is not spent on a redirect, and one of ranges not on a request without one.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping

    from .repository import Repo

PAGE: Final = b"<!DOCTYPE html><html><title>Welcome</title><body>Sign in to go on</body></html>"
# Names of a listing that would write where nobody meant to.
HOSTILE_NAMES: Final = (
    "../config.json", "/etc/passwd", "..\\config.json", "a/../../LICENSE", "LICENSE.\x1b[2J",
    "LICENSE.\n::set-output name=x::y", "model-\u202egnp.safetensors", "LICENSE." + "x" * 300,
    ".git/config", "LICENSE.%2e%2e%2f",
)  # fmt: skip
_PIECE_BYTES: Final = 1 << 16

# What a request has to be for a fault to strike: any at all; a GET of which the answer has bytes
# of a file; a part of one that was asked for by a range; the head of one; a listing of a revision.
Where = Literal["any", "bytes", "range", "head", "listing"]


@dataclass(frozen=True)
class Fault:
    """
    One fault; which fields count is said at its kind.

    Attributes:
        kind: A name of KINDS.
        status: Of an answer that is an error.
        retry_after: As the header says it.
        at_byte: Where in the bytes; in the middle if absent.
        pause_s: Between two pieces.
        content: Bytes to give instead.
        count: How many.
    """

    kind: str
    status: int = 503
    retry_after: str = "3600"
    at_byte: int | None = None
    pause_s: float = 0.05
    content: bytes | None = None
    count: int = 100_000


class Reset(Exception):  # noqa: N818 - no error: what was asked for
    """End the connection here, as somebody does who is gone."""


@dataclass
class Reply:
    """
    An answer before it is sent.

    Attributes:
        status: 0 if not even a head is to be sent.
        stream: Pieces to send instead of `body`; it may wait, and raise Reset.
        framing: How its end is told: by the length in its head, by chunks, by the connection's end.
        shows: What it shows, so that a fault finds it.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    stream: Iterator[bytes] | None = None
    framing: Literal["length", "chunked", "close"] = "length"
    shows: Literal["file", "listing", "other"] = "other"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """
    Where a fault strikes.

    Attributes:
        whole: The whole file, of a request for bytes.
        address: The address of the request itself, absolute.
        portal: Address of a page of another origin.
        closing: Set when the server ends, so that nothing waits longer.
    """

    whole: bytes
    address: str
    portal: str
    closing: threading.Event


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what it strikes, and how it is done."""

    where: Where
    change: Callable[[Reply, Fault, Scene], None] | None = None
    event: Callable[[Repo], object] | None = None


# --- bytes --------------------------------------------------------------------------------------


def _middle(reply: Reply, fault: Fault) -> int:
    return len(reply.body) // 2 if fault.at_byte is None else fault.at_byte


def _flip(reply: Reply, fault: Fault, _: Scene) -> None:
    at = _middle(reply, fault)
    reply.body = reply.body[:at] + bytes([reply.body[at] ^ 1]) + reply.body[at + 1 :]


def _page(reply: Reply, _: Fault, __: Scene) -> None:
    reply.status, reply.headers, reply.body = 200, {"Content-Type": "text/html"}, PAGE


def _padded_page(reply: Reply, _: Fault, __: Scene) -> None:
    reply.body = PAGE.ljust(len(reply.body))[: len(reply.body)]


def _other(reply: Reply, fault: Fault, _: Scene) -> None:
    """Give bytes of something else, of the length of what was asked for."""
    at = _middle(reply, fault)
    other = reply.body[at:] + reply.body[:at] if fault.content is None else fault.content
    reply.body = (other * (len(reply.body) // len(other) + 1))[: len(reply.body)]


def _short(reply: Reply, fault: Fault, _: Scene) -> None:
    reply.body = reply.body[: _middle(reply, fault)]


def _long(reply: Reply, _: Fault, __: Scene) -> None:
    reply.body += bytes(1000)


def _empty(reply: Reply, _: Fault, __: Scene) -> None:
    reply.body = b""


def _pointer(reply: Reply, _: Fault, __: Scene) -> None:
    reply.body = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def _endless(reply: Reply, fault: Fault, scene: Scene) -> None:
    def stream() -> Iterator[bytes]:
        yield reply.body
        while not scene.closing.wait(fault.pause_s):
            yield bytes(_PIECE_BYTES)

    reply.stream, reply.framing = stream(), "chunked"


def _gzip(reply: Reply, _: Fault, __: Scene) -> None:
    reply.headers["Content-Encoding"] = "gzip"
    reply.body = gzip.compress(reply.body, 1)


def _no_gzip(reply: Reply, _: Fault, __: Scene) -> None:
    reply.headers["Content-Encoding"] = "gzip"


# --- ranges -------------------------------------------------------------------------------------


def _another_range(reply: Reply, _: Fault, scene: Scene) -> None:
    """Answer with the part before, and say so."""
    size = len(scene.whole)
    reply.body = scene.whole[: size // 3]
    reply.headers["Content-Range"] = f"bytes 0-{len(reply.body) - 1}/{size}"


def _lying_range(reply: Reply, _: Fault, scene: Scene) -> None:
    """Say that it is the part that was asked for, and give the first bytes."""
    reply.body = scene.whole[: len(reply.body)]


def _whole(reply: Reply, _: Fault, scene: Scene) -> None:
    reply.status, reply.body = 200, scene.whole
    del reply.headers["Content-Range"]


def _not_satisfiable(reply: Reply, _: Fault, scene: Scene) -> None:
    reply.status, reply.body = 416, b""
    reply.headers["Content-Range"] = f"bytes */{len(scene.whole)}"


# --- connections --------------------------------------------------------------------------------


def _lost(reply: Reply, _: Fault, __: Scene) -> None:
    def stream() -> Iterator[bytes]:
        yield b""
        raise Reset

    reply.status, reply.stream = 0, stream()


def _silent(reply: Reply, _: Fault, scene: Scene) -> None:
    def stream() -> Iterator[bytes]:
        yield b""
        scene.closing.wait()
        raise Reset

    reply.status, reply.stream = 0, stream()


def _broken_off(wait: Callable[[Scene], object]) -> Callable[[Reply, Fault, Scene], None]:
    """Send the first bytes, wait, and end the connection."""

    def change(reply: Reply, fault: Fault, scene: Scene) -> None:
        reply.headers["Content-Length"] = str(len(reply.body))

        def stream() -> Iterator[bytes]:
            yield reply.body[: _middle(reply, fault)]
            wait(scene)
            raise Reset

        reply.stream = stream()

    return change


def _ended(reply: Reply, fault: Fault, _: Scene) -> None:
    """Announce all, send the first bytes, and end in good order."""
    reply.headers["Content-Length"] = str(len(reply.body))
    reply.headers["Connection"] = "close"
    reply.stream = iter([reply.body[: _middle(reply, fault)]])


def _drip(reply: Reply, fault: Fault, scene: Scene) -> None:
    reply.headers["Content-Length"] = str(len(reply.body))

    def stream() -> Iterator[bytes]:
        for at in range(len(reply.body)):
            yield reply.body[at : at + 1]
            if scene.closing.wait(fault.pause_s):
                raise Reset

    reply.stream = stream()


def _framed(
    framing: Literal["chunked", "close"], *, whole: bool
) -> Callable[[Reply, Fault, Scene], None]:
    """Tell no length; and, unless it is to be whole, end in good order after the first bytes."""

    def change(reply: Reply, fault: Fault, _: Scene) -> None:
        end = len(reply.body) if whole else _middle(reply, fault)
        reply.framing = framing
        reply.stream = iter([reply.body[:end]])

    return change


# --- heads --------------------------------------------------------------------------------------


def _status(reply: Reply, fault: Fault, _: Scene) -> None:
    reply.status, reply.headers, reply.body = fault.status, {}, b'{"error": "Internal Error"}'


def _retry_after(reply: Reply, fault: Fault, scene: Scene) -> None:
    _status(reply, fault, scene)
    reply.headers["Retry-After"] = fault.retry_after


def _retry_date(reply: Reply, fault: Fault, scene: Scene) -> None:
    _status(reply, fault, scene)
    when = datetime.now(UTC) + timedelta(seconds=float(fault.retry_after))
    reply.headers["Retry-After"] = format_datetime(when, usegmt=True)


def _allowance(reply: Reply, fault: Fault, scene: Scene) -> None:
    _status(reply, fault, scene)
    reply.status = 429
    reply.headers["RateLimit"] = f'"api";r=0;t={fault.retry_after}'
    reply.headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'


def _led_away(reply: Reply, _: Fault, scene: Scene) -> None:
    reply.status, reply.headers, reply.body = 302, {"Location": scene.portal}, b""


def _led_in_a_circle(reply: Reply, _: Fault, scene: Scene) -> None:
    reply.status, reply.headers, reply.body = 302, {"Location": scene.address}, b""


def _other_etag(reply: Reply, _: Fault, __: Scene) -> None:
    for name in ("ETag", "X-Linked-Etag"):
        if name in reply.headers:
            reply.headers[name] = '"' + reply.headers[name].strip('"')[::-1] + '"'


def _other_commit(reply: Reply, _: Fault, __: Scene) -> None:
    reply.headers["X-Repo-Commit"] = "f" * 40


def _other_size(reply: Reply, _: Fault, __: Scene) -> None:
    reply.headers["X-Linked-Size"] = "17"


# --- listings -----------------------------------------------------------------------------------


def _listing(
    edit: Callable[[dict[str, Any], Fault], object],
) -> Callable[[Reply, Fault, Scene], None]:
    """Change the JSON of a listing."""

    def change(reply: Reply, fault: Fault, _: Scene) -> None:
        told = json.loads(reply.body)
        edit(told, fault)
        reply.body = json.dumps(told).encode()

    return change


def _entries(
    edit: Callable[[dict[str, Any], Fault], object],
) -> Callable[[Reply, Fault, Scene], None]:
    """Change each entry of a listing."""

    def every(told: dict[str, Any], fault: Fault) -> None:
        for sibling in told["siblings"]:
            edit(sibling, fault)

    return _listing(every)


def _no_digest(entry: dict[str, Any], _: Fault) -> None:
    entry.pop("lfs", None)
    del entry["blobId"]


def _other_digest(entry: dict[str, Any], _: Fault) -> None:
    entry["blobId"] = "d" * 40
    if "lfs" in entry:
        entry["lfs"]["sha256"] = "d" * 64


def _other_listed_size(entry: dict[str, Any], _: Fault) -> None:
    entry["size"] += 7
    if "lfs" in entry:
        entry["lfs"]["size"] += 7


def _hostile_names(told: dict[str, Any], _: Fault) -> None:
    like = told["siblings"][0]
    told["siblings"] += [like | {"rfilename": name} for name in HOSTILE_NAMES]


def _named_twice(told: dict[str, Any], _: Fault) -> None:
    twins = json.loads(json.dumps(told["siblings"]))
    for twin in twins:
        _other_digest(twin, _)
    told["siblings"] += twins


def _huge(told: dict[str, Any], fault: Fault) -> None:
    like = told["siblings"][0]
    told["siblings"] += [like | {"rfilename": f"more/{n}.json"} for n in range(fault.count)]


def _set(**values: object) -> Callable[[Mapping[str, Any], Fault], None]:
    def edit(told: Mapping[str, Any], _: Fault) -> None:
        assert isinstance(told, dict)
        told.update(values)

    return edit


KINDS: Final[dict[str, Kind]] = {
    # bytes of an answer that is right in all the rest
    "flip": Kind("bytes", _flip),  # one bit, at `at_byte`
    "html": Kind("bytes", _page),  # a page as hotel networks show it, whatever was asked for
    "html_padded": Kind("bytes", _padded_page),  # the same, of the right length and type
    "swapped": Kind("bytes", _other),  # `content`, or its own halves exchanged; the right length
    "short": Kind("bytes", _short),  # the first bytes, announced as all
    "long": Kind("bytes", _long),  # and 1,000 more
    "empty": Kind("bytes", _empty),
    "endless": Kind("bytes", _endless),  # all, and then more for ever
    "lfs_pointer": Kind("bytes", _pointer),  # what git has of a file in LFS
    "gzip": Kind("bytes", _gzip),  # compressed on the way, and said to be
    "gzip_lie": Kind("bytes", _no_gzip),  # said to be, and not
    # answers to a request for a part
    "wrong_range": Kind("range", _another_range),  # 206 with another part, as its head says
    "range_lie": Kind("range", _lying_range),  # 206 with another part, against its head
    "range_ignored": Kind("range", _whole),  # 200 with everything
    "range_refused": Kind("range", _not_satisfiable),  # 416
    # the connection
    "reset_before": Kind("any", _lost),  # before the head
    "reset_mid": Kind("bytes", _broken_off(lambda scene: scene.closing.wait(0.05))),
    "cut_mid": Kind("bytes", _ended),  # in good order, but too early
    "stall_before": Kind("any", _silent),  # the request is read, and then nothing
    "stall_mid": Kind("bytes", _broken_off(lambda scene: scene.closing.wait())),
    "drip": Kind("bytes", _drip),  # a byte every `pause_s`
    "no_length": Kind("bytes", _framed("close", whole=True)),  # its end is the connection's
    "no_length_cut": Kind("bytes", _framed("close", whole=False)),
    "chunked": Kind("bytes", _framed("chunked", whole=True)),
    "chunked_short": Kind("bytes", _framed("chunked", whole=False)),  # in good order
    # heads
    "status": Kind("any", _status),  # `status`
    "retry_after": Kind("any", _retry_after),  # `status`, and `retry_after` as it is
    "retry_date": Kind("any", _retry_date),  # the same as a date
    "allowance": Kind("any", _allowance),  # 429, with the allowance as the Hub tells it
    "redirect_other": Kind("any", _led_away),  # to a page of another origin
    "redirect_loop": Kind("any", _led_in_a_circle),
    "wrong_etag": Kind("head", _other_etag),
    "wrong_commit": Kind("head", _other_commit),  # another X-Repo-Commit
    "wrong_linked_size": Kind("head", _other_size),
    # listings
    "listing_missing_digest": Kind("listing", _entries(_no_digest)),
    "listing_missing_size": Kind("listing", _entries(lambda entry, _: entry.pop("size"))),
    "listing_wrong_size": Kind("listing", _entries(_other_listed_size)),
    "listing_lies": Kind("listing", _entries(_other_digest)),  # digests of other bytes
    "listing_other_sha": Kind("listing", _listing(_set(sha="e" * 40))),
    "listing_other_id": Kind("listing", _listing(_set(id="mallory/Tiny", author="mallory"))),
    "listing_other_repository": Kind("listing", _listing(_set(_id="0" * 24))),
    "listing_nothing": Kind("listing", _listing(_set(siblings=[]))),
    "listing_nonsense": Kind("listing", _listing(_set(siblings="none", sha=7))),
    "listing_html": Kind("listing", _page),
    "listing_cut": Kind("listing", _short),  # announced as all, so no JSON
    "listing_huge": Kind("listing", _listing(_huge)),  # `count` files more
    "listing_endless": Kind("listing", _endless),
    "listing_names": Kind("listing", _listing(_hostile_names)),
    "listing_twice": Kind("listing", _listing(_named_twice)),  # names again, with other digests
    # what happens meanwhile; before this request is answered
    "gated_mid": Kind("any", event=lambda repo: repo.gate("manual")),
    "gone_mid": Kind("any", event=lambda repo: repo.delete()),
    "disabled_mid": Kind("any", event=lambda repo: repo.disable()),
    "moved_mid": Kind("any", event=lambda repo: repo.commit({"README.md": b"moved\n"}, "Move on")),
    "renamed_mid": Kind("any", event=lambda repo: repo.rename(f"{repo.owner}/Renamed")),
    "rewritten_mid": Kind("any", event=lambda repo: repo.rewrite(repo.revision(repo.head))),
    "replaced_mid": Kind("any", event=lambda repo: repo.recreate(repo.revision(repo.head))),
}
