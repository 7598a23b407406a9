"""Extraction of zips by an allow-list of members: resumable, each file written atomically."""

import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from lednet.errors import UserError
from lednet.io import remove_leftovers, require_space, write_atomically
from lednet.progress import progress_bar

MAX_FILES, MAX_FILE_BYTES = 100_000, 2**24
"""Limits of an archive's members. The largest Cityscapes archive has 93,894 files; a colour label
has 8 MB of pixels, no file more."""

UNREADABLE = (
    OSError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile
)  # fmt: skip
"""Exceptions of `zipfile` for damaged bytes, unknown compression included."""


def open_zip(path: str | os.PathLike) -> zipfile.ZipFile:
    """Open a zip and read its directory; a `UserError` if it does not exist or is not a zip."""
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror or error}; check the path") from error
    except UNREADABLE as error:
        raise UserError(
            f"{path} is not a zip, or damaged or cut short ({error}): get or make it again"
        ) from error


class Archive:
    """The members of a zip that are to be extracted.

    Args:
        path: the zip.
        allowed: pattern of the full names of files to extract. No name that it matches may lead
            out of the target folder.

    Attributes:
        files: members with an allowed name; the last one of those with the same name.
        left_out: names of the other files, sorted.

    Raises:
        UserError: the zip cannot be read, has too many files, or one that is encrypted, too large,
            or compressed by a method that limits no output.
    """

    def __init__(self, path: str | os.PathLike, allowed: re.Pattern):
        self.path = Path(path)
        with open_zip(path) as file:
            members = {m.filename: m for m in file.infolist() if not m.filename.endswith("/")}
        self.files = [m for name, m in members.items() if allowed.fullmatch(name)]
        self.left_out = sorted(members.keys() - {m.filename for m in self.files})
        if len(self.files) > MAX_FILES:
            raise UserError(f"{path} has more than {MAX_FILES:,} files: download it again")
        for member in self.files:
            plain = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if member.flag_bits & 1 or not plain or member.file_size > MAX_FILE_BYTES:
                raise UserError(
                    f"{member.filename} in {path} is encrypted, larger than {MAX_FILE_BYTES:,} "
                    "bytes, or compressed by an unexpected method: download the archive again"
                )

    def extract(self, root: Path, bar: tqdm) -> int:
        """Write the files that do not exist yet with their size and CRC, each one atomically.

        An existing file directly in `root`, such as a README, is kept: it may be of another
        archive, or the user's own. `bar` is advanced by the bytes of each file.

        Returns:
            How many were written.

        Raises:
            UserError: a file is damaged or cannot be written. Files before it are kept.
        """
        for folder in {(root / member.filename).parent for member in self.files} - {root}:
            if folder.is_dir():
                remove_leftovers(folder)
        written = 0
        with open_zip(self.path) as source:
            for member in self.files:
                target = root / member.filename
                kept = target.parent == root and target.exists()
                if not kept and not _is_complete(target, member):
                    data = self._read(source, member)
                    with write_atomically(target, durable=False) as temporary:
                        temporary.write_bytes(data)
                    written += 1
                bar.update(member.file_size)
        return written

    def _read(self, source: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
        try:
            with source.open(member) as file:
                data = file.read(member.file_size + 1)  # inflates no more; compares the CRC
            if len(data) != member.file_size:
                raise ValueError(f"{len(data)} bytes instead of {member.file_size}")
            return data
        except UNREADABLE as error:
            raise UserError(
                f"{member.filename} is damaged in {self.path} ({error}): download the archive again"
            ) from error


def _is_complete(path: Path, member: zipfile.ZipInfo) -> bool:
    try:
        same_size = path.stat().st_size == member.file_size
        return same_size and zlib.crc32(path.read_bytes()) == member.CRC
    except OSError:
        return False


def extract_all(archives: list[Archive], root: Path) -> int:
    """Extract into `root`, which is created if necessary, and return how many files were written.

    Shows a progress bar. Interrupted extractions are resumed. Raises a `UserError` if the disk is
    too small, or see `Archive.extract`.
    """
    members = [member for archive in archives for member in archive.files]
    needed = sum(m.file_size for m in members if not (root / m.filename).exists())
    require_space(root, needed, "what is to be unpacked", "--datadir")
    total, written = sum(m.file_size for m in members), 0
    with progress_bar(total=total, unit="B", unit_scale=True) as bar:
        for archive in archives:
            bar.set_description(archive.path.stem)
            written += archive.extract(root, bar)
    return written
