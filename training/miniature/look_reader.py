"""The look reader: reads clothes and place back from a clip, and gives features for a Frechet distance."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from .evaluator import halved, roughen, to_frames
from .world_tasks import LOOK_FACTORS

FEATURES = 24
FRAMES = (0, 8, 16)  # that are looked at
SHIPPED = Path(__file__).with_suffix(".safetensors")


class LookReader(nn.Module):
    """A few half-size frames -> features [B, FEATURES] -> logits per factor."""

    def __init__(self):
        super().__init__()
        self.frame = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
        )  # fmt: skip
        self.features = nn.Linear(48 * 16, FEATURES)
        self.heads = nn.ModuleList(nn.Linear(FEATURES, len(values)) for values in LOOK_FACTORS.values())

    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        """Features [B, FEATURES] of frames [B, T, 3, 32, 32] in -1..1: the mean over some of them."""
        shown = frames[:, list(FRAMES)]
        seen = self.frame(shown.flatten(0, 1)).flatten(1)
        return torch.tanh(self.features(seen).unflatten(0, (len(frames), -1)).mean(1))

    def forward(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """Logits per factor of frames [B, T, 3, 32, 32] in -1..1."""
        features = self.embed(frames)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factor indices [B, 3] and features [B, FEATURES] of clips uint8 [B, T, 64, 64, 3]."""
        indices, features = [], []
        for part in torch.from_numpy(halved(clips)).split(64):
            embedded = self.embed(to_frames(part))
            features.append(embedded)
            indices.append(torch.stack([head(embedded).argmax(-1) for head in self.heads], 1))
        return torch.cat(indices).numpy(), torch.cat(features).numpy()


def train(
    clips: np.ndarray, labels: np.ndarray, steps: int, *, batch: int = 64, seed: int = 0,
    report=lambda step, figures: None,
) -> LookReader:  # fmt: skip
    """Fit to half-size clips uint8 [N, T, 32, 32, 3] and factor indices [N, 3]."""
    torch.manual_seed(seed)
    model = LookReader().train()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        picks = torch.randint(len(clips), (batch,))
        shown = roughen(to_frames(torch.from_numpy(clips[picks.numpy()])))
        wanted = torch.from_numpy(labels[picks.numpy()]).long()
        logits = model(shown)
        loss = sum(F.cross_entropy(row, wanted[:, i]) for i, row in enumerate(logits)) / len(logits)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            right = torch.stack([row.argmax(-1) == wanted[:, i] for i, row in enumerate(logits)]).all(0)
            report(step + 1, {"loss": loss.item(), "joint": right.float().mean().item()})
    return model.eval()


def save(model: LookReader, path: Path) -> None:
    """Half precision: it only has to be read by `load`."""
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path)


def load(path: Path = SHIPPED) -> LookReader:
    """The trained look reader."""
    model = LookReader()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()
