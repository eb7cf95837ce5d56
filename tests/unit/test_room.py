from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.room import room

SECONDS = 20.0
SOON = 0.2


class Visitor(threading.Thread):
    """Enters the room, says so, and stays until it is let go."""

    def __init__(self, folder: Path, *, alone: bool) -> None:
        super().__init__(daemon=True)
        self._folder, self._alone = folder, alone
        self.inside, self._leave = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with room(self._folder, alone=self._alone):
            self.inside.set()
            self._leave.wait(SECONDS)

    def go(self) -> None:
        self._leave.set()
        self.join(SECONDS)


@contextmanager
def visitors(*all_of_them: Visitor) -> Iterator[None]:
    try:
        yield
    finally:
        for one in all_of_them:
            one.go()


def test_several_share_the_room(tmp_path: Path) -> None:
    first, second = (Visitor(tmp_path, alone=False) for _ in range(2))
    with visitors(first, second):
        assert first.inside.wait(SECONDS) and second.inside.wait(SECONDS)


def test_one_that_wants_to_be_alone_waits_for_the_others_and_keeps_later_ones_out(tmp_path: Path) -> None:
    first = Visitor(tmp_path, alone=False)
    assert first.inside.wait(SECONDS)
    alone = Visitor(tmp_path, alone=True)
    assert not alone.inside.wait(SOON)
    later = Visitor(tmp_path, alone=False)
    with visitors(first, alone, later):
        assert not later.inside.wait(SOON), "it passed one that waits"
        first.go()
        assert alone.inside.wait(SECONDS)
        assert not later.inside.wait(SOON), "it is not alone"
        alone.go()
        assert later.inside.wait(SECONDS)
