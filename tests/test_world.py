"""The world: what is drawn follows the factors, and the split keeps whole actions apart."""

import dataclasses

import numpy as np
import pytest
import torch

from training.miniature import world
from training.miniature.latents import LatentClips
from training.miniature.world import BACKDROPS, COLOURS, FACTORS, Action, Look
from training.miniature.world_tasks import WorldTask

LOOK = Look("red", "blue", "studio")
PLAIN = Action("left_arm", "wide", "slow", "stay", "upright", "together")


def draw(action=PLAIN, look=LOOK, seed=0):
    return world.draw_clip(action, look, np.random.default_rng(seed))


def where(clip, colour, tolerance=40):
    """Pixels [T, H, W] near a colour."""
    return np.abs(clip.astype(int) - colour).max(-1) <= tolerance


def centre(mask):
    """Mean (x, y) of a frame's pixels."""
    ys, xs = np.nonzero(mask)
    return xs.mean(), ys.mean()


def test_a_clip_is_seventeen_frames_of_64_by_64_rgb_bytes():
    clip = draw()
    assert (
        clip.shape == (17, 64, 64, 3) == (world.FRAMES, world.SIZE, world.SIZE, 3) and clip.dtype == np.uint8
    )
    assert clip.std() > 10 and all((clip[i] != clip[i + 1]).any() for i in range(16))


def test_the_same_seed_draws_the_same_clip_and_another_seed_another():
    assert (draw() == draw()).all() and (draw() != draw(seed=1)).any()


@pytest.mark.parametrize("factor", FACTORS)
def test_every_two_values_of_a_factor_look_different(factor):
    clips = {v: draw(dataclasses.replace(PLAIN, **{factor: v})).astype(int) for v in FACTORS[factor]}
    pairs = [(a, b) for a in clips for b in clips if a < b]
    for a, b in pairs:
        changed = np.abs(clips[a] - clips[b]).max(-1) > 60
        assert changed.sum() > 150, (a, b)  # of 69,632 pixels: a limb's worth, in several frames
        assert (changed.any((1, 2))).sum() >= 4, (a, b)


def test_jitter_moves_less_than_a_factor_does():
    other = draw(dataclasses.replace(PLAIN, travel="right")).astype(int)
    jitter = max(np.abs(draw(seed=s).astype(int) - draw()).mean() for s in range(1, 6))
    assert 0 < jitter < np.abs(other - draw()).mean()


@pytest.mark.parametrize(
    ("travel", "x", "y"), [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1), ("stay", 0, 0)]
)
def test_the_body_travels_where_the_picture_says(travel, x, y):
    shirt = where(
        draw(dataclasses.replace(PLAIN, travel=travel, limb="left_leg", amplitude="small")), COLOURS["red"]
    )
    (x0, y0), (x1, y1), (_, y8) = (centre(shirt[i]) for i in (0, 16, 8))
    up_or_down = y8 - y0 if travel == "up" else y1 - y0
    assert (abs(x1 - x0) < 3) if x == 0 else (10 < x * (x1 - x0) < 40)
    assert (abs(up_or_down) < 3) if y == 0 else (4 < y * up_or_down < 15)


def test_lean_tilts_the_body_and_stance_parts_the_feet():
    heads, feet = {}, {}
    for lean in FACTORS["lean"]:
        clip = draw(dataclasses.replace(PLAIN, lean=lean, limb="right_leg"))
        heads[lean] = centre(where(clip[:1], (240, 190, 150), 25)[0][:30])[0]
    assert heads["left"] + 5 < heads["upright"] < heads["right"] - 5
    for stance in FACTORS["stance"]:
        xs = np.nonzero(where(draw(dataclasses.replace(PLAIN, stance=stance))[:1], COLOURS["blue"])[0])[1]
        feet[stance] = xs.max() - xs.min()
    assert feet["apart"] > feet["together"] + 8


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limb", ["arm", "leg"])
def test_the_limb_that_moves_is_on_the_named_side_of_the_picture(side, limb):
    clip = draw(dataclasses.replace(PLAIN, limb=f"{side}_{limb}")).astype(int)
    moving = np.abs(clip - clip[0]).max((0, 3)) > 60
    x = centre(moving)[0] - centre(where(clip, COLOURS["red"])[0])[0]
    assert (x < -4) if side == "left" else (x > 4)


def test_amplitude_lifts_the_limb_higher_and_tempo_doubles_its_swings():
    tops = {}
    for amplitude in FACTORS["amplitude"]:
        clip = draw(dataclasses.replace(PLAIN, amplitude=amplitude)).astype(int)
        changed = np.abs(clip - clip[0]).max(-1) > 60
        tops[amplitude] = min(np.nonzero(changed[8])[0])  # highest halfway through
        assert changed.sum((1, 2))[8] > 5 * changed.sum((1, 2))[1]
    assert tops["wide"] < tops["small"] - 8
    slow, fast = (draw(dataclasses.replace(PLAIN, tempo=tempo)) for tempo in ("slow", "fast"))
    assert (fast[:9] == slow[::2]).all() and (fast[8:] == fast[:9]).all()


