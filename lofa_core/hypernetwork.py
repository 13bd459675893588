"""The hypernetwork: Stage I predicts where a LoRA acts on the base weights, Stage II predicts the LoRA (LoFA,
section 3.3).

Both stages are one transformer over the patches of a base weight W, told which layer it looks at (eq. 3) and
attending to the condition; Stage II also attends to Stage I's features (eq. 5). What we do differently from
the paper, and why:

* A and B are read from the tokens of their own columns and rows of W, not from one pooled vector: every part
  is local.
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

from .descriptions import BaseDescription, ConditionDescription, HypernetworkConfig
from .normalisation import TargetStatistics
from .response_map import THRESHOLD
from .trunk import Condition, Trunk, weight_patches


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

    def __init__(self, config: HypernetworkConfig, statistics: TargetStatistics):
        super().__init__()
        self.statistics, self.rank = statistics, config.rank
        self.to_B = nn.Linear(config.width, config.patch * config.rank)
        self.to_A = nn.Linear(config.width, config.patch * config.rank)
        for head in (self.to_A, self.to_B):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, rows: Tensor, columns: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) for the layers `index` [N]."""
        B = self.to_B(rows).unflatten(-1, (-1, self.rank)).flatten(-3, -2)
        A = self.to_A(columns).unflatten(-1, (-1, self.rank)).flatten(-3, -2).transpose(-1, -2)
        return self.statistics.denormalise(A, B, index)


class PooledHeads(nn.Module):
    """One token a layer -> A [B, N, r, in], B [B, N, out, r], and for Stage II alpha [B, N] (LoFA_v0)."""

    def __init__(self, config: HypernetworkConfig, with_alpha: bool):
        super().__init__()
        self.shape_A = (config.rank, config.in_features)
        self.shape_B = (config.out_features, config.rank)
        self.to_A = nn.Linear(config.width, config.rank * config.in_features)
        self.to_B = nn.Linear(config.width, config.out_features * config.rank)
        self.to_alpha = nn.Linear(config.width, 1) if with_alpha else None

    def forward(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) of token [B, N, d]."""
        return self.to_A(token).unflatten(-1, self.shape_A), self.to_B(token).unflatten(-1, self.shape_B)

    def alpha(self, token: Tensor) -> Tensor:
        """The factor of B A, positive, float32 [B, N]."""
        if self.to_alpha is None:
            raise ValueError("Stage I has no alpha; ask Stage II.")
        return F.softplus(self.to_alpha(token).float()).squeeze(-1)


class ResponsePredictor(nn.Module):
    """Stage I (eq. 3): base weights and condition -> where, and how strongly, a LoRA would act."""

    def __init__(
        self, config: HypernetworkConfig, base: BaseDescription, statistics: TargetStatistics | None
    ):
        super().__init__()
        self.trunk = Trunk(config, base.layers, with_features=False)
        self.heads = (
            PooledHeads(config, with_alpha=False) if statistics is None else LocalHeads(config, statistics)
        )
        if statistics is not None:
            self.row_deviation = nn.Linear(config.width, config.patch)
            self.column_deviation = nn.Linear(config.width, config.patch)
            for head in (self.row_deviation, self.column_deviation):
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)

    def forward(self, patches: Tensor, index: Tensor, condition: Condition) -> Response:
        """Patches of the layers `index` [N], B projected conditions -> Response."""
        features = self.trunk(patches, index, condition, None)
        if isinstance(self.heads, PooledHeads):
            A, B = self.heads(self.trunk.pooled(features))
            return ScoreResponse(A, B, features)
        rows, columns = self.trunk.by_row_and_column(features)
        A, B = self.heads(rows, columns, index)
        row_deviation = self.row_deviation(rows).flatten(-2)
        row_deviation = row_deviation + self.heads.statistics.delta_log_deviation[index].unsqueeze(-1)
        return GaussianResponse(A, B, features, row_deviation, self.column_deviation(columns).flatten(-2))


class LoRAPredictor(nn.Module):
    """Stage II (eq. 5): base weights, condition and Stage I's features -> A and B."""

    def __init__(
        self, config: HypernetworkConfig, base: BaseDescription, statistics: TargetStatistics | None
    ):
        super().__init__()
        self.trunk = Trunk(config, base.layers, with_features=True)
        self.heads = (
            PooledHeads(config, with_alpha=True) if statistics is None else LocalHeads(config, statistics)
        )

    def start_from(self, stage1: ResponsePredictor) -> None:
        """Copy Stage I's trunk and factor heads (section 3.3); attention to features starts as no
        contribution.
        """
        self.trunk.load_state_dict(stage1.trunk.state_dict(), strict=False)
        self.heads.load_state_dict(stage1.heads.state_dict(), strict=False)
        self.trunk.silence_features()

    def forward(
        self, patches: Tensor, index: Tensor, condition: Condition, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(A [B, N, r, in], B [B, N, out, r]); dW = B A, an alpha of its own is multiplied into B."""
        tokens = self.trunk(patches, index, condition, features)
        if isinstance(self.heads, PooledHeads):
            token = self.trunk.pooled(tokens)
            A, B = self.heads(token)
            return A, B.float() * self.heads.alpha(token)[..., None, None]
        return self.heads(*self.trunk.by_row_and_column(tokens), index)


class Hypernetwork(nn.Module):
    """Stage I and Stage II with what they were trained for (eq. 2: f(C, W) -> dW).

    `statistics` is None with the pooled readout, which predicts A and B as they are.
    """

    def __init__(self, config: HypernetworkConfig, base: BaseDescription, condition: ConditionDescription):
        super().__init__()
        self.config, self.base, self.condition = config, base, condition
        self.statistics = (
            TargetStatistics(len(base.layers), config.rank, config.out_features, config.in_features)
            if config.readout == "local"
            else None
        )
        self.stage1 = ResponsePredictor(config, base, self.statistics)
        self.stage2 = LoRAPredictor(config, base, self.statistics)

    @classmethod
    def unfilled(
        cls, config: HypernetworkConfig, base: BaseDescription, condition: ConditionDescription
    ) -> "Hypernetwork":
        """The network without memory for its weights, to be `filled`."""
        with torch.device("meta"):
            return cls(config, base, condition)

    def filled(self, tensors: Mapping[str, Tensor]) -> "Hypernetwork":
        """This network for prediction, holding these very tensors, by the names of `state_dict()`."""
        self.load_state_dict(tensors, strict=False, assign=True)
        return self.eval().requires_grad_(False)

    def own_state(self) -> dict[str, Tensor]:
        """`state_dict()` with the statistics, one module under three names, by the first of them alone."""
        return {key: value for key, value in self.state_dict().items() if ".heads.statistics." not in key}

    def patches(self, weights: Tensor) -> Tensor:
        """Weights [N, out, in] as both stages look at them: [N, patches, numbers] in the network's dtype."""
        return weight_patches(weights, self.config).to(self.stage1.trunk.patch_embed.weight.dtype)

    def forward(self, weights: Tensor, index: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Response]:
        """Weights [N, out, in] of the layers `index` [N], condition tokens [B, S, d] -> (A, B, Stage I's
        response).
        """
        patches = self.patches(weights)
        response = self.stage1(patches, index, self.stage1.trunk.project(condition))
        A, B = self.stage2(patches, index, self.stage2.trunk.project(condition), response.features)
        return A, B, response
