"""Both stages with several kinds of condition and layers of several shapes: each item as if it were alone."""

import copy
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_stages import copied, dataset, moved, run
from tiny import CONFIG, POSE, STYLE, condition, describe, generator, network
from tiny_tasks import ACTIONS, DIM, RANK, TEXT, Tasks, loras
from tiny_unet import PictureTasks, denoiser, unet_loras, unet_network

from lofa_core.conditions import Given
from lofa_core.descriptions import ConditionDescription
from training.config import EndToEndConfig, Stage1Config, Stage2Config
from training.end_to_end import EndToEnd
from training.looks import looks_at, names_by_shape
from training.loop import Run
from training.stage1 import Stage1, stage1_losses
from training.stages import Stage2
from training.trainer import draw as drawn
from training.trainer import noise_from
from training.validation import response_cosines, weight_cosines

CPU = torch.device("cpu")
WORDS = ConditionDescription("text", TEXT, coarse_prompt="a person moves")
TOLD = dict(zip(ACTIONS, [("text",), ("pose",), ("style",), ("text", "style")], strict=True))


class ManyKinds(Tasks):
    """Each task is told by kinds of its own."""

    kinds = ("text", "pose", "style")

    def condition(self, action, rng):
        return {kind: action for kind in TOLD[action]}

    def conditions(self, told):
        found = {}
        for kind in self.kinds:
            rows = [self._values(kind, one.get(kind)) for one in told]
            strength = torch.tensor([float(kind in one) for one in told])
            if strength.any():
                found[kind] = Given(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), strength)
        return found

    def _values(self, kind, action):
        if kind == "pose":
            seed, shown = (0, 0.0) if action is None else (ACTIONS.index(action), 1.0)
            return shown * torch.rand(3, *POSE.size, generator=generator(seed))
        if action is None:
            return torch.zeros(1, TEXT if kind == "text" else STYLE.width)
        if kind == "text":
            return self.prompts([f"someone can {action}"]).states[0, :-1]
        return condition(tokens=2 + ACTIONS.index(action), seed=ACTIONS.index(action), width=STYLE.width)[0]


def many_network(randomised=True):
    base = describe(depths=1, shape=(DIM, DIM))
    return network(0, replace(CONFIG, rank=RANK), base, randomised, (WORDS, POSE, STYLE))


def settings(kind, **changes):
    common = {"steps": 1, "tasks": 8, "warm_up": 1, "validate_every": 0, "seed": 1}
    return kind(**(common | changes))


def encoders(module):
    """Names of the parameters that belong to one kind of condition."""
    parts = ("condition_proj.", "modality.", "summary.")
    return {
        name for name, _ in module.named_parameters() if name.startswith(tuple(f"trunk.{x}" for x in parts))
    }


