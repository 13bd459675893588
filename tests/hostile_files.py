"""Small files of every kind that LoFA reads, ways to damage them, and what may come of reading one."""

import argparse
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from test_released import SMALL, released
from tiny import CONFIG, POSE, TEXT, base_tensors, describe, network

from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import load_generator, save_hypernetwork, save_lora_diffusion
from lofa_core.command_conditions import read_conditions
from lofa_core.descriptions import BaseDescription, ConditionDescription
from lofa_core.inspection import inspect
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_diffusion import LoRADiffusion, LoRADiffusionConfig
from lofa_core.lora_files import load_lora, load_target_layers, save_lora
from lofa_core.released import load_released, published_state
from lofa_core.safetensors_file import open_safetensors
from training.config import DataConfig, load_config
from training.data.task_folder import read_task_folder
from training.experiments import Plan
from training.lora_dataset import LoRAFolder

REPOSITORY = Path(__file__).resolve().parents[1]


_NOTHING = dict.fromkeys(("condition", "pose", "style", "identity", "prompt", "image_encoder")) | {
    "weight": ()
}


@dataclass(frozen=True)
class Kind:
    """One kind of file: a sound one, under its name, and all that reads it."""

    name: str
    sound: bytes
    read: Callable[[Path], object]


def kinds(folder: Path) -> dict[str, Kind]:
    """Every kind of file; `folder` is for what has to lie beside them."""
    small = replace(CONFIG, width=8, blocks=1, feature_blocks=(0,), rank=1, pooling_queries=1)
    save_hypernetwork(network(0, small, describe(1, (4, 4))), folder / "h.safetensors")
    save_hypernetwork(network(0, CONFIG), folder / "h8.safetensors", dtype=torch.int8)
    save_lora_diffusion(_lora_diffusion(describe(1, (4, 4))), folder / "d.safetensors")
    for stage, state in zip(("stage1", "stage2"), published_state(_released()), strict=True):
        torch.save(state, folder / f"{stage}.pth")
    save_file(base_tensors(1, 4), folder / "base.safetensors")
    save_file({"text_emb": torch.randn(1, 3, TEXT.width)}, folder / "c.safetensors")
    lora = LoRA({f"blocks.0.self_attn.{part}": _layer() for part in "qkvo"}, {"lofa_prompt": "a person"})
    layouts = ("comfyui", "original", "diffusers", "kohya", "peft")
    for layout in layouts:
        save_lora(lora, folder / f"lora_{layout}.safetensors", layout)
    index = {"weight_map": dict.fromkeys(base_tensors(1, 4), "base.safetensors")}
    person = {"pose_keypoints_2d": [1.0, 2.0, 0.5] * 18}
    pose = [{"people": [person], "canvas_width": 64, "canvas_height": 64}] * 2
    record = {
        "task": "a",
        "status": "done",
        "file": "a.safetensors",
        "sha256": "0",
        "loss": 0.1,
        "reason": None,
    }
    Image.new("RGB", (8, 8)).save(folder / "wave.png")
    tasks = '{"id": "wave", "prompt": "waves", "clips": [{"file": "wave.png"}]}\n'
    configs = REPOSITORY / "training/configs"

    def of(name: str, read: Callable[[Path], object], content: bytes | None = None) -> Kind:
        return Kind(name, (folder / name).read_bytes() if content is None else content, read)

    found = [
        of("h.safetensors", _all(load_generator, inspect)),
        of("h8.safetensors", _all(load_generator, inspect)),
        of("d.safetensors", _all(load_generator, inspect)),
        of("stage1.pth", _all(lambda path: load_released(path, folder / "stage2.pth"), inspect)),
        of("stage2.pth", _all(lambda path: load_released(folder / "stage1.pth", path), inspect)),
        of("base.safetensors", _all(_read_base, inspect)),
        of("c.safetensors", _all(_read_condition, inspect)),
        of("base.safetensors.index.json", _read_base, json.dumps(index).encode()),
        of("pose.json", _read_pose, json.dumps(pose).encode()),
        of("run.toml", load_config, (configs / "miniature.toml").read_bytes()),
        of("plan.toml", Plan.load, (configs / "experiments.toml").read_bytes()),
        of("manifest.jsonl", lambda path: LoRAFolder(path.parent).records(), json.dumps(record).encode()),
        of("tasks.jsonl", lambda path: read_task_folder(path.parent, DataConfig()), tasks.encode()),
    ]
    read_lora = _all(load_lora, load_target_layers, inspect)
    found += [of(f"lora_{layout}.safetensors", read_lora) for layout in layouts]
    return {kind.name: kind for kind in found}


