"""The hypernetwork: Stage I predicts where a LoRA acts on the base weights, Stage II predicts the LoRA (LoFA,
section 3.3).

Both stages are one transformer over the patches of a base weight W, told which layer it looks at (eq. 3) and
attending to the condition; Stage II also attends to Stage I's features (eq. 5). What we do differently from
the paper, and why:

* A and B are read from the tokens of their own columns and rows of W, not from one pooled vector: every part
  is local.
* Several kinds of condition in one network: their tokens stand in one sequence, each kind with an embedding
  and a strength of its own. Each shape of base weight has a patch embedding and heads of its own (SDXL has
  four); all else is shared.
* The condition and the layer together modulate every normalisation (FiLM): the strongest single gain at small
  scale.
* Outputs are offsets from the mean LoRA of the training set, in units of its spread (see normalisation.py).
* Stage I predicts dW as a Gaussian, so the response probability P(|dW| > 0.02 |W|) follows exactly and can
  reach 0.

LoFA_v0, the published checkpoint, is the same network with other choices of `HypernetworkConfig`: see
released.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conditions import Conditions
from .descriptions import (
    BaseDescription,
    ConditionDescription,
    HypernetworkConfig,
    Shape,
    coarse_prompt_of,
)
from .normalisation import TargetStatistics
from .response_map import THRESHOLD
from .trunk import Condition, Layers, Trunk, constants, shape_key, weight_patches

StatisticsByShape = Mapping[str, TargetStatistics] | None  # by `shape_key`; None: A and B as they are


@dataclass
class Response(ABC):
    """Stage I for N layers under B conditions, as low-rank factors: A [B, N, r, in], B [B, N, out, r].

    `features` [B, N, tokens, width] are what Stage II attends to.
    """

    needs_weights: ClassVar[bool] = True  # whether `probability` reads the weights

    A: Tensor
    B: Tensor
    features: Tensor

    @abstractmethod
    def probability(self, weights: Tensor, threshold: float = THRESHOLD) -> Tensor:
        """P(|dW| > threshold |W|) for weights [N, out, in]: [B, N, out, in] in float32 (section 3.2)."""

    def kept(self) -> "Response":
        """What `probability` needs of it for the first condition, in float32 on the CPU."""
        parts = {name: getattr(self, name)[:1].cpu().float() for name in self._factors()}
        return type(self)(**parts, features=torch.empty(0))

    def layer(self, row: int) -> "Response":
        """That of one of the N layers, without features."""
        parts = {name: getattr(self, name)[:, row : row + 1] for name in self._factors()}
        return type(self)(**parts, features=torch.empty(0))

    def _factors(self) -> list[str]:
        return [part.name for part in fields(self) if part.name != "features"]


@dataclass
class GaussianResponse(Response):
    """dW ~ Normal(B A, deviation^2), the deviation of an entry a product of its row's and its column's.

    row_log_deviation [B, N, out], column_log_deviation [B, N, in].
    """

    row_log_deviation: Tensor
    column_log_deviation: Tensor

    def probability(self, weights: Tensor, threshold: float = THRESHOLD) -> Tensor:
        mean = self.B.float() @ self.A.float()
        log_deviation = self.row_log_deviation.unsqueeze(-1) + self.column_log_deviation.unsqueeze(-2)
        deviation = log_deviation.float().exp() * 2.0**0.5
        edge = threshold * weights.float().abs()
        # erfc of each tail: exact for tiny probabilities too, where 1 - (difference of two CDFs) would
        # cancel.
        return 0.5 * (torch.erfc((edge - mean) / deviation) + torch.erfc((edge + mean) / deviation))


@dataclass
class ScoreResponse(Response):
    """|dW / W| is about softplus(B A), as in LoFA_v0; its probability is never below 0.45."""

    needs_weights = False

    def score(self) -> Tensor:
        """softplus(B A), float32 [B, N, out, in]."""
        return F.softplus(self.B.float() @ self.A.float())

    def logit(self, threshold: float = THRESHOLD) -> Tensor:
        """(score - threshold) / 0.1, float32 [B, N, out, in]."""
        return (self.score() - threshold) / 0.1

    def probability(self, weights: Tensor, threshold: float = THRESHOLD) -> Tensor:
        return self.logit(threshold).sigmoid()


class LocalHeads(nn.Module):
    """Tokens of rows and columns -> B [B, N, out, r] and A [B, N, r, in], as offsets from the mean LoRA;
    start at zero.
    """

    def __init__(self, config: HypernetworkConfig, shape: Shape, statistics: TargetStatistics):
        super().__init__()
        self.statistics, self.rank = statistics, config.rank
        high, wide = config.patch(shape)
        self.to_B = nn.Linear(config.width, high * config.rank)
        self.to_A = nn.Linear(config.width, wide * config.rank)
        _start_at_zero(self.to_A, self.to_B)

    def forward(self, rows: Tensor, columns: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) for the layers `row` [N] of this shape."""
        B = self.to_B(rows).unflatten(-1, (-1, self.rank)).flatten(-3, -2)
        A = self.to_A(columns).unflatten(-1, (-1, self.rank)).flatten(-3, -2).transpose(-1, -2)
        return self.statistics.denormalise(A, B, row)


