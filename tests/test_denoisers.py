"""Base models as training sees them: SDXL's noising and sampling against diffusers' own, layers by name."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import generator
from tiny_sdxl import POOLED
from tiny_tasks import tiny_model
from tiny_unet import CONTEXT, PictureTasks, denoiser, prompts, schedule, tiny_unet, unet_loras

from training import flow
from training.config import LoRAConfig
from training.denoisers import Prompts, SDXLDenoiser, WanDenoiser
from training.factors import by_name
from training.injection import injected
from training.lora_factory import train_loras


class Stub:
    """In place of a UNet: `says` of (x, steps), and what it was asked."""

    def __init__(self, says):
        self.says, self.asked = says, []

    def __call__(self, x, steps, states, added_cond_kwargs, return_dict):
        self.asked.append((x, steps, states, added_cond_kwargs))
        return (self.says(x, steps),)


def sdxl(says):
    return SDXLDenoiser(Stub(says), schedule(), 8)


def latents(count=3, seed=0):
    draw = generator(seed)
    return (torch.randn(count, 4, 8, 8, generator=draw) for _ in range(2))


def test_sdxls_noising_is_diffusers_at_every_step():
    clean, noise = latents(1000)
    steps = torch.arange(1000)
    found = denoiser().noised(clean, noise, (steps + 0.5) / 1000)
    assert torch.allclose(found, schedule().add_noise(clean, noise, steps), atol=1e-6)
    assert torch.equal(denoiser().target(clean, noise), noise)


def test_sdxls_times_are_its_steps_drawn_evenly_and_by_the_generator():
    model = denoiser()
    times = model.random_times(20_000, generator(0))
    assert torch.equal(times, model.random_times(20_000, generator(0)))
    assert times.min() > 0.0 and times.max() < 1.0
    steps = model._steps(times)
    assert torch.equal((steps + 0.5) / 1000, times) and len(steps.unique()) == 1000
    counts = torch.histc(times, 10, 0.0, 1.0)
    assert (counts - 2000).abs().max() < 6 * 2000**0.5
    assert model._steps(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_the_unet_is_asked_with_its_step_its_text_and_the_pictures_size():
    x, prompt = torch.randn(2, 4, 6, 10), prompts(2)
    model = sdxl(lambda x, steps: 3.0 * x)
    assert torch.equal(model(x, torch.tensor([0.0005, 0.7005]), prompt), 3.0 * x)
    ((given, steps, states, added),) = model.model.asked
    assert given is x and steps.tolist() == [0, 700] and states is prompt.states
    assert added["text_embeds"] is prompt.pooled
    assert added["time_ids"].tolist() == [[48.0, 80.0, 0.0, 0.0, 48.0, 80.0]] * 2


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_sampling_with_a_perfect_noise_predictor_gives_the_clean_latents_back(steps):
    clean, noise = latents()
    alphas = schedule().alphas_cumprod

    def perfect(x, steps):
        alpha = alphas[steps].view(-1, 1, 1, 1)
        return (x - alpha.sqrt() * clean) / (1.0 - alpha).sqrt()

    model = sdxl(perfect)
    found = model.sample(noise, prompts(3), steps)
    assert torch.allclose(found, clean, atol=1e-3) and not torch.allclose(noise, clean, atol=0.5)
    asked = [steps.tolist() for _, steps, *_ in model.model.asked]
    assert len(asked) == steps and asked[0] == [999] * 3 and asked == sorted(asked, reverse=True)


def test_sampling_a_gaussian_ends_in_that_gaussian():
    mean, deviation, alphas = 0.7, 0.4, schedule().alphas_cumprod

    def best(x, steps):
        """E[noise | x] where clean latents are drawn from that Gaussian."""
        alpha = alphas[steps].view(-1, 1, 1, 1)
        spread = alpha * deviation**2 + 1.0 - alpha
        return (1.0 - alpha).sqrt() * (x - alpha.sqrt() * mean) / spread

    noise = torch.randn(200, 4, 8, 8, generator=generator(1))
    found = sdxl(best).sample(noise, prompts(200), 100)
    assert found.mean().item() == pytest.approx(mean, abs=0.04)
    assert found.std().item() == pytest.approx(deviation, abs=0.02)


@torch.no_grad()
@pytest.mark.parametrize("steps", [4, 10])
def test_sampling_is_diffusers_ddim(steps):
    model, prompt, (noise, _) = denoiser(), prompts(2), latents(2)
    scheduler = schedule(DDIMScheduler, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    x = noise
    for step in scheduler.timesteps:
        said = model(x, (step + 0.5).expand(2) / 1000, prompt)
        x = scheduler.step(said, step, x).prev_sample
    assert torch.allclose(model.sample(noise, prompt, steps), x, atol=1e-3, rtol=1e-3)


def test_names_lead_to_the_unets_layers():
    model = tiny_unet()
    layers = PictureTasks().weights.model.layers
    modules = denoiser(model).modules([layer.name for layer in layers])
    assert len(layers) == 88 and len({id(module) for module in modules.values()}) == 88
    assert all(modules[layer.name].weight.shape == layer.shape for layer in layers)
    block = model.up_blocks[0].attentions[2].transformer_blocks[0]
    assert modules["up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0"] is block.attn2.to_out[0]
    with pytest.raises(AttributeError):
        denoiser(model).modules(["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"])


@torch.no_grad()
def test_every_task_gets_its_own_w_plus_b_a_in_every_shape():
    data = PictureTasks()
    model, loras, prompt = data.load_denoiser(), unet_loras(data, 2), prompts(4)
    layers = data.base_description()
    groups = [[layers.layers[place].name for place in places] for places in layers.by_shape().values()]
    modules = model.modules([name for names in groups for name in names])
    (x, _), times = latents(4), torch.tensor([0.2, 0.4, 0.6, 0.9])
    with injected(modules, *by_name(groups, loras)):
        found = model(x, times, prompt)
    for task in range(2):
        merged, part = denoiser(copy.deepcopy(data.model)), slice(2 * task, 2 * task + 2)
        for names, delta in zip(groups, loras[task : task + 1].deltas(), strict=True):
            for row, module in enumerate(merged.modules(names).values()):
                module.weight += delta[0, row]
        assert torch.allclose(found[part], merged(x[part], times[part], prompt[part]), atol=1e-4)
    assert (found - model(x, times, prompt)).abs().max() > 0.01


def test_per_task_loras_of_a_unet_are_trained_task_by_task():
    data = PictureTasks()
    layers, settings = data.weights.model.layers, LoRAConfig(rank=2, steps=4, batch=1, learning_rate=1e-2)
    clips = {task: data.latents_of(task) for task in data.training[:2]}
    both, alone = (
        train_loras(data.load_denoiser(), layers, some, data.coarse(), settings)
        for some in (clips, {"jump": clips["jump"]})
    )
    own = both["jump"]
    for layer, A, B in zip(layers, own.A, own.B, strict=True):
        assert A.shape == (2, layer.shape[1]) and B.shape == (layer.shape[0], 2) and B.abs().max() > 0
    assert own.divergence is None and own.loss == pytest.approx(alone["jump"].loss, rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(own.B, alone["jump"].B, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(own.B, both["wave"].B, strict=True))


@torch.no_grad()
def test_wans_denoiser_is_flow_matching_with_times_up_to_a_thousand():
    wan = WanDenoiser(tiny_model())
    draw = generator(0)
    clean, noise = (torch.randn(2, 16, 2, 4, 4, generator=draw) for _ in range(2))
    prompt, times = Prompts(torch.randn(2, 5, 64, generator=draw)), torch.tensor([0.25, 0.8])
    x = wan.noised(clean, noise, times)
    assert torch.allclose(x[0], 0.75 * clean[0] + 0.25 * noise[0], atol=1e-6)
    assert torch.equal(wan.target(clean, noise), noise - clean)
    said = wan.model(x, torch.tensor([250.0, 800.0]), prompt.states, return_dict=False)[0]
    assert torch.allclose(wan(x, times, prompt), said, atol=1e-5)
    assert torch.equal(wan.random_times(9, generator(3)), flow.random_times(9, generator(3)))
    wanted = flow.sample(lambda x, t: wan(x, t, prompt), noise, 3, 5.0)
    assert torch.allclose(wan.sample(noise, prompt, 3, 5.0), wanted, atol=1e-5)


@pytest.mark.parametrize("pooled", [True, False])
def test_prompts_keep_their_rows_together(pooled):
    made = prompts(3) if pooled else Prompts(prompts(3).states)
    assert len(made) == 3 and made.states.shape[-1] == CONTEXT

    def rows(some):
        return [some.states] + ([some.pooled] if pooled else [])

    for whole, twice, one in zip(
        rows(made), rows(made.repeated(2)), rows(made[1:2].expanded(4)), strict=True
    ):
        assert torch.equal(twice, whole[[0, 0, 1, 1, 2, 2]]) and torch.equal(one, whole[[1, 1, 1, 1]])
    assert all(part.dtype == torch.float64 for part in rows(made.to("cpu", torch.float64)))
    assert made[0:1].pooled is None or made[0:1].pooled.shape == (1, POOLED)
