"""SDXL's folder at toy size with random weights: every part by diffusers' and transformers' own classes."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

TOKENS, WIDTHS, POOLED = 24, (8, 12), 12
STATES, IMAGE_WIDTH = 5, 8  # of a picture of 16 x 16 in patches of 8, with the class token
PIXELS = 2  # a latent's side in pixels


def build_unet(blocks=1):
    """88 target layers of 16x16, 16x20, 32x32 and 32x20; `blocks` more at the widest places."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=2,
        transformer_layers_per_block=[1, 1, blocks], attention_head_dim=[1, 2, 4], use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS), addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED + 6 * 4, norm_num_groups=4,
    )  # fmt: skip


def build_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        scaling_factor=0.13025,
    )  # fmt: skip


def build_tokenizer(pad):
    """A token for every letter, and one more for those that end a word."""
    letters = "abcdefghijklmnopqrstuvwxyz!"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS, pad_token=pad)


def build_text_encoder(kind, width, tokenizer):
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=POOLED,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def build_image_encoder():
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE_WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            image_size=16, patch_size=8,
        )
    )  # fmt: skip


def write_sdxl(folder: Path, seed: int = 0) -> Path:
    """The whole folder, with image_encoder/. As SDXL's, its tokenizers differ in what they pad with."""
    torch.manual_seed(seed)
    build_unet().save_pretrained(folder / "unet")
    build_vae().save_pretrained(folder / "vae")
    build_image_encoder().save_pretrained(folder / "image_encoder")
    for kind, width, suffix, pad in (
        (CLIPTextModel, WIDTHS[0], "", "<|endoftext|>"),
        (CLIPTextModelWithProjection, WIDTHS[1], "_2", "!"),
    ):
        tokenizer = build_tokenizer(pad)
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        build_text_encoder(kind, width, tokenizer).save_pretrained(folder / f"text_encoder{suffix}")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
    ).save_pretrained(folder / "scheduler")
    return folder
