"""LoRA files: safetensors in every layout of key_names.py, and the count of layers that fit a base model."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .base_models import BaseModel
from .key_names import canonical_name, default_layout, layout_name
from .lora import LoRA, LoRALayer
from .numbers import check_finite, is_finite
from .safetensors_file import DTYPE_NAMES, open_safetensors
from .steps import UNWATCHED, Watch
from .whole_files import whole_file

# What stands after a layer's name -> what it holds.
SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",  # a raw PEFT state dict names the adapter
    ".lora_B.default.weight": "B",
    ".lora_down.weight": "A",  # Kohya
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",  # diffusers' older scripts
    ".lora.up.weight": "B",
    ".alpha": "alpha",  # where it is absent, alpha = r
}
_PIECE = 2**24  # bytes written at once


def to_state_dict(
    lora: LoRA, layout: str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A [r, in] and B [out, r] of each layer under the names of `layout`; by default the one all tools load.

    Kohya's layout keeps alpha as a tensor of its own. The others have no place for it that every tool reads,
    so there alpha / r is multiplied into B. `dtype` None keeps each tensor's own. Raises ValueError for an
    unknown layout.
    """
    layout = layout or default_layout(lora)
    state: dict[str, Tensor] = {}
    for name, layer in lora.items():
        key = layout_name(name, layout)
        if layout == "kohya":
            down, up, B = "lora_down", "lora_up", layer.B
            state[f"{key}.alpha"] = torch.tensor(float(layer.alpha))
        else:
            down, up, B = "lora_A", "lora_B", layer.B.float() * (layer.alpha / layer.rank)
        state[f"{key}.{down}.weight"] = layer.A.to(dtype or layer.A.dtype)
        state[f"{key}.{up}.weight"] = B.to(dtype or layer.B.dtype)
    return state


def from_state_dict(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoRA:
    """The LoRA in a state dict of any layout, its tensors untouched.

    Raises ValueError naming the key that is not part of a LoRA of target layers, or whose partner is missing.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, (name, part) in _check_names(state).items():
        found.setdefault(name, {})[part] = state[key]
    return LoRA({name: _layer(name, parts) for name, parts in found.items()}, dict(metadata or {}))


def _check_names(keys: Collection[str]) -> dict[str, tuple[str, str]]:
    """Key -> (canonical name of its target layer, "A", "B" or "alpha"). ValueError as `from_state_dict`."""
    found: dict[tuple[str, str], str] = {}
    for key in keys:
        module, part = _split(key)
        name = canonical_name(module)
        if name is None:
            raise ValueError(
                f"{key} changes a layer that LoFA does not know. It reads LoRAs of the attention (q, k, v, "
                "o) of WAN2.1 or of SDXL's UNet, under ComfyUI, original, diffusers, Kohya or PEFT names."
            )
        if (name, part) in found:
            raise ValueError(f"{key}: {name} has its {part} twice, under two names.")
        found[name, part] = key
    if not found:
        raise ValueError("There are no tensors here, so no LoRA.")
    return {key: place for place, key in found.items()}


def _target_layers(keys: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the keys of a LoRA of target layers, all others)."""
    kept: list[str] = []
    others: list[str] = []
    for key in keys:
        known = any(key.endswith(suffix) for suffix in SUFFIXES) and canonical_name(_split(key)[0])
        (kept if known else others).append(key)
    if not kept:
        first = f" (first {others[0]})" if others else ""
        raise ValueError(
            f"None of these {len(keys)} tensors{first} belongs to a LoRA of the attention (q, k, v, o) of "
            "WAN2.1 or of SDXL's UNet. LoHa, LoKr and full differences are not read."
        )
    return tuple(kept), tuple(others)


def _split(key: str) -> tuple[str, str]:
    """Key -> (module name, "A", "B" or "alpha")."""
    for suffix, part in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    raise ValueError(
        f"{key} is not a LoRA's key, which ends in lora_A/lora_B.weight, lora_down/lora_up.weight or alpha. "
        "Whole models, LoHa, LoKr, DoRA and full differences are not LoRAs."
    )


def _layer(name: str, parts: dict[str, Tensor]) -> LoRALayer:
    for part in ("A", "B"):
        if part not in parts:
            raise ValueError(f"{name} has no {part}: it has only {', '.join(sorted(parts))}.")
    for part, tensor in parts.items():
        if not tensor.is_floating_point() and not (part == "alpha" and not tensor.is_complex()):
            raise ValueError(f"{name}: its {part} is {tensor.dtype}, expected floating point numbers.")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ValueError(f"{name}: its alpha is {list(parts['alpha'].shape)}, expected one number.")
    rank = parts["A"].shape[0] if parts["A"].ndim else 0  # LoRALayer says what is wrong with it
    alpha = parts["alpha"].item() if "alpha" in parts else rank
    try:
        return LoRALayer(parts["A"], parts["B"], float(alpha))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def save_lora(
    lora: LoRA,
    path: Path | str,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    watch: Watch = UNWATCHED,
) -> None:
    """Write a LoRA and its metadata to a .safetensors file, whole or not at all; see `to_state_dict`.

    Raises FileNotFoundError if the folder is not there, ValueError for another file type, or where a number
    is not finite or too large for `dtype`.
    """
    state = to_state_dict(lora, layout, dtype)
    for key, tensor in state.items():
        watch.before()
        if not is_finite(tensor):
            raise ValueError(
                f"{path} is not written: {key} is not finite in {str(tensor.dtype).removeprefix('torch.')}. "
                "Lower the LoRA's strength, or predict it again."
            )
    write_safetensors(state, path, lora.metadata, watch)


def load_lora(path: Path | str) -> LoRA:
    """Read a LoRA of any layout. FileNotFoundError, or ValueError naming the file and what is wrong in it."""
    file = open_safetensors(Path(path))
    try:
        _check_names(file)  # before a whole model is read for a LoRA
        return from_state_dict(dict(each_tensor(path)), file.metadata)
    except ValueError as error:
        raise ValueError(_with_its_name(path, error)) from error


def load_target_layers(path: Path | str, watch: Watch = UNWATCHED) -> tuple[LoRA, tuple[str, ...]]:
    """(the LoRA of the target layers, the keys of everything else) in a file of any layout: people's LoRAs
    often change feed-forward layers and text encoders too, which are not read.

    Raises as `load_lora`, and ValueError where no target layer is among them.
    """
    file = open_safetensors(Path(path))
    try:
        kept, others = _target_layers(file)
        state = {}
        for key in watch.each(kept, len(kept)):
            state[key] = file.tensor(key, watch)
            check_finite(state[key], key)
        return from_state_dict(state, file.metadata), others
    except ValueError as error:
        raise ValueError(_with_its_name(path, error)) from error


def _with_its_name(path: Path | str, error: ValueError) -> str:
    return str(error) if str(error).startswith(str(path)) else f"{path}: {error}"


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str], watch: Watch = UNWATCHED
) -> None:
    """Write a safetensors file, whole or not at all; the same tensors and metadata give the same bytes.

    By hand: the format's own library puts the metadata into another order every time, and cannot be stopped
    on a slow disk. Raises FileNotFoundError if the folder is not there, ValueError if the name does not end
    in .safetensors or the format has no such dtype, OSError naming the file where the disk is full.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the file's name has to end in .safetensors.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent} to write into. Make it first.")
    # The widest numbers first: each then lies at a multiple of its size.
    keys = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for key in keys:
        tensor = tensors[key]
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{path}: {key} is {tensor.dtype}, which safetensors files do not hold.")
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key in watch.each(keys, len(keys)):
            data = tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8)
            for piece in data.split(_PIECE):
                watch.before()
                file.write(piece.numpy().data)


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file. FileNotFoundError, or ValueError naming a damaged file."""
    file = open_safetensors(Path(path))
    return {key: file.tensor(key) for key in file}, file.metadata


