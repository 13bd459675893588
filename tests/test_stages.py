"""Training of both stages: the losses against explicit loops, who is trained and who is not, seeds."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny import condition, generator, network, weights
from tiny_tasks import ACTIONS, Tasks, loras, sized_network

from lofa_core.hypernetwork import GaussianResponse
from training import flow
from training.config import Stage1Config, Stage2Config
from training.injection import target_modules
from training.stages import _schedule, _some_tasks, _teacher, stage1_loss, train_stage1, train_stage2


def test_stage_one_loss_is_cross_entropy_of_the_map_plus_the_likelihood_of_dw():
    draw = generator(0)
    W = torch.randn(2, 3, 4, generator=draw)
    A, B = torch.randn(2, 2, 2, 4, generator=draw), 0.02 * torch.randn(2, 2, 3, 2, generator=draw)
    response = GaussianResponse(
        torch.randn(2, 2, 2, 4, generator=draw),
        0.02 * torch.randn(2, 2, 3, 2, generator=draw),
        torch.zeros(0),
        torch.randn(2, 2, 3, generator=draw) - 3.0,
        0.5 * torch.randn(2, 2, 4, generator=draw),
    )
    probability = response.probability(W)
    cells = [(k, n, i, j) for k in range(2) for n in range(2) for i in range(3) for j in range(4)]
    entropy = likelihood = typical = 0.0
    for k, n, i, j in cells:
        delta = sum(B[k, n, i, r].item() * A[k, n, r, j].item() for r in range(2))
        mean = sum(response.B[k, n, i, r].item() * response.A[k, n, r, j].item() for r in range(2))
        responds = abs(delta / W[n, i, j].item()) > 0.02
        p = min(max(probability[k, n, i, j].item(), 1e-6), 1 - 1e-6)
        entropy -= math.log(p if responds else 1 - p)
        log_deviation = (response.row_log_deviation[k, n, i] + response.column_log_deviation[k, n, j]).item()
        likelihood += 0.5 * ((delta - mean) / math.exp(log_deviation)) ** 2 + log_deviation
        typical += log_deviation
    wanted = entropy / len(cells) + 0.3 * (likelihood - typical) / len(cells)
    assert stage1_loss(response, W, A, B, 0.3).item() == pytest.approx(wanted, rel=1e-4)
    assert stage1_loss(response, W, A, B, 0.0).item() == pytest.approx(entropy / len(cells), rel=1e-4)


def test_stage_one_loss_is_lower_for_the_truth_and_does_not_burst_where_it_is_surely_wrong():
    W = weights(4)
    A, B = (
        torch.randn(1, 4, 2, 16, generator=generator(1)),
        0.01 * torch.randn(1, 4, 16, 2, generator=generator(2)),
    )
    deviation = torch.full((1, 4, 16), -6.0), torch.zeros(1, 4, 16)
    right, wrong = (GaussianResponse(a, B, torch.zeros(0), *deviation) for a in (A, 30.0 * A))
    assert stage1_loss(right, W, A, B, 0.0) < 0.2 < stage1_loss(wrong, W, A, B, 0.0) < 14.0


def unreached(module, loss):
    loss.backward()
    return [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_gradients_reach_every_parameter_of_stage_one():
    net, index = network(), torch.arange(16)
    response = net.stage1(net.patches(weights()), index, net.stage1.trunk.project(condition(2)))
    A, B = torch.randn(2, 16, 3, 16), 0.1 * torch.randn(2, 16, 16, 3)
    assert unreached(net.stage1, stage1_loss(response, weights(), A, B, 0.1)) == []
    assert all(parameter.grad is None for parameter in net.stage2.parameters())


def test_gradients_reach_every_parameter_of_stage_two():
    net = network()
    A, B, _ = net(weights(), torch.arange(16), condition(2))
    assert unreached(net.stage2, (A.square().mean() + B.square().mean())) == []


def moved(module, before):
    """Names of parameters that changed, and of those that did not."""
    names = {name: not torch.equal(value, before[name]) for name, value in module.named_parameters()}
    return [n for n, changed in names.items() if changed], [n for n, changed in names.items() if not changed]


def copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def run_stage1(seed=0, steps=4, start=0):
    net = sized_network(start, randomised=False)
    A, B = loras(3, size=0.01)  # about as strong as the threshold: some entries respond, some do not
    net.statistics.fit(A, B)
    settings = Stage1Config(steps=steps, tasks=2, layers=4, likelihood_weight=0.1, seed=seed)
    train_stage1(net, Tasks(), ACTIONS[:3], A, B, settings, lambda step, figures: None)
    return net


def test_stage_one_training_moves_all_of_stage_one_and_nothing_else():
    before = sized_network(0, randomised=False)
    net = run_stage1()
    assert moved(net.stage1, copied(before.stage1))[1] == []
    assert moved(net.stage2, copied(before.stage2))[0] == []


def test_stage_one_training_repeats_by_seed():
    first, again, other = run_stage1(), run_stage1(), run_stage1(seed=1)
    assert all(torch.allclose(v, again.state_dict()[k], atol=1e-6) for k, v in first.state_dict().items())
    key = "stage1.heads.to_A.weight"
    assert not torch.allclose(first.state_dict()[key], other.state_dict()[key], atol=1e-6)


def test_stage_one_training_lowers_its_loss():
    net, (A, B) = run_stage1(steps=1), loras(3, size=0.01)
    trained, data = run_stage1(steps=50), Tasks()
    given, W = data.conditions([data.sentence(a, None) for a in ACTIONS[:3]]), data.stacked_weights()

    def loss(net):
        response = net.stage1(net.patches(W), torch.arange(8), net.stage1.trunk.project(given))
        return stage1_loss(response, W, A, B, 0.1).item()

    assert loss(trained) < loss(net) - 0.02


def run_stage2(tmp_path, net=None, data=None, known=("wave", "jump"), factors=None, **changes):
    net, data = net or sized_network(), data or Tasks()
    A, B = factors or loras(len(known))
    settings = {
        "steps": 3,
        "tasks": 2,
        "clips": 1,
        "fine_prompts": 0.5,
        "seed": 0,
        "learning_rate": 2e-3,
    } | changes
    reports = []
    train_stage2(net, data, list(known), A, B, Stage2Config(**settings), tmp_path / "stage2.pt",
                 lambda step, figures: reports.append((step, dict(figures))))  # fmt: skip
    return net, reports


def test_stage_two_training_moves_all_of_stage_two_and_nothing_else(tmp_path):
    net, data = sized_network(), Tasks()
    started = copy.deepcopy(net)
    started.stage2.start_from(started.stage1)
    base = copied(data.model)
    run_stage2(tmp_path, net, data, steps=4)
    assert moved(net.stage2, copied(started.stage2))[1] == []
    assert moved(net.stage1, copied(started.stage1))[0] == []
    assert all(
        torch.equal(v, started.statistics.state_dict()[k]) for k, v in net.statistics.state_dict().items()
    )
    assert all(torch.equal(value, base[key]) for key, value in data.model.state_dict().items())
    assert all(parameter.grad is None for parameter in data.model.parameters())


def test_stage_two_training_repeats_by_seed_and_leaves_its_average_in_the_file(tmp_path):
    first, again, other = (run_stage2(tmp_path / str(i), seed=i // 2) for i in made(tmp_path, 3))
    assert first[1][-1][0] == 3 and first[1][-1][1] == pytest.approx(again[1][-1][1])
    for key, value in first[0].stage2.state_dict().items():
        assert torch.allclose(value, again[0].stage2.state_dict()[key], atol=1e-6)
    key = "heads.to_B.weight"
    assert not torch.allclose(first[0].stage2.state_dict()[key], other[0].stage2.state_dict()[key], atol=1e-6)
    kept = torch.load(tmp_path / "0" / "stage2.pt", weights_only=True)
    assert all(torch.equal(value, kept[key]) for key, value in first[0].stage2.state_dict().items())


def made(folder, count):
    for number in range(count):
        (folder / str(number)).mkdir()
    return range(count)


@torch.no_grad()
def velocity_with(data, A, B, x, times, text):
    """The base model's velocity with dW = B A really added to its weights. A [8, r, in], B [8, out, r]."""
    merged = copy.deepcopy(data.model)
    names = [layer.name for layer in data.weights.model.layers]
    for number, module in enumerate(target_modules(merged, names).values()):
        module.weight += B[number] @ A[number]
    return merged(x, times * 1000.0, text, return_dict=False)[0]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("fine", [0.0, 1.0])
