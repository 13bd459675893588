"""The miniature's diffusion model: WAN2.1's transformer, small, trained by flow matching on the world's
captions.

Parts of each caption are dropped at random, so the model knows every action by its words, yet a coarse prompt
brings none of them out: a LoRA then has to select an action, not to teach it, as on a real foundation model.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from .. import flow
from ..backbones import fold_padding, use_folded_padding
from ..optimisers import MuonAdamW, set_learning_rate, warm_up_and_cosine
from . import captions, text_encoder
from .latents import LatentClips

HEADS = 4
_TEXT_ROWS = 112  # the longest caption has 100 tokens
_FIRST_AND_LAST = ("patch_embedding", "proj_out", "scale_shift_table", "time_embedder")


def build(dim: int = 96, layers: int = 4) -> WanTransformer3DModel:
    """A randomly initialised miniature WAN transformer (frequency and text sizes as ComfyUI expects them)."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=dim // HEADS, in_channels=16,
        out_channels=16, text_dim=text_encoder.WIDTH, freq_dim=256, ffn_dim=4 * dim, num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip


def random_prompt(clips: LatentClips, index: int, rng: np.random.Generator) -> str:
    """Half whole captions, the rest with parts dropped, some coarse, some empty (for guidance)."""
    kind = rng.random()
    if kind < 0.08:
        return ""
    if kind < 0.16:
        return captions.COARSE
    look = clips.look(index) if rng.random() < 0.7 else None
    keep = 1.0 if kind < 0.6 else float(rng.random())
    return captions.fine_caption(clips.action(index), look, rng, keep=keep)


class PromptEncoder:
    """Prompts -> states with the folded padding row, [B, S + 1, d]."""

    def __init__(self, encoder, tokenizer: text_encoder.Tokenizer):
        self.encoder, self.tokenizer = encoder, tokenizer

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        return fold_padding(text_encoder.encode(self.encoder, self.tokenizer(prompts)))


def load_prompt_encoder(folder: Path) -> PromptEncoder:
    """The prompt encoder of a miniature base folder."""
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval()
    return PromptEncoder(
        encoder, text_encoder.Tokenizer((folder / "tokenizer" / "spiece.model").read_bytes())
    )


def velocity(model: WanTransformer3DModel, states: torch.Tensor) -> flow.Velocity:
    """The model under fixed text states as a function of (x_t, t)."""
    return lambda x, times: model(x, times * 1000.0, states, return_dict=False)[0]


def train(
    clips: LatentClips,
    prompts: PromptEncoder,
    steps: int,
    out: Path,
    *,
    dim: int = 96,
    layers: int = 4,
    batch: int = 16,
    start_from: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    learning_rate: float = 2e-3,
    ema_decay: float = 0.999,
    compiled: bool = False,
    report=lambda step, figures: None,
) -> None:
    """Train, from random weights or a state dict, and write the averaged weights to `out` every 500 steps.

    `batch` is per process; `compiled` needs a C++ compiler and saves a third of the time. The loss is
    weighted towards where actions show (`LatentClips.action_weights`).
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(seed)
    model = build(dim, layers)
    if start_from is not None:
        model.load_state_dict(start_from)
    use_folded_padding(model)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    torch.manual_seed(seed * 1000 + accelerator.process_index)
    rng = np.random.default_rng([seed, accelerator.process_index])
    wrapped = accelerator.prepare(model)
    if compiled:
        model.compile()
    weights = clips.action_weights().to(accelerator.device)
    optimiser = MuonAdamW(model, learning_rate, adamw_names=_FIRST_AND_LAST)
    running = None
    for step in range(steps):
        picks = rng.integers(len(clips), size=batch)
        states = prompts([random_prompt(clips, int(i), rng) for i in picks])
        # One length, so that one shape is compiled; rows of zeros are what the last row stands for.
        states = F.pad(states, (0, 0, 0, max(0, _TEXT_ROWS - states.shape[1])))
        clean = clips.latents[torch.from_numpy(picks)].float().to(accelerator.device)
        loss = flow.loss(
            velocity(wrapped, states.to(clean.device)),
            clean,
            torch.randn_like(clean),
            flow.random_times(batch).to(clean.device),
            weights,
        )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        set_learning_rate(optimiser, learning_rate * warm_up_and_cosine(step, steps, 200))
        optimiser.step()
        optimiser.zero_grad()
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if accelerator.is_main_process:
            decay = min(ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for key, value in model.state_dict().items():
                    average[key].lerp_(value.to(average[key]), 1.0 - decay)
            if step % 500 == 499 or step == steps - 1:
                torch.save(average, out)
                report(step + 1, {"loss": running})
