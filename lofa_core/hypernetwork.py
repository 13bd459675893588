"""The hypernetwork: Stage I predicts where a LoRA acts on the base weights, Stage II predicts the LoRA (LoFA, section 3.3).

Both stages are one transformer over the patches of a base weight W, told which layer it looks at (eq. 3) and attending to
the condition; Stage II also attends to Stage I's features (eq. 5). What we do differently from the paper, and why:

* A and B are read from the tokens of their own columns and rows of W, not from one pooled vector: every part is local.
* The condition and the layer together modulate every normalisation (FiLM): the strongest single gain at small scale.
* Outputs are offsets from the mean LoRA of the training set, in units of its spread (see normalisation.py).
* Stage I predicts dW as a Gaussian, so the response probability P(|dW| > 0.02 |W|) follows exactly and can reach 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .normalisation import TargetStatistics
from .response_map import THRESHOLD


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


@dataclass
class Condition:
    """A batch of conditions, projected once for all layers: tokens [B, S, d], mask [B, S], summary [B, d]."""

    tokens: Tensor
    mask: Tensor
    summary: Tensor


@dataclass
class Response:
    """Stage I for N layers under B conditions: dW ~ Normal(mean, deviation^2), and the features Stage II attends to.

    A [B, N, r, in], B [B, N, out, r] (mean = B A), row_log_deviation [B, N, out], column_log_deviation [B, N, in],
    features [B, N, tokens, width].
    """

    A: Tensor
    B: Tensor
    row_log_deviation: Tensor
    column_log_deviation: Tensor
    features: Tensor

    def probability(self, weights: Tensor, threshold: float = THRESHOLD) -> Tensor:
        """P(|dW| > threshold |W|) for weights [N, out, in]: [B, N, out, in] in float32 (eq. 3's map, section 3.2)."""
        mean = self.B.float() @ self.A.float()
        log_deviation = self.row_log_deviation.unsqueeze(-1) + self.column_log_deviation.unsqueeze(-2)
        deviation = log_deviation.float().exp() * 2.0**0.5
        edge = threshold * weights.float().abs()
        # erfc of each tail: exact for tiny probabilities too, where 1 - (difference of two CDFs) would cancel.
        return 0.5 * (torch.erfc((edge - mean) / deviation) + torch.erfc((edge + mean) / deviation))


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys; `context` None is self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [..., T, d], context [..., S, d], mask [..., S] (True where a row counts)."""
        q = self._split(self.q(x))
        k, v = (self._split(part) for part in self.kv(x if context is None else context).chunk(2, dim=-1))
        allowed = None if mask is None else mask[..., None, None, :]
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=allowed)
        return self.proj(y.transpose(-2, -3).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


class MLP(nn.Sequential):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, ratio: int):
        super().__init__(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))


class Block(nn.Module):
    """Self-attention within a layer's patches, attention to the condition, an MLP after each; FiLM on every norm."""

    def __init__(self, config: HypernetworkConfig, attends_to_features: bool):
        super().__init__()
        width = config.width
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False) for _ in range(4)])
        self.film = nn.Linear(width, 8 * width)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        self.self_attention = Attention(width, config.heads)
        self.self_mlp = MLP(width, config.mlp_ratio)
        self.cross_attention = Attention(width, config.heads)
        self.cross_mlp = MLP(width, config.mlp_ratio)
        self.feature_attention = Attention(width, config.heads) if attends_to_features else None

    def forward(self, x: Tensor, condition: Condition, code: Tensor, features: Tensor | None) -> Tensor:
        """x [B, N, T, d], code [B, N, d] (condition and layer), features [B, N, T, d] of Stage I."""
        film = self.film(code).unsqueeze(-2).chunk(8, dim=-1)

        def normed(i: int, x: Tensor) -> Tensor:
            return self.norms[i](x) * (1.0 + film[2 * i]) + film[2 * i + 1]

        x = x + self.self_attention(normed(0, x))
        x = x + self.self_mlp(normed(1, x))
        # The condition's keys and values are shared by all layers: their tokens stand in one row of queries.
        asked = self.cross_attention(normed(2, x).flatten(1, 2), condition.tokens, condition.mask)
        x = x + asked.view_as(x)
        x = x + self.cross_mlp(normed(3, x))
        if self.feature_attention is not None and features is not None:
            x = x + self.feature_attention(x, features)
        return x


