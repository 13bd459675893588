"""Our hypernetwork file: one safetensors with the weights, its configuration as JSON in the metadata."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from .base_models import open_safetensors
from .descriptions import BaseDescription, ConditionDescription, HypernetworkConfig, LayerDescription
from .hypernetwork import Hypernetwork
from .int8 import SUFFIX, packed, unpacked
from .lora_files import each_tensor, write_safetensors
from .steps import UNWATCHED, Watch

FORMAT = "lofa.hypernetwork.2"


def save_hypernetwork(
    hypernetwork: Hypernetwork, path: Path | str, *, dtype: torch.dtype | None = None, notes: str = ""
) -> None:
    """Write weights and everything needed to rebuild the network; atomic.

    `dtype`: what floating-point weights are cast to; torch.int8 packs them by rows (int8.py).
    """
    base = hypernetwork.base
    header = {
        "config": asdict(hypernetwork.config),
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "layers": [[layer.name, layer.depth, layer.kind, *layer.shape] for layer in base.layers],
        },
        "conditions": [asdict(condition) for condition in hypernetwork.conditions.values()],
    }
    tensors = hypernetwork.own_state()
    if dtype == torch.int8:
        tensors = packed(tensors)
    elif dtype is not None:
        tensors = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()
        }
    metadata = {"format": FORMAT, "lofa": json.dumps(header)}
    if notes:
        metadata["notes"] = notes
    write_safetensors(tensors, Path(path), metadata)


def load_hypernetwork(
    path: Path | str, dtype: torch.dtype | None = torch.float32, *, watch: Watch = UNWATCHED
) -> Hypernetwork:
    """Rebuild a network for prediction, its weights in `dtype` (None: as stored; float16 for int8).

    Raises FileNotFoundError, or ValueError where the file is not one of ours, naming what it is not.
    """
    path = Path(path)
    hypernetwork = describe_hypernetwork(path)
    with open_safetensors(path) as handle:
        tensors = len(handle.keys())
    return hypernetwork.filled(unpacked(watch.each(each_tensor(path), tensors), dtype))


def describe_hypernetwork(path: Path) -> Hypernetwork:
    """The network that a file holds, unfilled: nothing but names and shapes is read. Raises as
    `load_hypernetwork`.
    """
    if path.suffix in (".pth", ".pt"):
        raise ValueError(
            f"{path.name}: one file of LoFA_v0, which has two. Join them: python -m lofa_core convert "
            "--stage1 stage1_preview.pth --stage2 stage2_preview.pth --out lofa_v0.safetensors"
        )
    with open_safetensors(path) as handle:
        metadata = handle.metadata() or {}
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}
        packed_keys = {key for key in shapes if handle.get_slice(key).get_dtype() == "I8"}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path.name}: not a LoFA hypernetwork (its metadata says format "
            f"{metadata.get('format', 'nothing')!r}, expected {FORMAT!r}). "
            "Choose a file written by LoFA's training or by `python -m lofa_core convert`."
        )
    try:
        hypernetwork = Hypernetwork.unfilled(*_descriptions(json.loads(metadata["lofa"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name}: its LoFA header is damaged ({error}). Download or train it again."
        ) from error
    expected = {key: tuple(value.shape) for key, value in hypernetwork.own_state().items()}
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
    return hypernetwork


def _descriptions(
    header: dict,
) -> tuple[HypernetworkConfig, BaseDescription, tuple[ConditionDescription, ...]]:
    base = header["base"]
    layers = tuple(
        LayerDescription(name, depth, kind, (out, into)) for name, depth, kind, out, into in base["layers"]
    )
    return (
        HypernetworkConfig(**_with_tuples(header["config"], "feature_blocks", "grid")),
        BaseDescription(base["name"], layers, base["fingerprint"]),
        tuple(ConditionDescription(**_with_tuples(given, "words", "size")) for given in header["conditions"]),
    )


def _with_tuples(values: dict, *names: str) -> dict:
    """JSON has lists in their place."""
    return values | {name: tuple(values[name]) for name in names}
