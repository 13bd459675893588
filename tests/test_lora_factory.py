"""Per-task LoRAs: the training written out once more for one task, and no task sees another."""

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_tasks import RANK, Tasks, tiny_model
from torch.func import functional_call

from lofa_core.key_names import wan_to_diffusers
from training import flow
from training.config import LoRAConfig
from training.denoisers import WanDenoiser
from training.lora_factory import initial_A, train_loras

SETTINGS = LoRAConfig(rank=RANK, steps=12, batch=2, learning_rate=1e-2, seed=3)


@pytest.fixture(scope="module")
def data():
    return Tasks(clips=3)


def train(data, names, settings=SETTINGS, spoiled=(), model=None, **kwargs):
    """Task -> its TrainedLoRA; the clips of `spoiled` tasks are infinite."""
    clips = {name: data.latents_of(name) for name in names}
    clips |= {name: torch.full_like(clips[name], math.inf) for name in spoiled}
    denoiser, layers = WanDenoiser(model or data.model), data.weights.model.layers
    return train_loras(denoiser, layers, clips, data.coarse(), settings, **kwargs)


def factors(lora):
    """A [L, r, in] and B [L, out, r] of a LoRA whose layers have one shape."""
    return torch.stack(lora.A), torch.stack(lora.B)


def test_the_shared_initialisation_is_uniform_within_one_over_root_in(data):
    layers = data.weights.model.layers
    start = initial_A(layers, 64, 0)
    values = torch.cat([start[layer.name].flatten() for layer in layers]) * math.sqrt(48)
    assert list(start) == [layer.name for layer in layers] and start[layers[0].name].shape == (64, 48)
    assert values.abs().max() <= 1.0 and values.abs().max() > 0.99
    assert values.mean().item() == pytest.approx(0.0, abs=0.02) and values.std().item() == pytest.approx(
        3**-0.5, abs=0.02
    )
    assert len({value.sum().item() for value in start.values()}) == 8  # every layer has an A of its own


def test_a_repeat_has_the_same_start_and_other_noise(data):
    first, same, again = (
        train(data, ["wave"], replace(SETTINGS, repeat=repeat, steps=steps))["wave"]
        for repeat, steps in ((0, 1), (0, 1), (1, 1))
    )
    assert all(torch.equal(a, b) for a, b in zip(first.B, same.B, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.B, again.B, strict=True))
    start = initial_A(data.weights.model.layers, RANK, SETTINGS.seed)
    for A, began in zip(again.A, start.values(), strict=True):
        assert torch.allclose(A, began, atol=1e-2)  # B was zero, so A has hardly moved


def by_hand(data, clips, settings):
    """The same training with W + B A in place of W, one task, all steps written out."""
    layers, model = data.weights.model.layers, data.model
    start = initial_A(layers, settings.rank, settings.seed)
    A = {layer.key: start[layer.name].clone().requires_grad_() for layer in layers}
    B = {layer.key: torch.zeros(48, settings.rank, requires_grad=True) for layer in layers}
    optimiser = torch.optim.AdamW([*A.values(), *B.values()], betas=(0.9, 0.99), weight_decay=0.0)
    source = torch.Generator().manual_seed(settings.seed)
    losses = []
    for step in range(settings.steps):
        picks = torch.randint(2**31, (settings.batch,), generator=source)
        clean = clips[picks % len(clips)].float()
        noise = torch.randn(clean.shape, generator=source)
        times = flow.random_times(settings.batch, source)
        weights = {key: data.model.state_dict()[key] + B[key] @ A[key] for key in A}
        x = flow.noised(clean, noise, times)
        text = data.coarse().states.expand(settings.batch, -1, -1)
        said = functional_call(model, weights, (x, times * 1000.0, text), {"return_dict": False})[0]
        loss = (said - (noise - clean)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        warm = min(1.0, (step + 1) / 10)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        optimiser.param_groups[0]["lr"] = settings.learning_rate * warm * cosine
        optimiser.step()
        losses.append(loss.item())
    return (
        torch.stack([A[layer.key] for layer in layers]),
        torch.stack([B[layer.key] for layer in layers]),
        losses,
    )


def test_it_is_adamw_on_the_flow_matching_loss_of_w_plus_b_a(data):
    seen = []
    found = train(data, ["jump"], report=lambda step, losses: seen.append((step, losses.item())))["jump"]
    wanted_A, wanted_B, losses = by_hand(data, data.latents_of("jump"), SETTINGS)
    A, B = factors(found)
    assert A.shape == (8, RANK, 48) and B.shape == (8, 48, RANK)
    assert torch.allclose(A, wanted_A, atol=2e-5) and torch.allclose(B, wanted_B, atol=2e-5)
    assert B.abs().amax(dim=(1, 2)).min() > 1e-4  # every layer has learned something
    assert [step for step, _ in seen] == list(range(1, 13))
    assert [loss for _, loss in seen] == pytest.approx(losses, rel=1e-4)
    assert found.loss == pytest.approx(losses[-1], rel=1e-4) and found.divergence is None


def test_a_step_is_what_peft_computes(data):
    """The loss and the first update of adapters that PEFT injected into a copy of the base."""
    layers = data.weights.model.layers
    names = [wan_to_diffusers(f"{layer.name}.weight").removesuffix(".weight") for layer in layers]
    model = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), tiny_model())
    start = initial_A(layers, RANK, SETTINGS.seed)
    modules = [model.get_submodule(name) for name in names]
    for layer, module in zip(layers, modules, strict=True):
        module.lora_A["default"].weight.data.copy_(start[layer.name])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, SETTINGS.learning_rate / 10, betas=(0.9, 0.99), weight_decay=0.0)
    source = torch.Generator().manual_seed(SETTINGS.seed)
    clips = data.latents_of("turn")
    clean = clips[torch.randint(2**31, (2,), generator=source) % len(clips)].float()
    noise = torch.randn(clean.shape, generator=source)
    times = flow.random_times(2, source)
    x, text = flow.noised(clean, noise, times), data.coarse().states.expand(2, -1, -1)
    loss = (model(x, times * 1000.0, text, return_dict=False)[0] - (noise - clean)).square().mean()
    loss.backward()
    optimiser.step()
    found = train(data, ["turn", "wave"], replace(SETTINGS, steps=1))["turn"]
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    for module, A, B in zip(modules, found.A, found.B, strict=True):
        assert torch.allclose(module.lora_A["default"].weight, A, atol=1e-6)
        # Adam's first step is g / |g|: where g is as small as rounding, it may be either.
        close = torch.isclose(module.lora_B["default"].weight, B, atol=1e-6).float().mean()
        assert B.abs().mean() > 5e-4 and close > 0.9


