"""The second miniature as it is shipped: small, read by the real classes, drawing whom it is told."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from lofa_core.__main__ import main
from training.faces import captions, evaluator, identity, make, world
from training.faces.model import Base
from training.faces.portraits import draw_portraits

FOLDER = make.DEFAULT


@pytest.fixture(scope="module")
def base():
    return Base(FOLDER)


@pytest.fixture(scope="module")
def held_out():
    return world.split_identities(make.HELD_OUT, make.SEED)[1]


@pytest.fixture(scope="module")
def reader():
    return evaluator.load(FOLDER / "evaluator.safetensors")


def test_all_weights_together_stay_under_five_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) < 5_000_000


def test_figures_say_what_they_were_made_with():
    figures = json.loads((FOLDER / "figures.json").read_text())
    assert set(figures) == {"vae", "clip", "evaluator", "base"}
    assert all(part["seed"] == make.SEED and part["steps"] > 0 for part in figures.values())


def test_sdxl_s_own_pipeline_loads_the_folder_and_paints_what_ours_does(base):
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        FOLDER, torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = "a portrait of a person, red hair in a bun, dark skin"
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        prompt, latents=noise, num_inference_steps=6, guidance_scale=3.0, output_type="np"
    ).images
    ours = base.paint(base.prompts([prompt]), seed=3, steps=6, guidance=3.0)
    assert np.abs(theirs * 255.0 - ours).max() <= 2.0


def test_the_evaluator_reads_people_it_never_saw(reader, held_out):
    portraits = draw_portraits(held_out[:60], 1, seed=9)
    assert (reader.read(portraits.pixels).factors == portraits.factors.numpy()).mean() > 0.9


def test_fine_captions_bring_out_their_person_and_the_coarse_prompt_does_not(base, reader, held_out):
    people = held_out[-12:]
    rng = np.random.default_rng(1)
    texts = [captions.fine_caption(person, world.random_attributes(rng), rng) for person in people]
    wanted = np.array([person.indices() for person in people])
    fine, coarse = (
        (reader.read(base.paint(base.prompts(prompts), seed=2, steps=12)).factors == wanted).mean()
        for prompts in (texts, [captions.COARSE] * len(people))
    )
    assert fine > 0.6 and fine > coarse + 0.2


def test_the_vae_keeps_what_identity_is_made_of(base, reader, held_out):
    from training.faces.data import latents_of
    from training.faces.figures import pictures

    portraits = draw_portraits(held_out[:40], 1, seed=10)
    shown = pictures(base.vae, latents_of(base.vae, portraits))
    assert (reader.read(shown).factors == portraits.factors.numpy()).mean() > 0.85


def test_one_picture_of_somebody_unseen_is_enough_to_draw_them(reader, held_out, tmp_path):
    """Through the command line and SDXL's own pipeline: six people, two pictures each."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        FOLDER, torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    similar = {"base": [], "LoRA": []}
    for number, who in enumerate(held_out[-6:]):
        drawn = draw_portraits([who], 5, seed=number)
        Image.fromarray(drawn.pixels[0].numpy()).save(tmp_path / "face.png")
        lora = tmp_path / f"{number}.safetensors"
        command = ["predict", "--hypernetwork", str(identity.SHIPPED), "--base", str(FOLDER)]
        assert main([*command, "--identity", str(tmp_path / "face.png"), "--out", str(lora)]) == 0
        known = reader.read(drawn.pixels[1:]).identity
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(number))
        for name in similar:
            if name == "LoRA":
                pipeline.load_lora_weights(lora)
            shown = pipeline(
                2 * [captions.COARSE], latents=noise, num_inference_steps=12, guidance_scale=1.0,
                output_type="np",
            ).images  # fmt: skip
            read = reader.read((shown * 255).round().astype(np.uint8)).identity
            similar[name].append(evaluator.identity_similarity(read, known))
        pipeline.unload_lora_weights()
    assert np.mean(similar["LoRA"]) > np.mean(similar["base"]) + 0.15
