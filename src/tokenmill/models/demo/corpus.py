"""The text of the running interpreter's own standard library, split into training and held-out files."""

import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HELD_OUT_SHARE = 20
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class SourceFile:
    """One file of the library: its path relative to the library's root, with slashes, and its text."""

    path: str
    text: str


def is_held_out(path: str) -> bool:
    """Say whether the file of this relative path is kept from training: one in twenty, by a hash of the path.

    The hash depends on nothing else, so a file stays on its side on every machine and in every Python version.
    """
    return zlib.crc32(path.encode()) % _HELD_OUT_SHARE == 0


def training_files(root: Path | None = None) -> Iterator[SourceFile]:
    """Read the files to train on, tests of the library included where they are installed, in order of path."""
    return (file for file in _files(root) if not is_held_out(file.path))


def held_out_files(root: Path | None = None) -> Iterator[SourceFile]:
    """Read the files kept from training, in order of path.

    Tests are left out, because not every installation of Python has them and the score should be the same.
    """
    return (file for file in _files(root) if is_held_out(file.path) and not _is_test(file.path))


def _files(root: Path | None) -> Iterator[SourceFile]:
    """Read every non-empty `.py` file below `root` (the standard library unless told) that decodes as source text."""
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            # The library's tests hold files that are broken on purpose.
            continue
        if text.strip():
            yield SourceFile(relative.as_posix(), text)


def _is_test(path: str) -> bool:
    return not _TEST_FOLDERS.isdisjoint(path.split("/"))
