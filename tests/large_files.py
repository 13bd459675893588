"""Hostile files that are made to take time or memory, written without taking either; and what reading takes.

`python tests/large_files.py`: every one of them is read, and a line of JSON says what came of it. The memory
is that of the reading alone, over what the process had when everything was imported.
"""

import json
import os
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))

import hostile_files
import torch
from PIL import Image

MB = 2**20
BOMB = 1024 * MB  # what a compressed file expands to


def _safetensors(header: bytes, length: int | None = None) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(struct.pack("<Q", length or len(header)) + header) and None


def _sparse(path: Path) -> None:
    """Half a terabyte of zeros, of which the disk holds nothing, as one factor of a LoRA."""
    size = 2**39
    entry = {"dtype": "F32", "shape": [2, size // 8], "data_offsets": [0, size]}
    header = json.dumps({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": entry}).encode()
    _safetensors(header)(path)
    os.truncate(path, 8 + len(header) + size)


def _pickle(data: bytes) -> Callable[[Path], None]:
    """A .pth whose pickle is this."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + data + b".")
            archive.writestr("archive/data/0", b"\0" * 64)

    return write


def _expanding(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        with archive.open("archive/data/0", "w") as part:
            for _ in range(BOMB // MB):
                part.write(bytes(MB))


def _shared(path: Path) -> None:
    """A thousand tensors that are all the same 4 MB of the file."""
    storage = torch.zeros(MB)
    torch.save({f"t{number}": storage for number in range(1000)}, path)


def _many_parts(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(120_000):
            archive.writestr(str(number), b"")


def _tensor(shape: bytes, stride: bytes) -> bytes:
    """Instructions that make a tensor of the 64 bytes that are there."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\x10tQ"
    return (
        b"}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + stride + b"\x89}tRs"
    )


def _picture(path: Path) -> None:
    """A GB of black, in half a MB."""
    Image.new("1", (32_000, 32_000)).save(path, "PNG")


def _text(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


_KEYS = ",".join(f'"{number:x}":1' for number in range(10**6)).encode()
_ENTRY = b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
_ENTRIES = b",".join(_ENTRY % number for number in range(10**6))
_LISTS = b"[" + b"[]," * (15 * MB // 3) + b"0]"
_SHAPE = b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":' + _LISTS + b"}}"
_LEVELS = b"[" * (15 * MB)
_DOUBLED = b"]q\0" + b"".join(
    b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40)
)  # lists of lists, 2^40 in all
_STRANGE_KEY = b"}K\1" + b"\x85" * 400_000 + b"K\1s"  # a tuple in a tuple in a tuple as a dict's key

# Name -> (the kind of file that it claims to be, what writes it).
LARGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{
        f"{kind.partition('.')[0]}: {name}": (kind, write)
        for kind in ("h.safetensors", "lora_comfyui.safetensors")
        for name, write in {
            "a header of 2^63 bytes": _safetensors(b"{}", 2**63),
            "a header of 100 MB": _safetensors(b'{"a":"' + b"a" * 100 * MB + b'"}'),
            "10^6 keys": _safetensors(b"{" + _KEYS + b"}"),
            "10^6 tensors": _safetensors(b"{" + _ENTRIES + b"}"),
            "20,000 tensors": _safetensors(b"{" + b",".join(_ENTRY % n for n in range(20_000)) + b"}"),
            "a shape of 5 million lists": _safetensors(_SHAPE),
            "15 million levels": _safetensors(b'{"a":' + _LEVELS),
        }.items()
    },
    "LoRA: half a terabyte of nothing": ("lora_comfyui.safetensors", _sparse),
    "condition: half a terabyte of nothing": ("c.safetensors", _sparse),
    **{
        f".pth: {name}": ("stage1.pth", write)
        for name, write in {
            "expands to a GB": _expanding,
            "4 GB of tensors in 4 MB": _shared,
            "120,000 parts": _many_parts,
            "15 MB of instructions": _pickle(b"]" * (15 * MB)),
            "lists of lists, 2^40 in all": _pickle(_DOUBLED),
            "tuples in tuples as a key": _pickle(_STRANGE_KEY),
            "tuples in tuples": _pickle(b"}X\1\0\0\0aK\1" + b"\x85" * 400_000 + b"s"),
            "a tensor of 2^30 x 2^30": _pickle(_tensor(b"J\0\0\0\x40J\0\0\0\x40\x86", b"K\1K\1\x86")),
            "a tensor of 2^30 times one number": _pickle(_tensor(b"J\0\0\0\x40\x85", b"K\0\x85")),
        }.items()
    },
    **{
        f"{kind}: {name}": (kind, write)
        for kind in ("pose.json", "metadata.json", "tasks.jsonl", "manifest.jsonl")
        for name, write in {
            "5 million lists": _text(_LISTS),
            "15 million levels": _text(_LEVELS),
            "10^6 keys": _text(b"{" + _KEYS + b"}"),
            "450,000 objects": _text(b"[" + b'{"a":1},' * 450_000 + b"0]"),
            "5 million lines": _text(b"{}\n" * (5 * MB)),
            "a number of a million digits": _text(b"[" + b"9" * 10**6 + b"]"),
        }.items()
    },
    "pose.json: a million people": ("pose.json", _text(b'{"people":[' + b"{}," * 10**6 + b"{}]}")),
    "run.toml: a name of 10,000 parts": ("run.toml", _text(b"a." * 10_000 + b"a=1")),
    "run.toml: 900,000 levels": ("run.toml", _text(b"a=" + b"[" * 900_000)),
    "run.toml: 15 MB": ("run.toml", _text(b"a=1\n" * (4 * MB))),
    "picture: a gigapixel": ("picture.png", _picture),
}  # fmt: skip


def _megabytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) // 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        kinds = hostile_files.kinds(place)
        for kind in kinds.values():
            hostile_files.outcome(kind, place / kind.name)  # what is imported late is imported now
        for case, (claimed, write) in LARGE.items():
            path = place / claimed
            write(path)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from here
            before, start = _megabytes("VmRSS"), time.process_time()
            try:
                what = hostile_files.outcome(kinds[claimed], path)
            except MemoryError as error:
                assert str(path) in str(error)
                what = "refused"
            seconds, memory = time.process_time() - start, _megabytes("VmHWM") - before
            sys.stdout.write(json.dumps([case, what, round(seconds, 2), memory]) + "\n")
            path.write_bytes(kinds[claimed].sound)


if __name__ == "__main__":
    main()
