"""Check that a `torch.export` archive cannot run code when it is loaded.

`torch.export.load` has no safe mode as of PyTorch 2.14: it unpickles objects, evaluates
expressions, imports modules and loads libraries that an archive names. Therefore only the members
and values of exported networks are allowed.
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

_DATA_MEMBERS = re.compile(
    r"(.+/)?(data/(weights/weight|constants/tensor)_\d+|version|archive_format|archive_version"
    r"|byteorder|\.data/\w+|\.format_version|\.storage_alignment|extra(_files)?/[\w.]+)"
)
"""Members that are read as raw tensors or text."""

_OPERATOR = (
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|lt|le|gt|ge|eq|ne|and_|or_|getitem)"
)
_PYTREE = r"""([][{}:, \d]|null|"(type|context|children_spec|builtins\.\w+|null|\[\])")*"""
_ALLOWED = {
    "target": _OPERATOR,
    "as_operator": _OPERATOR,
    # Sizes, which PyTorch passes to `eval`.
    "expr_str": r"(\b(Add|Mul|Mod|Max|Min|FloorDiv|CleanDiv|PythonMod|Integer|Symbol|positive"
    r"|integer|Equality|Unequality|(Strict)?(Less|Greater)Than|And|Or|Not|True|False|[su]\d+"
    r"|\d{1,9})\b|[ '(),=-])*",
    # Structures of arguments and outputs, as JSON. Other types than these import modules.
    "in_spec": _PYTREE,
    "out_spec": _PYTREE,
    "use_pickle": "False",
    "guards_code": r"\[\]",
}
"""Patterns for the values that PyTorch would resolve or run, by their key in JSON members."""


def copy_safe_archive(path: Path) -> io.BytesIO:
    """A copy of an archive that is safe to load.

    PyTorch reads the copy, because its reader of zip files may find other members in the file.

    Raises:
        ValueError: The archive holds anything that is not allowed, or compressed members.
        Exception: Of many types, if the file is not an archive.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as safe:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("compressed members")
        if len({member.filename.lower() for member in members}) < len(members):
            raise ValueError("two members of one name")
        for member in members:
            content = archive.read(member)
            if member.filename.endswith(".pt"):
                torch.load(io.BytesIO(content), weights_only=True)
            elif member.filename.endswith(".json"):
                json.loads(content, object_hook=_require_allowed)
            elif not _DATA_MEMBERS.fullmatch(member.filename):
                raise ValueError(f"a member {member.filename}")
            safe.writestr(member.filename, content)
    copy.seek(0)
    return copy


def _require_allowed(values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if key in _ALLOWED and not re.fullmatch(_ALLOWED[key], str(value)):
            raise ValueError(f"{key} {value!r}")
    return values
