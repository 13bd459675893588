"""The miniature's tasks with text, pose and style: what is drawn of them, what is told, how it is encoded."""

import numpy as np
import pytest
import torch
from tiny import generator

from training.config import DataConfig
from training.miniature import captions, world
from training.miniature.latents import LatentClips
from training.miniature.style_pictures import IMAGE_WIDTH, PICTURES
from training.miniature.tasks import POSE_SIZE, MiniatureTasks
from training.miniature.world_tasks import WorldTask, all_looks, look_indices, split_looks
from training.told import MOST_PICTURES, NOTHING

ALL = ("text", "pose", "style")
STATES = 3  # of a picture; the image encoder's own are more
EACH = 6  # clips of an action


def made(folder, kinds=ALL):
    """The tasks over clips that are noise and pictures that are noise, so that nothing has to be encoded."""
    rng, draw = np.random.default_rng(0), generator(0)
    actions = [action for action in world.split_actions(32, 0)[0] for _ in range(EACH)]
    labels = torch.tensor([action.indices() for action in actions], dtype=torch.uint8)
    shown = [look_indices(world.random_look(rng)) for _ in actions]
    noise = torch.randn(len(actions), 16, 5, 8, 8, generator=draw).half()
    LatentClips(noise, labels, torch.tensor(shown, dtype=torch.uint8)).save(folder / "latents.pt")
    states = torch.randn(len(all_looks()), PICTURES, STATES, IMAGE_WIDTH, generator=draw).half()
    torch.save(states, folder / "style_states.pt")
    return MiniatureTasks(DataConfig(conditions=kinds), folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made(tmp_path_factory.mktemp("tasks"))


def draws(data, count, seed=0):
    """(task, what is told of it) of so many items."""
    found = []
    for item in range(count):
        rng = np.random.default_rng([seed, item])
        task = data.draw_task(rng)
        found.append((task, data.condition(task, rng)))
    return found


@pytest.fixture(scope="module")
def drawn(data):
    return draws(data, 800)


def sort(task):
    return (task.action is not None, task.look is not None)


def test_training_and_held_out_tasks_are_actions_and_looks_without_overlap(data):
    actions, looks = world.split_actions(32, 0), split_looks(24, 0)
    for tasks, some_actions, some_looks in zip((data.training, data.held_out), actions, looks, strict=True):
        assert tasks == [WorldTask(a) for a in some_actions] + [WorldTask(look=x) for x in some_looks]
    assert data.sorts() == [data.training[:448], data.training[448:]]


def test_what_is_drawn_is_a_function_of_the_generator(data, drawn):
    assert draws(data, 40) == drawn[:40] != draws(data, 40, seed=1)


def test_training_tasks_are_actions_looks_and_both_at_once(drawn, data):
    shares = {kind: np.mean([sort(task) == kind for task, _ in drawn]) for kind in ((1, 0), (0, 1), (1, 1))}
    held_out = 24 / 180  # of the clips that a joint task is made of; an action alone stands in for it
    assert shares[1, 0] == pytest.approx(0.45 + 0.25 * held_out, abs=0.05)
    assert shares[0, 1] == pytest.approx(0.3, abs=0.05)
    assert shares[1, 1] == pytest.approx(0.25 * (1 - held_out), abs=0.05)
    actions, looks = ({task.action for task, _ in drawn}, {task.look for task, _ in drawn})
    assert not actions & {task.action for task in data.held_out if task.action}
    assert not looks & {task.look for task in data.held_out if task.look}
    assert len(actions) > 250 and len(looks) > 120


def test_the_clips_of_a_joint_task_show_its_action_and_its_look(data, drawn):
    joint = [task for task, _ in drawn if sort(task) == (True, True)][:40]
    for task in joint:
        clips = data.clips_of(task)
        assert 1 <= len(clips) < EACH
        assert {data.clips.action(int(i)) for i in clips} == {task.action}
        assert {data.clips.look(int(i)) for i in clips} == {task.look}
        some = data.some_latents(task, 3, np.random.default_rng(0))
        own = data.latents_of(task)
        assert some.shape == (3, 16, 5, 8, 8)
        assert all(any(torch.equal(clip, one) for one in own) for clip in some)


def test_what_is_told_fits_the_task(data, drawn):
    for task, told in drawn:
        assert set(told) <= ({"text", "pose"} if task.action else set()) | ({"style"} if task.look else set())
        if "style" in told:
            assert {look for look, _ in told["style"]} == {task.look}
            assert 1 <= len(told["style"]) <= MOST_PICTURES
            assert all(0 <= pick < PICTURES for _, pick in told["style"])
        if "text" in told:
            said = captions.said_factors(told["text"])
            assert all(getattr(task.action, name) == value for name, value in said.items())
        if "pose" in told:
            assert len(told["pose"]) == world.FRAMES
    nothing = np.mean([not told for _, told in drawn])
    assert nothing == pytest.approx(NOTHING, abs=0.015)


def test_an_action_is_told_by_text_by_pose_or_by_both(drawn):
    told = [frozenset(told) - {"style"} for task, told in drawn if task.action and told]
    shares = {
        kinds: told.count(frozenset(kinds)) / len(told) for kinds in (("text",), ("pose",), ("text", "pose"))
    }
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["text",] == pytest.approx(0.4, abs=0.05) and shares["pose",] == pytest.approx(0.4, abs=0.05)


def test_a_pose_is_that_of_the_tasks_action(data):
    task = data.training[3]
    assert data.pose(task, np.random.default_rng(5)) == world.pose_of_clip(
        task.action, np.random.default_rng(5)
    )


def test_a_batch_has_each_items_own_rows_and_says_which_kinds_it_is_told(data, drawn):
    told = [told for _, told in drawn[:12]] + [{}]
    found = data.conditions(told)
    widths = {known.kind: known.width for known in data.descriptions()[1]}
    assert set(found) == set(ALL) == set(widths)
    for kind, given in found.items():
        there = torch.tensor([float(kind in one) for one in told])
        assert torch.equal(given.strength, there) and 0 < there.sum() < 13
        assert len(given.values) == 13
        if kind == "pose":
            assert given.values.shape[1:] == (3, *POSE_SIZE)
        else:
            assert given.values.ndim == 3 and given.values.shape[2] == widths[kind]
        for row, one in enumerate(told):
            if kind in one:
                alone = data.conditions([{kind: one[kind]}])[kind].values[0]
                assert torch.allclose(given.values[row, : len(alone)], alone, atol=1e-5)
                assert kind == "pose" or not given.values[row, len(alone) :].any()
            elif kind != "text":
                assert not given.values[row].any()


def test_style_rows_are_the_states_of_the_pictures_told(data):
    look, other = data.training[448].look, data.training[460].look
    found = data.conditions([{"style": [(look, 2), (other, 5)]}, {"style": [(look, 7)]}])["style"]
    states = torch.load(data.folder / "style_states.pt").float()
    row, other_row = all_looks().index(look), all_looks().index(other)
    assert found.values.shape == (2, 2 * STATES, IMAGE_WIDTH) and found.strength.tolist() == [1.0, 1.0]
    assert torch.equal(found.values[0], torch.cat([states[row, 2], states[other_row, 5]]))
    assert torch.equal(found.values[1, :STATES], states[row, 7]) and not found.values[1, STATES:].any()


def test_kinds_that_no_item_is_told_are_left_out_and_silence_has_no_strength(data):
    found = data.conditions([{"text": "a person moves"}, {}])
    assert set(found) == {"text"} and found["text"].strength.tolist() == [1.0, 0.0]
    ((_, silence),) = data.conditions([{}, {}, {}]).items()
    assert silence.strength.tolist() == [0.0] * 3 and len(silence.values) == 3
    assert silence.values[0].any()  # such as a network takes


def test_all_that_can_be_said_plainly(data, drawn):
    for task, _ in drawn[:40]:
        told = data.plain_condition(task, np.random.default_rng(0))
        assert set(told) == ({"text", "pose"} if task.action else set()) | ({"style"} if task.look else set())
        if task.action:
            said = captions.said_factors(told["text"])
            assert set(said) == set(world.FACTORS) and not captions.says(told["text"], "backdrop", "beach")


def test_losses_look_where_actions_show_only_where_there_is_one(data):
    action, look = data.training[0], data.training[-1]
    where = data.loss_weights(action)
    assert where.shape == (16, 5, 8, 8) and where.mean().item() == pytest.approx(1.0, abs=1e-4)
    assert torch.equal(data.loss_weights(WorldTask(action.action, look.look)), where) and where.std() > 0
    assert torch.equal(data.loss_weights(look), torch.ones(16, 5, 8, 8))


@pytest.mark.parametrize(("kinds", "count"), [(("text",), 448), (("pose",), 448), (("style",), 156)])
def test_one_kind_alone_is_always_told_and_at_full_strength(tmp_path, kinds, count):
    data = made(tmp_path, kinds)
    assert len(data.training) == count and data.sorts() == [data.training]
    told = [told for _, told in draws(data, 60)]
    assert all(tuple(one) == kinds for one in told)
    ((kind, given),) = data.conditions(told[:4]).items()
    assert kind == kinds[0] and given.strength is None and len(given.values) == 4
    assert [known.kind for known in data.descriptions()[1]] == [kind]


def test_identities_are_not_of_this_world(tmp_path):
    with pytest.raises(ValueError, match="no identities"):
        MiniatureTasks(DataConfig(conditions=("text", "identity")), tmp_path)
