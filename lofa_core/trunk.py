"""The transformer both stages share: tokens of a base weight's patches, told the layer and the condition."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .descriptions import HypernetworkConfig, LayerDescription

KeysValues = tuple[Tensor, Tensor]  # [M, heads, S, head width] each


@dataclass
class Condition:
    """A batch of B conditions, projected once for all layers.

    keys_values: one pair a block. bias [B, 1, 1, S]: added to the attention scores, None where every row
    counts once. summary [B, d]: what FiLM is made from, None without it.
    """

    keys_values: list[KeysValues]
    bias: Tensor | None
    summary: Tensor | None


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def keys_values(self, context: Tensor) -> KeysValues:
        """What [M, S, d] is attended to by; the same context serves any number of `forward`s."""
        # Two products instead of one: their outputs are contiguous, so that the norm needs no copy.
        (k, v), (k_bias, v_bias) = self.kv.weight.chunk(2), self.kv.bias.chunk(2)
        keys = self.k_norm(self._split(F.linear(context, k, k_bias)))
        return keys.transpose(1, 2), self._split(F.linear(context, v, v_bias)).transpose(1, 2)

    def forward(self, x: Tensor, keys_values: KeysValues, bias: Tensor | None = None) -> Tensor:
        """x [M, T, d]; bias [M, 1, 1, S] is added to the scores."""
        q = self.q_norm(self._split(self.q(x))).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, *keys_values, attn_mask=bias)
        return self.proj(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class MLP(nn.Sequential):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, ratio: int):
        super().__init__(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        # In place: a second buffer of this size, the largest of all, costs more than the function itself.
        return self[2](torch.ops.aten.gelu_(self[0](x)))


class Block(nn.Module):
    """Self-attention within a layer's patches, attention to the condition, an MLP after each.

    Some blocks of Stage II then attend to Stage I's features (eq. 5); with LayerScale an MLP follows there
    too, as in LoFA_v0.
    """

    def __init__(self, config: HypernetworkConfig, attends_to_features: bool):
        super().__init__()
        width, film = config.width, config.modulation == "film"
        feature_mlp = attends_to_features and not film
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, 1e-5 if film else 1e-6, elementwise_affine=not film)
            for _ in range(5 if feature_mlp else 4)
        )
        self.film = nn.Linear(width, 8 * width) if film else None
        self.scales: nn.ParameterList | None = None  # LayerScale: one vector for each thing that is added
        if self.film is None:
            self.scales = nn.ParameterList(
                nn.Parameter(torch.full((width,), 0.1)) for _ in range(6 if feature_mlp else 4)
            )
        else:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)
        self.self_attention = Attention(width, config.heads)
        self.self_mlp = MLP(width, config.mlp_ratio)
        self.cross_attention = Attention(width, config.heads)
        self.cross_mlp = MLP(width, config.mlp_ratio)
        self.feature_attention = Attention(width, config.heads) if attends_to_features else None
        self.feature_mlp = MLP(width, config.mlp_ratio) if feature_mlp else None

    def forward(
        self,
        x: Tensor,
        keys_values: KeysValues,
        bias: Tensor | None,
        code: Tensor | None,
        features: Tensor | None,
    ) -> Tensor:
        """x [B N, T, d]; keys, values and bias of B conditions; code [B N, d] (condition and layer) for FiLM;
        features [B N, T', d] of Stage I.
        """
        film = None if self.film is None or code is None else self.film(code).unsqueeze(1).chunk(8, dim=-1)
        h = self._normed(0, x, film)
        x = self._add(0, x, self.self_attention(h, self.self_attention.keys_values(h)))
        x = self._add(1, x, self.self_mlp(self._normed(1, x, film)))
        # All layers share the condition's keys and values: their tokens stand in one row of queries.
        rows = self._normed(2, x, film).reshape(len(keys_values[0]), -1, x.shape[-1])
        x = self._add(2, x, self.cross_attention(rows, keys_values, bias).view_as(x))
        x = self._add(3, x, self.cross_mlp(self._normed(3, x, film)))
        if self.feature_attention is not None and features is not None:
            asked = self.feature_attention(x, self.feature_attention.keys_values(features))
            x = self._add(4, x, asked)
            if self.feature_mlp is not None:
                x = self._add(5, x, self.feature_mlp(self._normed(4, x, None)))
        return x

    def _normed(self, i: int, x: Tensor, film: tuple[Tensor, ...] | None) -> Tensor:
        x = self.norms[i](x)
        return x if film is None else torch.addcmul(film[2 * i + 1], x, 1.0 + film[2 * i])

    def _add(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.scales is None else torch.addcmul(x, y, self.scales[i])


def weight_patches(weights: Tensor, config: HypernetworkConfig) -> Tensor:
    """Weights [N, out, in] -> float32 [N, patches, channels * side^2], as `config.weight_input` says.

    Magnitudes decide the response map (most of it is 1 / |W|), so "magnitude" keeps them, per layer, as a
    channel of their own; "column_rms" divides the differences between columns away.
    """
    weights = weights.float()
    if config.weight_input == "column_rms":
        power = torch.linalg.vector_norm(weights, dim=1, keepdim=True).square() / weights.shape[1]
        channels = (weights * torch.rsqrt(power + 1e-6)).unsqueeze(1)
    else:
        scaled = weights / weights.std(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        # plus one: about zero mean for Gaussian weights
        channels = torch.stack([scaled, scaled.abs().clamp_min(1e-3).log() + 1.0], 1)
    grid = channels.unflatten(3, (-1, config.patch)).unflatten(2, (-1, config.patch))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class Trunk(nn.Module):
    """W, layer and condition -> tokens: one summary token (where the design has it) and one per patch."""

    depth_of: Tensor  # int64 [L]: which depth and which kind each target layer has
    kind_of: Tensor

    def __init__(self, config: HypernetworkConfig, layers: tuple[LayerDescription, ...], with_features: bool):
        super().__init__()
        width, side, film = config.width, config.patch, config.modulation == "film"
        self.config, self.side = config, side
        self.checkpoint_activations = False  # in training: compute blocks again in the backward pass
        self.rows, self.columns = config.out_features // side, config.in_features // side
        kinds = list(dict.fromkeys(layer.kind for layer in layers))
        # On the CPU even where the network itself is built on the meta device, to be filled from a file.
        with torch.device("cpu"):
            depth_of = torch.tensor([layer.depth for layer in layers])
            kind_of = torch.tensor([kinds.index(layer.kind) for layer in layers])
        self.register_buffer("depth_of", depth_of, persistent=False)
        self.register_buffer("kind_of", kind_of, persistent=False)
        channels = 2 if config.weight_input == "magnitude" else 1
        self.patch_embed = nn.Linear(channels * side * side, width)
        # The eps is float32's in every dtype: bfloat16's own, 0.008, would change what is computed.
        self.patch_norm = (
            nn.RMSNorm(width, eps=torch.finfo(torch.float32).eps)
            if config.weight_input == "column_rms"
            else None
        )
        self.row_position = nn.Parameter(0.5 * torch.randn(self.rows, 1, width))
        self.column_position = nn.Parameter(0.5 * torch.randn(1, self.columns, width))
        self.cls_token = nn.Parameter(0.5 * torch.randn(width)) if config.cls_token else None
        self.depth_embedding = nn.Embedding(1 + max(layer.depth for layer in layers), width)
        self.kind_embedding = nn.Embedding(len(kinds), width)
        self.condition_proj = nn.Linear(config.condition_width, width)
        if film:
            self.code = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.pooling_queries = nn.Parameter(torch.randn(config.pooling_queries, width) / width**0.5)
            self.summary = nn.Linear(config.pooling_queries * width, width)
        self.blocks = nn.ModuleList(
            Block(config, with_features and index in config.feature_blocks) for index in range(config.blocks)
        )
        self.norm = nn.LayerNorm(width)

    def project(self, condition: Tensor) -> Condition:
        """Condition tokens [B, S, condition_width] -> what the blocks attend to. Zero rows are padding.

        Raises ValueError where a condition is nothing but padding.
        """
        rows, bias = self._rows_that_count(condition)
        tokens = self.condition_proj(rows)
        keys_values = [block.cross_attention.keys_values(tokens) for block in self._each_block()]
        scores_bias = None if bias is None else bias[:, None, None, :]
        if self.config.modulation != "film":
            return Condition(keys_values, scores_bias, None)
        scores = self.pooling_queries @ tokens.transpose(-1, -2)
        pooled = (scores if bias is None else scores + bias.unsqueeze(1)).softmax(-1) @ tokens
        return Condition(keys_values, scores_bias, self.summary(pooled.flatten(1)))

    def _rows_that_count(self, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows [B, S', condition_width] without the padding after the longest prompt, and what to add to
        their attention scores [B, S'].

        Padding is left out; or, where it is attended to, one row of zeros stands for all of them: n equal
        keys with equal values weigh as one whose score is log n higher.
        """
        padding = (condition == 0).all(-1)
        if padding.all(1).any():
            raise ValueError("the condition has no tokens: every row of it is zero")
        if not padding.any():
            return condition, None
        longest = int((~padding).any(0).nonzero().max()) + 1
        rows, padding_between = condition[:, :longest], padding[:, :longest]
        if self.config.mask_padding and not padding_between.any():
            return rows, None
        bias = torch.zeros_like(rows[..., 0]).masked_fill(padding_between, float("-inf"))
        if self.config.mask_padding:
            return rows, bias
        zeros = padding.sum(1, keepdim=True).to(bias.dtype)
        return torch.cat([rows, torch.zeros_like(rows[:, :1])], 1), torch.cat([bias, zeros.log()], 1)

    def forward(
        self, patches: Tensor, index: Tensor, condition: Condition, features: Tensor | None
    ) -> Tensor:
        """`weight_patches` of the layers `index` [N] -> tokens [B, N, T, width]; features likewise.

        T = rows * columns, and one more with a CLS token, which comes first.
        """
        layer = self.depth_embedding(self.depth_of[index]) + self.kind_embedding(self.kind_of[index])
        tokens = self.patch_embed(patches)
        if self.patch_norm is not None:
            tokens = self.patch_norm(tokens)
        tokens = tokens + (self.row_position + self.column_position).flatten(0, 1) + layer.unsqueeze(1)
        if self.cls_token is not None:
            # LoFA_v0 does not tell this token which layer it is in.
            own = (
                self.cls_token + layer
                if self.config.modulation == "film"
                else self.cls_token.expand_as(layer)
            )
            tokens = torch.cat([own.unsqueeze(1), tokens], 1)
        conditions = len(condition.keys_values[0][0])
        x = tokens.expand(conditions, -1, -1, -1).flatten(0, 1)
        features = None if features is None else features.flatten(0, 1)
        code = None
        if condition.summary is not None:
            code = self.code(condition.summary.unsqueeze(1) + layer).flatten(0, 1)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block, keys_values in zip(self.blocks, condition.keys_values, strict=True):
            inputs = (x, keys_values, condition.bias, code, features)
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return self.norm(x).unflatten(0, (conditions, -1))

    def silence_features(self) -> None:
        """Make attention to Stage I's features contribute nothing, until it is trained to."""
        for block in self._each_block():
            for last in (
                None if block.feature_attention is None else block.feature_attention.proj,
                None if block.feature_mlp is None else block.feature_mlp[2],
            ):
                if isinstance(last, nn.Linear):
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)

    def _each_block(self) -> Iterator[Block]:
        return (block for block in self.blocks if isinstance(block, Block))

    def by_row_and_column(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens -> ([B, N, rows, d], [B, N, columns, d]): means over the other axis plus the CLS token."""
        if self.cls_token is None:
            grid = tokens.unflatten(-2, (self.rows, self.columns))
            return grid.mean(-2), grid.mean(-3)
        cls, grid = tokens[..., :1, :], tokens[..., 1:, :].unflatten(-2, (self.rows, self.columns))
        return grid.mean(-2) + cls, grid.mean(-3) + cls

    def pooled(self, tokens: Tensor) -> Tensor:
        """Tokens -> [B, N, d], their mean. Without a CLS token LoFA_v0 leaves out the first patch."""
        return (tokens if self.cls_token is not None else tokens[..., 1:, :]).mean(-2)