def test_a_task_does_not_depend_on_who_shares_its_batch(data):
    alone = train(data, ["jump"])["jump"]
    for names in (["wave", "jump"], ["jump", "bow", "turn"]):
        together = train(data, names)
        other = next(name for name in names if name != "jump")
        for a, b, c in zip(factors(alone), factors(together["jump"]), factors(together[other]), strict=True):
            assert torch.allclose(a, b, atol=2e-5)
            assert not torch.allclose(b, c, atol=1e-3)


def test_a_task_that_diverges_changes_nothing_for_its_neighbours(data):
    seen = []
    calm = train(data, ["wave", "jump", "bow"])
    found = train(data, ["wave", "jump", "bow"], spoiled=["jump"], report=lambda step, x: seen.append(x))
    for name in ("wave", "bow"):
        assert found[name].divergence is None and found[name].loss == calm[name].loss
        assert all(torch.equal(*pair) for pair in zip(factors(found[name]), factors(calm[name]), strict=True))
    assert found["jump"].divergence == "the loss was not finite in step 1"
    assert all(losses.isfinite().tolist() == [True, False, True] for losses in seen)


def test_a_change_larger_than_the_limit_is_a_divergence(data):
    (W,) = data.weights_by_shape()
    A, B = factors(train(data, ["wave"])["wave"])
    relative = (B @ A).norm(dim=(1, 2)) / W.norm(dim=(1, 2))
    largest, worst = relative.max(0)
    name = data.weights.model.layers[worst].name
    for limit, good in ((1.001, True), (0.999, False)):
        settings = replace(SETTINGS, max_relative_norm=limit * largest.item())
        divergence = train(data, ["wave"], settings)["wave"].divergence
        assert divergence is None if good else f"times ||W|| in {name}, above max_relative_norm" in divergence


def test_without_a_shared_start_a_task_has_one_of_its_own(data):
    settings = replace(SETTINGS, steps=1, learning_rate=1e-9)  # so small that the start is what is found
    shared = train(data, ["wave", "jump"], settings)
    own = train(data, ["wave", "jump"], replace(settings, shared_A=False))
    alone = train(data, ["jump"], replace(settings, shared_A=False))
    A, own_A, alone_A = ({name: factors(x)[0] for name, x in y.items()} for y in (shared, own, alone))
    assert torch.equal(A["wave"], A["jump"])
    assert (own_A["wave"] - own_A["jump"]).abs().mean() > 0.02
    assert torch.allclose(own_A["jump"], alone_A["jump"], atol=1e-7)


def test_the_canonical_form_is_the_same_change(data):
    plain, form = (train(data, ["bow"], replace(SETTINGS, canonical=c))["bow"] for c in (False, True))
    (plain_A, plain_B), (A, B) = factors(plain), factors(form)
    assert torch.allclose(plain_B @ plain_A, B @ A, atol=1e-6)
    gram = B.mT @ B  # B = U sqrt(S): its columns are orthogonal, and as long as A's rows
    assert torch.allclose(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2)), atol=1e-6)
    assert torch.allclose(gram, A @ A.mT, atol=1e-6)


def test_a_model_in_bfloat16_trains_factors_in_float32(data):
    model = tiny_model().to(torch.bfloat16)
    found, wanted = (train(data, ["bow"], replace(SETTINGS, steps=3), model=m)["bow"] for m in (model, None))
    assert all(x.dtype == torch.float32 for x in factors(found)) and found.divergence is None
    assert found.loss == pytest.approx(wanted.loss, rel=0.05)
    assert torch.allclose(factors(found)[0], factors(wanted)[0], atol=0.03)


def test_it_repeats_by_seed_and_leaves_the_base_alone(data):
    before = {key: value.clone() for key, value in data.model.state_dict().items()}
    first, again = train(data, ["wave"])["wave"], train(data, ["wave"])["wave"]
    other = train(data, ["wave"], replace(SETTINGS, seed=4))["wave"]
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(factors(first), factors(again), strict=True))
    assert not torch.allclose(factors(first)[0], factors(other)[0], atol=1e-2)
    assert all(torch.equal(value, before[key]) for key, value in data.model.state_dict().items())
    assert all(parameter.grad is None for parameter in data.model.parameters())


def test_training_fits_the_clips(data):
    seen = []
    settings = LoRAConfig(rank=8, steps=60, batch=4, learning_rate=1e-2)
    found = train(data, ["wave"], settings, report=lambda step, losses: seen.append(losses.item()))["wave"]
    assert sum(seen[-10:]) < 0.8 * sum(seen[:10])
    assert found.loss == pytest.approx(sum(seen[-6:]) / 6, rel=1e-4)  # the last tenth
