"""Zips unpacked with care: only the files that are expected, none larger than it may be."""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lednet.data.pairs import list_examples
from lednet.errors import UserError
from lednet.io import remove_leftovers, require_space, write_atomically

UNREADABLE = (
    OSError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile
)  # fmt: skip
"""What `zipfile` raises at damaged bytes (NotImplementedError is a RuntimeError)."""

SMALL = 2**20
"""Bytes up to which a file's ratio says nothing: an empty label shrinks to less than 1 %."""


class ZipLimits(NamedTuple):
    """What an archive may unpack to.

    Attributes:
        file, total: bytes of one file, and of all.
        file_ratio, total_ratio: of those to the packed ones. Deflate goes up to 1032.
    """

    file: int
    total: int
    file_ratio: float = 100
    total_ratio: float = 20


def open_zip(path: str | os.PathLike) -> zipfile.ZipFile:
    """Open a zip and read its directory.

    Raises:
        UserError: no such file, or no zip.
    """
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror or error}; check the path") from error
    except UNREADABLE as error:
        raise UserError(
            f"{path} is no zip, or damaged or cut short ({error}): get or make it again"
        ) from error


class Archive:
    """A zip whose directory has been checked, to be unpacked.

    Attributes:
        files: its members that are expected.
        left_out: names of the others.

    Raises:
        UserError: it cannot be read, or something in it is not as in a zip made in good faith:
            a name that leads out of the folder or stands twice, a link, a password, sizes past
            the limits.
    """

    def __init__(self, path: str | os.PathLike, expected: re.Pattern, limits: ZipLimits):
        """
        Args:
            expected: matches the whole names of files to unpack, and none that leads elsewhere.
        """
        self.path = Path(path)
        with open_zip(path) as file:
            members = [member for member in file.infolist() if not member.filename.endswith("/")]
        packed = self.path.stat().st_size
        for member in members:
            problem = _problem(member, limits)
            if problem:
                raise self._refusal(f"{member.orig_filename!r} {problem}")
        names = Counter(member.filename for member in members)
        if len(names) < len(members):
            doubled = (name for name, count in names.items() if count > 1)
            raise self._refusal(f"it holds files of one name ({list_examples(doubled)})")
        if sum(member.compress_size for member in members) > packed:
            raise self._refusal("its files overlap")
        size = sum(member.file_size for member in members)
        if size > min(limits.total, max(SMALL, limits.total_ratio * packed)):
            raise self._refusal(f"it would unpack to {size / 1e9:.1f} GB")
        self.files = [member for member in members if expected.fullmatch(member.filename)]
        self.left_out = sorted(names.keys() - {member.filename for member in self.files})

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self.path} is not unpacked, {reason}: download it again")

    @property
    def size(self) -> int:
        """Bytes of `files`."""
        return sum(member.file_size for member in self.files)

    def space_needed(self, root: Path) -> int:
        """Bytes that `unpack` is to write, judged by the sizes of the files that are there."""
        return sum(m.file_size for m in self.files if _size(root / m.filename) != m.file_size)

    def unpack(self, root: Path, bar: tqdm) -> int:
        """Write the files that are not there yet, each one whole or not at all.

        Args:
            bar: is advanced by the bytes of each file.

        Returns:
            How many were written. The others are there, with the right checksum.

        Raises:
            UserError: a file is damaged in the archive, or cannot be written. Those before it
                stay.
        """
        for folder in {(root / member.filename).parent for member in self.files} - {root}:
            if folder.is_dir():
                remove_leftovers(folder)
        written = 0
        with open_zip(self.path) as source:
            for member in self.files:
                target = root / member.filename
                # Beside the folders lies a README, of another archive perhaps, or the user's own.
                kept = target.parent == root and target.exists()
                if not kept and not _is_there(target, member):
                    data = self._read(source, member)
                    with write_atomically(target, durable=False) as temporary:
                        temporary.write_bytes(data)
                    written += 1
                bar.update(member.file_size)
        return written

    def _read(self, source: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
        try:
            with source.open(member) as file:
                data = file.read(member.file_size + 1)
        except UNREADABLE as error:
            raise self._damage(member, str(error)) from error
        if len(data) != member.file_size:  # whatever its directory says
            raise self._damage(member, f"{len(data)} bytes, not {member.file_size}")
        return data

    def _damage(self, member: zipfile.ZipInfo, reason: str) -> UserError:
        return UserError(
            f"{member.filename} is damaged in {self.path} ({reason}): download the archive again"
        )


def _problem(member: zipfile.ZipInfo, limits: ZipLimits) -> str | None:
    """Why a member should not be in an archive."""
    parts = re.split(r"[/\\]", member.orig_filename)
    if ".." in parts or not parts[0] or ":" in parts[0]:
        return "leads out of the folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        return "is a link or a device"
    if member.flag_bits & 1:
        return "needs a password"
    # The other methods inflate without a limit, whatever size the member declares.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed in an unusual way"
    if member.file_size > limits.file:
        return f"would unpack to {member.file_size / 1e6:.0f} MB"
    if member.file_size > max(SMALL, limits.file_ratio * member.compress_size):
        return f"would unpack to {member.file_size} bytes from {member.compress_size}"
    return None


def _size(path: Path) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_there(path: Path, member: zipfile.ZipInfo) -> bool:
    if _size(path) != member.file_size:
        return False
    try:
        return zlib.crc32(path.read_bytes()) == member.CRC
    except OSError:
        return False


def unpack_all(archives: list[Archive], root: Path) -> int:
    """Unpack into `root`, which is made if need be; shows a progress bar.

    Returns:
        How many files were written. Those that are there, with the right checksum, are left
        alone, so that an unpacking that was stopped goes on.

    Raises:
        UserError: the disk is too small, or see `Archive.unpack`.
    """
    needed = sum(archive.space_needed(root) for archive in archives)
    require_space(root, needed, "what is to be unpacked", "--datadir")
    total, written = sum(archive.size for archive in archives), 0
    with tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for archive in archives:
            bar.set_description(archive.path.stem)
            written += archive.unpack(root, bar)
    return written
