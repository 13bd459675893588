"""Target layers of each base model, found from the names and shapes in a state dict, and their weights."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .documents import read_json
from .key_names import SDXL_PLACES, SDXL_TARGETS, WAN_TARGETS, canonical_name
from .numbers import check_finite
from .safetensors_file import SafetensorsFile, open_safetensors

WAN_KINDS = (
    *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
    *("cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o"),
)
WAN_IMAGE_KINDS = ("cross_attn.k_img", "cross_attn.v_img")

# (width, blocks, image conditioned) -> name.
WAN_SIZES = {
    (1536, 30, False): "WAN2.1-T2V-1.3B",
    (5120, 40, False): "WAN2.1-T2V-14B",
    (5120, 40, True): "WAN2.1-I2V-14B",
}
MINIATURE_WIDTH = 256  # no WAN and no SDXL that people work with is this narrow
# Shape (out, in) -> number of SDXL's 560 target layers that have it.
SDXL_SHAPES = {(640, 640): 60, (640, 2048): 20, (1280, 1280): 360, (1280, 2048): 120}
FINGERPRINT_ROWS = 16

_SDXL_BLOCKS = {place: blocks for place, _, blocks in SDXL_PLACES}


@dataclass(frozen=True)
class TargetLayer:
    """One linear weight W [out, in] of the base model that gets a LoRA."""

    name: str  # canonical, see key_names.py: "blocks.0.self_attn.q"
    depth: int  # block index; SDXL: running index of the transformer block, from input to output
    kind: str  # "self_attn.q"; SDXL: "attn1.to_q"
    shape: tuple[int, int]  # (out, in)
    key: str  # key of its weight where it was found


@dataclass(frozen=True)
class BaseModel:
    """A base model as LoFA sees it: its name, and its target layers by depth, then in the order of kinds."""

    name: str
    layers: tuple[TargetLayer, ...]

    def summary(self) -> str:
        """Number and shapes of the target layers: `240 layers of 1536x1536`."""
        counts = Counter(layer.shape for layer in self.layers)
        if len(counts) == 1:
            (out, in_), count = counts.popitem()
            return f"{count} layers of {out}x{in_}"
        shapes = ", ".join(f"{count} of {out}x{in_}" for (out, in_), count in sorted(counts.items()))
        return f"{len(self.layers)} layers: {shapes}"


def describe(shapes: Mapping[str, Sequence[int]]) -> BaseModel:
    """Find the base model in a state dict of any layout, from the shape [out, in] of each key.

    Raises ValueError when there are no target layers, some are missing, or they belong to another network.
    """
    found: dict[str, TargetLayer] = {}
    for key, shape in shapes.items():
        module, _, parameter = key.rpartition(".")
        name = canonical_name(module) if parameter == "weight" and len(shape) == 2 else None
        if name is None:
            continue
        if name in found:
            raise ValueError(
                f"{name} is there twice, as {found[name].key} and as {key}: keep one model in a file."
            )
        depth, kind = _place(name)
        found[name] = TargetLayer(name, depth, kind, (int(shape[0]), int(shape[1])), key)
    if not found:
        example = next(iter(shapes), None)
        seen = f"{len(shapes)} keys, the first is {example!r}" if example is not None else "it is empty"
        raise ValueError(
            f"No target layers of WAN2.1 or SDXL here ({seen}). "
            "Give the diffusion model (WAN's transformer, SDXL's UNet), not a VAE, a text encoder or a LoRA."
        )
    wan = {name: layer for name, layer in found.items() if layer.kind in WAN_TARGETS}
    if wan and len(wan) < len(found):
        raise ValueError("Both WAN2.1 and SDXL layers here: keep one model in a file.")
    return _describe_wan(wan) if wan else _describe_sdxl(found)


def _place(name: str) -> tuple[int, str]:
    """(depth, kind) of a canonical name; SDXL's blocks are counted at each place for itself."""
    depth, kind = name.rpartition("blocks.")[2].split(".", 1)
    return int(depth), kind


