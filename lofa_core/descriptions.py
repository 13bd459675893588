"""What a hypernetwork is: its sizes, the base model and the condition it was trained for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HypernetworkConfig:
    """Sizes of both stages."""

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

    def __post_init__(self):
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
    """What the condition tokens are. `words` is the encoder's closed vocabulary; empty means any text."""

    kind: str
    width: int
    words: tuple[str, ...] = ()
    coarse_prompt: str = ""
