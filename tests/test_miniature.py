"""The shipped miniature in diffusers and in our own code: the same model, text and LoRA whichever way."""

import json
import re

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors import safe_open
from tiny import generator
from transformers import AutoTokenizer

from lofa_core import miniature
from lofa_core.base_models import WAN_KINDS, BaseWeights
from lofa_core.checkpoint import load_hypernetwork
from lofa_core.conditions import Given
from lofa_core.conditions.text import TextEncoder, check_prompt
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import match, save_lora
from lofa_core.prediction import fitting_layers, predict
from training import backbones
from training.config import DataConfig
from training.denoisers import WanDenoiser
from training.injection import injected
from training.miniature import captions, text_encoder, transformer, vae, world
from training.miniature.tasks import MiniatureTasks

PROMPT = "someone waves the left arm widely and quickly, jumps up, leaning right, feet apart"


@pytest.fixture(scope="module")
def base():
    return BaseWeights.open(miniature.FOLDER)


@pytest.fixture(scope="module")
def hypernetwork():
    return load_hypernetwork(miniature.HYPERNETWORK)


@pytest.fixture(scope="module")
def prompts():
    return transformer.load_prompt_encoder(miniature.FOLDER)


@pytest.fixture
def pipeline():
    pipeline = backbones.load_pipeline(miniature.FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sentences(count):
    rng, actions = np.random.default_rng(0), world.all_actions()
    return [text_encoder.random_caption(actions, rng)[0] for _ in range(count)] + [
        miniature.COARSE_PROMPT,
        "",
    ]


def latents(batch=2, seed=0):
    draw = generator(seed)
    return torch.randn(batch, 16, 5, 8, 8, generator=draw), torch.rand(batch, generator=draw) * 1000.0


def test_everything_is_there_and_small():
    files = [
        miniature.DIFFUSION_MODEL,
        miniature.VAE,
        miniature.TEXT_ENCODER,
        miniature.TOKENIZER,
        miniature.HYPERNETWORK,
    ]
    assert all(path.is_file() and miniature.FOLDER in path.parents for path in files)
    assert sum(path.stat().st_size for path in miniature.FOLDER.rglob("*.safetensors")) < 25e6
    assert isinstance(json.loads(miniature.FIGURES.read_text(encoding="utf-8")), dict)
    assert (miniature.FRAMES, miniature.SIZE) == (world.FRAMES, world.SIZE)
    assert miniature.COARSE_PROMPT == captions.COARSE


def test_the_base_has_32_target_layers(base):
    assert base.model.name == "WAN2.1 miniature" and base.model.summary() == "32 layers of 96x96"
    assert [layer.name for layer in base.model.layers] == [
        f"blocks.{d}.{kind}" for d in range(4) for kind in WAN_KINDS
    ]
    assert all(base.read(layer).shape == (96, 96) for layer in base.model.layers)


def test_comfyui_finds_in_the_metadata_what_the_tensors_do_not_say():
    with safe_open(miniature.DIFFUSION_MODEL, "pt") as file:
        said = json.loads(file.metadata()["config"])["transformer"]
        assert (
            file.get_slice("text_embedding.0.weight").get_shape()[1] == said["text_dim"] == text_encoder.WIDTH
        )
    assert (
        said["num_heads"]
        == json.loads((miniature.FOLDER / "transformer/config.json").read_text())["num_attention_heads"]
    )


def test_the_hypernetwork_is_for_this_base_and_this_encoder(base, hypernetwork):
    assert [layer.name for layer in fitting_layers(hypernetwork, base)] == [x.name for x in base.model.layers]
    assert hypernetwork.base.fingerprint == base.fingerprint()
    known = hypernetwork.conditions["text"]
    assert known.kind == "text" and known.coarse_prompt == miniature.COARSE_PROMPT
    encoded = TextEncoder.open(miniature.FOLDER).encode(PROMPT)
    assert encoded.shape[2] == known.width == hypernetwork.stage1.trunk.condition_proj["text"].in_features
    own_base, own_conditions = MiniatureTasks(
        DataConfig(conditions=tuple(hypernetwork.conditions)), miniature.FOLDER
    ).descriptions()
    assert own_base == hypernetwork.base and own_conditions == tuple(hypernetwork.conditions.values())


def test_the_hypernetwork_knows_every_word_of_every_caption(hypernetwork):
    words = set(hypernetwork.conditions["text"].words)
    assert set(captions.known_words()) <= words
    for sentence in sentences(300):
        assert set(re.findall(r"[a-z]+", sentence)) <= words
        if sentence:
            check_prompt(sentence, words)


def test_both_tokenizers_agree_and_know_every_caption():
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(miniature.TOKENIZER))
    tokenizer = AutoTokenizer.from_pretrained(miniature.FOLDER / "tokenizer")
    for sentence in [*sentences(300), "A Person WAVES", "two\nlines\tand  spaces "]:
        ids = [*pieces.encode(sentence), text_encoder.END]
        assert tokenizer(sentence).input_ids == ids and text_encoder.UNKNOWN not in ids
    assert pieces.encode("A PERSON") == pieces.encode("a person")
    config = json.loads(miniature.TEXT_ENCODER_CONFIG.read_text(encoding="utf-8"))
    assert len(tokenizer) == pieces.get_piece_size() == config["vocab_size"]


