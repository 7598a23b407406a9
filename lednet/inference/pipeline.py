"""Reading, predicting and writing at the same time, in order and in bounded memory."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from lednet.io import Result, map_ordered

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Answer = TypeVar("Answer")


def _until_none(items: Iterable[Loaded | None]) -> Iterator[Loaded]:
    for item in items:
        if item is None:
            return
        yield item


def run_pipeline(
    items: Iterable[Item],
    read: Callable[[Item], Loaded | None],
    predict: Callable[[Loaded], Answer],
    write: Callable[[Answer], Result],
    progress: Callable[[], object] = lambda: None,
    *,
    readers: int = 2,
    writers: int = 2,
) -> list[Result]:
    """Read ahead and write behind while the calling thread predicts.

    Of each stage the results come in the order of `items`. At most `readers` items wait to be
    predicted, and `writers` to be written, besides those in work.

    When a stage raises, or Ctrl-C comes, nothing more is read or predicted, what is predicted
    already is written to its end, and then the exception goes on: the first one alone.

    Args:
        items: taken one by one in the calling thread, and may be endless.
        read: in `readers` threads. None from it ends the stream. A source that is read in
            sequence has one reader.
        predict: in the calling thread.
        write: in `writers` threads.
        progress: in the calling thread, after each item.

    Returns:
        What `write` returned for each item.
    """
    results: list[Result] = []
    reading, writing = ThreadPoolExecutor(readers), ThreadPoolExecutor(writers)
    try:
        loaded = map_ordered(reading, (partial(read, item) for item in items), readers)
        answers = (partial(write, predict(one)) for one in _until_none(loaded))
        for result in map_ordered(writing, answers, writers):
            results.append(result)
            progress()
    finally:
        reading.shutdown(cancel_futures=True)
        writing.shutdown()
    return results
