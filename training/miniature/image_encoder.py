"""The miniature's image encoder: CLIP's vision tower, small, trained as CLIP is, with the world's captions.

Its states are what style is read from. It never sees the held-out looks.
"""

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ..optimisers import MuonAdamW, set_learning_rate, warm_up_and_cosine
from . import captions, world
from .transformer import PromptEncoder

WIDTH, SHARED = 64, 32
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_FIRST_AND_LAST = ("embeddings", "visual_projection", "text_projection")


def build() -> CLIPVisionModelWithProjection:
    """A randomly initialised tower for the world's frames: 65 tokens of 64 numbers."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4, num_attention_heads=4,
            image_size=world.SIZE, patch_size=8, projection_dim=SHARED,
        )
    )  # fmt: skip


def picture(look: world.Look, actions: list[world.Action], rng: np.random.Generator) -> np.ndarray:
    """A frame, uint8 [64, 64, 3], of a clip in this look."""
    action = actions[rng.integers(len(actions))]
    return world.draw_clip(action, look, rng)[rng.integers(world.FRAMES)]


class CLIP(torch.nn.Module):
    """The tower and the text's projection into the shared space, with CLIP's temperature."""

    def __init__(self, tower: CLIPVisionModelWithProjection, text_width: int):
        super().__init__()
        self.tower = tower
        self.text_projection = torch.nn.Linear(text_width, SHARED, bias=False)
        self.temperature = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Similarities [B, B] of pictures (rows) and texts."""
        seen = F.normalize(self.tower(pixel_values=pixels).image_embeds, dim=-1)
        said = F.normalize(self.text_projection(text), dim=-1)
        return self.temperature.exp() * seen @ said.T


def train(
    looks: list[world.Look],
    actions: list[world.Action],
    prompts: PromptEncoder,
    steps: int,
    *,
    batch: int = 64,
    bank: int = 8_000,
    seed: int = 0,
    learning_rate: float = 2e-3,
    report=lambda step, figures: None,
) -> "CLIP":
    """Contrastive training (CLIP's loss) on `bank` frames and captions of their looks. A caption that is
    right for several pictures of a batch counts as right for all of them.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shown = [looks[i] for i in rng.integers(len(looks), size=bank)]
    frames = torch.from_numpy(np.stack([picture(look, actions, rng) for look in shown]))
    model = CLIP(build(), text_encoder_width(prompts))
    optimiser = MuonAdamW(model, learning_rate, adamw_names=_FIRST_AND_LAST)
    for step in range(steps):
        picks = torch.from_numpy(rng.integers(bank, size=batch))
        said = [shown[i] for i in picks]
        text = _pooled(prompts, [captions.fine_caption(None, look, rng) for look in said])
        logits = model(normalised(frames[picks]), text)
        same = torch.tensor([[a == b for b in said] for a in said]).float()
        wanted = same / same.sum(1, keepdim=True)
        loss = 0.5 * (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted))
        loss.backward()
        set_learning_rate(optimiser, learning_rate * warm_up_and_cosine(step, steps, 50))
        optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 99:
            hit = (same.gather(1, logits.argmax(1, keepdim=True)) > 0).float().mean()
            report(step + 1, {"loss": loss.item(), "right": hit.item()})
    return model.eval()


@torch.no_grad()
def named_right(
    model: CLIP, looks: list[world.Look], actions: list[world.Action], prompts: PromptEncoder, seed: int
) -> float:
    """Share of new pictures of `looks`, eight of each, whose own caption is the nearest of all of theirs."""
    rng = np.random.default_rng(seed)
    text = _pooled(prompts, [captions.fine_caption(None, look, rng) for look in looks])
    shown = [np.stack([picture(look, actions, rng) for look in looks]) for _ in range(8)]
    named = [model(normalised(torch.from_numpy(frames)), text).argmax(1) for frames in shown]
    return float((torch.stack(named) == torch.arange(len(looks))).float().mean())


def text_encoder_width(prompts: PromptEncoder) -> int:
    return prompts.encoder.config.d_model


def normalised(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 64, 64, 3] -> what the tower takes [B, 3, 64, 64]."""
    mean, deviation = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, DEVIATION))
    return (frames.permute(0, 3, 1, 2).float() / 255.0 - mean) / deviation


@torch.no_grad()
def _pooled(prompts: PromptEncoder, sentences: list[str]) -> torch.Tensor:
    """Mean state [B, d] of each sentence's tokens."""
    states = prompts(sentences)[:, :-1]
    there = (states != 0).any(-1, keepdim=True)
    return (states * there).sum(1) / there.sum(1).clamp(min=1)
