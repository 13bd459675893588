"""Per-task LoRAs: the training written out once more for one task, and no task sees another."""

import math

import pytest
import torch
from tiny_tasks import RANK, Tasks, loras
from torch.func import functional_call

from training import flow
from training.lora_dataset import LoRADataset
from training.lora_factory import LoRATraining, shared_initialisation, train_loras
from training.miniature.world import all_actions

SETTINGS = LoRATraining(rank=RANK, steps=12, batch=2, learning_rate=1e-2, seed=3)


@pytest.fixture(scope="module")
def data():
    return Tasks(clips=3)


def train(data, names, settings=SETTINGS, **kwargs):
    clips = [data.clips.latents[data.clips_by_action[name]] for name in names]
    return train_loras(data.model, data.weights.model.layers, clips, data.coarse(), settings, **kwargs)


def test_the_shared_initialisation_is_uniform_within_one_over_root_in(data):
    layers = data.weights.model.layers
    start = shared_initialisation(layers, 64, 0)
    values = torch.cat([start[layer.name].flatten() for layer in layers]) * math.sqrt(48)
    assert list(start) == [layer.name for layer in layers] and start[layers[0].name].shape == (64, 48)
    assert values.abs().max() <= 1.0 and values.abs().max() > 0.99
    assert values.mean().item() == pytest.approx(0.0, abs=0.02) and values.std().item() == pytest.approx(
        3**-0.5, abs=0.02
    )
    assert len({value.sum().item() for value in start.values()}) == 8  # every layer has an A of its own


def by_hand(data, clips, settings):
    """The same training with W + B A in place of W, one task, all steps written out."""
    layers, model = data.weights.model.layers, data.model
    start = shared_initialisation(layers, settings.rank, settings.seed)
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
        text = data.coarse().expand(settings.batch, -1, -1)
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
    A, B = train(data, ["jump"], report=lambda step, loss: seen.append((step, loss)))
    wanted_A, wanted_B, losses = by_hand(data, data.clips.latents[data.clips_by_action["jump"]], SETTINGS)
    assert A.shape == (1, 8, RANK, 48) and B.shape == (1, 8, 48, RANK)
    assert torch.allclose(A[0], wanted_A, atol=2e-5) and torch.allclose(B[0], wanted_B, atol=2e-5)
    assert B.abs().amax(dim=(0, 2, 3)).min() > 1e-4  # every layer has learned something
    assert [step for step, _ in seen] == list(range(1, 13))
    assert [loss for _, loss in seen] == pytest.approx(losses, rel=1e-4)


def test_a_task_does_not_depend_on_who_shares_its_batch(data):
    alone = train(data, ["jump"])
    for names in (["wave", "jump"], ["jump", "bow", "turn"]):
        together, row = train(data, names), names.index("jump")
        for a, b in zip(alone, together, strict=True):
            assert torch.allclose(a[0], b[row], atol=2e-5)
            assert not torch.allclose(b[row], b[1 - row], atol=1e-3)


def test_it_repeats_by_seed_and_leaves_the_base_alone(data):
    before = {key: value.clone() for key, value in data.model.state_dict().items()}
    first, again = train(data, ["wave"]), train(data, ["wave"])
    other = train(data, ["wave"], LoRATraining(**{**vars(SETTINGS), "seed": 4}))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first[0], other[0], atol=1e-2)
    assert all(torch.equal(value, before[key]) for key, value in data.model.state_dict().items())
    assert all(parameter.grad is None for parameter in data.model.parameters())


def test_training_fits_the_clips(data):
    seen = []
    settings = LoRATraining(rank=8, steps=60, batch=4, learning_rate=1e-2)
    train(data, ["wave"], settings, report=lambda step, loss: seen.append(loss))
    assert sum(seen[-10:]) < 0.8 * sum(seen[:10])


def test_a_dataset_comes_back_in_order(tmp_path):
    A, B = loras(3)
    actions = all_actions()[5:400:150]
    LoRADataset(A, B, actions).save(tmp_path / "loras.safetensors")
    found = LoRADataset.load(tmp_path / "loras.safetensors")
    assert found.actions == actions and found.A.dtype == found.B.dtype == torch.float32
    assert torch.allclose(found.A, A, atol=1e-3) and torch.allclose(found.B, B, atol=1e-3)
    assert found.factors().tolist() == [list(action.indices()) for action in actions]
    assert [path.name for path in tmp_path.iterdir()] == ["loras.safetensors"]
