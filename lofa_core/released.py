"""LoFA_v0, the checkpoint that the paper's authors published, read into our hypernetwork.

It comes as two pickled state dicts, one a stage. Every size is inferred from the tensors. What v0 chose
differently from us (input, modulation, read-out, padding) is configuration: see `RELEASED_DESIGN`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .archives import load_archive
from .base_models import WAN_KINDS, describe
from .descriptions import BaseDescription, ConditionDescription, HypernetworkConfig, LayerDescription
from .header import MAX_BLOCKS, MAX_LAYERS, MAX_SIZE
from .hypernetwork import Hypernetwork
from .numbers import check_finite
from .steps import UNWATCHED, Watch

RELEASED_DESIGN: dict[str, Any] = {
    "weight_input": "column_rms",
    "modulation": "layer_scale",
    "readout": "pooled",
    "mask_padding": False,
}
PROMPT_TOKENS = 512  # what the published model was trained to read, padded with zeros

# Our names in a stage -> the published ones. A name stands for its .weight and .bias too.
_OUTSIDE_BLOCKS = {
    "trunk.cls_token": "cls_token",
    "trunk.patch_norm": "patch_embed.norm",
    "trunk.row_position": "pos.row",
    "trunk.column_position": "pos.col",
    "trunk.depth_embedding": "depth_embed",
    "trunk.kind_embedding": "type_embed",
    "trunk.condition_proj.text": "text_proj",
    "trunk.norm": "norm",
}
_OF_THE_SHAPE = {  # ours name the one shape of all layers: "heads.1536x1536.to_A"
    "trunk.patch_embed": "patch_embed.proj",
    "heads.to_A": "head_A",
    "heads.to_B": "head_B",
    "heads.to_alpha": "head_alpha",
}
_IN_BLOCK = {  # after "trunk.blocks.N." -> after "blocks.N."
    "norms.0": "norm1",
    "self_attention.q_norm": "self_attn.q_norm",
    "self_attention.k_norm": "self_attn.k_norm",
    "self_attention.proj": "self_attn.proj",
    "scales.0": "ls1.gamma",
    "norms.1": "norm2",
    "self_mlp.0": "mlp_sa.fc1",
    "self_mlp.2": "mlp_sa.fc2",
    "scales.1": "ls2.gamma",
    "norms.2": "norm3",
    "cross_attention.q": "cross_attn.q",
    "cross_attention.kv": "cross_attn.kv",
    "cross_attention.q_norm": "cross_attn.q_norm",
    "cross_attention.k_norm": "cross_attn.k_norm",
    "cross_attention.proj": "cross_attn.proj",
    "scales.2": "ls3.gamma",
    "norms.3": "norm4",
    "cross_mlp.0": "mlp_ca.fc1",
    "cross_mlp.2": "mlp_ca.fc2",
    "scales.3": "ls4.gamma",
}
_IN_FEATURE_BLOCK = {  # after "trunk.blocks.N." -> after "cross_attn_blocks.N."
    "feature_attention.q": "cross_attn.q",
    "feature_attention.kv": "cross_attn.kv",
    "feature_attention.q_norm": "cross_attn.q_norm",
    "feature_attention.k_norm": "cross_attn.k_norm",
    "feature_attention.proj": "cross_attn.proj",
    "scales.4": "ls1.gamma",
    "norms.4": "norm2",
    "feature_mlp.0": "mlp.fc1",
    "feature_mlp.2": "mlp.fc2",
    "scales.5": "ls2.gamma",
}
# The tensors of Stage II that say how large it is -> their number of sizes.
_SIZES_FROM = {
    "patch_embed.proj.weight": 4,
    "pos.row": 4,
    "pos.col": 4,
    "depth_embed.weight": 2,
    "type_embed.weight": 2,
    "text_proj.weight": 2,
    "head_A.weight": 2,
    "head_B.weight": 2,
    "blocks.0.self_attn.q_norm.weight": 1,
    "blocks.0.mlp_sa.fc1.weight": 2,
}
_FUSED = ("self_attention.q", "self_attention.kv")  # both are rows of the published self_attn.qkv


def load_released(
    stage1: Path | str,
    stage2: Path | str,
    dtype: torch.dtype | None = torch.float32,
    *,
    watch: Watch = UNWATCHED,
) -> Hypernetwork:
    """The two published files as one hypernetwork for prediction, its weights in `dtype` (None: as stored).

    Nothing is unpickled. Raises FileNotFoundError, or ValueError naming the file and what is wrong.
    """
    first, second = Path(stage1), Path(stage2)
    tensors: dict[str, Tensor] = {}
    hypernetwork: Hypernetwork | None = None
    # Stage II first: it alone says which blocks attend to features. One file is open at a time.
    for stage, path in (("stage2", second), ("stage1", first)):
        published = read_stage(path, watch)
        _check_stage(published, stage, path)
        if hypernetwork is None:
            try:
                hypernetwork = Hypernetwork.unfilled(*describe_released(published))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        expected = {
            key.removeprefix(f"{stage}."): tuple(value.shape)
            for key, value in hypernetwork.own_state().items()
            if key.startswith(f"{stage}.")
        }
        _check_shapes(published, _published_shapes(expected), path)
        for name, shape in expected.items():
            watch.before()
            value = _take(published, name).reshape(shape)
            tensors[f"{stage}.{name}"] = value.to(dtype or value.dtype)
    assert hypernetwork is not None
    return hypernetwork.filled(tensors)


def published_state(hypernetwork: Hypernetwork) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse: (Stage I, Stage II) under the published names and shapes.

    Raises ValueError for a network of another design, which those names cannot hold.
    """
    if len(hypernetwork.base.by_shape()) > 1 or list(hypernetwork.conditions) != ["text"]:
        raise ValueError("the published names are for layers of one shape and for text alone")
    design = {name: getattr(hypernetwork.config, name) for name in RELEASED_DESIGN}
    if design != RELEASED_DESIGN:
        raise ValueError(f"this hypernetwork's design is {design}; the published one is {RELEASED_DESIGN}")
    states = []
    for stage in ("stage1", "stage2"):
        own = {
            key.removeprefix(f"{stage}."): value
            for key, value in hypernetwork.own_state().items()
            if key.startswith(f"{stage}.")
        }
        shapes = _published_shapes({name: tuple(value.shape) for name, value in own.items()})
        parts: dict[str, list[Tensor]] = {}
        for name, value in own.items():  # q comes before kv, as in the published rows
            parts.setdefault(_published_name(name), []).append(value)
        states.append({key: torch.cat(values).reshape(shapes[key]) for key, values in parts.items()})
    return states[0], states[1]