def _all(*readers: Callable[[Path], object]) -> Callable[[Path], None]:
    """Every reader has its turn; the first one's error counts."""

    def read(path: Path) -> None:
        errors = []
        for reader in readers:
            try:
                reader(path)
            except (ValueError, OSError) as error:
                errors.append(error)
                check_error(error, path)
        if errors:
            raise errors[0]

    return read


def _layer() -> LoRALayer:
    return LoRALayer(torch.randn(2, 4), torch.randn(4, 2), 2.0)


def _released():
    small = replace(SMALL, width=6, blocks=1, feature_blocks=(0,), rank=1)
    return released(small, depths=1, shape=(8, 8), words=4)


def _lora_diffusion(base: BaseDescription) -> LoRADiffusion:
    config = LoRADiffusionConfig(
        rank=1, latent=4, layer_width=2, vae_width=4, width=8, blocks=1, pooling_queries=1, steps=2
    )
    return LoRADiffusion(config, base, (ConditionDescription("text", 6),))


def _read_base(path: Path) -> None:
    base = BaseWeights.open(path)
    base.fingerprint()
    for layer in base.model.layers:
        base.read(layer)


def _read_condition(path: Path) -> object:
    return read_conditions(argparse.Namespace(**(_NOTHING | {"condition": path})), {"text": TEXT}, path)


def _read_pose(path: Path) -> object:
    return read_conditions(argparse.Namespace(**(_NOTHING | {"pose": path})), {"pose": POSE}, path)


# ------------------------------------------------------------
# What may come of it


def outcome(kind: Kind, path: Path) -> str:
    """ "read" or "refused". Fails where anything else comes of reading the file."""
    try:
        kind.read(path)
    except (ValueError, OSError) as error:
        check_error(error, path)
        return "refused"
    return "read"


def check_error(error: Exception, path: Path) -> None:
    """An error names the file, or the other one of two that belong together, and is short."""
    said = str(error)
    named = ("stage1.pth", "stage2.pth") if path.suffix == ".pth" else (path.name, str(path.parent))
    assert isinstance(error, ValueError | FileNotFoundError), repr(error)[:300]
    assert any(name in said for name in named), said[:300]
    assert len(said) < 2500 and said.isprintable(), said[:300]


def agrees_with_the_library(path: Path) -> None:
    """What we read of a safetensors file, the safetensors library reads too, and the same."""
    from safetensors import safe_open

    try:
        own = open_safetensors(path)
    except (ValueError, OSError):
        return
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(own) and (theirs.metadata() or {}) == own.metadata
        for key in own:
            try:
                value = own.tensor(key)
            except ValueError as error:
                assert "which is not read" in str(error)
                continue
            other = theirs.get_tensor(key)
            assert value.dtype == other.dtype and value.shape == other.shape
            if value.numel() and value.dtype != torch.bool:
                assert torch.equal(value.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


# ------------------------------------------------------------
# Damage

HOSTILE_NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30),
    *(0.5, 1e308, -0.0, True, False, None, "", "x", "F32", "F4", "BOOL", [], {}, [0], [[]], {"a": 1}),
)


def with_header(data: bytes, header: bytes) -> bytes:
    """A safetensors file with another header, before the data of this one."""
    return len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def damaged(data: bytes, name: str, chance: random.Random) -> bytes:
    """The file with one to three injuries, of its bytes or of what they mean."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        try:
            data = chance.choice(_INJURIES[_format(name)])(data, chance)
        except RecursionError:
            pass  # as deep as it is, it is hostile enough
        except (ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile):
            data = _flip(data, chance)  # it is too far gone to be understood
    return data


def _format(name: str) -> str:
    return name.rpartition(".")[2]


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
        first = next(key for key in header if key != "__metadata__")
        header[first] = _json_damage(header[first], chance)
    return with_header(data, json.dumps(header).encode())


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


_ANY = [_flip, _cut, _splice, _noise, _early]
_INJURIES = {
    "safetensors": [*_ANY, *[_header] * 6, *[_own_header] * 6, _twice, _length, _not_numbers],
    "pth": [
        *_ANY,
        *[_in_zip(_flip, ".pkl"), _in_zip(_splice, ".pkl"), _in_zip(_cut), _part_gone, _compressed],
        *[_in_zip(_instruction, ".pkl")] * 4,
    ],
    "json": [*_ANY, *[_json_text] * 6, _deep],
    "jsonl": [*_ANY, *[_json_text] * 6, _deep],
    "toml": [*_ANY, *[_value] * 5, _lines],
}
