"""Muon and AdamW behind one object: everything moves, by the right one, in the model's own memory."""

import copy

import pytest
import torch
from torch import nn

from training.optimisers import MuonAdamW, orthogonalised, set_learning_rate, warm_up_and_cosine

RATE = 1e-2


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
    set_learning_rate(optimiser, RATE * factor)
    optimiser.step()
    optimiser.zero_grad()


def made(**kwargs):
    model = Parts()
    return model, MuonAdamW(model, RATE, **({"adamw_names": ("embedding",)} | kwargs))


def test_every_parameter_moves_and_what_is_frozen_stays():
    model, optimiser = made()
    before = copy.deepcopy(model.state_dict())
    step(model, optimiser)
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert same == ["frozen"]


@pytest.mark.parametrize("shape", [(3, 6, 10), (2, 10, 6), (4, 5, 5), (1, 2, 40)])
def test_orthogonalised_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    torch.manual_seed(1)
    matrices = torch.randn(shape) * torch.tensor([1e-3, 1.0, 50.0, 7.0])[: shape[0]].view(-1, 1, 1)
    found = orthogonalised(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ found @ v.mT  # diagonal where the vectors are the same
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert 0.6 < diagonal.min() and diagonal.max() < 1.25
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert torch.equal(orthogonalised(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_the_steps_are_those_of_torchs_own_optimisers():
    model, optimiser = made()
    other, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
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
        found = model.state_dict()[name]
        if name in ("linear.weight", "conv.weight"):  # torch's Muon works in bfloat16
            moves = torch.stack([found - start[name], value - start[name]]).flatten(1)
            assert torch.cosine_similarity(*moves, dim=0) > 0.995, name
            assert moves[0].norm() == pytest.approx(moves[1].norm().item(), rel=0.03), name
        else:
            assert torch.allclose(found, value, atol=1e-4), name


def test_matrices_of_one_shape_share_a_product_but_not_their_state():
    torch.manual_seed(0)
    both = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)])
    alone = copy.deepcopy(both[1])
    together = MuonAdamW(both, RATE, adamw_names=("none",))
    single = MuonAdamW(alone, RATE, adamw_names=("none",))
    x = torch.randn(7, 5)
    for _ in range(3):
        (both[0](x).square().sum() + both[1](x).pow(4).sum()).backward()
        together.step()
        together.zero_grad()
        alone(x).pow(4).sum().backward()
        single.step()
        single.zero_grad()
    assert torch.allclose(both[1].weight, alone.weight, atol=1e-6)
    assert not torch.allclose(both[0].weight, alone.weight, atol=1e-2)


def test_it_trains_the_models_own_memory_also_after_a_load():
    model, optimiser = made()
    step(model, optimiser)
    saved = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    model.load_state_dict(saved)
    step(model, optimiser)
    for name in ("linear.weight", "conv.weight"):
        value = model.state_dict()[name]
        assert not torch.equal(value, saved[name]) and (value - 0.5).abs().max() < 0.2


def test_the_factor_scales_every_step_and_does_not_pile_up():
    full, quarter = made(), made()
    moved = []
    for (model, optimiser), factor in ((full, 1.0), (quarter, 0.25)):
        before = copy.deepcopy(model.state_dict())
        step(model, optimiser, 1.0)  # a first step with another factor leaves no trace in the second
        model.load_state_dict(before)
        step(model, optimiser, factor)
        moved.append({name: value - before[name] for name, value in model.state_dict().items()})
    for name, change in moved[0].items():
        assert torch.allclose(moved[1][name], 0.25 * change, atol=1e-6), name


def test_a_factor_of_zero_moves_nothing():
    model, optimiser = made()
    before = copy.deepcopy(model.state_dict())
    step(model, optimiser, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_are_cleared_and_only_momentum_moves_a_matrix_without_one():
    model, optimiser = made()
    step(model, optimiser)
    assert all(parameter.grad is None for parameter in model.parameters())
    before = copy.deepcopy(model.state_dict())
    model.conv.weight.square().sum().backward()
    optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"conv.weight", "linear.weight"}


def test_a_loaded_state_goes_on_exactly_where_it_was():
    model, optimiser = made()
    for _ in range(3):
        step(model, optimiser)
    copied, fresh = made()
    copied.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for _ in range(3):
        step(model, optimiser, 0.7)
        step(copied, fresh, 0.7)
    assert all(torch.equal(value, copied.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_rate_climbs_a_line_and_falls_a_cosine():
    factors = [warm_up_and_cosine(step, 100, 10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1, abs=1e-3) and factors[4] == pytest.approx(0.5, abs=0.01)
    assert max(factors) == factors[9] > 0.97 and factors[100] == pytest.approx(0.02)
    assert factors[50] == pytest.approx(0.51) and factors[9:] == sorted(factors[9:], reverse=True)
