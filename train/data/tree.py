"""Which image files the class folders of a data set hold: links are followed, what is left out is counted and named.

Every real folder and every real file comes once, so that no image is its own nearest neighbour and no loop of links is
walked for ever. What lies in a folder itself comes before what a link shows, in the order of names.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

from . import images
from .formats import SUFFIXES
from .part import DataError

COPIES = frozenset(
    ("@eaDir", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
"""Folders that systems fill with thumbnails, copies and rubbish; so are those whose names begin with a dot."""


class Tree:
    """The classes of a data set: each sub-folder of ``root``, and each link there to a folder.

    Raises:
        DataError: a folder cannot be read, or a class has a name that no other machine would read the same way.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.classes: dict[str, list[Path]] = {}
        """By name, NFC: the paths of its files below ``root``, in the order of their names."""
        self.left_out: dict[str, list[Path]] = defaultdict(list)
        """By reason; also of a class with too few images."""
        self._seen = {identity(os.stat(root))}
        self._linked_folders: deque[tuple[str, Path]] = deque()
        self._linked_files: list[tuple[str, Path]] = []
        own = []
        for entry in self._entries(root):
            path = root / entry.name
            if not _is_folder(entry):
                self.left_out["files outside the sub-folders"].append(path)
            elif entry.is_symlink():
                self._linked_folders.append((self._add_class(path), path))
            else:
                own.append((self._add_class(path), path))
        self._seen |= {identity(os.stat(path)) for _, path in own}
        for name, path in own:
            self._walk(name, path)
        while self._linked_folders:
            name, path = self._linked_folders.popleft()
            if self._first_time(os.stat(path)):
                self._walk(name, path)
            else:
                self.left_out[_AGAIN].append(path)
        for name, path in self._linked_files:
            self._add_file(name, path)
        for files in self.classes.values():
            files.sort(key=self._order)

    def source(self, path: Path) -> str:
        """The name of a file, the same on every machine: below ``root``, with slashes, NFC."""
        return unicodedata.normalize("NFC", path.relative_to(self.root).as_posix())

    def notes(self) -> Iterator[str]:
        """A line for each reason for which something was left out."""
        for reason, paths in self.left_out.items():
            names = [path.relative_to(self.root) for path in sorted(paths, key=self._order)]
            kinds = ""
            if reason == _NO_IMAGES:
                counts = Counter(path.suffix.lower() or "without a suffix" for path in paths)
                kinds = f" ({', '.join(f'{count:,} {suffix}' for suffix, count in counts.most_common())})"
            yield f"{self.root}: {len(paths):,} {reason} left out{kinds}: {images.few(names)}"

    def _add_class(self, path: Path) -> str:
        name = unicodedata.normalize("NFC", path.name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"--data folder:{self.root}: {path.name!r} is not UTF-8: rename this sub-folder") from None
        if name in self.classes:
            raise DataError(f"--data folder:{self.root}: two sub-folders are {name!r}, in two spellings of Unicode")
        self.classes[name] = []
        return name

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, in the order of names, except what is hidden or broken."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"--data folder:{self.root}: cannot read folder {folder}: {error}") from error
        kept = []
        for entry in entries:
            path = folder / entry.name
            if hidden(entry.name):
                self.left_out[f"hidden {'folders' if _is_folder(entry) else 'files'}"].append(path)
            elif path.suffix.lower() not in SUFFIXES and self._leads_to_nothing(path):
                self.left_out["links to nothing"].append(path)
            else:
                kept.append(entry)
        return kept

    def _leads_to_nothing(self, path: Path) -> bool:
        """Not so of what may not be looked at, which is an error: it could be a folder of images."""
        try:
            os.stat(path)
        except OSError as error:
            if error.errno in _NOTHING:
                return True
            raise DataError(f"--data folder:{self.root}: cannot read {path}: {error}") from error
        return False

    def _walk(self, name: str, folder: Path) -> None:
        """Take over the files of a folder and of the real folders inside it."""
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            for entry in self._entries(folder):
                path = folder / entry.name
                if entry.is_symlink():
                    (self._linked_folders if _is_folder(entry) else self._linked_files).append((name, path))
                elif not _is_folder(entry):
                    self._add_file(name, path)
                elif self._first_time(os.stat(path)):
                    waiting.append(path)
                else:
                    self.left_out[_AGAIN].append(path)

    def _add_file(self, name: str, path: Path) -> None:
        if path.suffix.lower() not in SUFFIXES:
            self.left_out[_NO_IMAGES].append(path)
            return
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"--data folder:{self.root}: cannot read image {path}: {error}") from error
        if not stat.S_ISREG(found.st_mode):
            self.left_out["pipes and devices"].append(path)
        elif self._first_time(found):
            self.classes[name].append(path)
        else:
            self.left_out["files that are read already under another name"].append(path)

    def _first_time(self, found: os.stat_result) -> bool:
        file = identity(found)
        new = file not in self._seen
        self._seen.add(file)
        return new

    def _order(self, path: Path) -> list[str]:
        return self.source(path).split("/")


_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_AGAIN = "folders that are read already under another name"
_NO_IMAGES = "files that Pillow does not decode here"


def would_read(root: Path, place: Path) -> bool:
    """Whether images in the folder ``place``, which need not be there, would be images of a class of ``root``."""
    place, root = (Path(os.path.realpath(path)) for path in (place, root))  # a circle of links: Path.resolve raises

    def shows(folder: Path) -> bool:
        return place.is_relative_to(folder) and not any(map(hidden, place.relative_to(folder).parts))

    return (place != root and shows(root)) or any(map(shows, _linked(root)))


def _linked(root: Path) -> Iterator[Path]:
    """The real folders that links below ``root`` lead to. What cannot be read is left out: that is told when the data
    are loaded."""
    waiting = [os.fspath(root)]
    seen = set(waiting)
    while waiting:
        try:
            with os.scandir(waiting.pop()) as found:
                folders = [entry for entry in found if not hidden(entry.name) and _is_folder(entry)]
        except OSError:
            continue
        for entry in folders:
            real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            if real in seen:
                continue
            seen.add(real)
            waiting.append(real)
            if entry.is_symlink():
                yield Path(real)


def hidden(name: str) -> bool:
    return name.startswith(".") or name in COPIES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also through a link; False of a link that leads in a circle, for which ``DirEntry.is_dir`` raises OSError."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def identity(found: os.stat_result) -> tuple[int, int]:
    """Of a real file or folder, the same through every link."""
    return found.st_dev, found.st_ino
