"""Work on many tasks at once, by one thread: while one task is on its way to its next stop, the others are served.

Such work is a generator that yields wherever it would have to wait for its task. To wait for each task in turn costs a
wake-up of this process and one of the task, on another processor, at every stop.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from typing import TypeVar

    T = TypeVar("T")
    Steps = Generator[None, None, T]

_END = object()


def alone(work: Steps[T]) -> T:
    """Do *work* from its beginning to its end; what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def together(works: Iterable[Steps[object]]) -> None:
    """Do all *works*, each a step further in turn. If one of them fails, the others are closed where they are."""
    running = list(works)
    try:
        while running:
            running = [work for work in running if next(work, _END) is not _END]
    finally:
        for work in running:
            work.close()
