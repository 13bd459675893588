"""The evaluator: reads a portrait's factors, proportions and attributes back, and measures sets of portraits.

The paper's measures of identity and what stands for them here: Face Sim is `identity_similarity`, Face Div is
`diversity`, and the share of factors read right is what only a world of known factors can give.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import world
from .portraits import Portraits, to_pixels

IDENTITY_FEATURES, ATTRIBUTE_FEATURES = 48, 24

__all__ = [
    "Evaluator",
    "Reading",
    "diversity",
    "identity_similarity",
    "load",
    "save",
    "train",
]


@dataclass
class Reading:
    """What was read from B pictures: factor indices [B, 8], proportions [B, 3], attribute indices [B, 5],
    identity features [B, 48] and attribute features [B, 24]."""

    factors: np.ndarray
    proportions: np.ndarray
    attributes: np.ndarray
    identity: np.ndarray
    free: np.ndarray


class Evaluator(nn.Module):
    """Pixels [B, 3, 64, 64] in -1..1 -> features in -1..1 of the identity and of what varies within it."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 40)
        self.look = nn.Sequential(
            *(
                layer
                for inside, outside in zip(widths[:-1], widths[1:], strict=True)
                for layer in (nn.Conv2d(inside, outside, 5, 2, 2), nn.BatchNorm2d(outside), nn.ReLU())
            )
        )
        self.identity = nn.Linear(widths[-1] * 64, IDENTITY_FEATURES)  # places matter: eyes are not cheeks
        self.free = nn.Linear(widths[-1] * 64, ATTRIBUTE_FEATURES)
        self.factors = nn.ModuleList([nn.Linear(IDENTITY_FEATURES, len(v)) for v in world.FACTORS.values()])
        self.proportions = nn.Linear(IDENTITY_FEATURES, len(world.PROPORTIONS))
        self.attributes = nn.ModuleList(
            [nn.Linear(ATTRIBUTE_FEATURES, len(v)) for v in world.ATTRIBUTES.values()]
        )

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Identity features [B, 48] and attribute features [B, 24]."""
        seen = F.dropout(self.look(pixels).flatten(1), 0.1, self.training)
        return torch.tanh(self.identity(seen)), torch.tanh(self.free(seen))

    @torch.no_grad()
    def read(self, pictures: np.ndarray | Tensor) -> Reading:
        """Read uint8 pictures [B, 64, 64, 3]."""
        parts = []
        for part in torch.as_tensor(pictures).split(64):
            identity, free = self.embed(to_pixels(part))
            factors = torch.stack([head(identity).argmax(-1) for head in self.factors], 1)
            attributes = torch.stack([head(free).argmax(-1) for head in self.attributes], 1)
            parts.append((factors, self.proportions(identity), attributes, identity, free))
        return Reading(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def train(
    pixels: Tensor,
    portraits: Portraits,
    steps: int,
    *,
    batch: int = 64,
    seed: int = 0,
    learning_rate: float = 2e-3,
    report=lambda step, figures: None,
) -> Evaluator:
    """Train on uint8 pixels [N, 64, 64, 3] that show the portraits (drawn, or through the VAE), roughened."""
    torch.manual_seed(seed)
    model = Evaluator()
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        picks = torch.randint(len(pixels), (batch,))
        identity, free = model.embed(_roughen(to_pixels(pixels[picks])))
        logits = [head(identity) for head in model.factors] + [head(free) for head in model.attributes]
        wanted = torch.cat([portraits.factors[picks], portraits.attributes[picks]], 1)
        named = sum(F.cross_entropy(row, wanted[:, i]) for i, row in enumerate(logits)) / len(logits)
        measured = F.mse_loss(model.proportions(identity), portraits.proportions[picks])
        optimiser.zero_grad()
        (named + measured).backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            right = torch.stack([row.argmax(-1) == wanted[:, i] for i, row in enumerate(logits)])
            report(
                step + 1,
                {"loss": named.item(), "right": right.float().mean().item(), "proportions": measured.item()},
            )
    return model.eval()


def _roughen(pixels: Tensor) -> Tensor:
    """What a VAE and a small diffusion model do to pixels [B, 3, 64, 64]: soft, off in colour, noisy."""
    size = len(pixels)
    if torch.rand(()) < 0.5:
        soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pixels = pixels + 0.7 * torch.rand(size, 1, 1, 1) * (soft - pixels)
    gain, offset = 1.0 + 0.05 * torch.randn(size, 1, 3, 1).transpose(1, 2), 0.04 * torch.randn(size, 3, 1, 1)
    return pixels * gain + offset + 0.08 * torch.rand(size, 1, 1, 1) * torch.randn_like(pixels)


def identity_similarity(shown: np.ndarray, real: np.ndarray) -> float:
    """Mean cosine of identity features [N, 48] to the mean of a person's real pictures' features [M, 48]."""
    person = real.mean(0)
    lengths = np.linalg.norm(shown, axis=1) * np.linalg.norm(person)
    return float((shown @ person / np.maximum(lengths, 1e-9)).mean())


def diversity(free: np.ndarray) -> float:
    """Mean distance between the attribute features [N, 24] of a person's pictures, N at least 2."""
    gaps = np.linalg.norm(free[:, None] - free[None], axis=-1)
    return float(gaps.sum() / (len(free) * (len(free) - 1)))


def save(model: Evaluator, path: Path) -> None:
    """Half precision: it only has to be read by `load`."""
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path)


def load(path: Path) -> Evaluator:
    """The trained evaluator."""
    model = Evaluator()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()
