"""A three-stage pipeline: read, predict and write run at the same time."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from typing import TypeVar

from lednet.io import Result, map_ordered

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Output = TypeVar("Output")


def run_pipeline(
    items: Iterable[Item],
    read: Callable[[Item], Loaded | None],
    predict: Callable[[Loaded], Output],
    write: Callable[[Output], Result],
    progress: Callable[[], object] = lambda: None,
    *,
    on_result: Callable[[Result], object] | None = None,
    readers: int = 2,
    writers: int = 2,
) -> list[Result]:
    """Read ahead and write in threads while the calling thread predicts.

    Results keep the order of `items`. Besides those in work, at most `readers` items wait to be
    predicted and `writers` items to be written. When a stage raises, or on Ctrl-C, no more items
    are read or predicted. Items that were predicted are written, and then the first exception is
    raised.

    Args:
        items: taken one at a time in the calling thread. May be endless.
        read: called in `readers` threads. None ends the stream. A source that must be read in
            sequence needs one reader.
        predict, progress: called in the calling thread, the latter after each item.
        write: called in `writers` threads; returns the results.
        on_result: called with each result, in order, in the calling thread. Nothing is returned
            then, so that an endless run needs no memory.
    """
    results: list[Result] = []
    on_result = on_result or results.append
    reading, writing = ThreadPoolExecutor(readers), ThreadPoolExecutor(writers)
    try:
        loaded = map_ordered(reading, (partial(read, item) for item in items), readers)
        present = takewhile(lambda one: one is not None, loaded)
        outputs = (partial(write, predict(one)) for one in present if one is not None)
        for result in map_ordered(writing, outputs, writers):
            on_result(result)
            progress()
    finally:
        reading.shutdown(cancel_futures=True)
        writing.shutdown()
    return results