def test_all_text_paths_give_the_same_states(prompts, pipeline):
    encoder, texts = TextEncoder.open(miniature.FOLDER), [PROMPT, miniature.COARSE_PROMPT]
    folded = prompts(texts)
    padded = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    assert padded.shape == (2, 512, 64)
    for row, text in enumerate(texts):
        alone = encoder.encode(text)[0]
        assert torch.allclose(folded[row, : len(alone)], alone, atol=1e-5)
        assert torch.allclose(padded[row, : len(alone)], alone, atol=1e-5)
        assert not folded[row, len(alone) :].any() and not padded[row, len(alone) :].any()
    told = [{"text": text} for text in texts]
    conditions = MiniatureTasks(DataConfig(), miniature.FOLDER).conditions(told)
    assert torch.equal(conditions["text"].values, folded[:, :-1])


@torch.no_grad()
def test_diffusers_with_text_of_512_rows_gives_the_velocity_of_folded_padding(prompts, pipeline):
    texts, (x, times) = [PROMPT, miniature.COARSE_PROMPT], latents()
    padded = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    wanted = pipeline.transformer(x, times, padded, return_dict=False)[0]
    model = backbones.load_transformer(miniature.FOLDER)
    backbones.use_folded_padding(model)
    found = transformer.velocity(model, prompts(texts))(x, times / 1000.0)
    assert wanted.std() > 0.01 and torch.allclose(found, wanted, atol=1e-5)


def test_the_pipeline_makes_clips_and_repeats_them_by_seed(pipeline):
    def clips(seed, prompt=PROMPT):
        return pipeline(
            [prompt], height=64, width=64, num_frames=17, num_inference_steps=2, guidance_scale=1.0,
            output_type="np", generator=torch.Generator().manual_seed(seed),
        ).frames  # fmt: skip

    first = clips(0)
    assert first.shape == (1, 17, 64, 64, 3) and np.isfinite(first).all() and first.std() > 0
    assert np.allclose(first, clips(0), atol=1e-5) and not np.allclose(first, clips(1), atol=1e-3)
    assert not np.allclose(first, clips(0, miniature.COARSE_PROMPT), atol=1e-5)


@torch.no_grad()
def test_the_vae_takes_clips_to_unit_latents_and_back_as_diffusers_does():
    model, whole = (
        backbones.load_vae(miniature.FOLDER),
        vae.WholeClipVAE(backbones.load_vae(miniature.FOLDER)),
    )
    video = vae.to_video(vae.random_clips(world.all_actions(), 2, np.random.default_rng(0)))
    latent = model.encode(video).latent_dist.mean
    assert latent.shape == (2, 16, 5, 8, 8) and torch.allclose(whole.encode(video), latent, atol=1e-3)
    unit = backbones.to_unit(latent, model)
    assert 0.3 < unit.std() < 3.0  # the statistics are folded in, whatever the picture's quality
    assert torch.allclose(whole.decode(latent).clamp(-1, 1), model.decode(latent).sample, atol=1e-3)


def some_lora(base, rank=4, alpha=2.0):
    draw = generator(1)
    return LoRA(
        {
            layer.name: LoRALayer(
                0.2 * torch.randn(rank, layer.shape[1], generator=draw),
                0.2 * torch.randn(layer.shape[0], rank, generator=draw),
                alpha,
            )
            for layer in base.model.layers
        }
    )


@torch.no_grad()
def test_diffusers_applies_the_written_lora_exactly_as_injection_does(base, pipeline, prompts, tmp_path):
    lora, (x, times) = some_lora(base), latents()
    padded = pipeline.encode_prompt([PROMPT] * 2, do_classifier_free_guidance=False, max_sequence_length=512)[
        0
    ]
    plain = pipeline.transformer(x, times, padded, return_dict=False)[0]
    save_lora(lora, tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    applied = pipeline.transformer(x, times, padded, return_dict=False)[0]

    model = backbones.load_transformer(miniature.FOLDER)
    backbones.use_folded_padding(model)
    A = {name: layer.A[None] for name, layer in lora.items()}
    B = {name: layer.alpha / layer.rank * layer.B[None] for name, layer in lora.items()}
    modules = WanDenoiser(model).modules(list(lora))
    with injected(modules, A, B):
        ours = model(x, times, prompts([PROMPT] * 2), return_dict=False)[0]
    assert torch.allclose(applied, ours, atol=1e-5) and not torch.allclose(applied, plain, atol=1e-3)
    for name, module in modules.items():
        module.weight += lora.delta(name)
    merged = model(x, times, prompts([PROMPT] * 2), return_dict=False)[0]
    assert torch.allclose(applied, merged, atol=1e-5)
    pipeline.unload_lora_weights()
    assert torch.allclose(pipeline.transformer(x, times, padded, return_dict=False)[0], plain, atol=1e-6)


def test_a_predicted_lora_fits_the_base_and_loads_whole(base, hypernetwork, pipeline, tmp_path):
    condition = {"text": Given(TextEncoder.open(miniature.FOLDER).encode(PROMPT))}
    found = predict(hypernetwork, base, condition)
    assert match(found.lora, base.model).summary() == "32 of 32 layers matched"
    assert all(
        torch.isfinite(layer.A).all() and torch.isfinite(layer.B).all() for layer in found.lora.values()
    )
    assert all(((0 <= r) & (r <= 1)).all() for r in found.responses.values()) and len(found.responses) == 32
    save_lora(found.lora, tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    held = {
        name.rsplit(".lora_A", 1)[0]
        for name, _ in pipeline.transformer.named_parameters()
        if ".lora_A" in name
    }
    assert len(held) == 32
    for name, module in WanDenoiser(pipeline.transformer).modules(list(found.lora)).items():
        (delta,) = module.get_delta_weight(module.active_adapters[0]).unsqueeze(0)
        assert torch.allclose(delta, found.lora.delta(name), atol=1e-6), name
