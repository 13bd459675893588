"""CSD: Contrastive Style Descriptors (Somepalli et al. 2024, arXiv 2404.01292), the style half of it.

OpenAI's CLIP image tower with the projection of its class token trained to tell styles apart. The tensors
keep OpenAI's names, as CSD's checkpoint has them; every size is read from their shapes.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..conditions.image import DEVIATION, MEAN
from .embedders import FrameEmbedder
from .weights import fill, read_state

_HEAD = 64  # numbers per attention head, in every CLIP image transformer


class StyleTower(nn.Module):
    """Pictures [B, 3, size, size], normalised -> style descriptors [B, out]."""

    def __init__(self, width: int, layers: int, patch: int, tokens: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.Sequential(*(_Block(width) for _ in range(layers)))}
        )
        self.last_layer_style = nn.Parameter(torch.zeros(width, out))

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.conv1(pictures).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        tokens = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        tokens = self.transformer["resblocks"](tokens)
        return self.ln_post(tokens[:, 0]) @ self.last_layer_style


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, max(1, width // _HEAD), batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width), gelu=_QuickGELU(), c_proj=nn.Linear(4 * width, width)
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def open_csd(path: Path, device: torch.device) -> FrameEmbedder:
    """CSD's checkpoint. ValueError where it is something else."""
    state = {name.removeprefix("backbone."): value for name, value in read_state(path).items()}
    try:
        patches, positions = state["conv1.weight"], state["positional_embedding"]
        out = state["last_layer_style"].shape[1]
    except KeyError as error:
        raise ValueError(f"{path}: is not CSD's checkpoint: it has no {error.args[0]}.") from error
    layers = len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")})
    tower = StyleTower(patches.shape[0], layers, patches.shape[2], positions.shape[0], out)
    fill(tower, state, path, "CSD's checkpoint")
    size = round((positions.shape[0] - 1) ** 0.5) * patches.shape[2]
    return FrameEmbedder(tower.to(device), size, (MEAN, DEVIATION), device)
