"""
How the tests share the cores: what measures runs last and alone.

What tests marked `alone` say depends on how quiet the machine is, so nothing may run beside them.
All others are spread over the cores first: those of a file that shares something in the beginning,
where a process gets many in a row, so that few of the shared things are made twice; what is left
in the end is small, and no core waits long for another. One run, one closing line.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xdist.scheduler import LoadScheduling

if TYPE_CHECKING:
    import pytest
    from xdist.workermanage import WorkerController

MARK: Final = "alone"


def sort(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the tests that have to be alone behind the others, and tell the scheduler which."""
    sharing = {item.path for item in items if _shares(item)}
    items.sort(key=lambda item: (_is_alone(item), item.path not in sharing))
    told = getattr(config, "workerinput", None)
    if told is not None and told["workerid"] == "gw0":
        names = [item.nodeid for item in items if _is_alone(item)]
        _note(told["testrunuid"]).write_text(json.dumps(names))


def _is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker(MARK) is not None


def _shares(item: pytest.Item) -> bool:
    """Whether a test uses what is made once for its file or for all."""
    fixtures = getattr(item, "_fixtureinfo", None)
    made = fixtures.name2fixturedefs.values() if fixtures is not None else ()
    # Those of pytest and its plugins, as the folder of all temporary ones, have no `baseid`.
    scopes = {one.scope for each in made for one in each if one.baseid}
    return not scopes.isdisjoint({"module", "package", "session"})


def _note(run: str) -> Path:
    """Where a process that has collected says what the scheduler is not told of a test."""
    return Path(tempfile.gettempdir()) / f"gguf-fleet-alone-{run}.json"


class AloneLast(LoadScheduling):  # type: ignore[misc]  # xdist has no types
    """
    Spreads the tests, then gives those that have to be alone to one process.

    A process of xdist starts its last test only when it is told of a next one or of the end. So the
    one that goes on is left with a test in hand until the others have ended.
    """

    _alone: frozenset[str] | None = None

    def _send_tests(self, node: WorkerController, num: int) -> None:
        # What a process that died had in hand comes back behind those that have to be alone.
        self.pending.sort()
        super()._send_tests(node, min(num, self._together))

    def check_schedule(self, node: WorkerController, duration: float = 0) -> None:
        """Send what may run beside others; then end all processes but one, which gets the rest."""
        if self._together or not self.pending:
            super().check_schedule(node, duration)
            return
        alive = [each for each in self.nodes if not each.shutting_down]
        for other in alive[1:]:
            other.shutdown()
        # Where none is left, one that died is being replaced.
        for keeper in alive[:1]:
            if not any(self.node2pending[each] for each in self.nodes if each is not keeper):
                super()._send_tests(keeper, len(self.pending))
                keeper.shutdown()

    def schedule(self) -> None:
        """Begin, also where no test may run beside others."""
        super().schedule()
        for node in self.nodes[:1]:
            if self.pending and not self._together:
                self.check_schedule(node)

    def mark_test_complete(
        self, node: WorkerController, item_index: int, duration: float = 0
    ) -> None:
        """Go on, with the process that waits for this one, too."""
        super().mark_test_complete(node, item_index, duration)
        if self.pending and not self._together:
            self.check_schedule(self.nodes[0])

    @property
    def _together(self) -> int:
        """How many of the tests that nobody has yet may run beside others."""
        assert self.collection is not None
        if self._alone is None:
            note = _note(self.nodes[0].workerinput["testrunuid"])
            self._alone = frozenset(json.loads(note.read_text()))
            note.unlink()
        return sum(self.collection[index] not in self._alone for index in self.pending)
