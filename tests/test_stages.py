"""What both stages learn: the losses against explicit loops, who is trained and who is not, seeds."""

import copy
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from tiny import condition, generator, network, text, weights
from tiny_tasks import ACTIONS, Tasks, loras, sized_network

from lofa_core.hypernetwork import GaussianResponse
from training import flow
from training.config import Stage1Config, Stage2Config
from training.denoisers import WanDenoiser
from training.factors import Factors
from training.lora_dataset import LoRADataset
from training.over_base import padded
from training.stage1 import Stage1, stage1_losses
from training.stages import Stage2
from training.trainer import draw as drawn
from training.trainer import noise_from, train


def test_stage_one_losses_are_cross_entropy_of_the_map_and_the_likelihood_of_dw():
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
    found = stage1_losses(response, W, A, B)
    assert found["cross_entropy"].item() == pytest.approx(entropy / len(cells), rel=1e-4)
    assert found["likelihood"].item() == pytest.approx((likelihood - typical) / len(cells), rel=1e-4)


def test_under_bfloat16_stage1s_losses_are_those_of_float32():
    draw = generator(8)
    A, B = 0.1 * torch.randn(2, 3, 4, 16, generator=draw), torch.randn(2, 3, 16, 4, generator=draw)
    W = 0.3 * torch.randn(3, 16, 16, generator=draw)
    sure = GaussianResponse(A, B, torch.zeros(0), torch.full((2, 3, 16), -6.0), torch.zeros(2, 3, 16))
    plain = stage1_losses(sure, W, A, B)
    with torch.autocast("cpu", torch.bfloat16):
        found = stage1_losses(sure, W, A, B)
    assert {name: value.item() for name, value in found.items()} == {
        name: pytest.approx(value.item(), rel=1e-5) for name, value in plain.items()
    }


def test_stage_one_loss_is_lower_for_the_truth_and_does_not_burst_where_it_is_surely_wrong():
    W = weights(4)
    A, B = (
        torch.randn(1, 4, 2, 16, generator=generator(1)),
        0.01 * torch.randn(1, 4, 16, 2, generator=generator(2)),
    )
    deviation = torch.full((1, 4, 16), -6.0), torch.zeros(1, 4, 16)
    right, wrong = (GaussianResponse(a, B, torch.zeros(0), *deviation) for a in (A, 30.0 * A))
    right, wrong = (stage1_losses(response, W, A, B)["cross_entropy"] for response in (right, wrong))
    assert right < 0.2 < wrong < 14.0