def test_stage_two_losses_of_the_first_step_are_those_of_the_equations(tmp_path, known, fine):
    """One task with one clip: what the step draws is known, and Stage II still says what Stage I says."""
    data, net, (A, B) = Tasks(("wave",), clips=1), sized_network(), loras(1)
    W, index = data.stacked_weights(), torch.arange(8)
    with torch.no_grad():
        first = net.stage1(
            net.patches(W), index, net.stage1.trunk.project(data.conditions(["someone can wave"]))
        )
    known_actions = ("wave",) if known else ()
    _, reports = run_stage2(
        tmp_path, net, data, known_actions, (A, B), steps=1, tasks=1, clips=1, fine_prompts=fine,
        teacher_guidance=1.4,
    )  # fmt: skip
    torch.manual_seed(0)
    clean = data.clips.latents.float()
    noise, times = torch.randn_like(clean), flow.random_times(1)
    x = flow.noised(clean, noise, times)
    sentence, coarse = data.prompts(["a person can wave"]), data.coarse()
    said = velocity_with(data, first.A[0], first.B[0], x, times, sentence if fine else coarse)
    nothing = torch.zeros_like(A[0]), torch.zeros_like(B[0])
    if known:
        teacher = velocity_with(data, A[0], B[0], x, times, coarse)
    else:
        guided, unguided = (velocity_with(data, *nothing, x, times, text) for text in (sentence, coarse))
        teacher = unguided + 1.4 * (guided - unguided)
    shown = data.clips.action_weights()
    wanted = {
        "diffusion": (shown * (said - (noise - clean)).square()).mean().item(),
        "distillation": (shown * (said - teacher).square()).mean().item(),
    }
    if known:
        s = net.statistics
        a = [(first.A[0, n] - A[0, n]).abs().mean() / s.A_scale[n] for n in range(8)]
        b = [(first.B[0, n] - B[0, n]).abs().mean() / s.B_scale[n] for n in range(8)]
        wanted["reconstruction"] = (sum(a) / 8 + sum(b) / 8).item()
    assert reports[0][1] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["reconstruction", "diffusion", "distillation"])
