"""A dataset's making: what is missing is trained, what diverges is tried again, nothing stops the rest."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_tasks import RANK, Tasks

from training.config import LoRAConfig
from training.lora_dataset import LoRAFolder, checksum
from training.lora_run import make_dataset, train_batch, train_here
from training.miniature.world import all_actions
from training.miniature.world_tasks import WorldTask

TASKS = [WorldTask(action) for action in all_actions()[3:480:96]]  # five
IDS = [task.id for task in TASKS]
SETTINGS = LoRAConfig(rank=RANK, steps=6, batch=2, learning_rate=1e-2, tasks_at_once=2, seed=3)


class Making:
    """A folder, tiny tasks, and a trainer that notes its batches."""

    def __init__(self, path):
        self.data = Tasks(TASKS)
        self.latents = dict(self.data.latents)
        self.folder, self.batches, self.said, self.asked = LoRAFolder(path), [], [], 0

    def clips(self):
        self.asked += 1
        return lambda task: self.latents[task]

    def spoil(self, task):
        self.latents[task] = torch.full_like(self.latents[task], math.inf)

    def train(self, batches):
        def noted():
            for batch in batches:
                self.batches.append((list(batch.clips), batch.settings.learning_rate))
                yield batch

        return train_here(self.data, torch.device("cpu"))(noted())

    def __call__(self, tasks=TASKS, settings=SETTINGS, accelerator=None):
        return make_dataset(
            self.folder, tasks, self.clips, self.data.coarse(), settings, self.train,
            accelerator or Accelerator(cpu=True), self.said.append,
        )  # fmt: skip


@pytest.fixture
def make(tmp_path):
    return Making(tmp_path / "loras")


def intact(folder):
    return all(checksum(folder.path / record.file) == record.sha256 for record in folder.valid().values())


def test_every_task_gets_a_lora_and_a_second_run_finds_them(make):
    summary = make()
    assert summary.done == tuple(IDS) and not summary.skipped and not summary.retried and not summary.failed
    assert make.batches == [(IDS[:2], 1e-2), (IDS[2:4], 1e-2), (IDS[4:], 1e-2)]
    assert set(make.folder.valid()) == set(IDS) and intact(make.folder)
    lines = [json.loads(line) for line in make.folder.manifest.read_text().splitlines()]
    assert all(line["steps"] == 6 and line["learning_rate"] == 1e-2 and line["loss"] > 0 for line in lines)
    again = make()
    assert again.skipped == tuple(IDS) and not again.done and len(make.batches) == 3 and make.asked == 1
    assert "0 trained, 5 were there" in str(again) and str(make.folder.path) in str(again)
    assert make.said[-1].startswith("loras: 5 of 5 tasks, flow-matching loss ")


def test_what_a_kill_or_a_disk_has_damaged_is_trained_again_and_the_same(make):
    make()
    before = {task: record.sha256 for task, record in make.folder.valid().items()}
    (make.folder.path / f"{IDS[0]}.safetensors").unlink()
    (make.folder.path / f"{IDS[2]}.safetensors").write_bytes(b"nothing")
    text = make.folder.manifest.read_text()
    make.folder.manifest.write_text(text[: text.rindex('"sha256"')])
    names = [layer.name for layer in make.data.weights.model.layers]
    summary = make()
    assert set(summary.done) == {IDS[0], IDS[2], IDS[4]} and set(summary.skipped) == {IDS[1], IDS[3]}
    assert set(make.folder.valid()) == set(before) and intact(make.folder)
    assert len(make.folder.manifest.read_text().splitlines()) == 4 + 3
    assert make.folder.load([names], TASKS).tasks == TASKS


def test_the_same_task_in_another_batch_has_the_same_lora(make, tmp_path):
    other = Making(tmp_path / "others")
    make(), other(TASKS[::-1], replace(SETTINGS, tasks_at_once=3))
    names = [layer.name for layer in make.data.weights.model.layers]
    a, b = (folder.load([names], TASKS).loras for folder in (make.folder, other.folder))
    assert torch.allclose(a.A[0], b.A[0], atol=1e-3) and torch.allclose(a.B[0], b.B[0], atol=1e-3)
    assert (a.B[0][0] - a.B[0][1]).abs().max() > 1e-2


def test_a_task_that_diverges_twice_is_reported_and_stops_nothing(make):
    make.spoil(TASKS[2])
    summary = make()
    assert summary.failed == {IDS[2]: "the loss was not finite in step 1"} and summary.retried == (IDS[2],)
    assert set(summary.done) == set(IDS) - {IDS[2]} == set(make.folder.valid())
    assert make.batches[-1] == ([IDS[2]], 5e-3)  # once, alone, at half the rate
    record = make.folder.records()[IDS[2]]
    assert record.status == "failed" and record.file is None and record.settings["learning_rate"] == 5e-3
    assert not (make.folder.path / f"{IDS[2]}.safetensors").exists()
    assert f"1 failed\n  {IDS[2]}: the loss was not finite in step 1" in str(summary)
    assert "2 tasks" not in make.said[1] and "1 without a LoRA" in make.said[1]


def largest_norm(make, settings):
    """The largest ||dW|| / ||W|| of the first task's LoRA."""
    names, (W,) = [layer.name for layer in make.data.weights.model.layers], make.data.weights_by_shape()
    make([TASKS[0]], settings)
    (delta,) = make.folder.load([names], TASKS[:1]).loras.deltas()
    return (delta[0].norm(dim=(1, 2)) / W.norm(dim=(1, 2))).max().item()