def unreached(module, loss):
    loss.backward()
    return [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_gradients_reach_every_parameter_of_stage_one():
    net = network()
    response = net.stage1(net.look_at(weights(), torch.arange(16)), net.stage1.trunk.project(text(count=2)))
    A, B = torch.randn(2, 16, 3, 16), 0.1 * torch.randn(2, 16, 16, 3)
    assert unreached(net.stage1, sum(stage1_losses(response, weights(), A, B).values())) == []
    assert all(parameter.grad is None for parameter in net.stage2.parameters())


def test_gradients_reach_every_parameter_of_stage_two():
    net = network()
    A, B, _ = net(weights(), torch.arange(16), text(count=2))
    assert unreached(net.stage2, (A.square().mean() + B.square().mean())) == []


def moved(module, before):
    """Names of parameters that changed, and of those that did not."""
    names = {name: not torch.equal(value, before[name]) for name, value in module.named_parameters()}
    return [n for n, changed in names.items() if changed], [n for n, changed in names.items() if not changed]


def copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def dataset(actions, factors):
    return LoRADataset(factors, list(actions))


def run(stage, folder):
    train(stage, stage.settings, folder, Accelerator(cpu=True), Console(file=io.StringIO()))
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def run_stage1(folder, seed=0, steps=4, start=0):
    net = sized_network(start, randomised=False)
    known = loras(3, size=0.01)  # about as strong as the threshold: some entries respond, some do not
    net.statistics["48x48"].fit(known.A[0], known.B[0])
    settings = Stage1Config(
        steps=steps, tasks=2, layers=4, warm_up=1, likelihood_weight=0.1, seed=seed, validate_every=0
    )
    run(Stage1(net, Tasks(), dataset(ACTIONS[:3], known), None, settings, torch.device("cpu")), folder)
    return net


def test_stage_one_training_moves_all_of_stage_one_and_nothing_else(tmp_path):
    before = sized_network(0, randomised=False)
    net = run_stage1(tmp_path)
    assert moved(net.stage1, copied(before.stage1))[1] == []
    assert moved(net.stage2, copied(before.stage2))[0] == []


def test_stage_one_training_repeats_by_seed(tmp_path):
    first, again, other = (run_stage1(tmp_path / str(n), seed=n // 2) for n in range(3))
    assert all(torch.allclose(v, again.state_dict()[k], atol=1e-6) for k, v in first.state_dict().items())
    key = "stage1.heads.48x48.to_A.weight"
    assert not torch.allclose(first.state_dict()[key], other.state_dict()[key], atol=1e-6)


def test_stage_one_training_lowers_its_loss(tmp_path):
    net, known = run_stage1(tmp_path / "short", steps=1), loras(3, size=0.01)
    trained, data = run_stage1(tmp_path / "long", steps=50), Tasks()
    (W,) = data.weights_by_shape()
    given = data.conditions([data.condition(action, None) for action in ACTIONS[:3]])

    def loss(net):
        response = net.stage1(net.look_at(W, torch.arange(8)), net.stage1.trunk.project(given))
        return stage1_losses(response, W, known.A[0], known.B[0])["cross_entropy"].item()

    assert loss(trained) < loss(net) - 0.02


def stage2(net=None, data=None, known=ACTIONS[:2], factors=None, **changes):
    settings = {
        "steps": 3, "tasks": 2, "clips": 1, "fine_prompts": 0.5, "warm_up": 1, "validate_every": 0,
    } | changes  # fmt: skip
    known = dataset(known, factors or loras(len(known)))
    return Stage2(
        net or sized_network(), data or Tasks(), known, None, Stage2Config(**settings), torch.device("cpu")
    )


def run_stage2(folder, *arguments, **changes):
    stage = stage2(*arguments, **changes)
    return stage, run(stage, folder)


def test_stage_two_training_moves_all_of_stage_two_and_nothing_else(tmp_path):
    net, data = sized_network(), Tasks()
    started = copy.deepcopy(net)
    started.stage2.start_from(started.stage1)
    base = copied(data.model)
    run_stage2(tmp_path, net, data, steps=4, with_lora=0.5)
    assert moved(net.stage2, copied(started.stage2))[1] == []
    assert moved(net.stage1, copied(started.stage1))[0] == []
    assert all(
        torch.equal(v, started.statistics.state_dict()[k]) for k, v in net.statistics.state_dict().items()
    )
    assert all(torch.equal(value, base[key]) for key, value in data.model.state_dict().items())
    assert all(parameter.grad is None for parameter in data.model.parameters())


def test_stage_two_training_repeats_by_seed_and_averages_its_weights(tmp_path):
    (first, log), (again, same), (other, _) = (run_stage2(tmp_path / str(n), seed=n // 2) for n in range(3))
    assert len(log) == 3 and log == same
    average, last = first.average.state_dict(), first.hypernetwork.stage2.state_dict()
    key = "heads.48x48.to_B.weight"
    assert torch.equal(average[key], again.average.state_dict()[key])
    assert not torch.allclose(average[key], other.average.state_dict()[key], atol=1e-6)
    assert not torch.equal(average[key], last[key])


def test_the_average_is_exponential_with_a_warm_up():
    stage = stage2(ema_decay=0.9)
    key = "heads.48x48.to_B.weight"
    kept = stage.average.state_dict()[key].clone()
    for step in range(100):
        with torch.no_grad():
            stage.hypernetwork.stage2.heads["48x48"].to_B.weight.fill_(float(step))
        stage.after_step(step)
        decay = min(0.9, (1 + step) / (10 + step))
        kept = decay * kept + (1.0 - decay) * float(step)
        assert torch.allclose(stage.average.state_dict()[key], kept, atol=1e-4)


@torch.no_grad()
def velocity_with(data, A, B, x, times, prompts):
    """The base model's velocity with dW = B A really added to its weights. A [8, r, in], B [8, out, r]."""
    merged = copy.deepcopy(data.model)
    names = [layer.name for layer in data.weights.model.layers]
    for number, module in enumerate(WanDenoiser(merged).modules(names).values()):
        module.weight += B[number] @ A[number]
    return merged(x, times * 1000.0, prompts.states, return_dict=False)[0]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("fine", [0.0, 1.0])
def test_stage_two_losses_of_the_first_step_are_those_of_the_equations(tmp_path, known, fine):
    """One task with one clip: what the step draws is known, and Stage II still says what Stage I says."""
    data, net, own = Tasks(ACTIONS[:1], clips=1), sized_network(), loras(1)
    (W,), (A, B) = data.weights_by_shape(), (own.A[0], own.B[0])
    with torch.no_grad():
        given = net.stage1.trunk.project(data.conditions([{"text": "someone can wave"}]))
        first = net.stage1(net.look_at(W, torch.arange(8)), given)
    known_actions = ACTIONS[:1] if known else []
    _, log = run_stage2(
        tmp_path, net, data, known_actions, own if known else own[:0], steps=1, tasks=1, clips=1,
        fine_prompts=fine, teacher_guidance=1.4,
    )  # fmt: skip
    rng = drawn(0, 0, 0)
    rng.integers(1), rng.integers(1, size=1)  # the task, its clip
    noises = noise_from(rng)
    clean = data.latents_of(ACTIONS[0]).float()
    noise, times = torch.randn(clean.shape, generator=noises), flow.random_times(1, noises)
    x = flow.noised(clean, noise, times)
    sentence, coarse = data.prompts(["a person can wave"]), data.coarse()
    found = velocity_with(data, first.A[0], first.B[0], x, times, sentence if fine else coarse)
    nothing = torch.zeros_like(A[0]), torch.zeros_like(B[0])
    if known:
        teacher = velocity_with(data, A[0], B[0], x, times, coarse)
    else:
        guided, unguided = (velocity_with(data, *nothing, x, times, said) for said in (sentence, coarse))
        teacher = unguided + 1.4 * (guided - unguided)
    shown = data.loss_weights(ACTIONS[0])
    wanted = {
        "diffusion": (shown * (found - (noise - clean)).square()).mean().item(),
        "distillation": (shown * (found - teacher).square()).mean().item(),
    }
    if known:
        s = net.statistics["48x48"]
        a = [(first.A[0, n] - A[0, n]).abs().mean() / s.A_scale[n] for n in range(8)]
        b = [(first.B[0, n] - B[0, n]).abs().mean() / s.B_scale[n] for n in range(8)]
        wanted["reconstruction"] = (sum(a) / 8 + sum(b) / 8).item()
    else:
        wanted["reconstruction"] = 0.0
    weights = {"diffusion": 0.25, "distillation": 1.0, "reconstruction": 0.17}
    wanted["loss"] = sum(weights[name] * value for name, value in wanted.items())
    assert log[0] == pytest.approx(wanted | {"step": 1}, rel=1e-4)


@pytest.mark.parametrize("name", ["reconstruction", "diffusion", "distillation"])
def test_each_loss_alone_trains_stage_two_and_goes_down(tmp_path, name):
    only = {
        f"{other}_weight": float(other == name) for other in ("reconstruction", "diffusion", "distillation")
    }
    data = Tasks(ACTIONS[:2], clips=1)
    settings = {"fine_prompts": 0.0, "tasks": 4, "with_lora": 1.0} | only
    _, log = run_stage2(tmp_path, data=data, steps=60, **settings)
    first, last = (sum(line[name] for line in part) for part in (log[:6], log[-6:]))
    assert len(log) == 60 and last < 0.9 * first
    assert ("distillation" in log[0]) == (name == "distillation")
    assert ("reconstruction" in log[0]) == (name == "reconstruction")


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_teacher_is_the_own_lora_under_the_coarse_prompt_or_the_guided_fine_prompt(guidance):
    data, own, noises = Tasks(), loras(2), generator(3)
    stage = stage2(data=data, factors=own, clips=2, teacher_guidance=guidance)
    A, B = own.A[0], own.B[0]
    x, times = torch.randn(8, 16, 2, 4, 4, generator=noises), torch.rand(8, generator=noises)
    fine, coarse = data.prompts(ACTIONS).repeated(2), data.coarse()
    rows = torch.tensor([-1, 1, -1, 0])
    found = stage._teacher(x, times, fine, rows)
    for task, row in enumerate(rows.tolist()):
        for clip in (2 * task, 2 * task + 1):
            part = slice(clip, clip + 1)
            a, b, told = (A[row], B[row], coarse) if row >= 0 else (0 * A[0], 0 * B[0], fine[part])
            wanted = velocity_with(data, a, b, x[part], times[part], told)
            if row < 0:
                unsaid = velocity_with(data, a, b, x[part], times[part], coarse)
                wanted = guidance * wanted + (1.0 - guidance) * unsaid
            assert torch.allclose(found[part], wanted, atol=1e-5)


def test_the_first_items_of_a_step_have_a_lora_of_their_own_where_there_are_any():
    stage = stage2(known=ACTIONS[:1], tasks=11, with_lora=0.25)
    tasks = [stage.tasks(step, range(11)) for step in range(20)]
    assert all(names[:3] == ["wave"] * 3 for names in tasks)
    assert {name for names in tasks for name in names[3:]} == set(ACTIONS)
    none = Factors((torch.zeros(0, 8, 2, 48),), (torch.zeros(0, 8, 48, 2),))
    alone = stage2(known=(), factors=none, tasks=5)
    assert {name for step in range(20) for name in alone.tasks(step, range(5))} == set(ACTIONS)


def test_an_item_of_a_step_is_the_same_task_whoever_takes_it():
    stage = stage2(tasks=8)
    together = stage.tasks(3, range(8))
    assert stage.tasks(3, range(0, 8, 2)) == together[::2] and stage.tasks(3, [7]) == together[7:]
    assert stage.tasks(4, range(8)) != together


@torch.no_grad()
def test_a_network_that_attends_to_padding_is_trained_with_the_padding_it_is_used_with():
    net, given = sized_network(), condition(tokens=4, width=64)
    assert torch.equal(padded(text(given), net)["text"].values, given)
    net.conditions["text"] = replace(net.conditions["text"], padded_to=512)
    found = padded(text(given), net)["text"].values
    assert found.shape == (1, 512, 64) and torch.equal(found[:, :4], given) and not found[:, 4:].any()
    seen = []
    stage = Stage1(
        net, Tasks(), dataset(ACTIONS[:3], loras(3)), None, Stage1Config(tasks=2), torch.device("cpu")
    )
    stage.losses(lambda looks, given: seen.append(given) or stage.module(looks, given), 0, [0, 1])
    assert seen[0]["text"].values.shape == (2, 512, 64)
