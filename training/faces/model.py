"""SDXL's layout at toy size: UNet, two CLIP text encoders and their tokenizer, CLIP's image encoder.

Module names, the order of blocks and the kinds of target layers are SDXL's; so diffusers and transformers
load every part with their own classes, and the UNet has four shapes of target layers as SDXL's has.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lofa_core.guidance import HybridGuidance, Prediction, guide

from . import world
from .portraits import to_pictures, to_pixels
from .vae import CHANNELS, LATENT_SIZE, decode

TEXT_WIDTHS = (32, 48)  # SDXL: 768 and 1280
TOKENS = 64  # SDXL: 77; the longest caption has 59
IMAGE_WIDTH, IMAGE_LAYERS, PATCH = 64, 4, 8
# height and width before scaling, corner of the crop, height and width wanted: one picture's own, always
TIME_IDS = (world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE)
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def build_unet() -> UNet2DConditionModel:
    """A randomly initialised UNet: 88 target layers of 32x32, 32x80, 64x64 and 64x80."""
    frequencies = 8
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(24, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=2,
        transformer_layers_per_block=[1, 1, 1], attention_head_dim=[1, 2, 4], use_linear_projection=True,
        cross_attention_dim=sum(TEXT_WIDTHS), addition_embed_type="text_time",
        addition_time_embed_dim=frequencies,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + len(TIME_IDS) * frequencies, norm_num_groups=8,
    )  # fmt: skip


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModelWithProjection, ...]:
    """Both text encoders, with projections; SDXL leaves out the first one's after training."""
    return tuple(
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
                projection_dim=TEXT_WIDTHS[1], num_hidden_layers=3, num_attention_heads=width // 16,
                max_position_embeddings=TOKENS, hidden_act=act, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )
        for width, act in zip(TEXT_WIDTHS, ("quick_gelu", "gelu"), strict=True)
    )  # fmt: skip


def build_image_encoder() -> CLIPVisionModelWithProjection:
    """CLIP's image encoder: 65 states of width 64 for a portrait."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=IMAGE_WIDTH, intermediate_size=2 * IMAGE_WIDTH, projection_dim=TEXT_WIDTHS[1],
            num_hidden_layers=IMAGE_LAYERS, num_attention_heads=4, image_size=world.SIZE, patch_size=PATCH,
        )
    )  # fmt: skip


def tokenise(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """int64 [B, TOKENS], padded and cut as SDXL's pipeline does."""
    rows = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return rows.input_ids


def image_states(encoder: CLIPVisionModelWithProjection, pictures: np.ndarray | Tensor) -> Tensor:
    """Penultimate states [B, 65, 64] of uint8 pictures [B, 64, 64, 3]: what identity is read from."""
    return encoder(pixel_values=to_pixels(pictures), output_hidden_states=True).hidden_states[-2]


@dataclass
class Prompted:
    """What SDXL's UNet sees of prompts: states [B, TOKENS, 80], pooled [B, 48], time ids [B, 6]."""

    states: Tensor
    pooled: Tensor
    time_ids: Tensor

    def repeat(self, count: int) -> "Prompted":
        """Every prompt `count` times, one after the other."""
        return Prompted(*(part.repeat_interleave(count, 0) for part in vars(self).values()))


def noise_prediction(
    unet: UNet2DConditionModel, latents: Tensor, steps: Tensor, prompted: Prompted
) -> Tensor:
    """eps [B, 4, 16, 16] predicted for noisy latents at steps [B] (or one) of the schedule's 1000."""
    added = {"text_embeds": prompted.pooled, "time_ids": prompted.time_ids}
    return unet(latents, steps, prompted.states, added_cond_kwargs=added, return_dict=False)[0]