def read_stage(path: Path, watch: Watch = UNWATCHED) -> dict[str, Tensor]:
    """One published file. It is read as tensors; see archives.py.

    Raises FileNotFoundError, or ValueError for anything but a state dict.
    """
    state = load_archive(path, watch)
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(
            f"{path}: is not a state dict of tensors. Expected LoFA_v0's stage1_preview.pth or "
            "stage2_preview.pth."
        )
    for key, value in state.items():
        watch.before()
        check_finite(value, f"{path}: {key:.200}")
    return dict(state)


def stage_of(published: Mapping[str, Any]) -> str | None:
    """ "stage1" or "stage2" for the keys of a published state dict, None for any other."""
    if not {"patch_embed.proj.weight", "text_proj.weight", "head_A.weight"} <= published.keys():
        return None
    return "stage2" if "head_alpha.weight" in published else "stage1"


def _check_stage(published: Mapping[str, Tensor], stage: str, path: Path) -> None:
    found = stage_of(published)
    words = {"stage1": "Stage I", "stage2": "Stage II"}
    if found is None:
        first = next(iter(published), None)
        raise ValueError(
            f"{path}: is not a stage of LoFA_v0 ({len(published)} tensors, the first is {first!r}). "
            f"Expected the file with {words[stage]}, {stage}_preview.pth."
        )
    if found != stage:
        raise ValueError(
            f"{path}: holds {words[found]}, expected {words[stage]}. Give the two files the other way round."
        )