def each_tensor(path: Path | str, watch: Watch = UNWATCHED) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) after another of a large safetensors file, each in memory of its own and a step.

    What was read and let go does not stay in memory. Raises as `read_safetensors`, also for numbers
    that are not finite.
    """
    file = open_safetensors(Path(path))
    for key in watch.each(file, len(file)):
        tensor = file.tensor(key, watch)
        check_finite(tensor, f"{path}: {key}")
        yield key, tensor


@dataclass(frozen=True)
class MatchReport:
    """How the layers of a LoRA fit a base model, by canonical names."""

    base: str  # the base model's name
    matched: tuple[str, ...]
    missing: tuple[str, ...]  # target layers the LoRA leaves as they are
    unexpected: tuple[str, ...]  # layers of the LoRA that the base does not have
    wrong_shape: tuple[str, ...]

    def summary(self) -> str:
        """`32 of 32 layers matched`, and what does not fit."""
        parts = [
            f"{len(self.matched)} of {len(self.matched + self.missing + self.wrong_shape)} layers matched"
        ]
        if self.wrong_shape:
            parts.append(f"{len(self.wrong_shape)} have another shape (first {self.wrong_shape[0]})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} are not in {self.base} (first {self.unexpected[0]})")
        return "; ".join(parts)


def match(lora: LoRA, base: BaseModel) -> MatchReport:
    """Count which layers of a LoRA fit a base model. Tools apply what fits and say nothing of the rest."""
    shapes = {layer.name: layer.shape for layer in base.layers}
    fits = {name: shapes[name] == layer.shape for name, layer in lora.items() if name in shapes}
    return MatchReport(
        base=base.name,
        matched=tuple(name for name in shapes if fits.get(name)),
        missing=tuple(name for name in shapes if name not in fits),
        unexpected=tuple(name for name in lora if name not in shapes),
        wrong_shape=tuple(name for name, fit in fits.items() if not fit),
    )