def test_a_stage_one_step_with_several_kinds_is_the_mean_of_its_items_alone(tmp_path):
    net, data, known = many_network(), ManyKinds(), loras(4, size=0.01)
    configured = settings(Stage1Config, layers=8, tasks=16)
    stage = Stage1(net, data, dataset(ACTIONS, known), None, configured, CPU)
    tasks = stage.tasks(0, range(16))
    assert {kind for task in tasks for kind in TOLD[task]} == set(data.kinds)
    (W,), wanted = data.weights_by_shape(), {"cross_entropy": 0.0, "likelihood": 0.0, "size": 0.0}
    with torch.no_grad():
        for task in tasks:
            values = {kind: data._values(kind, task)[None] for kind in TOLD[task]}
            own = known[ACTIONS.index(task) : ACTIONS.index(task) + 1]
            given = net.stage1.trunk.project({kind: Given(value) for kind, value in values.items()})
            response = net.stage1(net.look_at(W, torch.arange(8)), given)
            for name, value in stage1_losses(response, W, own.A[0], own.B[0]).items():
                wanted[name] += value.item() / 16
    before = copied(net.stage1)
    (log,) = run(stage, tmp_path)
    assert {name: log[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert encoders(net.stage1) <= set(moved(net.stage1, before)[0]) and len(encoders(net.stage1)) > 20


def test_a_stage_two_step_with_several_kinds_predicts_each_item_as_if_it_were_alone(tmp_path):
    net, data = many_network(), ManyKinds()
    configured = settings(Stage2Config, clips=1, with_lora=0.5, steps=2)
    stage = Stage2(net, data, dataset(ACTIONS[:2], loras(2)), None, configured, CPU)
    told = [data.condition(action, None) for action in ACTIONS]
    with torch.no_grad():
        together = stage.module(stage.looks, data.conditions(told))
        for row, one in enumerate(told):
            alone = stage.module(stage.looks, data.conditions([one]))
            assert torch.allclose(together[row : row + 1].flat(), alone.flat(), atol=1e-5)
    assert (together.flat()[0] - together.flat()[1]).abs().max() > 1e-2
    assert {kind for task in stage.tasks(0, range(8)) for kind in TOLD[task]} == set(data.kinds)
    first, second = copied(net.stage1), copied(net.stage2)
    log = run(stage, tmp_path)
    assert len(log) == 2 and all(math.isfinite(value) for line in log for value in line.values())
    assert moved(net.stage2, second)[1] == [] and moved(net.stage1, first)[0] == []
    stage.finish()
    assert encoders(net.stage2) <= set(moved(net.stage2, second)[0])


# ------------------------------------------------------------
# Layers of several shapes, over a UNet


def test_a_stage_one_step_over_several_shapes_is_the_mean_over_its_layers(tmp_path):
    data = PictureTasks()
    net, known = unet_network(data), unet_loras(data, 4, size=0.02)
    stage = Stage1(net, data, dataset(ACTIONS, known), None, settings(Stage1Config, layers=12, tasks=2), CPU)
    rows = stage._rows(0)
    assert sum(map(len, rows)) == 12 and sum(len(own) > 0 for own in rows) > 1
    items = [ACTIONS.index(task) for task in stage.tasks(0, range(2))]
    given = net.stage1.trunk.project(data.conditions([{"identity": item} for item in items]))
    wanted = {"cross_entropy": 0.0, "likelihood": 0.0, "size": 0.0}
    shapes = zip(net.base.by_shape().values(), data.weights_by_shape(), known.pairs(), rows, strict=True)
    with torch.no_grad():
        for places, W, (A, B), own in shapes:
            for row in own.tolist():
                one = slice(row, row + 1)
                response = net.stage1(net.look_at(W[one], torch.tensor(places[one])), given)
                for name, value in stage1_losses(
                    response, W[one], A[items][:, one], B[items][:, one]
                ).items():
                    wanted[name] += value.item() / 12
    before = copied(net.stage1)
    (log,) = run(stage, tmp_path)
    assert {name: log[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    shared = [name for name, _ in net.stage1.named_parameters() if name.startswith("trunk.blocks")]
    assert set(shared) <= set(moved(net.stage1, before)[0])


def test_every_layer_of_every_shape_has_its_turn_in_stage_one():
    data = PictureTasks()
    stage = Stage1(
        unet_network(data), data, dataset(ACTIONS, unet_loras(data, 4)), None,
        settings(Stage1Config, layers=20), CPU,
    )  # fmt: skip
    seen = [set() for _ in stage.base]
    for step in range(40):
        rows = stage._rows(step)
        assert (
            sum(map(len, rows)) == 20 == len({(n, row) for n, own in enumerate(rows) for row in own.tolist()})
        )
        for own, now in zip(seen, rows, strict=True):
            own.update(now.tolist())
    assert seen == [set(range(len(W))) for W in stage.base]


@torch.no_grad()
def said_with(data, groups, deltas, x, times, prompts):
    """What the UNet says with dW really added to its weights."""
    merged = denoiser(copy.deepcopy(data.model))
    for names, delta in zip(groups, deltas, strict=True):
        for row, module in enumerate(merged.modules(names).values()):
            module.weight += delta[0, row]
    return merged(x, times, prompts)


def test_stage_two_losses_over_a_unet_are_those_of_the_equations(tmp_path):
    """One task with one clip, and Stage II still says what Stage I says."""
    data = PictureTasks(ACTIONS[:1], clips=1)
    net, own = unet_network(data), unet_loras(data, 1)
    weights, groups = data.weights_by_shape(), names_by_shape(net)
    with torch.no_grad():
        given = net.stage1.trunk.project(data.conditions([{"identity": 0}]))
        first = [net.stage1(look, given) for look in looks_at(net, weights)]
    configured = settings(Stage2Config, tasks=1, clips=1, fine_prompts=0.0, steps=2)
    stage = Stage2(net, data, dataset(ACTIONS[:1], own), None, configured, CPU)
    before, unet = copied(net.stage2), copied(data.model)
    log, _ = run(stage, tmp_path)

    rng = drawn(1, 0, 0)
    rng.integers(1), rng.integers(1, size=1)  # the task, its clip
    noises, clean = noise_from(rng), data.latents_of(ACTIONS[0]).float()
    noise = torch.randn(clean.shape, generator=noises)
    model = data.load_denoiser()
    times = model.random_times(1, noises)
    x = model.noised(clean, noise, times)
    found = said_with(data, groups, [r.B @ r.A for r in first], x, times, data.coarse())
    teacher, shown = said_with(data, groups, own.deltas(), x, times, data.coarse()), data.loss_weights(None)
    each = []
    for response, (A, B), s in zip(first, own.pairs(), net.statistics.values(), strict=True):
        for n in range(A.shape[1]):
            off_A, off_B = (
                (response.A[0, n] - A[0, n]).abs().mean(),
                (response.B[0, n] - B[0, n]).abs().mean(),
            )
            each.append((off_A / s.A_scale[n] + off_B / s.B_scale[n]).item())
    wanted = {
        "diffusion": (shown * (found - noise).square()).mean().item(),
        "distillation": (shown * (found - teacher).square()).mean().item(),
        "reconstruction": sum(each) / 88,
    }
    assert {name: log[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert moved(net.stage2, before)[1] == []
    assert all(torch.equal(value, unet[key]) for key, value in data.model.state_dict().items())


def test_end_to_end_over_a_unet_reaches_every_shape():
    data = PictureTasks(ACTIONS[:2], clips=1)
    stage = EndToEnd(unet_network(data), data, settings(EndToEndConfig, tasks=2, clips=1), CPU)
    losses = stage.losses(stage.module, 0, [0, 1])
    sum(losses.values()).backward()
    missing = [n for n, p in stage.module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert missing == [] and set(losses) == {"diffusion", "size"}


def test_held_out_cosines_are_over_all_shapes_at_once():
    """One training LoRA is its own mean: a network that puts it out is as near as the mean is."""
    data = PictureTasks()
    net, known = unet_network(data, randomised=False), dataset(ACTIONS[:1], unet_loras(data, 1))
    for statistics, (A, B) in zip(net.statistics.values(), known.loras.pairs(), strict=True):
        statistics.fit(A, B)
    other = unet_loras(data, 2, seed=9)
    held_out = dataset(ACTIONS[1:3], other)
    data.plain_condition = data.condition
    found = weight_cosines(net, data, known, held_out)
    flat = [torch.cat([delta[row].flatten() for delta in other.deltas()]) for row in range(2)]
    mean = torch.cat([delta[0].flatten() for delta in known.loras.deltas()])
    wanted = sum(torch.cosine_similarity(mean, one, dim=0).item() for one in flat) / 2
    assert found["delta_cosine"] == pytest.approx(wanted, abs=1e-4)
    assert found["mean_delta_cosine"] == pytest.approx(wanted, abs=1e-4)
    assert abs(found["centred_delta_cosine"]) < 0.05
    maps = response_cosines(net, data, known, held_out)
    assert set(maps) == {"response_cosine", "centred_response_cosine", "mean_map_cosine"}
    assert all(-1.0 <= value <= 1.0 for value in maps.values())


# ------------------------------------------------------------
# Several processes


def train_all(folder):
    """As a run does, shared by as many processes as there are: few layers of many, kinds that come and go."""
    data, pictures = ManyKinds(), PictureTasks()
    common, known = {"tasks": 4, "steps": 3}, dataset(ACTIONS, loras(4, size=0.01))
    few = dataset(ACTIONS, unet_loras(pictures, 4))
    for name, kind, *parts, configured in (
        ("kinds1", Stage1, many_network(), data, known, settings(Stage1Config, layers=4, **common)),
        ("kinds2", Stage2, many_network(), data, known, settings(Stage2Config, clips=1, **common)),
        ("shapes", Stage1, unet_network(pictures), pictures, few, settings(Stage1Config, layers=3, **common)),
    ):
        stage = kind(*parts, None, configured, CPU)
        run = SimpleNamespace(data=stage.data, folder=folder / name, console=Console(file=io.StringIO()))
        Run._train(run, stage)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path):
    train_all(tmp_path / "one")
    root = Path(__file__).resolve().parents[1]
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\nfrom test_stages_many import train_all\ntrain_all(Path(sys.argv[3]))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29519",
    ]
    command += [script, root, root / "tests", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(part) for part in command], check=True, env=environment, timeout=600)
    for place in ("kinds1/stage1", "kinds2/stage2", "shapes/stage1"):
        one, two = (
            [json.loads(line) for line in (tmp_path / run / place / "losses.jsonl").read_text().splitlines()]
            for run in ("one", "two")
        )
        assert len(one) == 3
        for line, other in zip(one, two, strict=True):
            assert line == pytest.approx(other, rel=1e-4), place