def describe_released(
    stage2: Mapping[str, Tensor],
) -> tuple[HypernetworkConfig, BaseDescription, tuple[ConditionDescription, ...]]:
    """Every size of the published model, from the shapes of its Stage II.

    Raises ValueError where they contradict each other or belong to another base than WAN2.1.
    """
    shape = {key: tuple(value.shape) for key, value in stage2.items()}
    for key, sides in _SIZES_FROM.items():
        if key not in shape:
            raise ValueError(f"has no {key}, from which its sizes are read. Download it again.")
        if len(shape[key]) != sides or not all(1 <= side <= MAX_SIZE for side in shape[key]):
            raise ValueError(f"{key} is {list(shape[key])}, expected {sides} sizes. Download it again.")
    width, _, patch, _ = shape["patch_embed.proj.weight"]
    out_features, in_features = shape["pos.row"][1] * patch, shape["pos.col"][2] * patch
    if out_features != in_features:
        raise ValueError(f"is for layers of {out_features}x{in_features}; WAN2.1's are square.")
    rank = shape["head_A.weight"][0] // in_features
    if (rank * in_features, rank * out_features) != (shape["head_A.weight"][0], shape["head_B.weight"][0]):
        raise ValueError(
            f"head_A and head_B give {shape['head_A.weight'][0]} and {shape['head_B.weight'][0]} numbers, "
            f"which is no rank for layers of {out_features}x{in_features}."
        )
    depths, kinds = shape["depth_embed.weight"][0], shape["type_embed.weight"][0]
    if kinds != len(WAN_KINDS):
        raise ValueError(
            f"knows {kinds} types of layers; WAN2.1's text-to-video models have {len(WAN_KINDS)}."
        )
    if depths * kinds > MAX_LAYERS:
        raise ValueError(f"is for {depths * kinds} target layers, more than any base model has.")
    numbers = {
        prefix: [int(match[1]) for key in shape if (match := re.match(rf"{prefix}\.([0-9]{{1,3}})\.", key))]
        for prefix in ("blocks", "cross_attn_blocks")
    }
    if max(numbers["blocks"]) >= MAX_BLOCKS:
        raise ValueError(f"has {1 + max(numbers['blocks'])} blocks, more than any hypernetwork.")
    config = HypernetworkConfig(
        rank=rank,
        grid=(shape["pos.row"][1], shape["pos.col"][2]),
        width=width,
        heads=width // shape["blocks.0.self_attn.q_norm.weight"][0],
        blocks=1 + max(numbers["blocks"]),
        mlp_ratio=shape["blocks.0.mlp_sa.fc1.weight"][0] // width,
        feature_blocks=tuple(sorted(set(numbers["cross_attn_blocks"]))),
        cls_token="cls_token" in shape,
        **RELEASED_DESIGN,
    )
    layers = tuple(
        LayerDescription(f"blocks.{depth}.{kind}", depth, kind, (out_features, in_features))
        for depth in range(depths)
        for kind in WAN_KINDS
    )
    base = describe({f"{layer.name}.weight": layer.shape for layer in layers})
    condition = ConditionDescription("text", shape["text_proj.weight"][1], padded_to=PROMPT_TOKENS)
    return config, BaseDescription(base.name, layers), (condition,)


def _published_name(name: str) -> str:
    """The published key that holds this parameter of one of our stages. KeyError if there is none."""
    owner, _, leaf = name.rpartition(".")
    module, suffix = (owner, f".{leaf}") if leaf in ("weight", "bias") else (name, "")
    if match := re.fullmatch(r"trunk\.blocks\.(\d+)\.(.+)", module):
        number, part = match.groups()
        if part in _FUSED:
            return f"blocks.{number}.self_attn.qkv{suffix}"
        if part in _IN_FEATURE_BLOCK:
            return f"cross_attn_blocks.{number}.{_IN_FEATURE_BLOCK[part]}{suffix}"
        return f"blocks.{number}.{_IN_BLOCK[part]}{suffix}"
    own = re.sub(r"\.\d+x\d+(?=\.|$)", "", module)
    return (_OUTSIDE_BLOCKS | _OF_THE_SHAPE)[own] + suffix


def _published_shapes(own: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Published key -> shape, from the names and shapes of one of our stages."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in own.items():
        key = _published_name(name)
        if key == "cls_token":
            shape = (1, 1, *shape)
        elif key in ("pos.row", "pos.col"):
            shape = (1, *shape)
        elif key == "patch_embed.proj.weight":
            side = int(shape[1] ** 0.5)
            shape = (shape[0], 1, side, side)
        elif key in shapes:  # kv below q
            shape = (shapes[key][0] + shape[0], *shape[1:])
        shapes[key] = shape
    return shapes


def _check_shapes(
    published: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    missing, unknown = sorted(expected.keys() - published.keys()), sorted(published.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{path}: does not have LoFA_v0's architecture ({len(missing)} tensors missing, first "
            f"{missing[:1]}; {len(unknown)} unknown, first {unknown[:1]})."
        )
    for key, shape in expected.items():
        if tuple(published[key].shape) != shape:
            raise ValueError(
                f"{path}: {key} is {list(published[key].shape)}, expected {list(shape)} as its other tensors "
                "(or the other stage's) say. Give two files of one model."
            )
        if not published[key].is_floating_point():
            raise ValueError(f"{path}: {key} is {published[key].dtype}, expected floating point numbers.")


def _take(published: Mapping[str, Tensor], name: str) -> Tensor:
    """Our parameter from the published tensors; q and kv are rows of one."""
    value = published[_published_name(name)]
    if ".self_attention.q." in name:
        return value[: len(value) // 3]
    if ".self_attention.kv." in name:
        return value[len(value) // 3 :]
    return value
