"""The evaluator: reads the action factors back from a clip, and gives features for a Frechet distance."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from . import world

FEATURES = 48
SHIPPED = Path(__file__).with_suffix(".safetensors")


class Evaluator(nn.Module):
    """uint8 clips [B, T, H, W, 3] -> features [B, FEATURES] -> logits per factor."""

    def __init__(self):
        super().__init__()
        self.frame = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
        )  # fmt: skip
        self.squeeze = nn.Linear(48 * 64, 96)  # places matter: left and right are factors
        self.motion = nn.Sequential(
            nn.Conv1d(96, 96, 5, padding=2), nn.ReLU(), nn.Conv1d(96, 96, 5, padding=2), nn.ReLU()
        )
        self.features = nn.Linear(96 * world.FRAMES, FEATURES)
        self.heads = nn.ModuleList([nn.Linear(FEATURES, len(values)) for values in world.FACTORS.values()])

    def embed(self, clips: torch.Tensor) -> torch.Tensor:
        """[B, FEATURES]."""
        frames = clips.float().flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1.0
        seen = F.relu(self.squeeze(self.frame(frames).flatten(1))).unflatten(0, (len(clips), -1))
        return torch.tanh(self.features(self.motion(seen.transpose(1, 2)).flatten(1)))

    def forward(self, clips: torch.Tensor) -> list[torch.Tensor]:
        features = self.embed(clips)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factor indices [B, 6] and features [B, FEATURES]."""
        indices, features = [], []
        for part in torch.from_numpy(clips).split(64):
            embedded = self.embed(part)
            features.append(embedded)
            indices.append(torch.stack([head(embedded).argmax(-1) for head in self.heads], 1))
        return torch.cat(indices).numpy(), torch.cat(features).double().numpy()


def train(
    clips: np.ndarray,
    labels: np.ndarray,
    steps: int,
    *,
    batch: int = 48,
    seed: int = 0,
    report=lambda s, f: None,
):
    """Train on uint8 clips [N, T, H, W, 3] with labels [N, 6], blurred, recoloured and noised at random."""
    torch.manual_seed(seed)
    model = Evaluator()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        picks = torch.randint(len(clips), (batch,))
        shown = _roughen(torch.from_numpy(clips[picks.numpy()]))
        wanted = torch.from_numpy(labels[picks.numpy()]).long()
        logits = model(shown)
        loss = sum(F.cross_entropy(row, wanted[:, i]) for i, row in enumerate(logits)) / len(logits)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            joint = (
                torch.stack([row.argmax(-1) == wanted[:, i] for i, row in enumerate(logits)])
                .all(0)
                .float()
                .mean()
            )
            report(step + 1, {"loss": loss.item(), "joint": joint.item()})
    return model.eval()


def _roughen(clips: torch.Tensor) -> torch.Tensor:
    """What a VAE and a small diffusion model do to a clip: softer, off in colour, noisy."""
    x = clips.float().permute(0, 1, 4, 2, 3)
    size = x.shape
    x = x.flatten(0, 1)
    if torch.rand(()) < 0.6:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    if torch.rand(()) < 0.3:
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
    x = x.view(size)
    x = x * (1.0 + 0.2 * torch.randn(size[0], 1, 3, 1, 1)) + 12.0 * torch.randn(size[0], 1, 3, 1, 1)
    x = x + 12.0 * torch.rand(()) * torch.randn(size)
    return x.permute(0, 1, 3, 4, 2).clamp(0, 255)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to features [N, d] and [M, d]."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of the square root of the product equals the sum of the roots of its eigenvalues, which are
    # real.
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariance_a @ covariance_b).real, 0.0, None))
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * roots.sum())


def save(model: Evaluator, path: Path) -> None:
    """Half precision: it only has to be read by `load`."""
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path)


def load(path: Path = SHIPPED) -> Evaluator:
    """The trained evaluator."""
    model = Evaluator()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()
