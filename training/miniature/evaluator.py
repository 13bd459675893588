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
    """Half-size clips, what moves in channels of its own -> features [B, FEATURES] -> logits per factor."""

    def __init__(self):
        super().__init__()
        self.frame = nn.Sequential(
            nn.Conv2d(6, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
        )  # fmt: skip
        self.squeeze = nn.Linear(48 * 64, 96)  # places matter: left and right are factors
        self.motion = nn.Sequential(
            nn.Conv1d(96, 96, 5, padding=2), nn.ReLU(), nn.Conv1d(96, 96, 5, padding=2), nn.ReLU()
        )
        self.features = nn.Linear(96 * world.FRAMES, FEATURES)
        self.heads = nn.ModuleList([nn.Linear(FEATURES, len(values)) for values in world.FACTORS.values()])

    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        """Features [B, FEATURES] of frames [B, T, 3, 32, 32] in -1..1."""
        both = torch.cat([frames, 2.0 * (frames - frames.mean(1, keepdim=True))], 2)
        seen = F.relu(self.squeeze(self.frame(both.flatten(0, 1)).flatten(1))).unflatten(0, (len(frames), -1))
        seen = F.dropout(seen, 0.1, self.training)
        return torch.tanh(self.features(self.motion(seen.transpose(1, 2)).flatten(1)))

    def forward(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """Logits per factor of frames [B, T, 3, 32, 32] in -1..1."""
        features = self.embed(frames)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Factor indices [B, 6] and features [B, FEATURES]."""
        indices, features = [], []
        for part in torch.from_numpy(halved(clips)).split(64):
            embedded = self.embed(to_frames(part))
            features.append(embedded)
            indices.append(torch.stack([head(embedded).argmax(-1) for head in self.heads], 1))
        return torch.cat(indices).numpy(), torch.cat(features).double().numpy()


def train(
    clips: np.ndarray,
    labels: np.ndarray,
    steps: int,
    *,
    batch: int = 64,
    seed: int = 0,
    report=lambda s, f: None,
):
    """Train on half-size uint8 clips [N, T, 32, 32, 3] with labels [N, 6]; mirrored, blurred, noised."""
    torch.manual_seed(seed)
    model = Evaluator()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        picks = torch.randint(len(clips), (batch,))
        shown = roughen(to_frames(torch.from_numpy(clips[picks.numpy()])))
        wanted = torch.from_numpy(labels[picks.numpy()]).long()
        if step % 2:
            shown, wanted = shown.flip(-1), _MIRRORED[torch.arange(len(world.FACTORS)), wanted]
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


def halved(clips: np.ndarray) -> np.ndarray:
    """uint8 [B, T, 64, 64, 3] -> uint8 [B, T, 32, 32, 3]; every factor is plain at half the size."""
    count, frames, height, width, _ = clips.shape
    blocks = clips.reshape(count, frames, height // 2, 2, width // 2, 2, 3)
    return np.stack([clip.mean(axis=(2, 4)).round().astype(np.uint8) for clip in blocks])


def to_frames(clips: torch.Tensor) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, T, 3, H, W] in -1..1."""
    return clips.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0


def _mirrored_labels() -> torch.Tensor:
    """[factors, most values]: the index a value has in the mirrored clip."""
    swap = {"left": "right", "right": "left"}
    table = torch.zeros(
        len(world.FACTORS), max(len(values) for values in world.FACTORS.values()), dtype=torch.long
    )
    for row, values in enumerate(world.FACTORS.values()):
        for index, value in enumerate(values):
            side, _, rest = value.partition("_")
            mirrored = swap.get(side, side) + ("_" + rest if rest else "")
            table[row, index] = values.index(mirrored)
    return table


_MIRRORED = _mirrored_labels()


def roughen(frames: torch.Tensor) -> torch.Tensor:
    """What a VAE and a small diffusion model do to frames [B, T, 3, 32, 32]: soft, off in colour, noisy."""
    size = len(frames)
    if torch.rand(()) < 0.5:
        soft = F.avg_pool2d(F.pad(frames.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(frames)
        frames = frames + 0.7 * torch.rand(size, 1, 1, 1, 1) * (soft - frames)
    gain, offset = 1.0 + 0.15 * torch.randn(size, 1, 3, 1, 1), 0.1 * torch.randn(size, 1, 3, 1, 1)
    return frames * gain + offset + 0.08 * torch.rand(size, 1, 1, 1, 1) * torch.randn_like(frames)


def save(model: Evaluator, path: Path) -> None:
    """Half precision: it only has to be read by `load`."""
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path)


def load(path: Path = SHIPPED) -> Evaluator:
    """The trained evaluator."""
    model = Evaluator()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()