class DeviationHeads(nn.Module):
    """Tokens of rows and columns -> log deviations of dW's rows [B, N, out] and columns [B, N, in], as
    offsets from the training set's; start at zero.
    """

    def __init__(self, config: HypernetworkConfig, shape: Shape, statistics: TargetStatistics):
        super().__init__()
        # In a list: the statistics are the factor heads' to hold.
        self._statistics = [statistics]
        high, wide = config.patch(shape)
        self.rows, self.columns = nn.Linear(config.width, high), nn.Linear(config.width, wide)
        _start_at_zero(self.rows, self.columns)

    def forward(self, rows: Tensor, columns: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        typical = self._statistics[0].delta_log_deviation[row].unsqueeze(-1)
        return self.rows(rows).flatten(-2) + typical, self.columns(columns).flatten(-2)


def _start_at_zero(*heads: nn.Linear) -> None:
    for head in heads:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)


class PooledHeads(nn.Module):
    """One token a layer -> A [B, N, r, in], B [B, N, out, r], and for Stage II alpha [B, N] (LoFA_v0)."""

    def __init__(self, config: HypernetworkConfig, shape: Shape, with_alpha: bool):
        super().__init__()
        self.shape_A, self.shape_B = (config.rank, shape[1]), (shape[0], config.rank)
        self.to_A = nn.Linear(config.width, config.rank * shape[1])
        self.to_B = nn.Linear(config.width, shape[0] * config.rank)
        self.to_alpha = nn.Linear(config.width, 1) if with_alpha else None

    def forward(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) of token [B, N, d]."""
        return self.to_A(token).unflatten(-1, self.shape_A), self.to_B(token).unflatten(-1, self.shape_B)

    def alpha(self, token: Tensor) -> Tensor:
        """The factor of B A, positive, float32 [B, N]."""
        if self.to_alpha is None:
            raise ValueError("Stage I has no alpha; ask Stage II.")
        return F.softplus(self.to_alpha(token).float()).squeeze(-1)


def _heads(
    config: HypernetworkConfig, base: BaseDescription, statistics: StatisticsByShape, with_alpha: bool
) -> nn.ModuleDict:
    """The heads of each shape of layers."""
    return nn.ModuleDict(
        {
            shape_key(shape): PooledHeads(config, shape, with_alpha)
            if statistics is None
            else LocalHeads(config, shape, statistics[shape_key(shape)])
            for shape in base.by_shape()
        }
    )


class ResponsePredictor(nn.Module):
    """Stage I (eq. 3): base weights and condition -> where, and how strongly, a LoRA would act."""

    def __init__(
        self,
        config: HypernetworkConfig,
        base: BaseDescription,
        conditions: tuple[ConditionDescription, ...],
        statistics: StatisticsByShape,
    ):
        super().__init__()
        self.trunk = Trunk(config, base, conditions, with_features=False)
        self.heads = _heads(config, base, statistics, with_alpha=False)
        self.deviations = nn.ModuleDict()
        if statistics is not None:
            for shape in base.by_shape():
                key = shape_key(shape)
                self.deviations[key] = DeviationHeads(config, shape, statistics[key])

    def forward(self, layers: Layers, condition: Condition) -> Response:
        """N layers of one shape, B projected conditions -> Response."""
        features = self.trunk(layers, condition, None)
        heads = self.heads[shape_key(layers.shape)]
        if isinstance(heads, PooledHeads):
            A, B = heads(self.trunk.pooled(features))
            return ScoreResponse(A, B, features)
        rows, columns = self.trunk.by_row_and_column(features)
        A, B = heads(rows, columns, layers.row)
        deviations = self.deviations[shape_key(layers.shape)](rows, columns, layers.row)
        return GaussianResponse(A, B, features, *deviations)


class LoRAPredictor(nn.Module):
    """Stage II (eq. 5): base weights, condition and Stage I's features -> A and B."""

    def __init__(
        self,
        config: HypernetworkConfig,
        base: BaseDescription,
        conditions: tuple[ConditionDescription, ...],
        statistics: StatisticsByShape,
    ):
        super().__init__()
        self.trunk = Trunk(config, base, conditions, with_features=True)
        self.heads = _heads(config, base, statistics, with_alpha=True)

    def start_from(self, stage1: ResponsePredictor) -> None:
        """Copy Stage I's trunk and factor heads (section 3.3); attention to features starts as no
        contribution.
        """
        self.trunk.load_state_dict(stage1.trunk.state_dict(), strict=False)
        self.heads.load_state_dict(stage1.heads.state_dict(), strict=False)
        self.trunk.silence_features()

    def forward(self, layers: Layers, condition: Condition, features: Tensor) -> tuple[Tensor, Tensor]:
        """(A [B, N, r, in], B [B, N, out, r]); dW = B A, an alpha of its own is multiplied into B."""
        tokens, heads = self.trunk(layers, condition, features), self.heads[shape_key(layers.shape)]
        if isinstance(heads, PooledHeads):
            token = self.trunk.pooled(tokens)
            A, B = heads(token)
            return A, B.float() * heads.alpha(token)[..., None, None]
        return heads(*self.trunk.by_row_and_column(tokens), layers.row)


