"""Keeps the next batches ready on the device while the current step runs, and measures how long the run had to wait for them."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_END = object()


class Prefetch:
    """Iterates over `place(item)` of every item of `source`, computed by one thread up to `depth` ahead; use as a context manager.

    An error in the source or in `place` is raised where the item would have come. Leaving the context closes a source that can be closed, so
    that its workers stop at once.
    """

    def __init__(self, source: Iterable[Any], place: Callable[[Any], Any], *, depth: int = 2):
        self._source, self._place, self._depth = iter(source), place, depth
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._wait = 0.0

    def _produce(self) -> Any:
        item = next(self._source, _END)
        return item if item is _END else self._place(item)

    def __iter__(self) -> Iterator[Any]:
        ahead: deque[Future[Any]] = deque(self._executor.submit(self._produce) for _ in range(self._depth))
        while True:
            start = time.monotonic()
            item = ahead.popleft().result()
            self._wait += time.monotonic() - start
            if item is _END:
                return
            ahead.append(self._executor.submit(self._produce))
            yield item

    def take_wait(self) -> float:
        """Seconds spent waiting since the last call."""
        wait, self._wait = self._wait, 0.0
        return wait

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: Any) -> None:
        self._executor.shutdown(cancel_futures=True)
        close = getattr(self._source, "close", None)
        if close is not None:
            close()
