"""SDXL's layout at toy size: names, shapes, the text path, the objective, and checkpoints."""

import re

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from training.faces import base, checkpoints, clip, evaluator, vae, world
from training.faces.model import (
    SCHEDULE,
    TIME_IDS,
    TOKENS,
    Prompted,
    PromptEncoder,
    build_text_encoders,
    build_unet,
    noise_prediction,
    sample,
    tokenise,
)
from training.faces.portraits import draw_portraits

TARGET = re.compile(r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)\.weight$")


@pytest.fixture(scope="module")
def tokenizer():
    return clip.train_tokenizer(sentences=1500)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    torch.manual_seed(0)
    first, second = build_text_encoders(tokenizer)
    return PromptEncoder(tokenizer, first.text_model.eval(), second.eval())


@pytest.fixture(scope="module")
def portraits():
    return draw_portraits(world.all_identities()[::5000], 1, seed=0)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return build_unet().eval()


def test_the_unet_has_sdxl_s_places_and_four_shapes_of_target_layers(unet):
    shapes = {name: tuple(p.shape) for name, p in unet.named_parameters() if TARGET.search(name)}
    assert len(shapes) == 88 and set(shapes.values()) == {(32, 32), (32, 80), (64, 64), (64, 80)}
    places = {name.split(".attentions")[0] for name in shapes}
    assert places == {"down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"}
    assert unet.config.use_linear_projection and unet.config.addition_embed_type == "text_time"


def test_states_are_both_penultimate_ones_side_by_side(prompts):
    prompted = prompts(["blue eyes"])
    tokens = tokenise(prompts.tokenizer, ["blue eyes"])
    one = prompts.first(tokens, output_hidden_states=True).hidden_states[-2]
    two = prompts.second(tokens, output_hidden_states=True)
    assert prompted.states.shape == (1, TOKENS, 80) and prompted.pooled.shape == (1, 48)
    assert torch.equal(prompted.states, torch.cat([one, two.hidden_states[-2]], -1))
    assert torch.equal(prompted.pooled, two.text_embeds)
    assert prompted.time_ids.tolist() == [list(TIME_IDS)]


def test_an_empty_prompt_is_zeros_and_no_other_is(prompts):
    prompted = prompts(["", "a beard"])
    assert not prompted.states[0].any() and not prompted.pooled[0].any() and prompted.states[1].any()


def test_repeated_prompts_stand_in_order(prompts):
    twice = prompts(["", "a beard"]).repeat(2)
    assert [bool(states.any()) for states in twice.states] == [False, False, True, True]


def test_captions_are_words_to_the_tokenizer_and_fit(tokenizer):
    rng = np.random.default_rng(0)
    people = world.all_identities()
    portraits = draw_portraits([people[int(i)] for i in rng.integers(len(people), size=40)], 1, seed=1)
    for index in range(len(portraits)):
        caption, said = clip.random_caption(portraits, index, rng)
        row = tokenizer(caption).input_ids
        assert len(row) <= TOKENS and tokenizer.unk_token_id not in row[1:-1]
        assert len(row) - 2 <= len(re.findall(r"[a-z]+|,", caption)) + 2  # nearly all words are one token
        for (_, values), index in zip(clip.NAMES.items(), said, strict=True):
            assert 0 <= index <= len(values)


def test_the_towers_learn_from_every_part_of_the_loss(tokenizer, portraits):
    torch.manual_seed(0)
    towers = clip.Towers(tokenizer)
    rng = np.random.default_rng(0)
    texts, said = zip(*(clip.random_caption(portraits, i, rng) for i in range(len(portraits))), strict=True)
    seen = clip._seen(portraits, torch.arange(len(portraits)))
    losses, right = towers.losses(tokenise(tokenizer, list(texts)), torch.tensor(said), *seen)
    assert set(losses) == {"contrast", "text", "image", "proportions"} and set(right) == {
        "text_1",
        "text_2",
        "image",
    }
    assert all(0.0 <= share <= 1.0 for share in right.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in towers.parameters() if p.requires_grad)


def test_the_loss_is_the_noise_s_and_zero_for_a_perfect_prediction(monkeypatch):
    clean, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    steps = torch.tensor([10, 500, 990])
    none = Prompted(torch.zeros(3, 2, 80), torch.zeros(3, 48), torch.zeros(3, 6))
    monkeypatch.setattr(base, "noise_prediction", lambda unet, x, t, prompted: noise)
    assert base.noise_loss(None, clean, none, noise, steps) == 0.0
    monkeypatch.setattr(base, "noise_prediction", lambda unet, x, t, prompted: noise + 1.0)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = torch.cumprod(1.0 - betas, 0)[steps]
    snr = kept / (1.0 - kept)
    expected = (snr.clamp(max=5.0) / snr).mean()
    assert base.noise_loss(None, clean, none, noise, steps).item() == pytest.approx(expected.item(), rel=1e-3)


