"""Long work step by step: how far it is gets reported, and whoever waits may stop it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Progress = Callable[[int, int], None]  # (steps done, steps in all)
T = TypeVar("T")


@dataclass(frozen=True)
class Watch:
    """Who looks on. `check_cancelled` is called before each step and may raise; `tell` hears what the next
    step works on, where that has a name.
    """

    progress: Progress | None = None
    check_cancelled: Callable[[], None] | None = None
    tell: Callable[[str], None] | None = None

    def before(self, what: str = "") -> None:
        """A step begins."""
        if self.check_cancelled is not None:
            self.check_cancelled()
        if what and self.tell is not None:
            self.tell(what)

    def after(self, done: int, total: int) -> None:
        """So many steps of all are done."""
        if self.progress is not None:
            self.progress(done, total)

    def each(self, items: Iterable[T], total: int, before: int = 0) -> Iterator[T]:
        """The items, each one step of `total`, `before` of which were done already."""
        for done, item in enumerate(items, before + 1):
            self.before()
            yield item
            self.after(done, total)


UNWATCHED = Watch()