def _describe_wan(found: dict[str, TargetLayer]) -> BaseModel:
    blocks = 1 + max(layer.depth for layer in found.values())
    image = any(layer.kind in WAN_IMAGE_KINDS for layer in found.values())
    kinds = WAN_KINDS + (WAN_IMAGE_KINDS if image else ())
    layers = _all_of((f"blocks.{depth}.{kind}" for depth in range(blocks) for kind in kinds), found, "WAN2.1")
    width = layers[0].shape[0]
    for layer in layers:
        if layer.shape != (width, width):
            raise ValueError(
                f"{layer.key} is {layer.shape[0]}x{layer.shape[1]}, but the target layers of this WAN2.1 are "
                f"{width}x{width}. If the file packs quantised weights, give the bf16, fp16 or fp8 one."
            )
    name = "WAN2.1 miniature" if width <= MINIATURE_WIDTH else f"WAN2.1 (dim {width}, {blocks} blocks)"
    return BaseModel(WAN_SIZES.get((width, blocks, image), name), layers)


def _describe_sdxl(found: dict[str, TargetLayer]) -> BaseModel:
    """Narrow ones may have fewer blocks at a place than SDXL, one at least; depths count the blocks there
    are.
    """
    there = dict.fromkeys(_SDXL_BLOCKS, 1)
    for name, layer in found.items():
        place, _, _ = name.partition(".transformer_blocks.")
        if layer.depth >= _SDXL_BLOCKS[place]:
            raise ValueError(
                f"{layer.key} is a layer of a UNet, but SDXL has none there. LoFA knows SDXL's UNet."
            )
        there[place] = max(there[place], layer.depth + 1)
    miniature = max(layer.shape[0] for layer in found.values()) <= MINIATURE_WIDTH and there != _SDXL_BLOCKS
    places = [
        (place, n) for place, count in (there if miniature else _SDXL_BLOCKS).items() for n in range(count)
    ]
    names = (f"{place}.transformer_blocks.{n}.{kind}" for place, n in places for kind in SDXL_TARGETS)
    name = "SDXL miniature" if miniature else "SDXL"
    layers = tuple(
        replace(layer, depth=position // len(SDXL_TARGETS))
        for position, layer in enumerate(_all_of(names, found, name))
    )
    counts = Counter(layer.shape for layer in layers)
    if not miniature and counts != SDXL_SHAPES:
        name += f" (widths {', '.join(str(width) for width in sorted({out for out, _ in counts}))})"
    return BaseModel(name, layers)


def _all_of(names: Iterable[str], found: dict[str, TargetLayer], base: str) -> tuple[TargetLayer, ...]:
    wanted = tuple(names)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} target layers of {base} are missing, first {missing[0]}. "
            "This is one part of a model (then give the folder or its .index.json) or another network."
        )
    return tuple(found[name] for name in wanted)


