"""Ways to damage a file: its bytes, or what they mean. The same `chance` gives the same damage."""

import io
import json
import math
import pickle
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

RAN = "LOFA_CODE_OF_A_FILE_RAN"  # the variable that code in a file would set

HOSTILE_NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30),
    *(0.5, 1e308, -0.0, True, False, None, "", "x", "F32", "F4", "BOOL", [], {}, [0], [[]], {"a": 1}),
)


def with_header(data: bytes, header: bytes) -> bytes:
    """A safetensors file with another header, before the data of this one."""
    return len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


# What comes of changing the meaning of a file that has none any more.
_TOO_FAR_GONE = (
    *(ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError, struct.error, zlib.error),
    *(zipfile.BadZipFile, SafetensorError, pickle.UnpicklingError, EOFError),
)


def damaged(sound: bytes, name: str, chance: random.Random) -> bytes:
    """The file with one to three injuries, of its bytes or of what they mean."""
    data = sound
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        try:
            injury = chance.choice(_INJURIES.get(name.rpartition(".")[2], _ANY))
            # PyTorch and safetensors are asked for tensors of sound files only.
            data = injury(sound if injury in (_tensor, _stored_tensor) else data, chance)
        except RecursionError:
            pass  # as deep as it is, it is hostile enough
        except _TOO_FAR_GONE:
            data = _flip(data, chance)
    return data


def _flip(data: bytes, chance: random.Random) -> bytes:
    found = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 8))):
        found[chance.randrange(len(found))] = chance.randrange(256)
    return bytes(found)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _splice(data: bytes, chance: random.Random) -> bytes:
    start, end, at = sorted(chance.randrange(len(data) + 1) for _ in range(3))
    return data[:at] + data[start:end] + data[chance.choice((at, end)) :]


def _noise(data: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice((0, 1, 7, 8, 9, 100, 3000)))


def _early(data: bytes, chance: random.Random) -> bytes:
    """Like _flip, in the first bytes, where headers are."""
    found = bytearray(data)
    found[chance.randrange(min(len(found), 400))] = chance.randrange(256)
    return bytes(found)


def _json_damage(values: object, chance: random.Random) -> object:
    """A JSON value with one place changed, somewhere in it."""
    places = []

    def walk(value: object) -> None:
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, item in items:
            places.append((value, key))
            walk(item)

    walk(values)
    if not places:
        return chance.choice(HOSTILE_NUMBERS)
    holder, key = chance.choice(places)
    what = chance.randrange(5)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[chance.choice(("x", "", "\0", "\ud800", "a" * 2000, f"{key}.", "__metadata__"))] = holder.pop(
            key
        )
    elif what == 2 and isinstance(holder[key], int | float):
        holder[key] += chance.choice((-1, 1, 4, 0.5))
    elif what == 3:
        holder[key] = holder[chance.choice(list(holder))] if isinstance(holder, dict) else [holder[key]] * 3
    else:
        holder[key] = chance.choice(HOSTILE_NUMBERS)
    return values


def _header(data: bytes, chance: random.Random) -> bytes:
    return with_header(data, json.dumps(_json_damage(header_of(data), chance)).encode())


def _own_header(data: bytes, chance: random.Random) -> bytes:
    """Of the JSON in a hypernetwork's metadata; in other files, of the first tensor's entry."""
    header = header_of(data)
    if "lofa" in header.get("__metadata__", {}):
        own = _json_damage(json.loads(header["__metadata__"]["lofa"]), chance)
        header["__metadata__"]["lofa"] = json.dumps(own)
    else:
        first = [key for key in header if key != "__metadata__"][0]
        header[first] = _json_damage(header[first], chance)
    return with_header(data, json.dumps(header).encode())


def _tensors_of(state: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    """A state dict with one tensor of another name, shape, dtype or content."""
    key = chance.choice(list(state))
    tensor = state.pop(key)
    numbers = chance.choice((0, 1, 2, 3, 7, 255, 999, 9999, 10**20))
    renamed = re.sub(r"\d+", str(numbers), key)
    other = chance.choice((key, key, f"{key}.", key.replace(".", "_"), renamed, *list(state)[:1]))
    state[other] = chance.choice(_OTHER_TENSORS)(tensor)
    return state


_OTHER_TENSORS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda x: x,
    lambda x: x.flatten(),
    lambda x: x.mT.contiguous() if x.ndim > 1 else x[:0],
    lambda x: x[None],
    lambda x: x[:-1] if x.ndim else x.reshape(1),
    lambda x: torch.zeros(0, *x.shape[1:], dtype=x.dtype),
    lambda x: torch.zeros(2**31, 0),
    lambda x: torch.zeros(()),
    lambda x: x.double(),
    lambda x: x.to(torch.int64),
    lambda x: x.bool(),
    lambda x: x.to(torch.float8_e4m3fn),
    lambda x: x.to(torch.complex64),
    lambda x: torch.full_like(x, math.nan) if x.is_floating_point() else x,
    lambda x: torch.full_like(x, math.inf) if x.is_floating_point() else x,
    lambda x: torch.full_like(x, 1e38, dtype=torch.float32),
)


