"""Skeletons: the colours and places of DWPose's pictures, legible at every size, whatever the numbers."""

import sys

import numpy as np
import pytest

from lofa_core.conditions.pose_drawing import draw_pose, fitted_box
from lofa_core.conditions.pose_keypoints import parse_pose

# A person who faces us, in shares of the picture: their right side is on the picture's left.
STANDING = np.array([
    (0.50, 0.15), (0.50, 0.25), (0.40, 0.25), (0.32, 0.38), (0.26, 0.50), (0.60, 0.25), (0.70, 0.36),
    (0.78, 0.24), (0.44, 0.52), (0.42, 0.70), (0.40, 0.88), (0.56, 0.52), (0.58, 0.70), (0.62, 0.88),
    (0.47, 0.12), (0.53, 0.12), (0.43, 0.14), (0.57, 0.14),
])  # fmt: skip
# Limbs and the 18 colours of ControlNet's and DWPose's pictures, as everyone's tools know them.
LIMBS = [
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
]  # fmt: skip
COLOURS = [
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
    (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
]  # fmt: skip
SIZES = [(64, 64), (512, 512), (832, 480)]


def document(*people, width=512, height=512):
    return {"people": list(people), "canvas_width": width, "canvas_height": height}


def flat(points, unseen=()):
    return [v for n, (x, y) in enumerate(points) for v in (float(x), float(y), float(n not in unseen))]


def draw(*people, size=(512, 512), canvas=(512, 512), unseen=(), shift=0.0):
    """One picture of people given by body points in shares of the canvas, moved sideways by `shift`."""
    bodies = [{"pose_keypoints_2d": flat(person + [shift, 0.0], unseen)} for person in people or (STANDING,)]
    return draw_pose(parse_pose(document(*bodies, height=canvas[0], width=canvas[1])), *size)[0]


def near(picture, place, around=0):
    """The pixels at (and next to) a place given in shares of the picture: [n, 3]."""
    x, y = (int(part * side) for part, side in zip(place, picture.shape[1::-1], strict=True))
    return picture[max(y - around, 0) : y + around + 1, max(x - around, 0) : x + around + 1].reshape(-1, 3)


def test_limbs_have_a_rainbows_colours_darker_than_their_joints():
    picture = draw(size=(832, 832)).astype(int)
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        middle = near(picture, (STANDING[a] + STANDING[b]) / 2, 1)
        darker = [int(0.6 * part) for part in colour]
        assert (np.abs(middle - darker).max(-1) <= 2).any(), (a, b)
    for joint, colour in enumerate(COLOURS):
        assert (near(picture, STANDING[joint]) == colour).all(), joint


@pytest.mark.parametrize("size", SIZES)
def test_every_limb_is_seen_at_every_size(size):
    """Along each limb outside the head the brightest pixel near any point of it is far from black."""
    picture = draw(size=size, canvas=size)
    for a, b in [limb for limb in LIMBS if max(limb) < 14]:
        for share in (0.15, 0.3, 0.5, 0.7, 0.85):
            place = STANDING[a] * (1 - share) + STANDING[b] * share
            assert near(picture, place, 1).max() >= 75, (a, b, share)
    lit = (picture.max(-1) > 40).mean()
    assert 0.004 < lit < 0.12


def test_limbs_are_as_wide_as_suits_the_picture():
    """A horizontal limb of a half width of 4 pixels in pictures of 512, at least 1."""
    for side, height in ((2048, 32), (1024, 16), (512, 8), (64, 2), (32, 2)):
        points = np.full((18, 2), 0.5)
        points[[2, 3]] = (0.1, 0.5), (0.9, 0.5)
        picture = draw(points, size=(side, side), unseen=set(range(18)) - {2, 3})
        column = picture[:, side // 2].max(-1) / 153  # of the darker orange's red
        assert column.sum() == pytest.approx(height, rel=0.25), side


@pytest.mark.parametrize("missing", [0, 1, 3, 8, 13])
def test_a_joint_not_seen_breaks_its_own_limbs_alone(missing):
    picture, whole = draw(unseen={missing}), draw()
    for a, b in LIMBS:
        middle = near(picture, (STANDING[a] + STANDING[b]) / 2, 1)
        if missing in (a, b):
            assert middle.max() < near(whole, (STANDING[a] + STANDING[b]) / 2, 1).max(), (a, b)
        else:
            assert np.array_equal(middle, near(whole, (STANDING[a] + STANDING[b]) / 2, 1)) or a == 0, (a, b)
    shown = [(near(drawn, STANDING[missing]) == COLOURS[missing]).all() for drawn in (picture, whole)]
    assert shown == [False, True]


def test_all_people_are_drawn_and_none_at_all_is_black():
    left, right = draw(shift=-0.2), draw(shift=0.2)
    both = draw(STANDING - [0.2, 0], STANDING + [0.2, 0])
    assert np.array_equal(both > 0, (left > 0) | (right > 0))
    assert not draw_pose(parse_pose(document()), 64, 64).any()


def test_pictures_are_fitted_whole_and_centred_each_frame_by_itself():
    frames = parse_pose([
        document({"pose_keypoints_2d": flat(STANDING)}, width=width, height=height)
        for width, height in ((512, 256), (256, 512), (512, 512))
    ])  # fmt: skip
    wide, tall, even = draw_pose(frames, 128, 128).max(-1) > 60
    ys, xs = np.nonzero(wide)
    assert ys.min() >= 32 and ys.max() < 96 and xs.min() < 36 and xs.max() > 96
    ys, xs = np.nonzero(tall)
    assert xs.min() >= 32 and xs.max() < 96 and ys.min() < 18 and ys.max() > 110
    assert even.sum() > wide.sum()


def test_what_lies_outside_the_canvas_is_not_drawn_into_the_margin():
    points = STANDING.copy()
    points[10] = 0.4, 1.4
    picture = draw(points, size=(128, 128), canvas=(256, 512))
    assert not picture[96:].any() and picture[95].any()


def test_a_point_is_drawn_where_it_is():
    """The middle of a joint's dot lies within a tenth of a pixel of the point, counted from the corner."""
    for side, share in ((64, 0.37), (512, 0.613)):
        picture = draw(np.full((18, 2), share), size=(side, side), unseen=set(range(1, 18)))[..., 0].astype(
            float
        )
        ys, xs = np.mgrid[:side, :side] + 0.5
        centre = (picture * xs).sum() / picture.sum(), (picture * ys).sum() / picture.sum()
        assert np.allclose(centre, share * side, atol=0.1)


def test_hands_feet_and_face_have_their_own_colours():
    hand = [(420, 300)] + [(380 + 20 * f, 260 - 12 * k) for f in range(5) for k in range(4)]
    face = [(100 + 10 * (n % 10), 300 + 10 * (n // 10)) for n in range(70)]
    feet = [(340, 480), (360, 470), (310, 480), (160, 480), (140, 470), (190, 480)]
    parts = {"pose": STANDING * 512, "hand_left": hand, "face": face, "foot": feet}
    person = {f"{part}_keypoints_2d": flat(points) for part, points in parts.items()}
    picture = draw_pose(parse_pose(document(person)), 512, 512)[0].astype(int)
    for x, y in hand:
        assert picture[y, x].tolist() == [0, 0, 255]
    first = [(255, 0, 0), (204, 255, 0), (0, 255, 102), (0, 102, 255), (204, 0, 255)]
    for finger in range(5):  # a chain of four points each, from the wrist, and no line between fingers
        chain = [hand[0], *hand[1 + 4 * finger : 5 + 4 * finger]]
        middles = [near(picture, np.add(a, b) / 1024, 1) for a, b in zip(chain, chain[1:], strict=False)]
        assert all(middle.max() > 120 for middle in middles)
        assert (np.abs(middles[0] - first[finger]).max(-1) <= 60).any()
    for tip, base in zip(hand[4:20:4], hand[5::4], strict=True):
        assert not near(picture, np.add(tip, base) / 1024, 1).any()
    for x, y in face:
        assert picture[y, x].tolist() == [255, 255, 255]
    for ankle, toe in ((13, feet[0]), (10, feet[3])):
        sole = near(picture, (np.array(toe) + STANDING[ankle] * 512) / 1024, 1)
        assert (np.abs(sole - [int(0.6 * part) for part in COLOURS[ankle]]).max(-1) <= 2).any()
    hidden = person | {"face_keypoints_2d": flat(face, range(70)), "hand_left_keypoints_2d": flat(hand, {0})}
    picture = draw_pose(parse_pose(document(hidden)), 512, 512)[0].astype(int)
    assert not (picture == 255).all(-1).any() and not picture[290:310, 410:430].any()


def test_guesses_that_are_hardly_sure_are_not_drawn():
    values = flat(STANDING)
    values[4 * 3 + 2] = 0.04
    faint = draw_pose(parse_pose(document({"pose_keypoints_2d": values})), 512, 512)[0]
    assert np.array_equal(faint, draw(unseen={4}))


@pytest.mark.parametrize("seed", range(20))
def test_absurd_places_and_canvases_neither_crash_nor_leave_the_picture(seed):
    rng = np.random.default_rng(seed)
    side = [1, 2, 63, 512, 16384]
    width, height = int(rng.choice(side)), int(rng.choice(side))
    reach = 10.0 ** rng.integers(0, 12, (18, 1))
    points = rng.uniform(-2, 3, (18, 2)) * [width, height] * np.where(rng.random((18, 1)) < 0.5, 1, reach)
    given = document({"pose_keypoints_2d": flat(points)}, width=width, height=height)
    size = int(rng.choice([1, 16, 64, 300])), int(rng.choice([1, 16, 64, 700]))
    picture = draw_pose(parse_pose([given] * 2), *size)
    assert picture.shape == (2, *size, 3) and np.array_equal(picture[0], picture[1])


@pytest.mark.parametrize("size", [(0, 64), (64, -1), (16385, 64)])
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(ValueError, match=r"(height|width) is (0|-1|16385); expected 1 to 16384"):
        draw_pose(parse_pose(document()), *size)


def test_without_opencv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        draw_pose(parse_pose(document()), 64, 64)


@pytest.mark.parametrize(
    ("picture", "into", "box"),
    [
        ((256, 512), (64, 64), (16, 0, 32, 64)),
        ((512, 256), (64, 64), (0, 16, 64, 32)),
        ((64, 64), (832, 480), (176, 0, 480, 480)),
        ((1, 16384), (64, 64), (31, 0, 1, 64)),
    ],
)
def test_boxes_keep_the_shape_and_lie_in_the_middle(picture, into, box):
    assert fitted_box(*picture, *into) == box
