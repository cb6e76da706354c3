"""
What a host that measures for itself has against a release: its own records, its own verdict.

A release is made of the records of the first measured host (results/M). Those of every other lie in
results/M/on/HOST, and say whether that host is to be served. One that is not PROMOTE by its own
measurement keeps the model from all registries, since an alias has one meaning for all hosts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import bundle, gate, routing, trees, verdict, verdict_evidence, wording
from pipelines.layout import Layout

if TYPE_CHECKING:
    from pipelines.params import Declaration, PublishSlice

# A bundle names the commit that it was measured at; nobody asks for it here.
_NO_COMMIT = "0" * 40


def refusals(
    declared: Declaration, slice_: PublishSlice, at: Layout, *, today: str
) -> tuple[str, ...]:
    """
    Return what stands against a release by the records of other measured hosts.

    Args:
        declared: The declaration.
        slice_: Of the model.
        at: The checkout.
        today: The day by which waivers count.

    Returns:
        A sentence for each host that is not PROMOTE; of a host that has no records here nothing is
        known, and the gate of a pull request saw to that.
    """
    first = bundle.primary_host(declared, slice_.model)
    return tuple(
        reason
        for host in bundle.measured_hosts(declared, slice_.model)
        if host != first
        and not routing.too_small(declared, at, slice_.model, host)
        and (at.root / "results" / slice_.model / "on" / host).is_dir()
        for reason in _of_host(declared, slice_, at, host, today)
    )


def _of_host(
    declared: Declaration, slice_: PublishSlice, at: Layout, host: str, today: str
) -> list[str]:
    model = slice_.model
    measured = bundle.from_git(at, declared, model, host=host, head=_NO_COMMIT)
    with tempfile.TemporaryDirectory(prefix="fleet-host-") as folder:
        tree = trees.lay_over(Layout(Path(folder)), measured.files)
        found = verdict.judge(verdict_evidence.collect(slice_, tree, day=today))
    return [
        f"Host {host}, by its own measurement: {wording.sentence(one.sentence)} {one.next_step}"
        for one in gate.of_hosts(model, (host,), host, {host: found})
        if one.verdict != "PROMOTE"
    ]
