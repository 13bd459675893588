"""Reading files that come from strangers: text, JSON, and what their readers share."""

import json
import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from .steps import Watch

MAX_TEXT = 16 * 2**20  # bytes
MAX_PARTS = 500_000  # lists and objects of JSON: the smallest take thirty times their bytes in memory
MAX_LINES, MAX_LINE = 250_000, 2**20
_PIECE = 2**24  # bytes read at once


def check_is_file(path: Path) -> None:
    """FileNotFoundError where there is none; opening a pipe or a device could wait for ever."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" + (", but a folder." if path.is_dir() else "."))


def shown(text: str, most: int = 500) -> str:
    """A stranger's words as an error can show them: printable, and not too many."""
    cut = text if len(text) <= most else text[:most] + "..."
    return cut if cut.isprintable() else repr(cut)[1:-1]


class FileState(NamedTuple):
    """What changes where an open file is written to or cut short."""

    size: int  # bytes
    changed: int  # nanoseconds
    device: int
    inode: int


def file_state(file: BinaryIO) -> FileState:
    found = os.fstat(file.fileno())
    return FileState(found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)


def read_into(file: BufferedReader, data: Tensor, watch: Watch) -> bool:
    """Fill `data`, uint8 [n], from where the file stands; whether there was enough. `watch` is asked between
    pieces: from a slow disk a large tensor takes seconds.
    """
    for piece in data.split(_PIECE):
        watch.before()
        if file.readinto(piece.numpy().data) < len(piece):
            return False
    return True


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte order mark. FileNotFoundError, or ValueError naming the file
    where it is something else or has more than MAX_TEXT bytes.
    """
    check_is_file(path)
    with path.open("rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"{path}: is larger than the {MAX_TEXT // 2**20} MB that are read of such a file.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}).") from error


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a long list, one after another. FileNotFoundError, or ValueError naming the file where it
    has more than MAX_LINES, or one of more than MAX_LINE bytes.
    """
    check_is_file(path)
    with path.open("rb") as file:
        for number in range(1, MAX_LINES + 1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                raise ValueError(f"{path}: line {number} is longer than the {MAX_LINE} bytes that are read.")
            yield line
        if file.read(1):
            raise ValueError(f"{path}: has more than the {MAX_LINES} lines that are read.")


def read_json(path: Path, what: str = "JSON") -> Any:
    """What a JSON file holds. As `read_text`; ValueError where it is no JSON, so not `what` it should be."""
    text = read_text(path)
    if text.count("[") + text.count("{") > MAX_PARTS:
        raise ValueError(f"{path}: has more than the {MAX_PARTS} lists and objects that are read.")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not {what} ({error}).") from error
