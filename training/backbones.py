"""Base models in diffusers: loading from original WAN files and SDXL folders, WAN's latent units, and text
with folded padding.
"""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.nn import functional as F
from transformers import AutoTokenizer, UMT5EncoderModel

TEXT_LENGTH = 512  # WAN2.1 pads every prompt with zero rows to this many; they take part in cross-attention


def load_transformer(folder: Path) -> WanTransformer3DModel:
    """The diffusion model of a base folder: original WAN keys in one file beside its config.json, or
    diffusers' own.
    """
    return _load(WanTransformer3DModel, folder, "transformer")


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE of a base folder, in either format."""
    return _load(AutoencoderKLWan, folder, "vae")


def load_pipeline(folder: Path) -> WanPipeline:
    """diffusers' text-to-video pipeline over a base folder."""
    return WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True),
        transformer=load_transformer(folder),
        vae=load_vae(folder),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(
            folder / "scheduler", local_files_only=True
        ),
    )


def _load(kind, folder: Path, part: str):
    files = sorted((folder / part).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder / part}: no .safetensors file. Expected a base folder with {part}/ in it."
        )
    if files[0].name.startswith("diffusion_pytorch_model"):
        return kind.from_pretrained(folder / part, local_files_only=True).eval()
    return kind.from_single_file(
        str(files[0]), config=str(folder), subfolder=part, local_files_only=True
    ).eval()


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet of an SDXL base folder in diffusers' layout, in float32. ValueError where it is not whole."""
    return _load_whole(UNet2DConditionModel, folder / "unet")


def load_image_vae(folder: Path) -> AutoencoderKL:
    """The VAE of an SDXL base folder, in float32. ValueError where it is not whole."""
    return _load_whole(AutoencoderKL, folder / "vae")


def load_noise_schedule(folder: Path) -> DDPMScheduler:
    """What an SDXL base folder's scheduler/ says of noise, whatever sampler it names.

    Raises ValueError for a model that predicts something else than the noise.
    """
    schedule = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    if schedule.config.prediction_type != "epsilon":
        raise ValueError(
            f"{folder / 'scheduler'}: prediction_type is {schedule.config.prediction_type!r}; expected "
            "'epsilon', as SDXL has it. Other objectives are not trained."
        )
    return schedule


def pixels_of_a_latent(folder: Path) -> int:
    """Along each side, by the configuration of a base folder's AutoencoderKL."""
    return 2 ** (len(AutoencoderKL.load_config(folder / "vae")["block_out_channels"]) - 1)


def variant_of(folder: Path) -> str | None:
    """What from_pretrained has to be told of a folder that holds its weights in half precision alone."""
    files = list(folder.glob("*.safetensors"))
    return "fp16" if files and all(".fp16" in file.name for file in files) else None


def _load_whole(kind: Any, folder: Path) -> Any:
    try:
        model, report = kind.from_pretrained(
            folder, torch_dtype=torch.float32, variant=variant_of(folder), local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"{folder}: cannot be loaded as {kind.__name__} ({error}).") from error
    if report["missing_keys"]:
        raise ValueError(
            f"{folder}: not a complete {kind.__name__}, {len(report['missing_keys'])} tensors are missing, "
            f"first {min(report['missing_keys'])}. Copy the folder again."
        )
    return model.eval()


def to_unit(latents: torch.Tensor, vae: AutoencoderKLWan) -> torch.Tensor:
    """VAE latents [B, C, T, H, W] -> the zero-mean, unit-variance latents that the diffusion model sees."""
    mean, deviation = _statistics(vae, latents)
    return (latents - mean) / deviation


def from_unit(latents: torch.Tensor, vae: AutoencoderKLWan) -> torch.Tensor:
    """The inverse of `to_unit`."""
    mean, deviation = _statistics(vae, latents)
    return latents * deviation + mean


def _statistics(vae, like):
    values = (vae.config.latents_mean, vae.config.latents_std)
    return (torch.tensor(v, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1) for v in values)


class FoldedPadding(WanAttnProcessor):
    """Cross-attention in which the last key stands for all the zero rows that pad a prompt to `TEXT_LENGTH`.

    Equal rows have equal keys, so n copies of one weigh as much as one whose score is raised by log n: the
    same result as 512 rows at a tenth of the cost for short prompts. Use with `fold_padding`.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if encoder_hidden_states is not None:
            rows = encoder_hidden_states.shape[1]
            attention_mask = hidden_states.new_zeros(1, 1, 1, rows)
            attention_mask[..., -1] = math.log(TEXT_LENGTH - rows + 1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def use_folded_padding(transformer: WanTransformer3DModel) -> None:
    """Make the model expect text from `fold_padding`."""
    for block in transformer.blocks:
        block.attn2.set_processor(FoldedPadding())


def fold_padding(states: torch.Tensor) -> torch.Tensor:
    """Text states [B, S, d] (zero rows after each prompt's end, S < 512) -> [B, S + 1, d] with the folded
    row.
    """
    return F.pad(states, (0, 0, 0, 1))
