"""RAFT (Teed and Deng 2020, arXiv 2003.12039): optical flow by looking up all-pairs correlations, 20 times.

The large model, at 1/8 of the size, with the tensor names of the authors' raft-things.pth, so that Dynamic
Degree is VBench's without its package. Only inference.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .weights import fill, read_state

_LEVELS, _RADIUS, _STEPS = 4, 4, 20
_HIDDEN = 128
_SMALLEST = 64  # pixels a side: the coarsest correlations are at 1/64


class RAFT(nn.Module):
    """Frames [1, 3, H, W] in 0..255, H and W multiples of 8 -> the flow from the first to the second in
    pixels [1, 2, H, W], x first."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet = _Encoder(256, nn.InstanceNorm2d)
        self.cnet = _Encoder(2 * _HIDDEN, nn.BatchNorm2d)
        self.update_block = _Update()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        first, second = first / 127.5 - 1.0, second / 127.5 - 1.0
        pyramid = _correlations(self.fnet(first), self.fnet(second))
        hidden, context = self.cnet(first).split(_HIDDEN, 1)
        hidden, context = hidden.tanh(), context.relu()
        rows, columns = hidden.shape[2:]
        y, x = torch.meshgrid(
            torch.arange(rows, device=first.device), torch.arange(columns, device=first.device), indexing="ij"
        )
        start = torch.stack([x, y]).float()[None]
        flow = torch.zeros_like(start)
        for _ in range(_STEPS):
            hidden, change = self.update_block(hidden, context, _looked_up(pyramid, start + flow), flow)
            flow = flow + change
        return _enlarged(flow, 0.25 * self.update_block.mask(hidden))


def _correlations(first: Tensor, second: Tensor) -> list[Tensor]:
    """Of each place of the first with all of the second, halved thrice: [places, 1, rows, columns] each."""
    channels, rows, columns = first.shape[1:]
    level = (first.flatten(2)[0].T @ second.flatten(2)[0]).view(-1, 1, rows, columns) / channels**0.5
    pyramid = [level]
    for _ in range(_LEVELS - 1):
        level = F.avg_pool2d(level, 2)
        pyramid.append(level)
    return pyramid


def _looked_up(pyramid: list[Tensor], places: Tensor) -> Tensor:
    """Correlations around `places` [1, 2, rows, columns]: [1, 4 9 9, rows, columns], x changing slowest."""
    rows, columns = places.shape[2:]
    centres = places[0].permute(1, 2, 0).reshape(-1, 1, 1, 2)
    steps = torch.arange(-_RADIUS, _RADIUS + 1, device=places.device).float()
    window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
    found = []
    for number, level in enumerate(pyramid):
        pixels = centres / 2**number + window
        extent = pixels.new_tensor([level.shape[3], level.shape[2]])
        # Pixel centres in grid_sample's own coordinates; good for a side of one pixel, too.
        grid = (2.0 * pixels + 1.0) / extent - 1.0
        found.append(F.grid_sample(level, grid, align_corners=False).view(rows, columns, -1))
    return torch.cat(found, -1).permute(2, 0, 1)[None]


def _enlarged(flow: Tensor, weights: Tensor) -> Tensor:
    """Eight times as large: each pixel a weighted mean of the 3x3 flows around it (section 3.3)."""
    rows, columns = flow.shape[2:]
    weights = weights.view(1, 1, 9, 8, 8, rows, columns).softmax(2)
    around = F.unfold(8.0 * flow, 3, padding=1).view(1, 2, 9, 1, 1, rows, columns)
    return (weights * around).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(1, 2, 8 * rows, 8 * columns)


