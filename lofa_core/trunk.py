"""The transformer both stages share: tokens of a base weight's patches, told the layer and the condition."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .descriptions import HypernetworkConfig, LayerDescription


@dataclass
class Condition:
    """A batch of conditions, projected once for all layers: tokens [B, S, d], mask [B, S], summary [B, d]."""

    tokens: Tensor
    mask: Tensor
    summary: Tensor


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
    """Self-attention within a layer's patches, attention to the condition, an MLP after each; FiLM on every
    norm.
    """

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

    depth_of: Tensor  # int64 [L]: which depth and which kind each target layer has
    kind_of: Tensor

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
        """Condition tokens [B, S, condition_width] -> what the blocks attend to. Zero rows are padding."""
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
        """Weights [N, out, in] of the layers `index` [N] -> tokens [B, N, 1 + rows * columns, width]."""
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

    def silence_features(self) -> None:
        """Make attention to Stage I's features contribute nothing, until it is trained to."""
        for attention in (block.feature_attention for block in self._each_block()):
            if attention is not None:
                nn.init.zeros_(attention.proj.weight)
                nn.init.zeros_(attention.proj.bias)

    def _each_block(self) -> Iterator[Block]:
        return (block for block in self.blocks if isinstance(block, Block))

    def _patches(self, weights: Tensor) -> Tensor:
        """[N, out, in] -> [N, patches, 2 side^2]: values in units of the layer's deviation, and their log
        magnitude.

        Magnitudes decide the response map (most of it is 1 / |W|), so they are kept, per layer, as a channel
        of their own.
        """
        scaled = weights.float() / weights.float().std(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        log_magnitude = scaled.abs().clamp_min(1e-3).log() + 1.0  # about zero mean for Gaussian weights
        both = torch.stack([scaled, log_magnitude], 1)
        grid = both.unflatten(3, (self.columns, self.side)).unflatten(2, (self.rows, self.side))
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return patches.to(self.patch_embed.weight.dtype)

    def by_row_and_column(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens -> ([B, N, rows, d], [B, N, columns, d]): means over the other axis plus the CLS token."""
        cls, grid = tokens[..., :1, :], tokens[..., 1:, :].unflatten(-2, (self.rows, self.columns))
        return grid.mean(-2) + cls, grid.mean(-3) + cls