def test_each_loss_alone_trains_stage_two_and_goes_down(tmp_path, name):
    only = {
        f"{other}_weight": float(other == name) for other in ("reconstruction", "diffusion", "distillation")
    }
    data = Tasks(("wave", "jump"), clips=1)
    settings = {"fine_prompts": 0.0, "tasks": 4} | only
    _, [(_, first)] = run_stage2(tmp_path, data=data, steps=1, **settings)
    _, [(step, last)] = run_stage2(tmp_path, data=data, steps=60, **settings)
    assert step == 60 and last[name] < 0.9 * first[name]
    assert ("distillation" in last) == (name == "distillation")


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_teacher_is_the_own_lora_under_the_coarse_prompt_or_the_guided_fine_prompt(guidance):
    data, (A, B) = Tasks(), loras(2)
    names = [layer.name for layer in data.weights.model.layers]
    modules, draw = target_modules(data.model, names), generator(3)
    x, times = torch.randn(8, 16, 2, 4, 4, generator=draw), torch.rand(8, generator=draw)
    fine, coarse = data.prompts(ACTIONS).repeat_interleave(2, 0), data.coarse()
    rows = torch.tensor([-1, 1, -1, 0])
    found = _teacher(data.model, modules, names, x, times, fine, coarse, rows, A, B, 2, guidance)
    for task, row in enumerate(rows.tolist()):
        for clip in (2 * task, 2 * task + 1):
            part = slice(clip, clip + 1)
            a, b, text = (A[row], B[row], coarse) if row >= 0 else (0 * A[0], 0 * B[0], fine[part])
            wanted = velocity_with(data, a, b, x[part], times[part], text)
            if row < 0:
                unsaid = velocity_with(data, a, b, x[part], times[part], coarse)
                wanted = guidance * wanted + (1.0 - guidance) * unsaid
            assert torch.allclose(found[part], wanted, atol=1e-5)


def test_a_quarter_of_the_tasks_have_a_lora_of_their_own_where_there_are_any():
    rng = np.random.default_rng(0)
    for _ in range(20):
        tasks = _some_tasks(ACTIONS, ["wave"], 11, rng)
        assert len(tasks) == 11 and tasks[:2] == ["wave"] * 2 and set(tasks) <= set(ACTIONS)
    assert len(_some_tasks(ACTIONS, [], 5, rng)) == 5
    assert {t for _ in range(50) for t in _some_tasks(ACTIONS, ["wave"], 4, rng)} == set(ACTIONS)


def test_the_schedule_warms_up_over_a_twentieth_and_falls_to_a_fiftieth():
    values = [_schedule(step, 100) for step in range(100)]
    assert values[:5] == sorted(values[:5]) and values[5:] == sorted(values[5:], reverse=True)
    assert values[0] == pytest.approx(0.2) and max(values) <= 1.0 and values[4] > 0.99
    assert values[-1] == pytest.approx(0.02, abs=0.001) and _schedule(0, 1) == pytest.approx(1.0)
