"""The reconstruction losses: each counts what its name says, one number a task."""

import pytest
import torch
from tiny import generator

from lofa_core.normalisation import TargetStatistics
from training.config import RECONSTRUCTIONS
from training.losses import RECONSTRUCTION


def pair(seed, tasks=3, layers=2, out=5, into=6, rank=2):
    draw = generator(seed)
    A = torch.randn(tasks, layers, rank, into, generator=draw)
    return A, torch.randn(tasks, layers, out, rank, generator=draw)


def deltas(factors):
    return factors[1] @ factors[0]


def turned(factors, angle=0.7):
    """The same dW from other factors."""
    c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    turn = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
    return turn.T @ factors[0], factors[1] @ turn


def loss(name, predicted, known, statistics=None):
    return RECONSTRUCTION[name](predicted, known, statistics)


def test_the_configuration_knows_their_names():
    assert tuple(RECONSTRUCTION) == RECONSTRUCTIONS


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_the_truth_costs_nothing_another_lora_does_and_tasks_do_not_mix(name):
    known, other = pair(0), pair(1)
    assert loss(name, known, known).abs().max() < 1e-5
    found = loss(name, other, known)
    assert found.shape == (3,) and found.min() > 0.05
    one = loss(name, tuple(part[1:2] for part in other), tuple(part[1:2] for part in known))
    assert torch.allclose(found[1:2], one, atol=1e-5)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_each_can_be_learned_from(name):
    factors = tuple(part.requires_grad_() for part in pair(1))
    loss(name, factors, pair(0)).sum().backward()
    assert all(torch.isfinite(part.grad).all() and part.grad.abs().max() > 0 for part in factors)


def test_factors_are_compared_entry_by_entry_in_the_units_they_are_predicted_in():
    predicted, known = pair(0), pair(1)
    plain = [(p - k).abs().mean(dim=(1, 2, 3)) for p, k in zip(predicted, known, strict=True)]
    assert torch.allclose(loss("factors", predicted, known), sum(plain))
    statistics = TargetStatistics(2, 2, 5, 6)
    statistics.A_scale.copy_(torch.tensor([0.5, 2.0]))
    scaled = (predicted[0] - known[0]).abs().mean(dim=(2, 3)) / statistics.A_scale
    assert torch.allclose(loss("factors", predicted, known, statistics), scaled.mean(1) + plain[1])


def test_delta_and_cosine_look_at_dw_alone():
    predicted, known = pair(0), pair(1)
    wanted = (deltas(predicted) - deltas(known)).abs().mean(dim=(1, 2, 3))
    assert torch.allclose(loss("delta", predicted, known), wanted)
    for name in ("delta", "delta_cosine", "spectral", "canonical"):
        assert loss(name, turned(known), known).abs().max() < 1e-4, name
    assert loss("factors", turned(known), known).min() > 0.1
    doubled = (2.0 * known[0], known[1])
    assert loss("delta_cosine", doubled, known).abs().max() < 1e-5 < loss("delta", doubled, known).min()


def test_spectral_is_the_distance_of_singular_values():
    predicted, known = pair(0), pair(1)
    values = [torch.linalg.svdvals(deltas(factors))[..., :2] for factors in (predicted, known)]
    wanted = (values[0] - values[1]).abs().mean(dim=(1, 2))
    assert torch.allclose(loss("spectral", predicted, known), wanted, atol=1e-4)
