"""The learned part of each condition: from what encoders of others give (text states, CLIP's image states) or
from drawn skeletons to tokens as wide as the hypernetwork. Each stage has its own.
"""

import torch
from torch import Tensor, nn

from ..descriptions import ConditionDescription

# Strides (frames, height, width) of the pose encoder's convolutions: 4 in time and 16 in space.
_POSE_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))


def make_encoder(description: ConditionDescription, width: int) -> nn.Module:
    """The module that turns a condition's values [B, ...] into tokens [B, S, width]."""
    match description.kind:
        case "text":
            return nn.Linear(description.width, width)
        case "pose":
            return PoseEncoder(description, width)
        case _:
            return ImageEncoder(description.width, width)


class ImageEncoder(nn.Sequential):
    """CLIP's image states [B, S, d] -> tokens [B, S, width]: an MLP (LoFA sections 4.2 and 4.3)."""

    def __init__(self, image_width: int, width: int):
        super().__init__(
            nn.LayerNorm(image_width), nn.Linear(image_width, width), nn.GELU(), nn.Linear(width, width)
        )


class PoseEncoder(nn.Module):
    """Drawn skeletons [B, 3, T, H, W] in 0..1 -> tokens [B, S, width], one for 4 frames of 16 x 16 pixels.

    A multi-layer 3D convolution, as LoFA takes it from UniAnimate (section 4.1), and learned positions.
    """

    def __init__(self, description: ConditionDescription, width: int):
        super().__init__()
        self.size = description.size
        # Multiples of the norms' four groups.
        channels = [description.width, *(max(8, width // part // 4 * 4) for part in (8, 4, 2)), width]
        self.convolutions = nn.ModuleList(
            nn.Conv3d(into, out, 3, stride, 1)
            for into, out, stride in zip(channels[:-1], channels[1:], _POSE_STRIDES, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, out) for out in channels[1:-1])
        grid = list(self.size)
        for stride in _POSE_STRIDES:
            grid = [-(-length // step) for length, step in zip(grid, stride, strict=True)]
        self.positions = nn.ParameterList(
            nn.Parameter(0.5 * torch.randn(width, *(length if axis == own else 1 for axis in range(3))))
            for own, length in enumerate(grid)
        )

    def forward(self, skeletons: Tensor) -> Tensor:
        """Raises ValueError for clips of another size."""
        if tuple(skeletons.shape[2:]) != tuple(self.size):
            raise ValueError(
                f"skeletons of {list(skeletons.shape[2:])}: this network reads {list(self.size)} (frames, "
                "height, width). Resample them with lofa_core.conditions.pose."
            )
        x = self.convolutions[0](2.0 * skeletons - 1.0)
        for norm, convolution in zip(self.norms, self.convolutions[1:], strict=True):
            x = convolution(nn.functional.silu(norm(x)))
        for position in self.positions:
            x = x + position
        return x.flatten(2).transpose(1, 2)
