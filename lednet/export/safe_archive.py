"""A `torch.export` archive that can run no code but a network's.

`torch.export.load` unpickles, compiles and evaluates what an archive holds: whoever writes one
can have any program run. So an archive is first copied, member by member, and only those are
taken that a network needs, with nothing in them but tensors, arithmetic and ATen's operators.
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

_PLAIN = re.compile(
    r"(.+/)?(data/(weights/weight|constants/tensor)_\d+|version|archive_format|archive_version"
    r"|byteorder|\.data/\w+|\.format_version|\.storage_alignment|extra(_files)?/[\w.]+)"
)
"""Members that are numbers or text, whoever reads them."""

_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|lt|le|gt|ge|eq|ne|and_|or_|getitem)"
)
_EXPRESSION = re.compile(
    r"(\b(Add|Mul|Mod|Max|Min|FloorDiv|CleanDiv|PythonMod|Integer|Symbol|positive|integer"
    r"|Equality|Unequality|(Strict)?(Less|Greater)Than|And|Or|Not|True|False|[su]\d+|\d{1,9})\b"
    r"|[ '(),=+*/-])*"
)
"""Of sizes, which PyTorch gives to `eval`."""


def inert_copy(path: Path) -> io.BytesIO:
    """The archive at `path`, as far as it is inert. A copy, so that PyTorch's reader sees the
    members that were looked at, whatever else the bytes may be read as.

    Raises:
        ValueError: it holds something else, or is packed to grow.
        Exception: of many kinds, if it is no archive.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as inert:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("compressed members")
        if len({member.filename.lower() for member in members}) < len(members):
            raise ValueError("two members of one name")
        for member in members:
            content = archive.read(member)
            if member.filename.endswith(".pt"):
                torch.load(io.BytesIO(content), weights_only=True)
            elif not _PLAIN.fullmatch(member.filename):
                if not member.filename.endswith(".json"):
                    raise ValueError(f"a member {member.filename}")
                _require_inert(json.loads(content))
            inert.writestr(member.filename, content)
    copy.seek(0)
    return copy


def _require_inert(value: Any) -> None:
    """
    Raises:
        ValueError: somewhere in this JSON is what PyTorch would run.
    """
    if isinstance(value, list):
        for item in value:
            _require_inert(item)
    if not isinstance(value, dict):
        if isinstance(value, str) and "__enum__" in value:  # names a module to import
            raise ValueError("an enumeration")
        return
    for key, item in value.items():
        if key in ("use_pickle", "guards_code") and item:
            raise ValueError(f"{key} {item!r}")
        if key in ("target", "as_operator") and not _OPERATOR.fullmatch(str(item)):
            raise ValueError(f"the operator {item!r}")
        if key == "expr_str" and not _EXPRESSION.fullmatch(str(item)):
            raise ValueError(f"the expression {item!r}")
        _require_inert(item)