def test_a_task_that_is_well_at_half_the_rate_is_done(make, tmp_path):
    half = replace(SETTINGS, learning_rate=SETTINGS.learning_rate / 2)
    full, less = (largest_norm(Making(tmp_path / n), s) for n, s in (("full", SETTINGS), ("half", half)))
    assert less < 0.9 * full
    settings = replace(SETTINGS, max_relative_norm=(full + less) / 2)
    summary = make(TASKS[:1], settings)
    assert summary.done == summary.retried == (IDS[0],) and not summary.failed
    assert make.folder.valid()[IDS[0]].settings["learning_rate"] == 5e-3
    statuses = [json.loads(line)["status"] for line in make.folder.manifest.read_text().splitlines()]
    assert statuses == ["diverged", "done"]
    assert make(TASKS[:1], settings).skipped == (IDS[0],)  # and it stays valid


def test_a_failed_task_is_tried_again_by_the_next_run(make):
    make.spoil(TASKS[1])
    make(TASKS[:2])
    make.latents = make.data.latents  # as they were
    summary = make(TASKS[:2])
    assert (
        summary.done == (IDS[1],) and summary.skipped == (IDS[0],) and set(make.folder.valid()) == {*IDS[:2]}
    )


@pytest.mark.parametrize(
    "change", [{"steps": 7}, {"rank": 1}, {"learning_rate": 1e-3}, {"shared_A": False}, {"canonical": True}]
)
def test_loras_of_other_settings_are_neither_mixed_nor_lost(make, change):
    make(TASKS[:1])
    with pytest.raises(ValueError, match=f"trained with {next(iter(change))} = .* Remove the folder"):
        make(TASKS[:2], replace(SETTINGS, **change))
    assert set(make.folder.valid()) == {IDS[0]}
    make(TASKS[:2], replace(SETTINGS, tasks_at_once=1))  # which changes no LoRA


def test_processes_share_the_tasks(tmp_path):
    """Two threads in the place of processes, with a barrier that both have to reach."""
    barrier, makings = threading.Barrier(2, timeout=60), [Making(tmp_path / "loras") for _ in range(2)]
    makings[0].spoil(TASKS[2])

    def process(index):
        accelerator = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=index == 0, wait_for_everyone=barrier.wait
        )
        return makings[index](accelerator=accelerator)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    assert [tasks for tasks, _ in makings[0].batches] == [[IDS[0], IDS[2]], [IDS[4]], [IDS[2]]]
    assert [tasks for tasks, _ in makings[1].batches] == [[IDS[1], IDS[3]]]
    assert first == second and first.retried == (IDS[2],) == tuple(first.failed)
    assert set(first.done) == set(IDS) - {IDS[2]} == set(makings[0].folder.valid())


def test_a_batch_writes_files_but_no_manifest(make):
    make.folder.prepare()
    batches = []
    make_dataset(
        make.folder, TASKS[:2], make.clips, make.data.coarse(), SETTINGS,
        lambda given: batches.extend(given) or train_here(make.data, "cpu")(batches), Accelerator(cpu=True),
    )  # fmt: skip
    for file in make.folder.path.iterdir():
        file.unlink()
    records = train_batch(make.data.load_denoiser(), make.data.weights.model.layers, batches[0])
    assert [record.task for record in records] == IDS[:2] and not make.folder.manifest.exists()
    assert all(checksum(make.folder.path / record.file) == record.sha256 for record in records)