class Trunk(nn.Module):
    """W, layer and condition -> tokens: one summary token and one per patch."""

    def __init__(self, config: HypernetworkConfig, layers: tuple[LayerDescription, ...], with_features: bool):
        super().__init__()
        width, side = config.width, config.patch
        self.side = side
        self.rows, self.columns = config.out_features // side, config.in_features // side
        kinds = list(dict.fromkeys(layer.kind for layer in layers))
        self.register_buffer("depth_of", torch.tensor([layer.depth for layer in layers]), persistent=False)
        self.register_buffer(
            "kind_of", torch.tensor([kinds.index(layer.kind) for layer in layers]), persistent=False
        )
        self.patch_embed = nn.Linear(2 * side * side, width)
        self.row_position = nn.Parameter(0.5 * torch.randn(self.rows, 1, width))
        self.column_position = nn.Parameter(0.5 * torch.randn(1, self.columns, width))
        self.cls_token = nn.Parameter(0.5 * torch.randn(width))
        self.depth_embedding = nn.Embedding(1 + max(layer.depth for layer in layers), width)
        self.kind_embedding = nn.Embedding(len(kinds), width)
        self.code = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.condition_proj = nn.Linear(config.condition_width, width)
        self.pooling_queries = nn.Parameter(torch.randn(config.pooling_queries, width) / width**0.5)
        self.summary = nn.Linear(config.pooling_queries * width, width)
        self.blocks = nn.ModuleList(
            Block(config, with_features and index in config.feature_blocks) for index in range(config.blocks)
        )
        self.norm = nn.LayerNorm(width)

    def project(self, condition: Tensor) -> Condition:
        """Condition tokens [B, S, condition_width] -> what the blocks attend to. All-zero rows are padding."""
        mask = (condition != 0).any(-1)
        if not mask.any(1).all():
            raise ValueError("the condition has no tokens: every row of it is zero")
        tokens = self.condition_proj(condition)
        scores = (self.pooling_queries @ tokens.transpose(-1, -2)).masked_fill(
            ~mask.unsqueeze(1), float("-inf")
        )
        pooled = scores.softmax(-1) @ tokens
        return Condition(tokens, mask, self.summary(pooled.flatten(1)))

    def forward(
        self, weights: Tensor, index: Tensor, condition: Condition, features: Tensor | None
    ) -> Tensor:
        """Weights [N, out, in] of the layers `index` [N] -> normed tokens [B, N, 1 + rows * columns, width]."""
        layer = self.depth_embedding(self.depth_of[index]) + self.kind_embedding(self.kind_of[index])
        patches = self.patch_embed(self._patches(weights)) + (
            self.row_position + self.column_position
        ).flatten(0, 1)
        tokens = torch.cat([self.cls_token.expand(len(weights), 1, -1), patches], 1) + layer.unsqueeze(1)
        x = tokens.expand(len(condition.tokens), -1, -1, -1)
        code = self.code(condition.summary.unsqueeze(1) + layer)
        for block in self.blocks:
            x = block(x, condition, code, features)
        return self.norm(x)

    def _patches(self, weights: Tensor) -> Tensor:
        """[N, out, in] -> [N, patches, 2 side^2]: values in units of the layer's deviation, and their log magnitude.

        Magnitudes decide the response map (most of it is 1 / |W|), so they are kept, per layer, as a channel of their own.
        """
        scaled = weights.float() / weights.float().std(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        log_magnitude = scaled.abs().clamp_min(1e-3).log() + 1.0  # about zero mean for Gaussian weights
        both = torch.stack([scaled, log_magnitude], 1)
        grid = both.unflatten(3, (self.columns, self.side)).unflatten(2, (self.rows, self.side))
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return patches.to(self.patch_embed.weight.dtype)

    def by_row_and_column(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens -> ([B, N, rows, d], [B, N, columns, d]): means over the other axis plus the summary token."""
        cls, grid = tokens[..., :1, :], tokens[..., 1:, :].unflatten(-2, (self.rows, self.columns))
        return grid.mean(-2) + cls, grid.mean(-3) + cls


class FactorHeads(nn.Module):
    """Tokens of rows and columns -> B [B, N, out, r] and A [B, N, r, in], as offsets from the mean LoRA; start at zero."""

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
        """Copy Stage I's trunk and factor heads (section 3.3); attention to features starts as no contribution."""
        self.trunk.load_state_dict(stage1.trunk.state_dict(), strict=False)
        self.heads.load_state_dict(stage1.heads.state_dict())
        for block in self.trunk.blocks:
            if block.feature_attention is not None:
                nn.init.zeros_(block.feature_attention.proj.weight)
                nn.init.zeros_(block.feature_attention.proj.bias)

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
        """Weights [N, out, in] of the layers `index` [N], condition tokens [B, S, d] -> (A, B, Stage I's response)."""
        response = self.stage1(weights, index, self.stage1.trunk.project(condition))
        A, B = self.stage2(weights, index, self.stage2.trunk.project(condition), response.features)
        return A, B, response
