"""The miniature's poses: POSE_KEYPOINT documents that follow the clips pixel for pixel."""

import dataclasses

import numpy as np
import pytest

from lofa_core.conditions.pose import pose_from_keypoints
from lofa_core.conditions.pose_keypoints import parse_pose
from training.miniature import world
from training.miniature.world import FACTORS, Action, Look

PLAIN = Action("left_arm", "wide", "slow", "stay", "upright", "together")
# In OpenPose's order the person's right comes first; they face us, so it is the picture's left.
WRISTS, ELBOWS, SHOULDERS = {"left": 4, "right": 7}, {"left": 3, "right": 6}, {"left": 2, "right": 5}
ANKLES, KNEES, HIPS = {"left": 10, "right": 13}, {"left": 9, "right": 12}, {"left": 8, "right": 11}
SIDES = ("left", "right")


def points(action=PLAIN, seed=0):
    """[17, 18, 2] as the parser reads them."""
    frames = parse_pose(world.pose_of_clip(action, np.random.default_rng(seed)))
    assert all((frame.width, frame.height, len(frame.people)) == (64, 64, 1) for frame in frames)
    bodies = np.stack([frame.people[0].body for frame in frames])
    assert bodies.shape == (17, 18, 3) and (bodies[..., 2] == 1).all()
    return bodies[..., :2]


def centre(mask):
    """Mean (x, y) of a frame's pixels, counted from the picture's corner."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.mean() + 0.5, ys.mean() + 0.5])


@pytest.mark.parametrize("action", world.all_actions()[::53])
def test_hands_head_and_feet_lie_where_the_clip_of_the_same_jitter_shows_them(action):
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    clip = world.draw_clip(action, Look("purple", "blue", "studio"), rng).astype(int)
    document = world.pose_of_clip(action, again)
    assert rng.random() == again.random()
    body = np.stack([frame.people[0].body for frame in parse_pose(document)])[..., :2]
    skin, shoe = (np.abs(clip - colour).max(-1) < 40 for colour in ((240, 190, 150), (50, 40, 40)))
    checked = 0
    ys, xs = np.mgrid[:64, :64] + 0.5
    for n in range(17):
        for joint, mask, radius in [
            (0, skin, 5.0),
            (4, skin, 2.3),
            (7, skin, 2.3),
            (10, shoe, 2.5),
            (13, shoe, 2.5),
        ]:
            away = np.hypot(xs - body[n, joint, 0], ys - body[n, joint, 1])
            disc, ring = mask[n] & (away < 8), mask[n] & (away > radius + 1.5) & (away < 8)
            full = disc.sum() > 0.75 * np.pi * radius**2
            if full and not ring.any() and (body[n, joint] > 4).all() and (body[n, joint] < 60).all():
                checked += 1
                assert np.abs(centre(disc) - body[n, joint]).max() < 0.4, (n, joint)
    assert checked > 20


def test_another_jitter_gives_another_pose_and_the_same_the_same():
    assert np.array_equal(points(), points()) and not np.array_equal(points(), points(seed=1))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["arm", "leg"])
def test_the_limb_that_the_action_names_moves_on_that_side_of_the_picture(side, kind):
    body = points(dataclasses.replace(PLAIN, limb=f"{side}_{kind}"))
    ends = WRISTS if kind == "arm" else ANKLES
    other = SIDES[side == "left"]
    swing = np.ptp(body[:, ends[side]], 0)
    assert swing.max() > 10 and np.ptp(body[:, ends[other]], 0).max() < 0.01
    sign = -1 if side == "left" else 1
    assert (sign * (body[:, ends[side], 0] - body[:, 1, 0]) > 0).all()
    highest = body[:, ends[side], 1].argmin()
    assert highest == 8 and body[8, ends[side], 1] < body[0, ends[side], 1] - 10


@pytest.mark.parametrize("limb", ["left_arm", "right_leg"])
def test_amplitude_tempo_and_travel_show_in_the_pose(limb):
    side, kind = limb.split("_")
    end = (WRISTS if kind == "arm" else ANKLES)[side]

    def path(**changed):
        return points(dataclasses.replace(PLAIN, limb=limb, **changed))[:, end]

    assert np.ptp(path(amplitude="wide")[:, 1]) > 1.5 * np.ptp(path(amplitude="small")[:, 1])
    assert np.allclose(path(tempo="fast")[:9], path()[::2], atol=1e-3)
    assert (
        path(travel="right")[16, 0] > path()[16, 0] + 10 and path(travel="left")[16, 0] < path()[16, 0] - 10
    )
    assert path(travel="up")[8, 1] < path()[8, 1] - 5


@pytest.mark.parametrize("action", world.all_actions()[::37])
def test_the_skeleton_is_that_of_a_person_who_faces_us(action):
    body = points(action)
    assert (np.diff(body[:, [2, 5], 0]) > 0).all() and (np.diff(body[:, [8, 11], 0]) > 0).all()
    ears_and_eyes = body[
        :, [16, 14, 15, 17]
    ]  # right ear, right eye, left eye, left ear: from the picture's left
    assert (np.diff(ears_and_eyes[..., 0]) > 0).all()
    for side in SIDES:
        shoulder, elbow, wrist = body[:, SHOULDERS[side]], body[:, ELBOWS[side]], body[:, WRISTS[side]]
        assert np.allclose(elbow, (shoulder + wrist) / 2, atol=1e-3)
        assert np.ptp(np.linalg.norm(wrist - shoulder, axis=1)) < 0.01
        hip, knee, ankle = body[:, HIPS[side]], body[:, KNEES[side]], body[:, ANKLES[side]]
        assert np.linalg.norm(knee - hip, axis=1) == pytest.approx(np.full(17, 10.0), rel=0.06)
        if not action.limb.endswith("leg"):
            assert (ankle[:, 1] > knee[:, 1]).all() and (knee[:, 1] > hip[:, 1]).all()
    assert np.allclose(body[:, 1], (body[:, 2] + body[:, 5]) / 2, atol=1e-3)
    lean = {"left": -1, "upright": 0, "right": 1}[action.lean]
    hips = (body[:, 8] + body[:, 11]) / 2
    tilt = body[:, 0, 0] - hips[:, 0]
    assert (np.abs(tilt) < 0.01).all() if lean == 0 else (lean * tilt > 5).all()


def test_two_values_of_every_factor_give_poses_that_look_different():
    for name, values in FACTORS.items():
        drawn = [
            pose_from_keypoints(
                world.pose_of_clip(dataclasses.replace(PLAIN, **{name: value}), np.random.default_rng(0)),
                17,
                64,
                64,
            )
            for value in values
        ]
        for n, one in enumerate(drawn):
            for other in drawn[n + 1 :]:
                assert ((one - other).abs().amax(1) > 0.25).sum() > 150, name