class _Encoder(nn.Module):
    def __init__(self, out: int, norm: type[nn.Module]):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 64, 7, 2, 3), norm(64)
        self.layer1 = nn.Sequential(_Residual(64, 64, 1, norm), _Residual(64, 64, 1, norm))
        self.layer2 = nn.Sequential(_Residual(64, 96, 2, norm), _Residual(96, 96, 1, norm))
        self.layer3 = nn.Sequential(_Residual(96, 128, 2, norm), _Residual(128, 128, 1, norm))
        self.conv2 = nn.Conv2d(128, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class _Residual(nn.Module):
    def __init__(self, width: int, out: int, stride: int, norm: type[nn.Module]):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, out, 3, stride, 1), norm(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1), norm(out)
        halved = [nn.Conv2d(width, out, 1, stride), norm(out)] if stride > 1 else []
        self.downsample = nn.Sequential(*halved)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.downsample(x) + F.relu(self.norm2(self.conv2(y))))


class _Motion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convc1, self.convc2 = nn.Conv2d(_LEVELS * 81, 256, 1), nn.Conv2d(256, 192, 3, 1, 1)
        self.convf1, self.convf2 = nn.Conv2d(2, 128, 7, 1, 3), nn.Conv2d(128, 64, 3, 1, 1)
        self.conv = nn.Conv2d(256, 126, 3, 1, 1)

    def forward(self, correlations: Tensor, flow: Tensor) -> Tensor:
        seen = F.relu(self.convc2(F.relu(self.convc1(correlations))))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([seen, moved], 1))), flow], 1)


class _GRU(nn.Module):
    """A gated unit along the rows, then along the columns."""

    def __init__(self) -> None:
        super().__init__()
        for number, kernel in (("1", (1, 5)), ("2", (5, 1))):
            for gate in "zrq":
                padding = (kernel[0] // 2, kernel[1] // 2)
                self.add_module(f"conv{gate}{number}", nn.Conv2d(3 * _HIDDEN, _HIDDEN, kernel, 1, padding))

    def forward(self, hidden: Tensor, given: Tensor) -> Tensor:
        for number in "12":
            z, r, q = (self.get_submodule(f"conv{gate}{number}") for gate in "zrq")
            both = torch.cat([hidden, given], 1)
            kept = z(both).sigmoid()
            new = q(torch.cat([r(both).sigmoid() * hidden, given], 1)).tanh()
            hidden = (1.0 - kept) * hidden + kept * new
        return hidden


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(_HIDDEN, 256, 3, 1, 1), nn.Conv2d(256, 2, 3, 1, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(hidden)))


class _Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.gru, self.flow_head = _Motion(), _GRU(), _Head()
        self.mask = nn.Sequential(nn.Conv2d(_HIDDEN, 256, 3, 1, 1), nn.ReLU(), nn.Conv2d(256, 64 * 9, 1))

    def forward(
        self, hidden: Tensor, context: Tensor, correlations: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = self.gru(hidden, torch.cat([context, self.encoder(correlations, flow)], 1))
        return hidden, self.flow_head(hidden)


class RAFTFlow:
    """Flow between two frames uint8 [H, W, 3], as VBench asks RAFT for it."""

    def __init__(self, model: RAFT, device: torch.device):
        self._model, self._device = model.to(device).eval(), device

    @classmethod
    def open(cls, path: Path, device: torch.device) -> "RAFTFlow":
        """raft-things.pth. ValueError where it is something else."""
        model = RAFT()
        fill(model, read_state(path), path, "RAFT's large model")
        return cls(model, device)

    @torch.no_grad()
    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Pixels [H', W', 2], x first; H' and W' the next multiples of 8, the edge repeated on both sides.
        ValueError for frames too small."""
        height, width = first.shape[:2]
        if min(height, width) < _SMALLEST:
            raise ValueError(f"{width}x{height} pixels; RAFT needs {_SMALLEST} a side.")
        down, across = -height % 8, -width % 8
        pad = (across // 2, across - across // 2, down // 2, down - down // 2)
        frames = (
            torch.from_numpy(frame).permute(2, 0, 1)[None].float().to(self._device)
            for frame in (first, second)
        )
        flow = self._model(*(F.pad(frame, pad, mode="replicate") for frame in frames))
        return flow[0].permute(1, 2, 0).cpu().numpy()
