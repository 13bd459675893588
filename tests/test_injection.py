"""LoRAs as tensors in a running model: what they do is what adding B A to the weights does, task by task."""

import copy

import pytest
import torch
from tiny import generator

from lofa_core.base_models import WAN_KINDS
from training.denoisers import WanDenoiser
from training.injection import injected
from training.miniature import transformer

NAMES = [f"blocks.{depth}.{kind}" for depth in range(2) for kind in WAN_KINDS]
DIM, RANK = 48, 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = transformer.build(DIM, 2).requires_grad_(False).eval()
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.2)
        for (
            block
        ) in model.blocks:  # an untrained gate is nearly closed: open it, so that every layer is heard
            block.scale_shift_table.normal_(std=0.7)
    return model


def target_modules(model, names):
    return WanDenoiser(model).modules(names)


def factors(tasks, seed=0):
    draw = generator(seed)
    A = {name: 0.3 * torch.randn(tasks, RANK, DIM, generator=draw) for name in NAMES}
    return A, {name: 0.3 * torch.randn(tasks, DIM, RANK, generator=draw) for name in NAMES}


def inputs(batch, seed=0):
    draw = generator(seed)
    return (
        torch.randn(batch, 16, 2, 4, 4, generator=draw),
        1000.0 * torch.rand(batch, generator=draw),
        torch.randn(batch, 7, 64, generator=draw),
    )


def run(model, given):
    return model(*given, return_dict=False)[0]


def test_names_lead_to_the_modules_that_hold_those_weights(model):
    modules = target_modules(model, NAMES)
    assert list(modules) == NAMES and len({id(module) for module in modules.values()}) == 16
    block = model.blocks[1]
    assert modules["blocks.1.self_attn.q"] is block.attn1.to_q
    assert modules["blocks.1.self_attn.o"] is block.attn1.to_out[0]
    assert modules["blocks.1.cross_attn.v"] is block.attn2.to_v
    with pytest.raises(AttributeError):
        target_modules(model, ["blocks.2.self_attn.q"])


@torch.no_grad()
def test_every_task_gets_its_own_w_plus_b_a(model):
    (A, B), given = factors(3), inputs(6)
    with injected(target_modules(model, NAMES), A, B):
        found = run(model, given)
    for task in range(3):
        merged, part = copy.deepcopy(model), slice(2 * task, 2 * task + 2)
        for name, module in target_modules(merged, NAMES).items():
            module.weight += B[name][task] @ A[name][task]
        assert torch.allclose(found[part], run(merged, [x[part] for x in given]), atol=1e-5)
    assert (found - run(model, given)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_each_layer_alone_is_heard(model, name):
    (A, B), given = factors(1), inputs(1)
    with injected(target_modules(model, [name]), {name: A[name]}, {name: B[name]}):
        heard = run(model, given)
    assert (heard - run(model, given)).abs().max() > 1e-5


@torch.no_grad()
def test_the_order_of_tasks_does_not_matter(model):
    (A, B), given = factors(3), inputs(6)
    modules, order = target_modules(model, NAMES), torch.tensor([2, 0, 1])
    rows = torch.tensor([4, 5, 0, 1, 2, 3])
    with injected(modules, A, B):
        found = run(model, given)
    with injected(modules, *({name: value[order] for name, value in part.items()} for part in (A, B))):
        shuffled = run(model, [x[rows] for x in given])
    assert torch.allclose(shuffled, found[rows], atol=1e-5) and not torch.allclose(shuffled, found, atol=1e-3)


@torch.no_grad()
def test_one_task_may_have_any_batch_and_b_of_zero_changes_nothing(model):
    (A, B), given = factors(1), inputs(5)
    modules = target_modules(model, NAMES)
    with injected(modules, A, B):
        together = run(model, given)
        alone = torch.cat([run(model, [x[i : i + 1] for x in given]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)
    with injected(modules, A, {name: torch.zeros_like(value) for name, value in B.items()}):
        unchanged = run(model, given)
    assert torch.allclose(unchanged, run(model, given), atol=1e-6)


@torch.no_grad()
def test_the_model_is_itself_again_afterwards_also_after_an_error(model):
    (A, B), given = factors(1), inputs(2)
    before, weights = run(model, given), {k: v.clone() for k, v in model.state_dict().items()}
    modules = target_modules(model, NAMES)
    with injected(modules, A, B):
        pass
    with pytest.raises(KeyError), injected(modules, A, B):
        raise KeyError
    with pytest.raises(KeyError), injected(modules, A, dict(list(B.items())[:-1])):
        pass
    assert torch.allclose(run(model, given), before, atol=1e-6)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_gradients_reach_every_factor_and_no_weight(model):
    A, B = factors(2)
    for value in (*A.values(), *B.values()):
        value.requires_grad_()
    with injected(target_modules(model, NAMES), A, B):
        run(model, inputs(2)).square().mean().backward()
    for value in (*A.values(), *B.values()):
        assert value.grad is not None and all(task.abs().max() > 0 for task in value.grad)
    assert all(parameter.grad is None for parameter in model.parameters())
