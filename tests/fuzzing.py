"""Strange input: ways to make it, and what may become of it."""

import copy
import io
import json
import math
import os
import resource
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hypothesis import strategies as st

from lednet import UserError

SECONDS = 60
"""What is not done by then hangs."""
MOST_MEMORY = 1 << 30
"""Bytes that reading a small file may take."""


class Hang(BaseException):
    """Nothing that code which expects errors would catch."""


def _hang(*_: Any) -> None:
    raise Hang(f"not done after {SECONDS} seconds")


def ends_well(call: Callable[[], Any], *names: object) -> Any:
    """What `call` returns, or None if it ended in one sentence that has one of `names` in it.

    Anything else (another exception, a hang, much memory) fails the test.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, _hang)
    outer = signal.alarm(SECONDS)
    try:
        return call()
    except UserError as error:
        sentence = str(error)
        assert sentence and "\n" not in sentence and len(sentence) < 2000, sentence
        assert any(str(name) in sentence for name in names), sentence
        return None
    finally:
        signal.alarm(outer)
        signal.signal(signal.SIGALRM, previous)
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert taken * 1024 < MOST_MEMORY


_EXTREMES = [
    b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f",
]  # fmt: skip


@st.composite
def damaged(draw: Callable, wholes: Sequence[bytes]) -> bytes:
    """One of `wholes` with some bytes changed, cut out, doubled, put in, or those of another."""
    data = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([0, 1, 1, 4, 30, 1000, 1 << 30])))
        other = draw(st.sampled_from(wholes))
        at = draw(st.integers(0, len(other)))
        data[start:stop] = draw(
            st.sampled_from([b"", *_EXTREMES, bytes(data[start:stop]) * 2, other[at : at + 40]])
            | st.binary(max_size=8)
        )
    return bytes(data)


def foreign(wholes: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes of any kind, most of them near to one of `wholes`."""
    return st.one_of(damaged(wholes), damaged(wholes), st.binary(max_size=200))


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(),
    st.sampled_from([2**31, 2**63, 10**400, -1, 0, math.nan, math.inf, 1e300, "", "a" * 3000]),
    st.text(max_size=6),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
"""What JSON can hold, odd numbers among it."""


@st.composite
def altered(draw: Callable, whole: Any, others: st.SearchStrategy = values) -> Any:
    """`whole`, made of dictionaries and lists, with some of its parts replaced, gone or doubled."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(0, 3))):
        if not isinstance(whole, dict | list) or draw(st.integers(0, 20)) == 0:
            return draw(others)
        part: Any = whole
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(part[key], dict | list) and draw(st.integers(0, 3)):
                part = part[key]
                continue
            change = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
            if change == "replace":
                part[key] = draw(others)
            elif change == "remove":
                del part[key]
            elif isinstance(part, list):
                part.insert(key, part[key])
            break
    return whole


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def json_files(draw: Callable, whole: Any) -> bytes:
    """The bytes of a JSON file like `whole`, of other content, or damaged."""
    content = as_json(draw(altered(whole)))
    deep = b"[" * 100_000
    return draw(st.one_of(st.just(content), st.just(content), foreign([content]), st.just(deep)))


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def png_of(chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A PNG file of chunks (kind, data)."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


class Trap:
    """Pickled, it makes the file `path` when it is opened by a reader that runs code."""

    def __init__(self, path: os.PathLike, how: int):
        self.path, self.how = os.fspath(path), how % 3

    def __reduce__(self) -> tuple:
        return (
            (os.system, (f"touch '{self.path}'",)),
            (open, (self.path, "w")),
            (exec, (f"open({self.path!r}, 'w').close()",)),
        )[self.how]