def _tensor(data: bytes, chance: random.Random) -> bytes:
    metadata = header_of(data).get("__metadata__")
    return save(_tensors_of(load(data), chance), metadata)


def _stored_tensor(data: bytes, chance: random.Random) -> bytes:
    found = io.BytesIO()
    state = torch.load(io.BytesIO(data), weights_only=True)
    holder = chance.choice([state, *(value for value in state.values() if isinstance(value, dict))])
    _tensors_of(holder, chance)
    torch.save(state, found)
    return found.getvalue()


def _twice(data: bytes, chance: random.Random) -> bytes:
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    entry = chance.choice(['"__metadata__":{}', '"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'])
    return with_header(data, header[:-1] + b"," + entry.encode() + b"," + header[1:])


def _length(data: bytes, chance: random.Random) -> bytes:
    return chance.choice((0, 1, 2**24, 10**8, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]


def _not_numbers(data: bytes, chance: random.Random) -> bytes:
    at = 8 + int.from_bytes(data[:8], "little") + 4 * chance.randrange(16)
    return data[:at] + struct.pack("<f", chance.choice((float("nan"), float("inf")))) + data[at + 4 :]


def _json_text(data: bytes, chance: random.Random) -> bytes:
    return json.dumps(_json_damage(json.loads(data), chance)).encode()


def _deep(data: bytes, chance: random.Random) -> bytes:
    return chance.choice((b"[", b'{"a":', b"[[],")) * chance.choice((10, 1000, 100_000))


def _value(data: bytes, chance: random.Random) -> bytes:
    """One value of a TOML file."""
    lines = data.decode().splitlines()
    at = chance.choice([n for n, line in enumerate(lines) if "=" in line and not line.startswith("#")])
    values = ("-1", "0", "1e400", "nan", "9" * 5000, '"x"', "[]", "{}", "true", "[" * 2000, "", "2**3", "0x1")
    lines[at] = f"{lines[at].partition('=')[0]}= {chance.choice(values)}"
    return "\n".join(lines).encode()


def _lines(data: bytes, chance: random.Random) -> bytes:
    lines = data.decode().splitlines()
    chance.shuffle(lines)
    return "\n".join(lines[: chance.randrange(len(lines) + 1)]).encode()


def zip_parts(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return found.getvalue()


def _in_zip(injure: Callable[[bytes, random.Random], bytes], suffix: str = "") -> Callable:
    def change(data: bytes, chance: random.Random) -> bytes:
        parts = zip_parts(data)
        name = chance.choice([name for name in parts if name.endswith(suffix)])
        return zipped(parts | {name: injure(parts[name], chance)})

    return change


def _part_gone(data: bytes, chance: random.Random) -> bytes:
    parts = zip_parts(data)
    del parts[chance.choice(list(parts))]
    return zipped(parts)


def _compressed(data: bytes, chance: random.Random) -> bytes:
    return zipped(zip_parts(data), zipfile.ZIP_DEFLATED)


def _instruction(data: bytes, chance: random.Random) -> bytes:
    """Another instruction or a number somewhere in a pickle."""
    at = chance.randrange(len(data))
    put = chance.choice(b"\x80.(]}KMJGXqrhjRcQtbuaes\x85\x86\x87\x88\x89N0122Vi\x93\x81")
    return data[:at] + bytes([put]) + data[at + chance.choice((0, 1)) :]


def code(statement: str) -> bytes:
    """A pickle that runs a line of Python where it is unpickled."""
    return b"\x80\x02cbuiltins\nexec\n(X" + struct.pack("<I", len(statement)) + statement.encode() + b"tR."


def _code(data: bytes, chance: random.Random) -> bytes:
    """Code before, in, or in place of a pickle."""
    put = code(f"import os; os.environ['{RAN}'] = '1'")
    at = chance.randrange(len(data))
    return chance.choice((put, put[:-1] + data[2:], data[:at] + put[2:-1] + b"0" + data[at:]))


_ANY = [_flip, _cut, _splice, _noise, _early]
_INJURIES = {
    "safetensors": [*_ANY, *[_header] * 6, *[_own_header] * 6, *[_tensor] * 6, _twice, _length, _not_numbers],
    "pth": [
        *_ANY,
        *[_in_zip(_flip, ".pkl"), _in_zip(_splice, ".pkl"), _in_zip(_cut), _part_gone, _compressed],
        *[_in_zip(_instruction, ".pkl")] * 4,
        *[_in_zip(_code, ".pkl"), _code, *[_stored_tensor] * 6],
    ],
    "json": [*_ANY, *[_json_text] * 6, _deep],
    "jsonl": [*_ANY, *[_json_text] * 6, _deep],
    "toml": [*_ANY, *[_value] * 5, _lines],
}
