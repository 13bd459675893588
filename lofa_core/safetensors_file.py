"""Reading safetensors files, which come from strangers: the one place where LoFA opens them.

A header is checked as a whole before anything is allocated for what it promises. Tensors are read, not
mapped: where a mapped file is cut short by somebody else, the whole process dies (SIGBUS) without a word.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .documents import FileState, check_is_file, file_state, read_into
from .steps import UNWATCHED, Watch

MAX_HEADER = 16 * 2**20  # bytes; a Flux or SDXL checkpoint with 2,500 tensors has 0.3 million
MAX_TENSORS = 20_000
_MAX_LISTS = 10 * MAX_TENSORS  # a tensor has two; metadata may be JSON that has some
MAX_NAME = 1000  # characters
_MAX_DIMENSIONS = 32
_MAX_NUMBERS = 2**62

# A dtype's name in the file -> bits of a number, and PyTorch's dtype; None: other programs' files may hold
# such tensors beside ours, but they are not read.
_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "U16": (16, torch.uint16),
    "I16": (16, torch.int16),
    "U32": (32, torch.uint32),
    "I32": (32, torch.int32),
    "U64": (64, torch.uint64),
    "I64": (64, torch.int64),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "F32": (32, torch.float32),
    "F64": (64, torch.float64),
    "C64": (64, torch.complex64),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "F8_E8M0": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
# What files call the dtypes that PyTorch has.
DTYPE_NAMES = {dtype: name for name, (_, dtype) in _DTYPES.items() if dtype is not None}


@dataclass(frozen=True)
class Entry:
    """What a header says about one tensor; `start` and `end` are bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A file whose header is sound. It is not kept open: each reading checks that it is still the same."""

    def __init__(
        self, path: Path, entries: dict[str, Entry], metadata: dict[str, str], state: FileState
    ) -> None:
        self.path, self.metadata = path, metadata
        self._entries, self._state = entries, state

    def keys(self) -> list[str]:
        """The tensors' names, in the file's order."""
        return list(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> str:
        """As the file names it: "BF16"."""
        return self._entries[key].dtype

    def is_floating_point(self, key: str) -> bool:
        return self.dtype(key).startswith(("F", "BF"))

    def tensor(self, key: str, watch: Watch = UNWATCHED) -> Tensor:
        """One tensor, in memory of its own. ValueError where the file has changed since it was opened, or
        PyTorch has no such dtype.
        """
        entry = self._entries[key]
        return self._read(key, entry.start, entry.shape, watch)

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (not included, and no further than there are) of a tensor, alone."""
        entry = self._entries[key]
        if not entry.shape:
            raise ValueError(f"{self.path}: {key} is a single number, expected rows.")
        first, last = min(first, entry.shape[0]), min(last, entry.shape[0])
        bits = _DTYPES[entry.dtype][0] * math.prod(entry.shape[1:])
        return self._read(key, entry.start + first * bits // 8, (last - first, *entry.shape[1:]))

    def _read(self, key: str, start: int, shape: tuple[int, ...], watch: Watch = UNWATCHED) -> Tensor:
        bits, dtype = _DTYPES[self._entries[key].dtype]
        if dtype is None:
            raise ValueError(
                f"{self.path}: {key} is {self._entries[key].dtype}, which is not read. "
                "Give the file in bf16, fp16 or fp8."
            )
        try:
            data = torch.empty(math.prod(shape) * bits // 8, dtype=torch.uint8)
        except RuntimeError as error:  # PyTorch's way to say that memory is short
            raise MemoryError(f"{self.path}: {key} does not fit into memory.") from error
        with _opened(self.path) as file:
            file.seek(start)
            whole = read_into(file, data, watch)
            if not whole or file_state(file) != self._state:
                raise ValueError(f"{self.path} was changed while it was read. Wait, and read it again.")
        return data.ne(0).view(shape) if dtype == torch.bool else data.view(dtype).view(shape)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check a file's header. FileNotFoundError, or ValueError naming the file and what is wrong."""
    with _opened(path) as file:
        state = file_state(file)
        try:
            entries, metadata = _header(file, state.size)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({_brief(error)}). Get or make it again."
            ) from error
    return SafetensorsFile(path, entries, metadata, state)


def _opened(path: Path) -> BufferedReader:
    check_is_file(path)
    return path.open("rb")


def _header(file: BufferedReader, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise ValueError("it is shorter than a header" if size else "it is empty")
    if length > size - 8:
        raise ValueError(f"its header would be {length} bytes long, the file has {size}")
    if length > MAX_HEADER:
        raise ValueError(f"its header is {length} bytes long, at most {MAX_HEADER} are read")
    raw = file.read(length)
    if len(raw) < length or raw[:1] != b"{":
        raise ValueError("it has no header")
    if raw.count(b"[") > _MAX_LISTS:  # each takes twenty times its bytes in memory
        raise ValueError(f"its header holds more than {_MAX_LISTS} lists")
    values = json.loads(raw.decode("utf-8"), object_pairs_hook=_Unique(), parse_constant=_refuse)
    metadata = values.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is not text by name")
    "".join([*metadata, *metadata.values()]).encode("utf-8")  # half a surrogate pair cannot be shown or saved
    entries = {key: _entry(key, value, 8 + length, size) for key, value in values.items()}
    _check_cover(entries, 8 + length, size)
    return entries, metadata


class _Unique:
    """An object's pairs as a dict, where no name is there twice and there are not too many objects."""

    def __init__(self) -> None:
        self.objects = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self.objects += 1
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("its header has a name twice")
        if self.objects > MAX_TENSORS + 2:  # the metadata, and the whole
            raise ValueError(f"it holds more than {MAX_TENSORS} tensors")
        return found


def _refuse(constant: str) -> None:
    raise ValueError(f"its header holds {constant}")


def _entry(key: str, value: Any, data: int, size: int) -> Entry:
    if len(key) > MAX_NAME or not key.isprintable():
        raise ValueError(f"the name {key[:40]!r} of a tensor is too long, or cannot be printed")
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"{key} has no dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{key} has the unknown dtype {dtype!r:.40}")
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{key} has the shape {shape!r:.40}")
    if not _is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data:
        raise ValueError(
            f"{key} would lie at {offsets!r:.60}, outside the {size - data} bytes that are there"
        )
    # Of a tensor without numbers, too: its other sizes are multiplied elsewhere.
    if math.prod(side or 1 for side in shape) > _MAX_NUMBERS:
        raise ValueError(f"{key} has the shape {shape!r:.40}")
    if math.prod(shape) * _DTYPES[dtype][0] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{key}: {offsets[1] - offsets[0]} bytes are not {shape!r:.60} of {dtype}")
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(side) is int and 0 <= side <= _MAX_NUMBERS for side in values
    )


def _check_cover(entries: dict[str, Entry], data: int, size: int) -> None:
    """Every byte of the data has to belong to one tensor."""
    at = data
    for key, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end)):
        if entry.start != at:
            raise ValueError(f"{key} overlaps another tensor, or there is a gap before it")
        at = entry.end
    if at != size:
        raise ValueError(f"its tensors end at byte {at}, the file at {size}")


def _brief(error: Exception) -> str:
    return str(error) if len(str(error)) <= 200 else str(error)[:200] + "..."
