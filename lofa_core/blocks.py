"""The block of the hypernetwork's transformer: attention within a layer, to conditions, and to features."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .descriptions import HypernetworkConfig

KeysValues = tuple[Tensor, Tensor]  # [M, heads, S, head width] each


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
