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
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .descriptions import BaseDescription, ConditionDescription, HypernetworkConfig
from .normalisation import TargetStatistics
from .response_map import THRESHOLD
from .trunk import Condition, Trunk


@dataclass
class Response:
    """Stage I for N layers under B conditions: dW ~ Normal(mean, deviation^2), and the features Stage II
    attends to.

    A [B, N, r, in], B [B, N, out, r] (mean = B A), row_log_deviation [B, N, out], column_log_deviation [B, N,
    in], features [B, N, tokens, width].
    """

    A: Tensor
    B: Tensor
    row_log_deviation: Tensor
    column_log_deviation: Tensor
    features: Tensor

    def probability(self, weights: Tensor, threshold: float = THRESHOLD) -> Tensor:
        """P(|dW| > threshold |W|) for weights [N, out, in]: [B, N, out, in] in float32 (eq. 3's map, section
        3.2).
        """
        mean = self.B.float() @ self.A.float()
        log_deviation = self.row_log_deviation.unsqueeze(-1) + self.column_log_deviation.unsqueeze(-2)
        deviation = log_deviation.float().exp() * 2.0**0.5
        edge = threshold * weights.float().abs()
        # erfc of each tail: exact for tiny probabilities too, where 1 - (difference of two CDFs) would
        # cancel.
        return 0.5 * (torch.erfc((edge - mean) / deviation) + torch.erfc((edge + mean) / deviation))


class FactorHeads(nn.Module):
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


class ResponsePredictor(nn.Module):
    """Stage I (eq. 3): base weights and condition -> where, and how strongly, a LoRA would act."""

    def __init__(self, config: HypernetworkConfig, base: BaseDescription, statistics: TargetStatistics):
        super().__init__()
        self.trunk = Trunk(config, base.layers, with_features=False)
        self.heads = FactorHeads(config, statistics)
        self.row_deviation = nn.Linear(config.width, config.patch)
        self.column_deviation = nn.Linear(config.width, config.patch)
        for head in (self.row_deviation, self.column_deviation):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, weights: Tensor, index: Tensor, condition: Condition) -> Response:
        """Weights [N, out, in] of the layers `index` [N], B projected conditions -> Response."""
        features = self.trunk(weights, index, condition, None)
        rows, columns = self.trunk.by_row_and_column(features)
        A, B = self.heads(rows, columns, index)
        return Response(
            A,
            B,
            self.row_deviation(rows).flatten(-2)
            + self.heads.statistics.delta_log_deviation[index].unsqueeze(-1),
            self.column_deviation(columns).flatten(-2),
            features,
        )


class LoRAPredictor(nn.Module):
    """Stage II (eq. 5): base weights, condition and Stage I's features -> A and B."""

    def __init__(self, config: HypernetworkConfig, base: BaseDescription, statistics: TargetStatistics):
        super().__init__()
        self.trunk = Trunk(config, base.layers, with_features=True)
        self.heads = FactorHeads(config, statistics)

    def start_from(self, stage1: ResponsePredictor) -> None:
        """Copy Stage I's trunk and factor heads (section 3.3); attention to features starts as no
        contribution.
        """
        self.trunk.load_state_dict(stage1.trunk.state_dict(), strict=False)
        self.heads.load_state_dict(stage1.heads.state_dict())
        self.trunk.silence_features()

    def forward(
        self, weights: Tensor, index: Tensor, condition: Condition, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(A [B, N, r, in], B [B, N, out, r]); dW = B A."""
        tokens = self.trunk(weights, index, condition, features)
        return self.heads(*self.trunk.by_row_and_column(tokens), index)


class Hypernetwork(nn.Module):
    """Stage I and Stage II with what they were trained for (eq. 2: f(C, W) -> dW)."""

    def __init__(self, config: HypernetworkConfig, base: BaseDescription, condition: ConditionDescription):
        super().__init__()
        self.config, self.base, self.condition = config, base, condition
        self.statistics = TargetStatistics(
            len(base.layers), config.rank, config.out_features, config.in_features
        )
        self.stage1 = ResponsePredictor(config, base, self.statistics)
        self.stage2 = LoRAPredictor(config, base, self.statistics)

    def forward(self, weights: Tensor, index: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Response]:
        """Weights [N, out, in] of the layers `index` [N], condition tokens [B, S, d] -> (A, B, Stage I's
        response).
        """
        response = self.stage1(weights, index, self.stage1.trunk.project(condition))
        A, B = self.stage2(weights, index, self.stage2.trunk.project(condition), response.features)
        return A, B, response
