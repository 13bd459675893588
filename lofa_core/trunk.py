"""The transformer both stages share: tokens of a base weight's patches, told the layer and the condition."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import Block, KeysValues
from .conditions import Conditions
from .conditions.encoders import make_encoder
from .descriptions import BaseDescription, ConditionDescription, HypernetworkConfig, Shape


@dataclass
class Layers:
    """N target layers of one shape, as a network looks at them.

    index [N]: their places among all target layers; row [N]: among those of their shape. patches [N, T,
    numbers]: `weight_patches`.
    """

    shape: Shape
    index: Tensor
    row: Tensor
    patches: Tensor


@dataclass
class Condition:
    """A batch of B conditions, projected once for all layers.

    keys_values: one pair a block. bias [B, 1, 1, S]: added to the attention scores, None where every row
    counts once. summary [B, d]: what FiLM is made from, None without it.
    """

    keys_values: list[KeysValues]
    bias: Tensor | None
    summary: Tensor | None


def weight_patches(weights: Tensor, config: HypernetworkConfig) -> Tensor:
    """Weights [N, out, in], or the `constants` in their place -> float32 [N, patches, numbers], as
    `config.weight_input` says.

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
    grid = channels.unflatten(3, (config.grid[1], -1)).unflatten(2, (config.grid[0], -1))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def constants(index: Tensor, shape: Shape) -> Tensor:
    """Gaussian noise [N, *shape] in place of the weights of the layers `index` [N], always the same."""
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(place)) for place in index.tolist()]
    return torch.stack(drawn).to(index.device)


def shape_key(shape: Shape) -> str:
    """What modules of one shape of layers are called: `640x2048`."""
    return f"{shape[0]}x{shape[1]}"


