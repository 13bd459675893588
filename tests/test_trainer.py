"""The training loop: killed anywhere it goes on exactly, shares its items, and loses nothing to bad luck."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from training.config import StageConfig
from training.trainer import Checkpoints, draw, train

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = StageConfig(steps=9, tasks=4, warm_up=2, checkpoint_every=2, validate_every=4)


class Line:
    """A stage of four numbers: y = w x + b for a w and b that each task knows, with an average to keep."""

    name = "line"
    weights = {"square": 1.0, "size": 0.01}

    def __init__(self, seed=0, poison=None):
        torch.manual_seed(seed)
        self.module, self.average = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
        self.poison, self.looks = poison, 0

    def tasks(self, step, items):
        return [f"task {int(draw(0, step, item).integers(5))}" for item in items]

    def losses(self, model, step, items):
        squares = []
        for item in items:
            rng = draw(0, step, item)
            slope = float(rng.integers(5))
            x = torch.from_numpy(rng.standard_normal((6, 3))).float()
            squares.append((model(x) - slope * x[:, :2]).square().mean())
        value = torch.stack(squares).mean()
        if step == self.poison:
            value = value * float("nan")
        return {"square": value, "size": self.module.weight.square().mean()}

    def after_step(self, step):
        with torch.no_grad():
            self.average.weight.lerp_(self.module.weight, 0.3)

    def state(self):
        return [self.average]

    def validate(self):
        self.looks += 1
        return {"norm": self.module.weight.detach().norm().item()}


def run(folder, stage=None, settings=SETTINGS, **options):
    stage, console = stage or Line(), Console(file=io.StringIO(), width=200)
    train(stage, settings, folder, Accelerator(cpu=True), console, **options)
    return stage, console.file.getvalue()


def losses(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def killed_after(steps):
    def stop(step):
        if step == steps:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
@pytest.mark.parametrize("kills", [[1], [2], [3], [8], [2, 3, 5, 7]])
def test_a_killed_run_goes_on_and_every_loss_and_weight_is_the_uninterrupted_runs(tmp_path, kills, optimiser):
    settings = replace(SETTINGS, optimiser=optimiser)
    whole, _ = run(tmp_path / "whole", settings=settings)
    for kill in kills:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", settings=settings, stop_after=killed_after(kill))
    again, _ = run(tmp_path / "killed", settings=settings)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [line["step"] for line in losses(tmp_path / "whole")] == list(range(1, 10))
    for part in ("module", "average"):
        for one, other in zip(
            getattr(whole, part).parameters(), getattr(again, part).parameters(), strict=True
        ):
            assert torch.equal(one, other)


def test_a_finished_run_does_nothing_more_and_still_has_its_weights(tmp_path):
    first, _ = run(tmp_path)
    before = (tmp_path / "losses.jsonl").read_text()
    again, _ = run(tmp_path, Line(seed=5))
    assert torch.equal(first.module.weight, again.module.weight)
    assert (tmp_path / "losses.jsonl").read_text() == before


def test_it_keeps_two_checkpoints_and_looks_at_held_out_tasks(tmp_path):
    stage, said = run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000008",
        "step-0000009",
    ]
    assert stage.looks == 3 and "step 8, held-out tasks: norm" in said and "line step 9 of 9  loss" in said
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_parts_of_a_step_add_up_to_the_whole(tmp_path, accumulate):
    run(tmp_path / "whole")
    run(tmp_path / "parts", settings=replace(SETTINGS, accumulate=accumulate))
    for one, other in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path):
    run(tmp_path / "one")
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\nfrom test_trainer import run\nrun(Path(sys.argv[3]))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29517",
    ]
    command += [script, ROOT, ROOT / "tests", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(part) for part in command], check=True, env=environment, timeout=300)
    for one, other in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_loss_that_is_no_number_stops_with_step_tasks_and_checkpoint(tmp_path):
    stage = Line(poison=5)
    with pytest.raises(ValueError) as error:
        run(tmp_path, stage)
    said = str(error.value)
    assert "[line] step 6: loss nan, square nan" in said and "step-0000004" in said
    assert all(name in said for name in stage.tasks(5, range(4)))
    assert torch.isfinite(stage.module.weight).all()
    healed, _ = run(tmp_path)
    whole, _ = run(tmp_path / "whole")
    assert torch.equal(healed.module.weight, whole.module.weight)


@pytest.mark.parametrize("changes", [{"learning_rate": 0.5}, {"steps": 20}, {"tasks": 8}, {"seed": 1}])
def test_a_checkpoint_of_other_settings_is_not_gone_on_from(tmp_path, changes):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after=killed_after(4))
    (name,) = changes
    with pytest.raises(ValueError, match=f"step-0000004 was made with {name} = .*another `out`"):
        run(tmp_path, settings=replace(SETTINGS, **changes))
    run(tmp_path, settings=replace(SETTINGS, checkpoint_every=3, validate_every=0))  # these two are free


def test_a_checkpoint_older_than_a_key_had_its_default(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after=killed_after(4))
    path = Checkpoints(tmp_path / "checkpoints", Accelerator(cpu=True)).last() / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("weight_decay") == StageConfig().weight_decay
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="made with weight_decay = 0.0, the configuration says 0.1"):
        run(tmp_path, settings=replace(SETTINGS, weight_decay=0.1))
    again, _ = run(tmp_path)
    whole, _ = run(tmp_path / "whole")
    assert torch.equal(again.module.weight, whole.module.weight)


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    save = Accelerator.save_state

    def full(self, folder, **options):
        save(self, folder, **options)
        if "0000006" in folder:
            raise OSError(28, "No space left on device", folder)

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "checkpoints", Accelerator(cpu=True)).last().name == "step-0000004"
    again, _ = run(tmp_path)
    whole, _ = run(tmp_path / "whole")
    assert torch.equal(again.module.weight, whole.module.weight)
    assert not list((tmp_path / "checkpoints").glob("unfinished-*"))


@pytest.mark.parametrize(("tasks", "accumulate"), [(3, 2), (5, 4)])
def test_parts_that_do_not_divide_the_tasks_are_refused(tasks, accumulate):
    with pytest.raises(ValueError, match=f"accumulate = {accumulate} .* tasks = {tasks}"):
        StageConfig(tasks=tasks, accumulate=accumulate)


def test_draws_depend_on_seed_step_and_item_and_on_nothing_else():
    seen = {
        (seed, step, item): draw(seed, step, item).integers(2**60)
        for seed in range(3)
        for step in range(3)
        for item in (None, 0, 1, 2)
    }
    assert len(set(seen.values())) == len(seen)
    assert all(draw(*key).integers(2**60) == value for key, value in seen.items())
