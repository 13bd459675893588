"""Reading .pth files, which come from strangers: PyTorch's zip archives of a pickle and of tensors' bytes.

Neither pickle nor torch.load touches them. The few instructions that describe a state dict are read here as
data; whatever else a pickle can do does not exist. (torch.load's weights_only runs no code either, but it
lets a file make tensors of any size, and believes what the pickle says of a tensor's length.)
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .documents import check_is_file, file_state, read_into
from .safetensors_file import MAX_NAME
from .steps import UNWATCHED, Watch

MAX_DIRECTORY = 4 * 2**20  # bytes of the archive's list of parts; one of 700 parts has 0.1 million
MAX_PICKLE = 16 * 2**20  # bytes; of a state dict of 700 tensors 0.1 million
_MAX_INSTRUCTIONS = 500_000  # a state dict takes about 25 for a tensor

_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_DICT = "collections OrderedDict"
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_NAMES = {*_STORAGES, _DICT, _TENSOR, _PARAMETER}


@dataclass(frozen=True)
class _Name:
    """Something that the pickle calls, by "module name"."""

    name: str


@dataclass(frozen=True)
class _Storage:
    part: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _Stored:
    """A tensor that is still in the file."""

    storage: _Storage
    offset: int  # numbers
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    span: int  # numbers from the first to the last


class _Refused(Exception):
    """The pickle is more than a state dict."""


def load_archive(path: Path, watch: Watch = UNWATCHED) -> Any:
    """The tensors, each a step, numbers, texts, lists and dicts of a .pth file.

    Raises FileNotFoundError, or ValueError naming the file where it is no archive, is damaged, holds anything
    else, or expands beyond its own size.
    """
    check_is_file(path)
    try:
        with _Frugal(io.FileIO(path)) as file:
            state = file_state(file)
            parts = _parts(file, state.size)
            (described,) = (name for name in parts if name.endswith("/data.pkl"))
            found = _carried_out(_part(file, parts[described], state.size))
            values = _Filled(file, parts, described.removesuffix("data.pkl"), state.size, watch).value(found)
            if file_state(file) != state:
                raise _Damaged("it was changed while it was read")
            return values
    except _Refused as error:
        raise ValueError(
            f"{path}: holds something else than tensors ({error}); it was not run. Get it again."
        ) from error
    except _Damaged as error:
        raise ValueError(
            f"{path}: is no whole PyTorch archive ({error}); it was not read. Get it again."
        ) from error


class _Damaged(Exception):
    """It is no archive, or what it says of itself does not fit together."""


class _Frugal(io.BufferedReader):
    """What zipfile reads an archive's list of parts from: at once, to make objects of 15 times its size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise _Damaged(f"its list of parts is {size} bytes long, at most {MAX_DIRECTORY} are read")
        return super().read(size if size is not None and size >= 0 else MAX_DIRECTORY)


def _parts(file: io.BufferedReader, size: int) -> dict[str, zipfile.ZipInfo]:
    """The parts by name, where by their declared sizes they are no larger than the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OSError) as error:
        raise _Damaged(f"{error!s:.200}") from error
    declared = sum(entry.file_size for entry in entries)
    packed = any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries)
    if packed or declared > size:
        raise _Damaged(
            f"it is compressed and would expand to {declared} bytes, the file has {size}; PyTorch does not "
            "compress what it saves"
        )
    if not all(0 <= entry.header_offset < size for entry in entries):
        raise _Damaged("a part lies outside the file")
    parts = {entry.filename: entry for entry in entries}
    if len(parts) < len(entries):
        raise _Damaged("a part is there twice")
    if sum(name.endswith("/data.pkl") for name in parts) != 1:
        raise _Damaged("it has no data.pkl, or several")
    return parts


def _part(file: io.BufferedReader, entry: zipfile.ZipInfo, size: int) -> bytes:
    start = _start(file, entry)
    if entry.file_size > MAX_PICKLE or start + entry.file_size > size:
        raise _Damaged(f"{entry.filename[:60]!r} is {entry.file_size} bytes long")
    data = bytearray(entry.file_size)
    file.seek(start)
    if file.readinto(data) < len(data):
        raise _Damaged("it was cut short while it was read")
    return bytes(data)


def _start(file: io.BufferedReader, entry: zipfile.ZipInfo) -> int:
    """Where a part's bytes begin: after its own header, whose length only that says."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise _Damaged(f"{entry.filename[:60]!r} is not where it should be")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return entry.header_offset + 30 + name + extra


def _carried_out(data: bytes) -> Any:
    """What a pickle of a state dict describes, its tensors as `_Stored`."""
    machine = _Machine()
    try:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if number > _MAX_INSTRUCTIONS:
                raise _Refused(f"it has more than {_MAX_INSTRUCTIONS} instructions")
            machine.do(instruction.name, argument)
        (found,) = machine.stack
    except _Refused:
        raise
    except (ValueError, LookupError, TypeError, UnicodeError, OverflowError) as error:
        raise _Damaged(f"its pickle: {str(error)[:200]}") from error
    return found


_MARK = object()
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}