class Hypernetwork(nn.Module):
    """Stage I and Stage II with what they were trained for (eq. 2: f(C, W) -> dW).

    `conditions`: the kinds it knows, each described. `statistics`: those of each shape of layers; None with
    the pooled readout, which predicts A and B as they are.
    """

    row_of: Tensor  # int64 [L]: a layer's place among those of its shape

    def __init__(
        self,
        config: HypernetworkConfig,
        base: BaseDescription,
        conditions: tuple[ConditionDescription, ...],
    ):
        super().__init__()
        self.config, self.base = config, base
        self.conditions: dict[str, ConditionDescription] = {known.kind: known for known in conditions}
        groups = base.by_shape()
        with torch.device("cpu"):  # as in Trunk
            row_of = torch.zeros(len(base.layers), dtype=torch.long)
            for places in groups.values():
                row_of[places] = torch.arange(len(places))
        self.register_buffer("row_of", row_of, persistent=False)
        statistics = None
        if config.readout == "local":
            statistics = {
                shape_key(shape): TargetStatistics(len(places), config.rank, *shape)
                for shape, places in groups.items()
            }
        self.statistics = None if statistics is None else nn.ModuleDict(statistics)
        self.stage1 = ResponsePredictor(config, base, conditions, statistics)
        self.stage2 = LoRAPredictor(config, base, conditions, statistics)

    @classmethod
    def unfilled(
        cls,
        config: HypernetworkConfig,
        base: BaseDescription,
        conditions: tuple[ConditionDescription, ...],
    ) -> "Hypernetwork":
        """The network without memory for its weights, to be `filled`."""
        with torch.device("meta"):
            return cls(config, base, conditions)

    def filled(self, tensors: Mapping[str, Tensor]) -> "Hypernetwork":
        """This network for prediction, holding these very tensors, by the names of `state_dict()`."""
        self.load_state_dict(tensors, strict=False, assign=True)
        return self.eval().requires_grad_(False)

    def own_state(self) -> dict[str, Tensor]:
        """`state_dict()` with the statistics, one module under three names, by the first of them alone."""
        return {
            key: value
            for key, value in self.state_dict().items()
            if ".heads." not in key or ".statistics." not in key
        }

    @property
    def coarse_prompt(self) -> str:
        return coarse_prompt_of(self.conditions.values())

    def patches(self, weights: Tensor, index: Tensor) -> Tensor:
        """Weights [N, out, in] of the layers `index` [N] as both stages look at them: [N, patches, numbers]
        in the network's dtype; no numbers where the design does not look at any.
        """
        dtype = self.stage1.trunk.row_position.dtype
        if self.config.weight_input == "condition":
            return torch.empty(len(weights), 0, 0, dtype=dtype, device=weights.device)
        if self.config.weight_input == "constants":
            weights = constants(index, (weights.shape[1], weights.shape[2]))
        return weight_patches(weights, self.config).to(dtype)

    def layers(self, shape: Shape, index: Tensor, patches: Tensor) -> Layers:
        """The layers `index` [N], all of one shape, with their `patches`."""
        return Layers(shape, index, self.row_of[index], patches)

    def look_at(self, weights: Tensor, index: Tensor) -> Layers:
        """The layers `index` [N] with weights [N, out, in]."""
        return self.layers((weights.shape[1], weights.shape[2]), index, self.patches(weights, index))

    def forward(
        self, weights: Tensor, index: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor, Response]:
        """Weights [N, out, in] of the layers `index` [N], B conditions -> (A, B, Stage I's response)."""
        layers = self.look_at(weights, index)
        response = self.stage1(layers, self.stage1.trunk.project(conditions))
        A, B = self.stage2(layers, self.stage2.trunk.project(conditions), response.features)
        return A, B, response
