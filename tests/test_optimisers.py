"""Muon and AdamW behind one object: everything moves, by the right one, in the model's own memory."""

import copy

import pytest
import torch
from torch import nn

from training.optimisers import MuonAdamW


class Parts(nn.Module):
    """Every kind of parameter: matrix, convolution, bias, embedding, vector, one row, one column."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = nn.Linear(5, 4), nn.Conv3d(3, 4, (1, 2, 2))
        self.embedding, self.norm = nn.Embedding(6, 5), nn.LayerNorm(5)
        self.row, self.column = nn.Parameter(torch.randn(1, 5)), nn.Parameter(torch.randn(5, 1))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)

    def forward(self):
        x = self.norm(self.embedding(torch.arange(6))) + self.row + self.column.T
        y = self.conv(torch.ones(1, 3, 2, 3, 3) * self.row.mean()).square().mean()
        return (self.linear(x) - 1.0).square().mean() + y


def step(model, optimiser, factor=1.0):
    model().backward()
    optimiser.step(factor)


def made(**kwargs):
    model = Parts()
    return model, MuonAdamW(model, 1e-2, muon_rate=1e-2, **({"adamw_names": ("embedding",)} | kwargs))


def test_every_parameter_moves_and_what_is_frozen_stays():
    model, optimiser = made()
    before = copy.deepcopy(model.state_dict())
    step(model, optimiser)
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert same == ["frozen"]


def test_matrices_and_convolutions_are_muons_the_rest_adamws():
    model, optimiser = made()
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in optimiser.optimisers]
    assert [len(part) for part in held] == [2, 7]
    flat = [p for group in optimiser.optimisers[0].param_groups for p in group["params"]]
    assert [tuple(p.shape) for p in flat] == [(4, 5), (4, 12)]
    assert {p.data_ptr() for p in flat} == {model.linear.weight.data_ptr(), model.conv.weight.data_ptr()}


def test_the_steps_are_those_of_torchs_own_optimisers():
    model, optimiser = made()
    other = copy.deepcopy(model)
    linear, conv = (
        nn.Parameter(other.linear.weight.detach().clone()),
        nn.Parameter(other.conv.weight.detach().flatten(1).clone()),
    )
    muon = torch.optim.Muon(
        [linear, conv], lr=5e-3, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    rest = [p for n, p in other.named_parameters() if n not in ("linear.weight", "conv.weight", "frozen")]
    adamw = torch.optim.AdamW(rest, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(3):
        step(model, optimiser, 0.5)
        other().backward()
        linear.grad, conv.grad = other.linear.weight.grad, other.conv.weight.grad.flatten(1)
        muon.step()
        adamw.step()
        with torch.no_grad():
            other.linear.weight.copy_(linear)
            other.conv.weight.copy_(conv.view_as(other.conv.weight))
        other.zero_grad()
    for name, value in other.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name


def test_it_trains_the_models_own_memory_also_after_a_load():
    model, optimiser = made()
    step(model, optimiser)
    saved = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    model.load_state_dict(saved)
    step(model, optimiser)
    for name in ("linear.weight", "conv.weight"):
        value = model.state_dict()[name]
        assert not torch.equal(value, saved[name]) and (value - 0.5).abs().max() < 0.2


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_factor_scales_both_rates_and_does_not_pile_up(factor):
    model, optimiser = made()
    for _ in range(3):
        step(model, optimiser, factor)
    rates = [group["lr"] for o in optimiser.optimisers for group in o.param_groups]
    assert rates == pytest.approx([1e-2 * factor] * 2)


def test_a_factor_of_zero_moves_nothing():
    model, optimiser = made()
    before = copy.deepcopy(model.state_dict())
    step(model, optimiser, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_are_cleared_and_a_parameter_without_one_stays():
    model, optimiser = made()
    step(model, optimiser)
    assert all(parameter.grad is None for parameter in model.parameters())
    before = copy.deepcopy(model.state_dict())
    model.conv.weight.square().sum().backward()
    optimiser.step(1.0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"conv.weight"}