def test_sampling_reaches_the_latent_a_perfect_unet_knows(monkeypatch):
    """With eps = (x_t - sqrt(a) x_0) / sqrt(1 - a) every Euler step goes towards x_0."""
    wanted = torch.randn(2, 4, 16, 16)
    scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1)
    kept = scheduler.alphas_cumprod

    def perfect(unet, latents, step, prompted):
        a = kept[int(step)]
        target = wanted.repeat(len(latents) // 2, 1, 1, 1)
        return (latents - a.sqrt() * target) / (1.0 - a).sqrt()

    monkeypatch.setattr("training.faces.model.noise_prediction", perfect)
    prompts = Prompted(torch.zeros(2, 3, 80), torch.zeros(2, 48), torch.zeros(2, 6))
    for guidance in (1.0, 3.0):
        made = sample(None, torch.randn(2, 4, 16, 16), prompts, scheduler, 10, guidance)
        assert (made - wanted).abs().max() < 0.02


def test_the_unet_listens_to_states_pooled_and_time_ids(unet):
    torch.manual_seed(1)
    latents, steps = torch.randn(1, 4, 16, 16), torch.tensor([300])
    parts = {
        "states": torch.randn(1, 9, 80),
        "pooled": torch.randn(1, 48),
        "time_ids": torch.full((1, 6), 64.0),
    }
    with torch.no_grad():
        before = noise_prediction(unet, latents, steps, Prompted(**parts))
        for name in parts:
            after = noise_prediction(unet, latents, steps, Prompted(**{**parts, name: parts[name] * 0.3}))
            assert (after - before).abs().max() > 1e-6, name


def test_latents_are_a_quarter_as_wide_and_have_unit_variance_when_scaled(portraits, tmp_path):
    model = vae.train(portraits, 2, tmp_path / "vae.pt", batch=4)
    latents = vae.encode(model, portraits)
    assert latents.shape == (len(portraits), 4, 16, 16)
    assert (latents * model.config.scaling_factor).std() == pytest.approx(1.0, abs=1e-2)
    assert vae.decode(model, latents * model.config.scaling_factor).shape == (len(portraits), 3, 64, 64)


def test_a_killed_vae_run_goes_on_where_it_was(portraits, tmp_path):
    def weights(model):
        return torch.cat([p.flatten() for p in model.parameters()])

    whole = weights(vae.train(portraits, 3, tmp_path / "whole.pt", batch=2))
    checkpoint = tmp_path / "killed.pt"

    class Killed(RuntimeError):
        pass

    def kill(step, figures):
        raise Killed

    monkey = pytest.MonkeyPatch()
    monkey.setattr(checkpoints, "EVERY", 1)
    with pytest.raises(Killed):
        vae.train(portraits, 3, checkpoint, batch=2, report=kill)
    assert torch.load(checkpoint, weights_only=True)["step"] == 1
    gone_on = weights(vae.train(portraits, 3, checkpoint, batch=2))
    monkey.undo()
    assert torch.allclose(whole, gone_on, atol=1e-6)


def test_the_evaluator_has_a_head_for_everything_and_survives_its_file(portraits, tmp_path):
    torch.manual_seed(0)
    model = evaluator.Evaluator().eval()
    evaluator.save(model, tmp_path / "evaluator.safetensors")
    reading = evaluator.load(tmp_path / "evaluator.safetensors").read(portraits.pixels)
    count = len(portraits)
    assert reading.factors.shape == (count, 8) and reading.attributes.shape == (count, 5)
    assert reading.identity.shape == (count, 48) and reading.proportions.shape == (count, 3)
    assert np.allclose(reading.identity, model.read(portraits.pixels).identity, atol=5e-3)


def test_identity_similarity_and_diversity_measure_what_they_say():
    person = np.array([[1.0, 0.0], [0.8, 0.2]])
    assert evaluator.identity_similarity(person.mean(0, keepdims=True), person) == pytest.approx(1.0)
    assert evaluator.identity_similarity(np.array([[-0.1, 0.9]]), person) == pytest.approx(0.0, abs=0.01)
    assert evaluator.diversity(np.zeros((4, 3))) == 0.0
    assert evaluator.diversity(np.array([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(5.0)