class BaseWeights:
    """The target weights of a base model, read one at a time; a file is never read whole."""

    model: BaseModel

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        read: Callable[[str, int | None], Tensor],
        where: str = "this base model",
    ) -> None:
        """`read(key, rows)` gives a tensor, or its first `rows` rows; `where` is what errors call the whole.
        Users call `open` or `from_tensors`.
        """
        self._where = where
        self.model = describe(shapes)
        self._read = read
        self._scales = {
            layer.key: scale
            for layer in self.model.layers
            for scale in (layer.key.removesuffix("weight") + "scale_weight", layer.key + "_scale")
            if scale in shapes
        }

    @classmethod
    def open(cls, path: Path | str) -> "BaseWeights":
        """Open a .safetensors file, a .safetensors.index.json, or a folder of one (diffusers' or plain).

        Raises FileNotFoundError, or ValueError naming the file that is damaged or holds no base model.
        """
        path = Path(path)
        files = _files_of(path)
        where: dict[str, SafetensorsFile] = {}
        for opened in map(open_safetensors, files):
            where |= dict.fromkeys(opened, opened)
        shapes = {key: opened.shape(key) for key, opened in where.items()}

        def read(key: str, rows: int | None) -> Tensor:
            opened = where[key]
            return opened.tensor(key) if rows is None else opened.rows(key, 0, rows)

        try:
            return cls(shapes, read, str(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Any], reader: Callable[[str], Tensor] | None = None
    ) -> "BaseWeights":
        """From a state dict, or from each key's shape (or tensor) and a `reader` that gives one key's tensor.

        Raises ValueError as `describe` does.
        """
        whole = reader or tensors.__getitem__
        shapes = {key: tuple(getattr(value, "shape", value)) for key, value in tensors.items()}
        return cls(shapes, lambda key, rows: whole(key) if rows is None else whole(key)[:rows])

    def read(self, layer: TargetLayer) -> Tensor:
        """W [out, in] of a target layer, in the file's dtype; float32 where fp8 values have a separate scale.

        Raises ValueError when the file is quantised in another way, and for numbers that are not finite.
        """
        weight = self._read(layer.key, None)
        scale = None
        # A reader may undo the quantisation itself: then the weight is wide again and its scale is spent.
        if layer.key in self._scales and weight.dtype.itemsize == 1:
            scale = self._read(self._scales[layer.key], None)
        if not weight.is_floating_point() or (scale is not None and scale.numel() != 1):
            raise ValueError(
                f"{self._where}: {layer.key} is quantised in blocks ({weight.dtype}): its values cannot be "
                "read one by one. Give the bf16, fp16 or fp8 file of this base model."
            )
        weight = weight if scale is None else weight.float() * scale.float().reshape(())
        check_finite(weight, f"{self._where}: {layer.name} of the {self.model.name}")
        return weight

    def fingerprint(self) -> str:
        """16 hex digits that tell one set of weights from another: names, shapes, signs of the first rows.

        Signs survive rounding, so the fp32, fp16, bf16 and fp8 copies of one model agree; a fine-tune of it
        flips some of the signs in the first 16 rows of its layers (5.9 million of them in the 1.3B).
        """
        digest = hashlib.sha256()
        for layer in self.model.layers:
            rows = self._read(layer.key, FINGERPRINT_ROWS)[:FINGERPRINT_ROWS]
            digest.update(f"{layer.name} {layer.shape[0]}x{layer.shape[1]};".encode())
            digest.update(torch.signbit(rows.float()).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _files_of(path: Path) -> list[Path]:
    """The safetensors files that `path` means."""
    if path.is_dir():
        return _files_of_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder. Give the base model's .safetensors or its folder."
        )
    if path.name.endswith(".safetensors.index.json"):
        return _files_of_index(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: a base model is a .safetensors file, a .safetensors.index.json or a folder."
        )
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    places = [place for place in (folder / "transformer", folder / "unet", folder) if place.is_dir()]
    for place in places:
        found = sorted(place.glob("*.safetensors.index.json")) or sorted(place.glob("*.safetensors"))
        if len(found) > 1:  # a folder may also hold a VAE, a text encoder, LoRAs
            found = [file for file in found if file.suffix == ".json" or _has_target_layers(file)]
            found = [file for file in found if not _is_variant(file, found)]
        if len(found) == 1:
            return _files_of(found[0])
        if found:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{place} holds several base models: {names}. Give the file you mean.")
    raise ValueError(
        f"{folder} holds no base model: no .safetensors in it, nor in transformer/ or unet/ under it."
    )


def _is_variant(file: Path, files: Sequence[Path]) -> bool:
    """Whether it is `x.fp16.safetensors` beside `x.safetensors`: the same model, rounded, as SDXL has it."""
    name, _, variant = file.name.removesuffix(".safetensors").rpartition(".")
    return variant in ("fp16", "bf16") and file.with_name(f"{name}.safetensors") in files


def _files_of_index(index: Path) -> list[Path]:
    values = read_json(index, "a safetensors index")
    try:
        weight_map = values["weight_map"]
        names = set(weight_map.values())
        strange = [name for name in names if not _is_beside(name)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index (it has no weight_map of file names).") from error
    if strange or not names:
        raise ValueError(
            f"{index}: names {strange[:1] or 'no files'} as its parts; expected .safetensors files beside it."
        )
    files = sorted(index.parent / name for name in names)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{index}: {len(absent)} of its {len(files)} files are missing: {', '.join(absent)}."
        )
    return files


def _is_beside(name: str) -> bool:
    """Whether a file's name has no folder in it, on any system."""
    return not set("/\\:\0") & set(name) and name.endswith(".safetensors") and len(name) <= 255


def _has_target_layers(file: Path) -> bool:
    return any(
        key.endswith(".weight") and canonical_name(key.removesuffix(".weight"))
        for key in open_safetensors(file)
    )