def test_clothes_and_backdrop_have_the_colours_they_are_said_to_have():
    for number, colour in enumerate(COLOURS):
        trousers = list(COLOURS)[number - 1]
        clip = draw(look=Look(colour, trousers, "studio"))
        assert where(clip[0], COLOURS[colour]).sum() > 60 and where(clip[0], COLOURS[trousers]).sum() > 30
    corners = {backdrop: tuple(draw(look=Look("red", "blue", backdrop))[0, 2, 60]) for backdrop in BACKDROPS}
    assert len(set(corners.values())) == len(BACKDROPS) == 6


def test_random_looks_have_two_colours_and_reach_all_of_them():
    rng = np.random.default_rng(0)
    looks = [world.random_look(rng) for _ in range(300)]
    assert all(look.shirt != look.trousers for look in looks)
    assert {look.shirt for look in looks} == {look.trousers for look in looks} == set(COLOURS)
    assert {look.backdrop for look in looks} == set(BACKDROPS) and all(
        type(look.shirt) is str for look in looks
    )


def test_there_are_at_least_400_actions_of_at_least_five_factors():
    actions = world.all_actions()
    assert len(actions) == len(set(actions)) == np.prod([len(v) for v in FACTORS.values()]) >= 400
    assert len(FACTORS) >= 5 and tuple(FACTORS) == tuple(f.name for f in dataclasses.fields(Action))
    for action in actions[::37]:
        assert Action(*(v[i] for v, i in zip(FACTORS.values(), action.indices(), strict=True))) == action


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("count", [24, 32])
def test_held_out_actions_are_never_trained_on_and_every_value_is_on_both_sides(count, seed):
    training, held_out = world.split_actions(count, seed)
    assert len(held_out) == len(set(held_out)) == count and not set(training) & set(held_out)
    assert set(training) | set(held_out) == set(world.all_actions())
    for name, values in FACTORS.items():
        for part in (training, held_out):
            assert {getattr(action, name) for action in part} == set(values)
    assert (training, held_out) == world.split_actions(count, seed)
    assert held_out != world.split_actions(count, seed + 1)[1]


@pytest.mark.parametrize("count", [0, 4, 479, 480])
def test_a_split_that_cannot_show_every_value_on_both_sides_is_refused(count):
    with pytest.raises(ValueError, match=str(count)):
        world.split_actions(count, 0)


def test_latent_clips_know_their_actions_and_looks(tmp_path):
    actions, look = world.all_actions()[3:480:200], Look("white", "red", "snow")
    values = torch.tensor([action.indices() for action in actions for _ in range(2)], dtype=torch.uint8)
    shown = [list(COLOURS).index("white"), list(COLOURS).index("red"), BACKDROPS.index("snow")]
    clips = LatentClips(
        torch.randn(6, 16, 5, 8, 8).half(), values, torch.tensor([shown] * 6, dtype=torch.uint8)
    )
    clips.save(tmp_path / "a.pt")
    both = LatentClips.load(tmp_path / "a.pt", tmp_path / "a.pt")
    assert len(both) == 12 and torch.equal(both.latents[6:], clips.latents)
    assert [both.action(i) for i in (0, 3, 10)] == [actions[0], actions[1], actions[2]] and both.look(
        7
    ) == look
    assert both.of(WorldTask(actions[1])).tolist() == [2, 3, 8, 9]
    assert both.of(WorldTask(actions[1], look)).tolist() == [2, 3, 8, 9]
    assert len(both.of(WorldTask(look=look))) == 12 and len(both.of(WorldTask(world.all_actions()[4]))) == 0


def test_action_weights_have_mean_one_and_are_larger_where_the_action_shows():
    torch.manual_seed(0)
    actions = torch.tensor([[i, 0, 0, 0, 0, 0] for i in (0, 1, 2, 3)], dtype=torch.uint8)
    labels = actions.repeat_interleave(50, 0)[torch.randperm(200)]
    latents = torch.randn(200, 2, 1, 2, 2)  # what clothes do
    latents[:, 1, 0, 0, 1] += labels[:, 0] * 3.0  # what the action does
    weights = LatentClips(latents.half(), labels, torch.zeros(200, 3, dtype=torch.uint8)).action_weights()
    assert weights.shape == (2, 1, 2, 2) and weights.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert weights[1, 0, 0, 1] > 5.0 and weights.flatten().sort().values[-2] < 0.3
