"""What a hypernetwork is: its sizes, the base model and the condition it was trained for."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

WeightInput = Literal["magnitude", "column_rms", "constants", "condition"]
Modulation = Literal["film", "layer_scale"]
Readout = Literal["local", "pooled"]
Kind = Literal["text", "pose", "style", "identity"]
KINDS: tuple[str, ...] = get_args(Kind)
Shape = tuple[int, int]  # (out, in) of a target layer
# Of the LoRAs in LoRA Diffusion. "canonical": B = U sqrt(S), A = sqrt(S) V^T. "trained": A and B as they
# are, for LoRAs that all started from one A, which a rotation into singular vectors would pull apart.
Form = Literal["canonical", "trained"]
Target = Literal["x0", "v"]  # what its network puts out


@dataclass(frozen=True)
class HypernetworkConfig:
    """Sizes and design of both stages. The design's defaults are ours; released.py has LoFA_v0's."""

    rank: int
    # Rows and columns of patches that every W is cut into, whatever its shape: each shape has patches of its
    # own size.
    grid: tuple[int, int] = (16, 16)
    width: int = 128
    heads: int = 4
    blocks: int = 3
    stage1_blocks: int = 0  # Stage I's, where it is to have fewer; 0: as many
    mlp_ratio: int = 4
    pooling_queries: int = 8
    feature_blocks: tuple[int, ...] = (0, 2)  # blocks of Stage II that attend to Stage I's features
    # "magnitude": W in units of its deviation, and log |W|. "column_rms": each column of W over its RMS.
    # Two that leave W out, to see what it is good for: "constants", a fixed draw of noise in each W's place,
    # and "condition", tokens that start from the condition instead.
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
        if self.weight_input == "condition" and self.modulation != "film":
            raise ValueError('weight_input = "condition" needs modulation = "film": FiLM sums a condition up')
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid = {self.grid}: expected rows and columns of patches, such as (16, 16)")
        for name in ("rank", "width", "heads", "blocks", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 1 or more")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is not a multiple of heads = {self.heads}")
        if not 0 <= self.stage1_blocks <= self.blocks:
            raise ValueError(f"stage1_blocks = {self.stage1_blocks}: expected 0 to blocks = {self.blocks}")
        if any(not 0 <= block < self.blocks for block in self.feature_blocks):
            raise ValueError(
                f"feature_blocks = {self.feature_blocks} names a block outside 0..{self.blocks - 1}"
            )

    def patch(self, shape: Shape) -> tuple[int, int]:
        """Height and width of a patch of a W of this shape. ValueError where the grid does not divide it."""
        if shape[0] % self.grid[0] or shape[1] % self.grid[1]:
            raise ValueError(
                f"a layer of {shape[0]}x{shape[1]} cannot be cut into {self.grid[0]}x{self.grid[1]} patches: "
                "choose a grid that divides every target layer."
            )
        return shape[0] // self.grid[0], shape[1] // self.grid[1]


@dataclass(frozen=True)
class LayerDescription:
    """One target layer of the base model a hypernetwork was trained for."""

    name: str
    depth: int
    kind: str
    shape: Shape


@dataclass(frozen=True)
class BaseDescription:
    """The base model a hypernetwork was trained for."""

    name: str
    layers: tuple[LayerDescription, ...]
    fingerprint: str = ""

    def by_shape(self) -> dict[Shape, list[int]]:
        """The shapes of the target layers, in order of appearance, and the places of the layers that have
        each.
        """
        places: dict[Shape, list[int]] = {}
        for place, layer in enumerate(self.layers):
            places.setdefault(layer.shape, []).append(place)
        return places


def coarse_prompt_of(conditions: Iterable["ConditionDescription"]) -> str:
    """What all tasks of a network's training had in common; empty where it is not recorded."""
    return next((known.coarse_prompt for known in conditions if known.coarse_prompt), "")


@dataclass(frozen=True)
class ConditionDescription:
    """One kind of condition that a hypernetwork was trained with.

    text, style, identity: tokens [S, width] of the base's text encoder or of a CLIP image encoder; `words` is
    the text encoder's closed vocabulary (empty: any text), `padded_to`: rows of zeros were added up to this
    many tokens in training (0: none). pose: drawn skeletons of `size` (frames, height, width), `width` is 3.
    """

    kind: Kind
    width: int
    words: tuple[str, ...] = ()
    coarse_prompt: str = ""
    padded_to: int = 0
    size: tuple[int, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}: expected one of {', '.join(KINDS)}")
        if (self.kind == "pose") != (len(self.size) == 3):
            raise ValueError(f"size = {self.size} of a {self.kind} condition: pose has frames, height, width")
