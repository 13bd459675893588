"""The dataset's folder: what is written comes back, what is damaged is not believed, a kill is survived."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_tasks import RANK, loras, tiny_model

from lofa_core.base_models import BaseWeights
from lofa_core.lora_files import load_lora, match
from training.factors import by_name
from training.lora_dataset import LoRADataset, LoRAFolder, Record, checksum
from training.miniature.world import Action, all_actions
from training.miniature.world_tasks import WorldTask, all_looks

TASKS = [WorldTask(action) for action in all_actions()[5:480:150]]
BASE = BaseWeights.from_tensors(tiny_model().state_dict()).model
NAMES = [layer.name for layer in BASE.layers]
SHIPPED = Path(__file__).resolve().parents[1] / "training" / "miniature"


def filled(path):
    """A folder with a LoRA for each of TASKS, and what went into it."""
    folder, made = LoRAFolder(path), loras(len(TASKS))
    folder.prepare()
    for task, a, b in zip(TASKS, made.A[0], made.B[0], strict=True):
        file, sha256 = folder.write({"task": task.id} | task.metadata(), NAMES, a, b)
        folder.append([Record(task.id, "done", file, sha256, 0.25, settings={"steps": 3})])
    return folder, made


def test_of_a_set_those_of_some_tasks_are_taken_in_their_order():
    made = LoRADataset(loras(4), TASKS)
    found = made.of([TASKS[3], WorldTask(all_actions()[0]), TASKS[1]])
    assert found.tasks == [TASKS[3], TASKS[1]]
    assert torch.equal(found.loras.B[0], made.loras.B[0][[3, 1]])


def test_a_packed_file_is_a_quarter_and_its_loras_do_nearly_the_same(tmp_path):
    made, path = loras(4), tmp_path / "loras.safetensors"
    LoRADataset(made, TASKS).save(path)
    assert path.stat().st_size < 0.4 * 4 * made.flat().numel()
    found = LoRADataset.load(path).loras
    for one, other in zip(found.deltas(), made.deltas(), strict=True):
        differences = (one - other).norm(dim=(2, 3)) / other.norm(dim=(2, 3))
        assert 0 < differences.max() < 0.02
    LoRADataset(found, TASKS).save(path)  # packing what was packed changes nothing
    assert torch.allclose(LoRADataset.load(path).loras.flat(), found.flat(), rtol=1e-6, atol=0)


def same(found, wanted, tolerance=1e-3):
    return all(
        torch.allclose(one, other, atol=tolerance)
        for one, other in zip((*found.A, *found.B), (*wanted.A, *wanted.B), strict=True)
    )


def test_a_file_of_all_tasks_comes_back_in_order(tmp_path):
    made, look = loras(4), all_looks()[7]
    mixed = [*TASKS[:2], WorldTask(look=look), WorldTask(TASKS[3].action, look)]
    for tasks in (TASKS, mixed):
        LoRADataset(made, tasks).save(tmp_path / "loras.safetensors")
        found = LoRADataset.load(tmp_path / "loras.safetensors")
        assert found.tasks == tasks and found.loras.A[0].dtype == found.loras.B[0].dtype == torch.float32
        assert same(found.loras, made, tolerance=4e-3)  # eight bits
    LoRADataset(made, TASKS).save(tmp_path / "loras.safetensors")
    found = LoRADataset.load(tmp_path / "loras.safetensors")
    assert found.indices().tolist() == [list(task.action.indices()) for task in TASKS]
    assert [path.name for path in tmp_path.iterdir()] == ["loras.safetensors"]


@pytest.mark.parametrize(("name", "looks"), [("training", 32), ("held_out", 24)])
def test_the_shipped_files_still_load(name, looks):
    found = LoRADataset.load(SHIPPED / f"loras_{name}.safetensors")
    ((A, B),) = found.loras.pairs()
    assert A.shape == (32 + looks, 32, 4, 96) and B.shape == (32 + looks, 32, 96, 4)
    assert len(set(found.tasks)) == 32 + looks and all(isinstance(task, WorldTask) for task in found.tasks)
    assert sum(task.action is None for task in found.tasks) == looks


def test_a_folder_comes_back_in_the_order_asked_for(tmp_path):
    folder, made = filled(tmp_path / "loras")
    found = folder.load([NAMES], TASKS[::-1])
    assert found.tasks == TASKS[::-1] and found.loras.A[0].dtype == torch.float32
    assert same(found.loras.map(lambda factor: factor.flip(0)), made)
    some = folder.load([NAMES], [WorldTask(all_actions()[0]), TASKS[2]])
    assert some.tasks == [TASKS[2]] and torch.equal(some.loras.A[0][0], found.loras.A[0][1])


def test_layers_come_back_in_the_groups_asked_for(tmp_path):
    folder, made = filled(tmp_path / "loras")
    groups = [NAMES[5:], NAMES[:2], NAMES[2:5]]
    found = folder.load(groups, TASKS)
    assert [factor.shape[1] for factor in found.loras.A] == [3, 2, 3]
    for ours, all_in_one in zip(by_name(groups, found.loras), by_name([NAMES], made), strict=True):
        assert ours.keys() == all_in_one.keys()
        assert all(torch.allclose(ours[name], all_in_one[name], atol=1e-3) for name in NAMES)


def test_alpha_is_folded_into_b(tmp_path):
    folder, made = filled(tmp_path / "loras")
    record, ((A, B),) = folder.records()[TASKS[0].id], made.pairs()
    lora = load_lora(folder.path / record.file)
    for row, name in enumerate(NAMES):
        assert torch.allclose(lora.delta(name), B[0, row] @ A[0, row], atol=2e-3)


def test_a_tasks_file_is_an_ordinary_lora_that_says_its_task(tmp_path):
    folder, *_ = filled(tmp_path / "loras")
    path = folder.path / f"{TASKS[1].id}.safetensors"
    lora = load_lora(path)
    assert match(lora, BASE).summary() == "8 of 8 layers matched"
    assert lora.rank == RANK and lora[NAMES[0]].A.dtype == torch.float16
    assert lora.metadata["task"] == TASKS[1].id == path.stem
    assert Action(**json.loads(lora.metadata["action"])) == TASKS[1].action


def test_task_ids_are_unique_readable_file_names():
    ids = {WorldTask(action).id for action in all_actions()}
    assert len(ids) == 480 and "left_arm-wide-slow-stay-upright-apart" in ids
    assert all(name.replace("-", "").replace("_", "").isalpha() for name in ids)


def test_a_line_has_the_promised_keys(tmp_path):
    folder, *_ = filled(tmp_path / "loras")
    lines = [json.loads(line) for line in folder.manifest.read_text().splitlines()]
    assert [line["task"] for line in lines] == [task.id for task in TASKS]
    for line in lines:
        assert line["status"] == "done" and line["loss"] == 0.25 and line["steps"] == 3
        assert checksum(folder.path / line["file"]) == line["sha256"] and len(line["sha256"]) == 64


def test_valid_is_done_and_there_and_whole(tmp_path):
    folder, *_ = filled(tmp_path / "loras")
    first, second, third, fourth = (task.id for task in TASKS)
    (folder.path / f"{first}.safetensors").unlink()
    damaged = folder.path / f"{second}.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-7] ^= 1  # one bit
    damaged.write_bytes(content)
    folder.append([Record(third, "failed", reason="the loss was not finite in step 2")])
    assert set(folder.valid()) == {fourth} and set(folder.records()) == {first, second, third, fourth}
    assert folder.load([NAMES], TASKS).tasks == [TASKS[3]]
    with pytest.raises(ValueError, match="no valid LoRA of this configuration's tasks. Run `lora-dataset`"):
        folder.load([NAMES], TASKS[:3])


def test_a_later_line_replaces_an_earlier_one(tmp_path):
    folder, *_ = filled(tmp_path / "loras")
    done = folder.records()[TASKS[0].id]
    folder.append([Record(done.task, "diverged", reason="too large")])
    assert done.task not in folder.valid()
    folder.append([done])
    assert folder.valid()[done.task] == done


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_torn_line_is_passed_over_and_repaired(tmp_path, kept):
    folder, *_ = filled(tmp_path / "loras")
    *whole, last = folder.manifest.read_text().splitlines(keepends=True)
    folder.manifest.write_text("".join(whole) + last[:kept])
    (folder.path / ".wave.safetensors.0123").write_bytes(b"unfinished")
    assert set(folder.valid()) == {task.id for task in TASKS[:3]}
    folder.prepare()
    assert folder.manifest.read_text() == "".join(whole)
    folder.append([Record.read(last)])
    assert set(folder.valid()) == {task.id for task in TASKS}
    assert {path.suffix for path in folder.path.iterdir()} == {".safetensors", ".jsonl"}
    assert not (folder.path / ".wave.safetensors.0123").exists()


@pytest.mark.parametrize("line", ["", "{", "[1, 2]", "7", '"task"', '{"task": "x"}', "null", "\0\0\0"])
def test_what_is_no_record_is_none(line):
    assert Record.read(line) is None


def test_lines_of_several_writers_do_not_mix(tmp_path):
    def append(name):
        for number in range(50):
            LoRAFolder(tmp_path).append([Record(f"{name}-{number}", "failed", reason=name * 200)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, "abcd"))
    found = LoRAFolder(tmp_path).records()
    assert len(found) == len(LoRAFolder(tmp_path).manifest.read_text().splitlines()) == 200
    assert all(set(record.reason) == {name[0]} for name, record in found.items())


@pytest.mark.parametrize(("layers", "rank", "said"), [(7, RANK, "has no"), (8, RANK + 1, "its layers are")])
def test_a_lora_of_another_model_or_rank_is_named(tmp_path, layers, rank, said):
    folder, _ = filled(tmp_path)
    task, names = TASKS[2], NAMES[:layers]
    side = BASE.layers[0].shape[0]
    A, B = [torch.ones(rank, side)] * len(names), [torch.ones(side, rank)] * len(names)
    file, sha256 = folder.write({"task": task.id}, names, A, B)
    folder.append([Record(task.id, "done", file, sha256)])
    with pytest.raises(ValueError, match=rf"{file}: {said}.*`lora-dataset`"):
        folder.load([NAMES], TASKS)
