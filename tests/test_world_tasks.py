"""The world's tasks: names, files, splits, and clips that show what a task fixes and vary in all else."""

import json
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
from tiny import generator

from lofa_core import miniature
from training.backbones import load_vae
from training.miniature import world
from training.miniature.latents import LatentClips, encode_clips
from training.miniature.world_tasks import LOOK_FACTORS, WorldTask, all_looks, look_indices, split_looks

ACTION = world.Action("left_arm", "wide", "slow", "stay", "upright", "apart")
LOOK = world.Look("red", "blue", "beach")
TASKS = [WorldTask(ACTION), WorldTask(look=LOOK), WorldTask(ACTION, LOOK)]


def test_a_task_prints_as_its_readable_id():
    assert (
        [str(task) for task in TASKS]
        == [task.id for task in TASKS]
        == [
            "left_arm-wide-slow-stay-upright-apart",
            "look-red-blue-beach",
            "left_arm-wide-slow-stay-upright-apart-look-red-blue-beach",
        ]
    )


def test_no_two_tasks_share_an_id_and_every_id_is_a_file_name():
    actions, looks = world.all_actions(), all_looks()
    tasks = [WorldTask(action) for action in actions] + [WorldTask(look=look) for look in looks]
    tasks += [WorldTask(action, look) for action, look in product(actions[::7], looks[::5])]
    ids = {task.id for task in tasks}
    assert len(ids) == len(tasks) and all(name.replace("-", "").replace("_", "").isalpha() for name in ids)


def test_a_task_that_fixes_nothing_is_refused():
    with pytest.raises(ValueError, match="an action or a look"):
        WorldTask()


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_metadata_and_dictionaries_give_the_task_back(task):
    said = task.metadata()
    assert all(isinstance(value, str) for value in said.values())
    read = {name: json.loads(said[name]) if name in said else None for name in ("action", "look")}
    assert WorldTask.read(read) == task
    assert WorldTask.read(json.loads(json.dumps(asdict(task)))) == task


def test_indices_are_the_places_of_the_values_it_fixes():
    action = tuple(values.index(getattr(ACTION, name)) for name, values in world.FACTORS.items())
    colours = list(world.COLOURS)
    look = (colours.index("red"), colours.index("blue"), world.BACKDROPS.index("beach"))
    assert [task.indices() for task in TASKS] == [action, look, action + look]


def test_looks_are_all_pairs_of_different_clothes_before_all_backdrops():
    looks = all_looks()
    assert len(looks) == len(set(looks)) == 6 * 5 * 6 and all(look.shirt != look.trousers for look in looks)
    assert len({look_indices(look) for look in looks}) == 180
    rng = np.random.default_rng(0)
    assert {world.random_look(rng) for _ in range(300)} <= set(looks)


@pytest.mark.parametrize("held_out", [18, 24, 90, 162])
def test_looks_are_split_without_overlap_and_every_value_is_on_both_sides(held_out):
    training, left_out = split_looks(held_out, 3)
    assert len(left_out) == held_out and len(training) == 180 - held_out
    assert set(training) | set(left_out) == set(all_looks())
    for part in (training, left_out):
        for name, values in LOOK_FACTORS.items():
            assert {getattr(look, name) for look in part} == set(values)
    assert split_looks(held_out, 3) == (training, left_out) != split_looks(held_out, 4)


@pytest.mark.parametrize("held_out", [0, 17, 163, 500])
def test_a_split_that_cannot_hold_every_value_is_refused(held_out):
    with pytest.raises(ValueError, match=f"held_out_looks = {held_out}: expected 18 to 162"):
        split_looks(held_out, 0)


def some_clips(count=200, seed=0):
    """Clips of a few actions and looks, their latents the numbers of the rows."""
    draw = generator(seed)
    actions = torch.randint(2, (count, 6), generator=draw).to(torch.uint8)
    looks = torch.randint(2, (count, 3), generator=draw).to(torch.uint8)
    return LatentClips(torch.arange(count).view(-1, 1, 1, 1, 1).float(), actions, looks)


def test_a_tasks_clips_are_those_that_show_all_it_fixes():
    clips = some_clips()
    task = WorldTask(clips.action(5), clips.look(5))
    for one in (task, WorldTask(task.action), WorldTask(look=task.look)):
        found = clips.of(one).tolist()
        wanted = [
            i
            for i in range(len(clips))
            if one.action in (None, clips.action(i)) and one.look in (None, clips.look(i))
        ]
        assert found == wanted and 5 in found and len(found) < 200


def test_clips_come_back_from_their_files(tmp_path):
    first, second = some_clips(7), some_clips(4, seed=1)
    first.save(tmp_path / "a.pt"), second.save(tmp_path / "b.pt")
    found = LatentClips.load(tmp_path / "a.pt", tmp_path / "b.pt")
    assert len(found) == 11 and found.look(8) == second.look(1) and found.action(2) == first.action(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_encoded_clips_show_what_each_task_fixes_and_draw_what_it_leaves_open():
    vae = load_vae(miniature.FOLDER)
    found, again, other = (
        encode_clips(vae, TASKS[:count], each, seed)
        for count, each, seed in ((3, 4, 3), (1, 4, 3), (1, 1, 4))
    )
    assert found.latents.shape == (12, 16, 5, 8, 8) and found.latents.dtype == torch.float16
    for name in ("latents", "actions", "looks"):
        assert torch.equal(getattr(found, name)[:4], getattr(again, name))
    assert not torch.equal(other.latents, found.latents[:1])
    for number, task in enumerate(TASKS):
        rows = range(4 * number, 4 * number + 4)
        actions, looks = {found.action(i) for i in rows}, {found.look(i) for i in rows}
        assert actions == {task.action} if task.action else len(actions) > 2
        assert looks == {task.look} if task.look else len(looks) > 2
        assert set(rows) <= set(found.of(task).tolist())
        latents = found.latents[4 * number : 4 * number + 4].float()
        assert (latents[0] - latents[1]).abs().max() > 0.1  # one task, two clips
