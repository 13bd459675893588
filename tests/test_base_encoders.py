"""What a base folder's own encoders give: the same as diffusers' pipelines; errors for what is not whole."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from tiny_sdxl import PIXELS, POOLED, TOKENS, WIDTHS, build_text_encoder, build_tokenizer, write_sdxl
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lofa_core.lora_files import read_safetensors, write_safetensors
from training.backbones import load_image_vae, load_noise_schedule, load_unet, pixels_of_a_latent, variant_of
from training.data.base_encoders import SDXLEncoders, WanEncoders
from training.denoisers import SDXLDenoiser
from training.over_base import OverBase

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pipeline(base):
    parts = {
        f"{part}{suffix}": kind.from_pretrained(base / f"{part}{suffix}")
        for part, suffix, kind in (
            ("text_encoder", "", CLIPTextModel),
            ("text_encoder", "_2", CLIPTextModelWithProjection),
            ("tokenizer", "", CLIPTokenizer),
            ("tokenizer", "_2", CLIPTokenizer),
        )
    }
    return StableDiffusionXLPipeline(
        vae=load_image_vae(base), unet=load_unet(base), scheduler=load_noise_schedule(base), **parts
    )


@pytest.mark.parametrize("prompt", ["a red fox", "x", "Of a Man, who waves!"])
def test_sdxls_texts_are_those_of_its_pipeline(base, pipeline, prompt):
    text = SDXLEncoders(base, CPU).text(prompt)
    states, _, pooled, _ = pipeline.encode_prompt(prompt, device=CPU, do_classifier_free_guidance=False)
    assert text["states"].shape == (TOKENS, sum(WIDTHS)) and text["pooled"].shape == (POOLED,)
    assert torch.allclose(text["states"].float(), states[0], atol=2e-3)
    assert torch.allclose(text["pooled"].float(), pooled[0], atol=2e-3)
    assert text["states"].abs().sum(1).min() > 0  # padding is tokens, not rows of zeros


def test_both_tokenizers_pad_in_their_own_way(base):
    first, second = (
        tokenizer("a", padding="max_length", max_length=TOKENS).input_ids
        for tokenizer, _ in SDXLEncoders(base, CPU)._texts
    )
    assert first[:3] == second[:3] and first[3:] != second[3:]


def test_prompts_are_stacked_for_sdxl_and_folded_for_wan():
    text = {"states": torch.ones(3, 4).half(), "pooled": torch.ones(2).half()}
    prompts = SDXLEncoders.prompts([text, text])
    assert prompts.states.shape == (2, 3, 4) and prompts.pooled.shape == (2, 2)
    assert prompts.states.dtype == prompts.pooled.dtype == torch.float32
    prompts = WanEncoders.prompts([{"states": torch.ones(3, 4)}, {"states": torch.ones(1, 4)}])
    assert prompts.states[..., 0].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]] and prompts.pooled is None


def test_a_text_that_is_too_long_is_refused_not_cut(base):
    with pytest.raises(ValueError, match=rf"the text has 30 tokens, {TOKENS} are read. Shorten it"):
        SDXLEncoders(base, CPU).text("a " * 28)


def test_sdxls_latents_are_scaled_means(base, pipeline):
    picture = np.random.default_rng(0).integers(256, size=(1, 32, 16, 3), dtype=np.uint8)
    latents = SDXLEncoders(base, CPU).latents(picture)
    assert latents.shape == (1, 4, 32 // PIXELS, 16 // PIXELS) and latents.dtype == torch.float16
    pixels = VaeImageProcessor(vae_scale_factor=PIXELS).preprocess(Image.fromarray(picture[0]))
    with torch.no_grad():
        wanted = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert torch.allclose(latents.float(), wanted, atol=1e-3)
    with pytest.raises(ValueError, match="2 frames: SDXL's clips are single pictures"):
        SDXLEncoders(base, CPU).latents(np.zeros((2, 16, 16, 3), np.uint8))


def test_the_denoiser_of_an_sdxl_folder_says_what_diffusers_says(base):
    denoiser = OverBase(base).load_denoiser()
    assert isinstance(denoiser, SDXLDenoiser) and denoiser.pixels == PIXELS == pixels_of_a_latent(base)
    assert denoiser.model.dtype == torch.float32 and not denoiser.model.conv_in.weight.requires_grad
    x, schedule = torch.randn(2, 4, 16, 8), load_noise_schedule(base)
    prompts = SDXLEncoders.prompts([SDXLEncoders(base, CPU).text("a fox")] * 2)
    noise, steps = torch.randn_like(x), torch.tensor([3, 700])
    times = (steps + 0.5) / 1000
    assert torch.allclose(denoiser.noised(x, noise, times), schedule.add_noise(x, noise, steps), atol=1e-5)
    sizes = torch.tensor([[32, 16, 0, 0, 32, 16]] * 2)
    with torch.no_grad():
        wanted = denoiser.model(
            x, steps, prompts.states, added_cond_kwargs={"text_embeds": prompts.pooled, "time_ids": sizes}
        ).sample
        assert torch.allclose(denoiser(x, times, prompts), wanted, atol=1e-5)
    assert len(denoiser.modules([x.name for x in OverBase(base).weights.model.layers])) == 88


def test_half_precision_files_alone_are_found(base, tmp_path):
    load_unet(base).half().save_pretrained(tmp_path / "unet", variant="fp16")
    tokenizer = build_tokenizer("!")
    encoder = build_text_encoder(CLIPTextModel, 8, tokenizer).half()
    encoder.save_pretrained(tmp_path / "text_encoder", variant="fp16")
    assert variant_of(tmp_path / "unet") == variant_of(tmp_path / "text_encoder") == "fp16"
    assert variant_of(base / "unet") is None
    found = load_unet(tmp_path)
    assert found.dtype == torch.float32
    assert torch.allclose(found.conv_in.weight, load_unet(base).conv_in.weight, atol=1e-3)
    assert OverBase(tmp_path).weights.fingerprint() == OverBase(base).weights.fingerprint()


def copied(base, to, part):
    (to / part).mkdir()
    for file in (base / part).iterdir():
        (to / part / file.name).write_bytes(file.read_bytes())
    return next((to / part).glob("*.safetensors"))


@pytest.mark.parametrize(
    ("part", "load"),
    [
        ("unet", load_unet),
        ("vae", load_image_vae),
        ("text_encoder_2", lambda folder: SDXLEncoders(folder, CPU)._texts),
    ],
)
def test_a_part_that_is_not_whole_is_named(base, tmp_path, part, load):
    weights = copied(base, tmp_path, part)
    if part == "text_encoder_2":
        for other in ("text_encoder", "tokenizer", "tokenizer_2"):
            copied(base, tmp_path, other) if other == "text_encoder" else (tmp_path / other).symlink_to(
                base / other
            )
    tensors, metadata = read_safetensors(weights)
    tensors.pop(max(tensors))
    write_safetensors(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part}: not a complete .*1 tensors are missing"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=part):
        load(tmp_path)


def test_another_objective_than_noise_is_refused(base, tmp_path):
    (tmp_path / "scheduler").mkdir()
    file = base / "scheduler" / "scheduler_config.json"
    values = json.loads(file.read_text()) | {"prediction_type": "v_prediction"}
    (tmp_path / "scheduler" / file.name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction'; expected 'epsilon'"):
        load_noise_schedule(tmp_path)