class Trunk(nn.Module):
    """W, layer and conditions -> tokens: one summary token (where the design has it) and one per patch.

    Weights of each shape have a patch embedding of their own; all else is shared (SDXL has four shapes).
    """

    depth_of: Tensor  # int64 [L]: which depth and which kind each target layer has
    kind_of: Tensor

    def __init__(
        self,
        config: HypernetworkConfig,
        base: BaseDescription,
        conditions: tuple[ConditionDescription, ...],
        with_features: bool,
    ):
        super().__init__()
        width, film, layers = config.width, config.modulation == "film", base.layers
        self.config = config
        self.checkpoint_activations = False  # in training: compute blocks again in the backward pass
        self.rows, self.columns = config.grid
        kinds = list(dict.fromkeys(layer.kind for layer in layers))
        # On the CPU even where the network itself is built on the meta device, to be filled from a file.
        with torch.device("cpu"):
            depth_of = torch.tensor([layer.depth for layer in layers])
            kind_of = torch.tensor([kinds.index(layer.kind) for layer in layers])
        self.register_buffer("depth_of", depth_of, persistent=False)
        self.register_buffer("kind_of", kind_of, persistent=False)
        channels = 1 if config.weight_input == "column_rms" else 2
        self.patch_embed = nn.ModuleDict()
        self.condition_embed = nn.Linear(width, width) if config.weight_input == "condition" else None
        for shape in base.by_shape() if self.condition_embed is None else ():
            high, wide = config.patch(shape)
            self.patch_embed[shape_key(shape)] = nn.Linear(channels * high * wide, width)
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
        self.condition_proj = nn.ModuleDict({given.kind: make_encoder(given, width) for given in conditions})
        # Several kinds of condition are told apart, and attended to beside a token that is always there.
        self.modality, self.null_token = nn.ParameterDict(), None
        if len(conditions) > 1:
            for given in conditions:
                self.modality[given.kind] = nn.Parameter(0.5 * torch.randn(width))
            self.null_token = nn.Parameter(0.5 * torch.randn(width))
        if film:
            self.code = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.pooling_queries = nn.Parameter(torch.randn(config.pooling_queries, width) / width**0.5)
            self.summary = nn.ModuleDict(
                {given.kind: nn.Linear(config.pooling_queries * width, width) for given in conditions}
            )
        blocks = config.blocks if with_features else config.stage1_blocks or config.blocks
        self.blocks = nn.ModuleList(
            Block(config, with_features and index in config.feature_blocks) for index in range(blocks)
        )
        self.norm = nn.LayerNorm(width)

    def project(self, conditions: Conditions) -> Condition:
        """Any of the kinds this network knows -> what the blocks attend to: the tokens of all, one after the
        other, the score of each raised by the log of its kind's strength. FiLM adds up a summary of each
        kind, times its strength.

        Raises ValueError where a condition is nothing but padding, or is not known here.
        """
        parts, biases, summaries = [], [], []
        for kind in self._known(conditions):
            values, strength = conditions[kind].values, conditions[kind].strength
            rows, bias = (values, None) if kind == "pose" else self._rows_that_count(values, strength)
            tokens = self.condition_proj[kind](rows)
            if kind in self.modality:
                tokens = tokens + self.modality[kind]
            if self.config.modulation == "film":
                summaries.append(self._summary(kind, tokens, bias, strength))
            if strength is not None:
                bias = tokens.new_zeros(tokens.shape[:2]) if bias is None else bias
                bias = bias + strength.log().unsqueeze(1)
            parts.append(tokens)
            biases.append(bias)
        if self.null_token is not None:
            parts.append(self.null_token.expand(len(parts[0]), 1, -1))
            biases.append(None)
        tokens, bias = torch.cat(parts, 1), None
        if any(part is not None for part in biases):
            bias = torch.cat(
                [
                    part.new_zeros(part.shape[:2]) if own is None else own
                    for part, own in zip(parts, biases, strict=True)
                ],
                1,
            )[:, None, None, :]
        keys_values = [block.cross_attention.keys_values(tokens) for block in self._each_block()]
        return Condition(keys_values, bias, torch.stack(summaries).sum(0) if summaries else None)

    def _known(self, conditions: Conditions) -> list[str]:
        """The kinds given, in this network's order."""
        unknown = [kind for kind in conditions if kind not in self.condition_proj]
        if unknown or not conditions:
            raise ValueError(
                f"given {', '.join(conditions) or 'no condition'}: this network knows "
                f"{', '.join(self.condition_proj)}."
            )
        if self.null_token is None and any(given.strength is not None for given in conditions.values()):
            raise ValueError("this network knows one kind of condition, whose strength is always 1.")
        return [kind for kind in self.condition_proj if kind in conditions]

    def _summary(self, kind: str, tokens: Tensor, bias: Tensor | None, strength: Tensor | None) -> Tensor:
        """[B, d] of one kind's tokens."""
        scores = self.pooling_queries @ tokens.transpose(-1, -2)
        pooled = (scores if bias is None else scores + bias.unsqueeze(1)).softmax(-1) @ tokens
        summary = self.summary[kind](pooled.flatten(1))
        return summary if strength is None else strength.unsqueeze(1) * summary

    def _rows_that_count(self, tokens: Tensor, strength: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows [B, S', d] without the padding after the longest condition, and what to add to their attention
        scores [B, S'].

        Padding is left out; or, where it is attended to, one row of zeros stands for all of them: n equal
        keys with equal values weigh as one whose score is log n higher.
        """
        padding = (tokens == 0).all(-1)
        if strength is not None:  # what is not given has no rows to leave out; its weight is zero anyway
            padding = padding & (strength > 0).unsqueeze(1)
        if padding.all(1).any():
            raise ValueError("the condition has no tokens: every row of it is zero")
        if not padding.any():
            return tokens, None
        longest = int((~padding).any(0).nonzero().max()) + 1
        rows, padding_between = tokens[:, :longest], padding[:, :longest]
        if self.config.mask_padding and not padding_between.any():
            return rows, None
        bias = torch.zeros_like(rows[..., 0]).masked_fill(padding_between, float("-inf"))
        if self.config.mask_padding:
            return rows, bias
        zeros = padding.sum(1, keepdim=True).to(bias.dtype)
        return torch.cat([rows, torch.zeros_like(rows[:, :1])], 1), torch.cat([bias, zeros.log()], 1)

    def forward(self, layers: Layers, condition: Condition, features: Tensor | None) -> Tensor:
        """N layers under B conditions -> tokens [B, N, T, width]; features likewise.

        T = rows * columns, and one more with a CLS token, which comes first.
        """
        index = layers.index
        layer = self.depth_embedding(self.depth_of[index]) + self.kind_embedding(self.kind_of[index])
        tokens = (self.row_position + self.column_position).flatten(0, 1) + layer.unsqueeze(1)
        if self.condition_embed is None:
            looked_at = self.patch_embed[shape_key(layers.shape)](layers.patches)
            tokens = (looked_at if self.patch_norm is None else self.patch_norm(looked_at)) + tokens
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
            if self.condition_embed is not None:
                start = self.condition_embed(condition.summary)[:, None, None]
                x = (start + x.unflatten(0, (conditions, -1))).flatten(0, 1)
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