class _Machine:
    """Pickle's stack machine, with no other instructions than state dicts need."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def do(self, instruction: str, argument: Any) -> None:
        stack = self.stack
        if instruction in _VALUES:
            stack.append(argument)
        elif instruction in _CONSTANTS:
            stack.append(_CONSTANTS[instruction]())
        elif instruction in ("PROTO", "FRAME", "STOP"):
            pass
        elif instruction in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif instruction in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif instruction in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(instruction[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif instruction == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif instruction in ("SETITEM", "APPEND"):
            items = [stack.pop() for _ in range(2 if instruction == "SETITEM" else 1)][::-1]
            self._put(items)
        elif instruction in ("SETITEMS", "APPENDS"):
            self._put(self._to_mark())
        elif instruction == "GLOBAL":
            if argument not in _NAMES:
                raise _Refused(f"it calls {argument[:80]!r}")
            stack.append(_Name(argument))
        elif instruction == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif instruction == "REDUCE":
            arguments = stack.pop()
            stack.append(_called(stack.pop(), arguments))
        elif instruction == "BUILD":  # the attributes of a state dict: versions of its modules
            stack.pop()
        else:
            raise _Refused(f"it has the instruction {instruction}")

    def _to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _put(self, items: list[Any]) -> None:
        """Add values to the list or dict that is on top of the stack. Keys are looked at before they are
        hashed: hashing tuples in tuples has no end in Python but that of the process.
        """
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, dict):
            if not all(_is_name(key) for key in items[::2]):
                raise _Refused("a key that is no name")
            target.update(zip(items[::2], items[1::2], strict=True))
        else:
            raise TypeError("it adds to something that is no dict or list")


def _is_name(key: Any) -> bool:
    return isinstance(key, int | None) or (
        isinstance(key, str) and len(key) <= MAX_NAME and key.isprintable()
    )


def _storage(described: Any) -> _Storage:
    word, kind, part, _, _ = described
    if word != "storage" or not isinstance(kind, _Name) or not isinstance(part, str):
        raise TypeError("it refers to something that is no storage")
    return _Storage(part, _STORAGES[kind.name])


def _called(function: Any, arguments: Any) -> Any:
    if function == _Name(_DICT) and arguments == ():
        return {}
    if function == _Name(_PARAMETER):
        return arguments[0]
    if function != _Name(_TENSOR):
        raise TypeError("it calls something that is no function")
    storage, offset, shape, stride = arguments[:4]
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(x) is int and 0 <= x < 2**62 for x in sizes):
        raise TypeError("a tensor without a storage, a shape or strides")
    if len(shape) != len(stride) or len(shape) > 32 or math.prod(side or 1 for side in shape) >= 2**62:
        raise TypeError(f"a tensor of shape {str(shape)[:60]}")
    numbers = math.prod(shape)
    span = 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) if numbers else 0
    if span < numbers:  # as one whose rows are all the same one
        raise _Refused(f"a tensor of shape {str(shape)[:60]} in {span} numbers")
    return _Stored(storage, offset, tuple(shape), tuple(stride), span)


class _Filled:
    """The described values with their tensors read, each no larger than its part of the archive."""

    def __init__(
        self,
        file: io.BufferedReader,
        parts: dict[str, zipfile.ZipInfo],
        folder: str,
        size: int,
        watch: Watch,
    ) -> None:
        self.file, self.parts, self.folder, self.size = file, parts, folder, size
        self.watch, self.done = watch, 0
        self.total = sum(name.startswith(f"{folder}data/") for name in parts)
        self.left = 4 * size  # bytes that may be read; some files name a tensor twice

    def value(self, found: Any, depth: int = 0) -> Any:
        if depth > 8:
            raise _Refused("lists in lists in lists")
        if isinstance(found, _Stored):
            return self.tensor(found)
        if isinstance(found, dict):
            return {key: self.value(item, depth + 1) for key, item in self._few(found.items())}
        if isinstance(found, list | tuple):
            return type(found)(self.value(item, depth + 1) for item in self._few(found))
        if isinstance(found, _Name | _Storage) or found is _MARK:
            raise _Refused("something that is no value")
        return found

    def _few(self, items: Any) -> Iterator[Any]:
        """The items; each takes of what may be read, so that lists named many times end somewhere."""
        for item in items:
            self._take(16)
            yield item

    def _take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise _Refused("its values are larger than the file")

    def tensor(self, stored: _Stored) -> Tensor:
        entry = self.parts.get(f"{self.folder}data/{stored.storage.part}")
        if entry is None:
            raise _Damaged(f"it has no part {stored.storage.part[:60]!r}")
        dtype = stored.storage.dtype
        first, length = stored.offset * dtype.itemsize, stored.span * dtype.itemsize
        if first + length > entry.file_size:
            raise _Damaged(f"a tensor of shape {list(stored.shape)} in {entry.file_size} bytes")
        self._take(length)
        data = torch.empty(length, dtype=torch.uint8)
        self.file.seek(_start(self.file, entry) + first)
        if not read_into(self.file, data, self.watch):
            raise _Damaged("it was cut short, perhaps while it was read")
        self.done += 1
        self.watch.after(min(self.done, self.total), self.total)
        numbers = data.ne(0) if dtype == torch.bool else data.view(dtype)
        return numbers.as_strided(stored.shape, stored.stride).contiguous()
