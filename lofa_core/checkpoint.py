"""Our hypernetwork file: one safetensors with the weights, its configuration as JSON in the metadata.

A LoRA Diffusion's file is the same under another format.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .descriptions import HypernetworkConfig
from .header import built, parse_header, trained_for
from .hypernetwork import Hypernetwork
from .int8 import SUFFIX, packed, unpacked
from .lora_diffusion import LoRADiffusion, LoRADiffusionConfig
from .lora_files import each_tensor, write_safetensors
from .safetensors_file import open_safetensors
from .steps import UNWATCHED, Watch

FORMAT = "lofa.hypernetwork.2"
DIFFUSION_FORMAT = "lofa.lora_diffusion.1"
Generator = Hypernetwork | LoRADiffusion
Network = TypeVar("Network", Hypernetwork, LoRADiffusion)


def save_hypernetwork(
    hypernetwork: Hypernetwork, path: Path | str, *, dtype: torch.dtype | None = None, notes: str = ""
) -> None:
    """Write weights and everything needed to rebuild the network; atomic.

    `dtype`: what floating-point weights are cast to; torch.int8 packs them by rows (int8.py).
    """
    _save(hypernetwork, hypernetwork.own_state(), FORMAT, Path(path), dtype, notes)


def save_lora_diffusion(
    network: LoRADiffusion, path: Path | str, *, dtype: torch.dtype | None = None, notes: str = ""
) -> None:
    """The same for a LoRA Diffusion."""
    _save(network, network.state_dict(), DIFFUSION_FORMAT, Path(path), dtype, notes)


def _save(
    network: Generator,
    tensors: Mapping[str, Tensor],
    format: str,
    path: Path,
    dtype: torch.dtype | None,
    notes: str,
) -> None:
    base = network.base
    header = {
        "config": asdict(network.config),
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "layers": [[layer.name, layer.depth, layer.kind, *layer.shape] for layer in base.layers],
        },
        "conditions": [asdict(condition) for condition in network.conditions.values()],
    }
    if dtype == torch.int8:
        tensors = packed(tensors)
    elif dtype is not None:
        tensors = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()
        }
    metadata = {"format": format, "lofa": json.dumps(header)}
    if notes:
        metadata["notes"] = notes
    write_safetensors(dict(tensors), path, metadata)


def load_hypernetwork(
    path: Path | str, dtype: torch.dtype | None = torch.float32, *, watch: Watch = UNWATCHED
) -> Hypernetwork:
    """Rebuild a network for prediction, its weights in `dtype` (None: as stored; float16 for int8).

    Raises FileNotFoundError, or ValueError where the file is not one of ours, naming what it is not.
    """
    path = Path(path)
    hypernetwork = describe_hypernetwork(path)
    return hypernetwork.filled(unpacked(each_tensor(path, watch), dtype))


def load_generator(
    path: Path | str, dtype: torch.dtype | None = torch.float32, *, watch: Watch = UNWATCHED
) -> Generator:
    """A hypernetwork or a LoRA Diffusion, whichever the file's metadata says. As `load_hypernetwork`."""
    path = Path(path)
    if format_of(path) != DIFFUSION_FORMAT:
        return load_hypernetwork(path, dtype, watch=watch)
    network = describe_lora_diffusion(path)
    network.load_state_dict(unpacked(each_tensor(path, watch), dtype), strict=False, assign=True)
    return network.eval().requires_grad_(False)


def format_of(path: Path) -> str:
    """The format that a file's metadata names; empty where it is no safetensors file or names none."""
    if path.suffix in (".pth", ".pt"):
        return ""
    return open_safetensors(path).metadata.get("format", "")


def describe_lora_diffusion(path: Path) -> LoRADiffusion:
    """The LoRA Diffusion that a file holds, unfilled. Raises as `load_hypernetwork`."""

    def build(header: dict) -> tuple[LoRADiffusion, Mapping[str, Tensor]]:
        with torch.device("meta"):
            network = LoRADiffusion(built(LoRADiffusionConfig, header["config"]), *trained_for(header))
        return network, network.state_dict()

    return _described(path, DIFFUSION_FORMAT, "LoRA Diffusion", build)


def describe_hypernetwork(path: Path) -> Hypernetwork:
    """The network that a file holds, unfilled: nothing but names and shapes is read. Raises as
    `load_hypernetwork`.
    """
    if path.suffix in (".pth", ".pt"):
        raise ValueError(
            f"{path.name}: one file of LoFA_v0, which has two. Join them: python -m lofa_core convert "
            "--stage1 stage1_preview.pth --stage2 stage2_preview.pth --out lofa_v0.safetensors"
        )

    def build(header: dict) -> tuple[Hypernetwork, Mapping[str, Tensor]]:
        config = built(HypernetworkConfig, header["config"])
        network = Hypernetwork.unfilled(config, *trained_for(header))
        return network, network.own_state()

    return _described(path, FORMAT, "LoFA hypernetwork", build)


def _described(
    path: Path, format: str, what: str, build: Callable[[dict], tuple[Network, Mapping[str, Tensor]]]
) -> Network:
    """What `build` makes of a file's header, after its tensors' names and shapes are compared with that."""
    file = open_safetensors(path)
    metadata = file.metadata
    shapes = {key: file.shape(key) for key in file}
    packed_keys = {key for key in shapes if file.dtype(key) == "I8"}
    if metadata.get("format") != format:
        raise ValueError(
            f"{path.name}: not a {what} (its metadata says format "
            f"{metadata.get('format', 'nothing')!r}, expected {format!r}). "
            "Choose a file written by LoFA's training or by `python -m lofa_core convert`."
        )
    try:
        network, tensors = build(parse_header(metadata["lofa"]))
    # RuntimeError: what PyTorch says of sizes whose product no number holds.
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path.name}: its LoFA header is damaged ({error}). Download or train it again."
        ) from error
    expected = {key: tuple(value.shape) for key, value in tensors.items()}
    expected |= {key + SUFFIX: expected[key][:1] for key in packed_keys & expected.keys()}
    if expected.keys() != shapes.keys():
        missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
        raise ValueError(
            f"{path.name}: the weights do not fit its header ({len(missing)} missing, first {missing[:1]}; "
            f"{len(unknown)} unknown, first {unknown[:1]}). Download or train it again."
        )
    for key, shape in shapes.items():
        if expected[key] != shape:
            raise ValueError(f"{path.name}: {key} is {list(shape)}, its header says {list(expected[key])}.")
        # Eight bits by rows stand for floats; a row's scale is no tensor of the network.
        floats = key not in tensors or tensors[key].is_floating_point()
        if floats and not file.is_floating_point(key) and key not in packed_keys:
            raise ValueError(f"{path.name}: {key} is {file.dtype(key)}, expected floating-point numbers.")
    return network
