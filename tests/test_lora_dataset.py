"""The dataset's folder: what is written comes back, what is damaged is not believed, a kill is survived."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_tasks import RANK, loras, tiny_model

from lofa_core.base_models import BaseWeights
from lofa_core.lora_files import load_lora, match
from training.lora_dataset import LoRADataset, LoRAFolder, Record, checksum, task_id, task_metadata
from training.miniature.world import Action, all_actions

ACTIONS = all_actions()[5:480:150]
BASE = BaseWeights.from_tensors(tiny_model().state_dict()).model
NAMES = [layer.name for layer in BASE.layers]
SHIPPED = Path(__file__).resolve().parents[1] / "training" / "miniature"


def filled(path):
    """A folder with a LoRA for each of ACTIONS, and the tensors that went into it."""
    folder, (A, B) = LoRAFolder(path), loras(len(ACTIONS))
    folder.prepare()
    for action, a, b in zip(ACTIONS, A, B, strict=True):
        file, sha256 = folder.write(task_metadata(action), NAMES, a, b)
        folder.append([Record(task_id(action), "done", file, sha256, 0.25, settings={"steps": 3})])
    return folder, A, B


def test_a_file_of_all_tasks_comes_back_in_order(tmp_path):
    A, B = loras(4)
    LoRADataset(A, B, ACTIONS).save(tmp_path / "loras.safetensors")
    found = LoRADataset.load(tmp_path / "loras.safetensors")
    assert found.actions == ACTIONS and found.A.dtype == found.B.dtype == torch.float32
    assert torch.allclose(found.A, A, atol=1e-3) and torch.allclose(found.B, B, atol=1e-3)
    assert found.factors().tolist() == [list(action.indices()) for action in ACTIONS]
    assert [path.name for path in tmp_path.iterdir()] == ["loras.safetensors"]


@pytest.mark.parametrize("name", ["training", "held_out"])
def test_the_shipped_files_still_load(name):
    found = LoRADataset.load(SHIPPED / f"loras_{name}.safetensors")
    assert found.A.shape == (32, 32, 4, 96) and found.B.shape == (32, 32, 96, 4) and len(found.actions) == 32


def test_a_folder_comes_back_in_the_order_asked_for(tmp_path):
    folder, A, B = filled(tmp_path / "loras")
    found = folder.load(NAMES, ACTIONS[::-1])
    assert found.actions == ACTIONS[::-1] and found.A.dtype == torch.float32
    assert torch.allclose(found.A.flip(0), A, atol=1e-3) and torch.allclose(found.B.flip(0), B, atol=1e-3)
    some = folder.load(NAMES, [all_actions()[0], ACTIONS[2]])
    assert some.actions == [ACTIONS[2]] and torch.equal(some.A[0], found.A[1])


def test_alpha_is_folded_into_b(tmp_path):
    folder, A, B = filled(tmp_path / "loras")
    record = folder.records()[task_id(ACTIONS[0])]
    lora = load_lora(folder.path / record.file)
    for row, name in enumerate(NAMES):
        assert torch.allclose(lora.delta(name), B[0, row] @ A[0, row], atol=2e-3)


def test_a_tasks_file_is_an_ordinary_lora_that_says_its_task(tmp_path):
    folder, *_ = filled(tmp_path / "loras")
    path = folder.path / f"{task_id(ACTIONS[1])}.safetensors"
    lora = load_lora(path)
    assert match(lora, BASE).summary() == "8 of 8 layers matched"
    assert lora.rank == RANK and lora[NAMES[0]].A.dtype == torch.float16
    assert lora.metadata["task"] == task_id(ACTIONS[1]) == path.stem
    assert Action(**json.loads(lora.metadata["action"])) == ACTIONS[1]


def test_task_ids_are_unique_readable_file_names():
    ids = {task_id(action) for action in all_actions()}
    assert len(ids) == 480 and "left_arm-wide-slow-stay-upright-apart" in ids
    assert all(name.replace("-", "").replace("_", "").isalpha() for name in ids)


def test_a_line_has_the_promised_keys(tmp_path):
    folder, *_ = filled(tmp_path / "loras")
    lines = [json.loads(line) for line in folder.manifest.read_text().splitlines()]
    assert [line["task"] for line in lines] == [task_id(action) for action in ACTIONS]
    for line in lines:
        assert line["status"] == "done" and line["loss"] == 0.25 and line["steps"] == 3
        assert checksum(folder.path / line["file"]) == line["sha256"] and len(line["sha256"]) == 64


def test_valid_is_done_and_there_and_whole(tmp_path):
    folder, *_ = filled(tmp_path / "loras")
    first, second, third, fourth = (task_id(action) for action in ACTIONS)
    (folder.path / f"{first}.safetensors").unlink()
    damaged = folder.path / f"{second}.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-7] ^= 1  # one bit
    damaged.write_bytes(content)
    folder.append([Record(third, "failed", reason="the loss was not finite in step 2")])
    assert set(folder.valid()) == {fourth} and set(folder.records()) == {first, second, third, fourth}
    assert folder.load(NAMES, ACTIONS).actions == [ACTIONS[3]]
    with pytest.raises(ValueError, match="no valid LoRA of this configuration's tasks. Run `lora-dataset`"):
        folder.load(NAMES, ACTIONS[:3])


def test_a_later_line_replaces_an_earlier_one(tmp_path):
    folder, *_ = filled(tmp_path / "loras")
    done = folder.records()[task_id(ACTIONS[0])]
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
    assert set(folder.valid()) == {task_id(action) for action in ACTIONS[:3]}
    folder.prepare()
    assert folder.manifest.read_text() == "".join(whole)
    folder.append([Record.read(last)])
    assert set(folder.valid()) == {task_id(action) for action in ACTIONS}
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
