"""Archives of data sets as their authors hand them out, unpacked where their folder is not there yet."""

import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from gzip import BadGzipFile
from pathlib import Path

from segmentation.data.folder import folders_below
from segmentation.errors import UsageError
from segmentation.files import told


@dataclass(frozen=True)
class Archive:
    """A file to be had elsewhere.

    Args:
        name: of the file.
        folder: what it holds, the path within the archive.
        source: where it is to be had.
        md5: of the whole file, where it is known.
    """

    name: str
    folder: str
    source: str
    md5: str | None = None

    def unpacked_in(self, root: Path) -> bool:
        """Whether the folder is there: root itself, or up to two levels below it."""
        name = Path(self.folder).name
        return root.name == name or bool(folders_below(root, name, levels=2))

    def __str__(self) -> str:
        return f"{self.name} from {self.source}" + ("" if self.md5 is None else f" (md5 {self.md5})")


def unpack(root: Path, archives: tuple[Archive, ...], say: Callable[[str], None]) -> None:
    """Unpack what lies in root as an archive but not as a folder.

    Raises:
        UsageError: an archive is damaged or holds something else, or the disk is full.
    """
    for archive in packed(root, archives):
        file, partial, target = root / archive.name, root / f"{archive.name}.partial", root / archive.folder
        say(f"unpacking {file}")
        shutil.rmtree(partial, ignore_errors=True)
        with told(partial):
            try:
                _extract(file, partial)
            except (EOFError, BadGzipFile, tarfile.TarError, zipfile.BadZipFile, zlib.error) as fault:
                raise UsageError(f"{file} cannot be unpacked ({fault}): fetch it again, {archive}") from None
        if not (partial / archive.folder).is_dir():
            raise UsageError(f"{file} holds no folder {archive.folder}: fetch it again, {archive}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / archive.folder, target)
        shutil.rmtree(partial)


def _extract(file: Path, target: Path) -> None:
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as zipped:
            zipped.extractall(target)
    else:
        with tarfile.open(file) as tarred:
            tarred.extractall(target, filter="data")


def packed(root: Path, archives: tuple[Archive, ...]) -> list[Archive]:
    """The archives that lie in root and whose folder is not there."""
    return [
        archive for archive in archives if (root / archive.name).is_file() and not archive.unpacked_in(root)
    ]


def still_packed(root: Path, archives: tuple[Archive, ...]) -> list[str]:
    """A line for each archive that waits to be unpacked."""
    return [
        f"{root / archive.name} is not unpacked: run the same command without --check"
        for archive in packed(root, archives)
    ]
