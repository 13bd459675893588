"""Long work step by step: how far it is gets reported, and whoever waits may stop it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Progress = Callable[[int, int], None]  # (steps done, steps in all)
T = TypeVar("T")


@dataclass(frozen=True)
class Watch:
    """Who looks on. `check_cancelled` is called before each step and may raise."""

    progress: Progress | None = None
    check_cancelled: Callable[[], None] | None = None

    def each(self, items: Iterable[T], total: int, before: int = 0) -> Iterator[T]:
        """The items, each one step of `total`, `before` of which were done already."""
        for done, item in enumerate(items, before + 1):
            if self.check_cancelled is not None:
                self.check_cancelled()
            yield item
            if self.progress is not None:
                self.progress(done, total)


UNWATCHED = Watch()