class PromptEncoder:
    """Prompts -> `Prompted`; an empty prompt is zeros, as in SDXL's pipeline."""

    def __init__(self, tokenizer: CLIPTokenizer, first: CLIPTextModel, second: CLIPTextModelWithProjection):
        self.tokenizer, self.first, self.second = tokenizer, first, second

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Prompted:
        tokens = tokenise(self.tokenizer, prompts)
        one, two = (model(tokens, output_hidden_states=True) for model in (self.first, self.second))
        said = torch.tensor([float(bool(prompt)) for prompt in prompts])
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1) * said.view(-1, 1, 1)
        time_ids = torch.tensor(TIME_IDS, dtype=torch.float32).expand(len(prompts), -1)
        return Prompted(states, two.text_embeds * said.view(-1, 1), time_ids)


class Base:
    """The parts of a base folder, each loaded when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_pretrained(
            self.folder / "unet", torch_dtype=torch.float32, local_files_only=True
        ).eval()

    @cached_property
    def vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(
            self.folder / "vae", torch_dtype=torch.float32, local_files_only=True
        ).eval()

    @cached_property
    def prompts(self) -> PromptEncoder:
        first = CLIPTextModel.from_pretrained(
            self.folder / "text_encoder", dtype=torch.float32, local_files_only=True
        )
        second = CLIPTextModelWithProjection.from_pretrained(
            self.folder / "text_encoder_2", dtype=torch.float32, local_files_only=True
        )
        return PromptEncoder(
            CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True),
            first.eval(),
            second.eval(),
        )

    @cached_property
    def image_encoder(self) -> CLIPVisionModelWithProjection:
        folder = self.folder / "image_encoder"
        return CLIPVisionModelWithProjection.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()

    @cached_property
    def scheduler(self) -> EulerDiscreteScheduler:
        return EulerDiscreteScheduler.from_pretrained(self.folder / "scheduler", local_files_only=True)

    def paint(
        self, prompts: Prompted, seed: int, *, steps: int = 20, guidance: float = 3.0, batch: int = 32
    ) -> np.ndarray:
        """Pictures uint8 [B, 64, 64, 3], one for each prompt."""
        noise = torch.randn(
            len(prompts.states),
            CHANNELS,
            LATENT_SIZE,
            LATENT_SIZE,
            generator=torch.Generator().manual_seed(seed),
        )
        parts = zip(*(part.split(batch) for part in (noise, *vars(prompts).values())), strict=True)
        latents = [sample(self.unet, x, Prompted(*p), self.scheduler, steps, guidance) for x, *p in parts]
        return to_pictures(decode(self.vae, torch.cat(latents)))


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    noise: Tensor,
    prompts: Prompted,
    scheduler: EulerDiscreteScheduler,
    steps: int = 20,
    guidance: float | HybridGuidance = 3.0,
) -> Tensor:
    """Unit noise [B, 4, 16, 16] -> scaled latents, by Euler steps and classifier-free guidance (1: none).

    Under HM-CFG the model's batch is in three equal parts, as `Prediction` has them: LoRAs are to be injected
    as three tasks, of which the first two are all zeros.
    """
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    hybrid = isinstance(guidance, HybridGuidance)
    parts = 3 if hybrid else 1 if guidance == 1.0 else 2
    if parts > 1:  # the empty prompt first
        empty = Prompted(torch.zeros_like(prompts.states), torch.zeros_like(prompts.pooled), prompts.time_ids)
        given = [vars(part).values() for part in (empty, *[prompts] * (parts - 1))]
        prompts = Prompted(*(torch.cat(same) for same in zip(*given, strict=True)))
    for done, step in enumerate(scheduler.timesteps):
        shown = scheduler.scale_model_input(torch.cat([latents] * parts), step)
        eps, *others = noise_prediction(unet, shown, step, prompts).chunk(parts)
        if hybrid:
            eps = guide(dict(zip(Prediction, (eps, *others), strict=True)), *guidance.at(done / steps))
        elif others:
            eps = eps + guidance * (others[0] - eps)
        latents = scheduler.step(eps, step, latents, return_dict=False)[0]
    return latents
