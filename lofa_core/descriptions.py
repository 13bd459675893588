"""What a hypernetwork is: its sizes, the base model and the condition it was trained for."""

from dataclasses import dataclass
from typing import Literal, get_args

WeightInput = Literal["magnitude", "column_rms"]
Modulation = Literal["film", "layer_scale"]
Readout = Literal["local", "pooled"]


@dataclass(frozen=True)
class HypernetworkConfig:
    """Sizes and design of both stages. The design's defaults are ours; released.py has LoFA_v0's."""

    condition_width: int  # d of the condition tokens [S, d]
    out_features: int  # every target layer is out_features x in_features
    in_features: int
    rank: int
    patch: int = 32  # side of a square patch of W
    width: int = 128
    heads: int = 4
    blocks: int = 3
    mlp_ratio: int = 4
    pooling_queries: int = 8
    feature_blocks: tuple[int, ...] = (0, 2)  # blocks of Stage II that attend to Stage I's features
    # "magnitude": W in units of its deviation, and log |W|. "column_rms": each column of W over its RMS.
    weight_input: WeightInput = "magnitude"
    # "film": condition and layer modulate every norm. "layer_scale": norms have weights, and every part of a
    # block is scaled by its own vector before it is added.
    modulation: Modulation = "film"
    # "local": A and B from the tokens of their own columns and rows, in units of the training set's spread.
    # "pooled": A, B and alpha from one mean token, as they are.
    readout: Readout = "local"
    cls_token: bool = True
    mask_padding: bool = True  # False: the condition's padding rows are attended to like others

    def __post_init__(self):
        for name, kind in (
            ("weight_input", WeightInput),
            ("modulation", Modulation),
            ("readout", Readout),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {get_args(kind)}")
        for name in ("out_features", "in_features"):
            if getattr(self, name) % self.patch:
                raise ValueError(f"{name} = {getattr(self, name)} is not a multiple of patch = {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is not a multiple of heads = {self.heads}")
        if any(not 0 <= block < self.blocks for block in self.feature_blocks):
            raise ValueError(
                f"feature_blocks = {self.feature_blocks} names a block outside 0..{self.blocks - 1}"
            )


@dataclass(frozen=True)
class LayerDescription:
    """One target layer of the base model a hypernetwork was trained for."""

    name: str
    depth: int
    kind: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class BaseDescription:
    """The base model a hypernetwork was trained for."""

    name: str
    layers: tuple[LayerDescription, ...]
    fingerprint: str = ""


@dataclass(frozen=True)
class ConditionDescription:
    """What the condition tokens are. `words` is the encoder's closed vocabulary; empty means any text.

    `padded_to`: rows of zeros were added up to this many tokens in training (0: as many as the prompt has).
    """

    kind: str
    width: int
    words: tuple[str, ...] = ()
    coarse_prompt: str = ""
    padded_to: int = 0
