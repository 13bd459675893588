"""Our hypernetwork file: one safetensors with the weights, its configuration as JSON in the metadata."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from .descriptions import BaseDescription, ConditionDescription, HypernetworkConfig, LayerDescription
from .hypernetwork import Hypernetwork
from .lora_files import read_safetensors, write_safetensors

FORMAT = "lofa.hypernetwork.1"


def save_hypernetwork(
    hypernetwork: Hypernetwork, path: Path | str, *, dtype: torch.dtype | None = None, notes: str = ""
) -> None:
    """Write weights (cast to `dtype` if given) and everything needed to rebuild the network; atomic."""
    base = hypernetwork.base
    header = {
        "config": asdict(hypernetwork.config),
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "layers": [[layer.name, layer.depth, layer.kind, *layer.shape] for layer in base.layers],
        },
        "condition": asdict(hypernetwork.condition),
    }
    tensors = {
        key: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for key, value in hypernetwork.state_dict().items()
        if not _is_shared(key)
    }
    metadata = {"format": FORMAT, "lofa": json.dumps(header)}
    if notes:
        metadata["notes"] = notes
    write_safetensors(tensors, Path(path), metadata)


def load_hypernetwork(path: Path | str) -> Hypernetwork:
    """Rebuild a network in float32 for prediction. ValueError if the file is not one of ours, naming what it
    is not.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path.name}: not a LoFA hypernetwork (its metadata says format "
            f"{metadata.get('format', 'nothing')!r}, expected {FORMAT!r}). "
            "Choose a file written by LoFA's training."
        )
    try:
        header = json.loads(metadata["lofa"])
        hypernetwork = Hypernetwork(*_descriptions(header))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name}: its LoFA header is damaged ({error}). Download or train it again."
        ) from error
    expected = {key for key in hypernetwork.state_dict() if not _is_shared(key)}
    if expected != set(tensors):
        missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ValueError(
            f"{path.name}: the weights do not fit its header ({len(missing)} missing, first {missing[:1]}; "
            f"{len(unknown)} unknown, first {unknown[:1]}). Download or train it again."
        )
    for key, tensor in tensors.items():
        wanted = (
            hypernetwork.get_parameter(key)
            if _is_parameter(hypernetwork, key)
            else hypernetwork.get_buffer(key)
        )
        if wanted.shape != tensor.shape:
            raise ValueError(
                f"{path.name}: {key} is {list(tensor.shape)}, its header says {list(wanted.shape)}."
            )
    hypernetwork.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False)
    return hypernetwork.eval().requires_grad_(False)


def _is_shared(key: str) -> bool:
    """The statistics are one module under three names; the first is the one written."""
    return ".heads.statistics." in key


def _is_parameter(module: torch.nn.Module, key: str) -> bool:
    owner, _, name = key.rpartition(".")
    return name in module.get_submodule(owner)._parameters


def _descriptions(header: dict) -> tuple[HypernetworkConfig, BaseDescription, ConditionDescription]:
    config = dict(header["config"])
    config["feature_blocks"] = tuple(config["feature_blocks"])
    base = header["base"]
    layers = tuple(
        LayerDescription(name, depth, kind, (out, into)) for name, depth, kind, out, into in base["layers"]
    )
    condition = dict(header["condition"])
    condition["words"] = tuple(condition["words"])
    return (
        HypernetworkConfig(**config),
        BaseDescription(base["name"], layers, base["fingerprint"]),
        ConditionDescription(**condition),
    )
