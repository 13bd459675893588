"""POSE_KEYPOINT documents: what real writers give is read, the broken and hostile refused in one sentence."""

import json

import numpy as np
import pytest

from lofa_core.conditions import pose_keypoints
from lofa_core.conditions.pose_keypoints import parse_pose

RNG = np.random.default_rng(0)


def flat(points, confidence=1.0):
    """[n, 2] -> x, y, confidence, x, y, confidence ..."""
    return [number for x, y in points for number in (float(x), float(y), confidence)]


def scattered(count, width=512, height=256):
    return flat(RNG.uniform(10, [width - 10, height - 10], (count, 2)))


def frame(*people, width=512, height=256):
    return {"people": list(people), "canvas_width": width, "canvas_height": height}


def person(**changed):
    parts = {"pose": 18, "face": 70, "hand_left": 21, "hand_right": 21, "foot": 6}
    return {f"{part}_keypoints_2d": scattered(count) for part, count in parts.items()} | changed


def body(values):
    return frame({"pose_keypoints_2d": values})


def test_every_part_of_every_person_is_read_in_pixels():
    one, two = person(), person()
    (read,) = parse_pose([frame(one, two)])
    assert (read.width, read.height, len(read.people)) == (512, 256, 2)
    for given, got in zip((one, two), read.people, strict=True):
        for name, values in zip(
            ("pose", "face", "hand_left", "hand_right", "foot"),
            (got.body, got.face, got.left_hand, got.right_hand, got.feet),
            strict=True,
        ):
            assert values.dtype == np.float32
            assert np.allclose(values.ravel(), given[f"{name}_keypoints_2d"], atol=1e-3), name


def test_a_list_one_frame_and_json_of_either_say_the_same():
    document = frame(person())
    wanted = parse_pose([document])[0].people[0].body
    for other in (document, (document,), json.dumps(document), json.dumps([document])):
        (read,) = parse_pose(other)
        assert np.array_equal(read.people[0].body, wanted)


@pytest.mark.parametrize("nothing", [None, [], ()])
def test_parts_that_are_null_missing_or_empty_are_not_seen(nothing):
    given = {
        "pose_keypoints_2d": scattered(18),
        "face_keypoints_2d": nothing,
        "hand_left_keypoints_2d": nothing,
    }
    (got,) = parse_pose(frame(given))[0].people
    assert (got.body[:, 2] == 1).all()
    for part, count in ((got.face, 70), (got.left_hand, 21), (got.right_hand, 21), (got.feet, 6)):
        assert part.shape == (count, 3) and not part.any()


def test_a_frame_may_be_without_people():
    assert [len(read.people) for read in parse_pose([frame(), frame(person()), frame(person(), {})])] == [
        0,
        1,
        2,
    ]
    assert parse_pose(frame() | {"people": None})[0].people == ()


def test_shares_of_the_canvas_become_pixels_even_a_little_outside():
    points = RNG.uniform(0.1, 0.9, (18, 2))
    points[10], points[13] = (0.5, 1.3), (-0.2, 0.5)
    small, wide = (
        frame({"pose_keypoints_2d": flat(points)}),
        frame({"pose_keypoints_2d": flat(points)}, width=64),
    )
    first, second = parse_pose([small, wide])
    assert np.allclose(first.people[0].body[:, :2], points * [512, 256], atol=1e-3)
    assert np.allclose(second.people[0].body[:, :2], points * [64, 256], atol=1e-3)


def test_pixels_or_shares_is_decided_over_the_whole_document():
    """A hand in the corner of one frame is small numbers among pixels, not a share of the canvas."""
    corner = {"hand_left_keypoints_2d": flat(RNG.uniform(0.2, 1.4, (21, 2)))}
    alone, among = parse_pose([frame(corner)]), parse_pose([frame(corner), frame(person())])
    assert alone[0].people[0].left_hand[:, 0].max() > 100 and among[0].people[0].left_hand[:, 0].max() < 1.5


def test_pixels_of_a_tiny_canvas_are_pixels():
    points = RNG.uniform(0.5, 3.5, (18, 2))
    got = parse_pose(frame({"pose_keypoints_2d": flat(points)}, width=4, height=4))[0].people[0].body
    assert points.max() < 4 and np.allclose(got[:, :2], points, atol=1e-5)


def test_points_that_nobody_saw_do_not_decide_about_pixels():
    values = flat(np.full((18, 2), 0.5))
    values[9:12] = 300.0, 200.0, 0.0
    got = parse_pose(body(values))[0].people[0].body
    assert np.allclose(got[0, :2], [256, 128]) and not got[3].any()


@pytest.mark.parametrize(
    "unseen",
    [(100, 100, 0), (100, 100, -1), (0, 0, 0), (0, 0, 1), (-1, -1, 0), (-1, -1, 1), (1e9, 100, 1),
     (100, -1e300, 1), (1025, 100, 1), (100, -257, 1)],
)  # fmt: skip
def test_marks_of_points_not_seen_and_points_far_outside(unseen):
    values = scattered(18)
    values[6:9] = unseen
    got = parse_pose(body(values))[0].people[0].body
    assert not got[2].any() and (np.delete(got, 2, 0)[:, 2] == 1).all()


def test_points_a_little_outside_stay_and_confidence_is_cut_to_one():
    values = scattered(18)
    values[6:9], values[9:12], values[12:15] = (-40, 300, 1), (100, 100, 8.25), (100, 100, 0.25)
    got = parse_pose(body(values))[0].people[0].body
    assert got[2].tolist() == [-40, 300, 1] and got[3, 2] == 1 and got[4, 2] == 0.25


def test_openposes_node_marks_hands_with_minus_one_pixel_as_a_share():
    hand = RNG.uniform(0.1, 0.9, (21, 2)).astype(np.float32)
    hand[5] = np.float32(-1) / np.float32(512), np.float32(-1) / np.float32(256)
    got = parse_pose(frame({"hand_left_keypoints_2d": flat(hand)}))[0].people[0].left_hand
    assert not got[5].any() and (np.delete(got, 5, 0)[:, 2] == 1).all()


@pytest.mark.parametrize("count", [1, 51, 68, 70, 71])
def test_a_face_may_lack_points_or_have_openposes_extra_one(count):
    values = scattered(count)
    got = parse_pose(frame({"face_keypoints_2d": values}))[0].people[0].face
    kept = min(count, 70)
    assert np.allclose(got[:kept].ravel(), values[: 3 * kept], atol=1e-3) and not got[kept:].any()


def test_body_25_is_put_into_the_order_of_18_with_its_feet():
    """OpenPose's own files: 8 is the middle of the hips; eyes and ears follow the legs, then the feet."""
    names = (
        "nose neck r_shoulder r_elbow r_wrist l_shoulder l_elbow l_wrist mid_hip r_hip r_knee r_ankle l_hip "
        "l_knee l_ankle r_eye l_eye r_ear l_ear l_big_toe l_small_toe l_heel r_big_toe r_small_toe r_heel"
    ).split()
    wanted = (
        "nose neck r_shoulder r_elbow r_wrist l_shoulder l_elbow l_wrist r_hip r_knee r_ankle l_hip l_knee "
        "l_ankle r_eye l_eye r_ear l_ear"
    ).split()
    places = {name: (10 + 7 * n, 200 - 5 * n) for n, name in enumerate(names)}
    (got,) = parse_pose(body(flat([places[name] for name in names])))[0].people
    assert [tuple(point) for point in got.body[:, :2]] == [places[name] for name in wanted]
    assert [tuple(point) for point in got.feet[:, :2]] == [places[name] for name in names[19:]]
    feet = scattered(6)
    both = {"pose_keypoints_2d": flat([places[n] for n in names]), "foot_keypoints_2d": feet}
    assert np.allclose(parse_pose(frame(both))[0].people[0].feet.ravel(), feet, atol=1e-3)


def test_nested_triples_arrays_and_whole_floats_are_read_too():
    values = scattered(18)
    nested = [values[n : n + 3] for n in range(0, 54, 3)]
    wanted = parse_pose(body(values))[0].people[0].body
    for other in (nested, np.array(values), tuple(values)):
        assert np.array_equal(parse_pose(body(other))[0].people[0].body, wanted)
    assert parse_pose(frame(width=512.0))[0].width == 512


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        (None, "The pose is null"),
        (7, "is 7; expected POSE_KEYPOINT"),
        ([], "0 frames"),
        ([[]], "Frame 0 of the pose is a list"),
        ([{"animals": []}], 'has no "people"'),
        ({"people": []}, "canvas_width is missing"),
        (frame(width=0), "canvas_width is 0"),
        (frame(height=16385), "canvas_height is 16385"),
        (frame(width=10**400), "canvas_width is a huge"),
        (frame(width=64.5), "canvas_width is 64.5"),
        (frame(width="512"), "canvas_width is '512'"),
        (frame(width=True), "canvas_width is True"),
        (frame(width=float("nan")), "canvas_width is nan"),
        (frame() | {"people": "x" * 999}, '"people" is \'xxx'),
        ([frame(), frame(3)], "Frame 1 of the pose: person 0 is 3"),
        (body("0" * 54), "pose_keypoints_2d is '0000"),
        (body(scattered(17)), "51 numbers; expected x, y, confidence of 18 or 25 points"),
        (body(scattered(18)[:-1]), "53 numbers"),
        (body([[1, 2]] * 18), "18 numbers"),
        (frame({"face_keypoints_2d": scattered(72)}), "216 numbers; expected x, y, confidence of 1 to 71"),
        (frame({"hand_left_keypoints_2d": scattered(20)}), "hand_left_keypoints_2d has 60 numbers"),
        (frame({"foot_keypoints_2d": scattered(5)}), "foot_keypoints_2d has 15 numbers"),
        (body([*scattered(18)[:-1], float("nan")]), "holds nan"),
        (body([float("inf"), *scattered(18)[1:]]), "holds inf"),
        (json.dumps(body([float("-inf"), *scattered(18)[1:]])), "holds -inf"),
        (body([10**400, *scattered(18)[1:]]), "holds a huge"),
        (body([None, *scattered(18)[1:]]), "holds null"),
        (body(["1", *scattered(18)[1:]]), "holds '1'"),
        (body([True, *scattered(18)[1:]]), "holds True"),
    ],
)
def test_what_is_no_pose_is_refused_in_one_short_sentence(document, said):
    with pytest.raises(ValueError, match=".") as error:
        parse_pose(document)
    assert said in str(error.value) and len(str(error.value)) < 300


def test_limits_of_frames_and_people(monkeypatch):
    assert len(parse_pose([frame(*[{}] * 100)])[0].people) == 100
    with pytest.raises(ValueError, match="Frame 0 of the pose has 101 people; at most 100"):
        parse_pose([frame(*[{}] * 101)])
    assert (pose_keypoints.MAX_FRAMES, pose_keypoints.MAX_SIDE) == (10_000, 16_384)
    monkeypatch.setattr(pose_keypoints, "MAX_FRAMES", 3)
    assert len(parse_pose([frame()] * 3)) == 3
    with pytest.raises(ValueError, match="4 frames; expected 1 to 3"):
        parse_pose([frame()] * 4)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_thrown_at_it_it_reads_or_refuses(seed):
    """Broken copies of a good document: a pose or a ValueError, nothing else, and only finite numbers."""
    rng = np.random.default_rng(seed)
    junk = [
        None,
        "x",
        -1,
        0,
        1e308,
        float("nan"),
        10**400,
        [],
        {},
        [[]],
        [None] * 54,
        True,
        [1e30] * 54,
        b"1",
    ]
    document = [frame(person(), person()), frame(), frame(person())]
    for _ in range(rng.integers(1, 4)):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = keys[rng.integers(len(keys))]
            if not isinstance(place[key], list | dict) or not place[key] or rng.random() < 0.3:
                break
            place = place[key]
        place[key] = junk[rng.integers(len(junk))]
    try:
        frames = parse_pose(document)
    except ValueError as error:
        assert len(str(error)) < 300
        return
    for read in frames:
        for someone in read.people:
            points = np.concatenate([someone.body, someone.face, someone.left_hand, someone.feet])
            assert np.isfinite(points).all() and (points[:, 2] >= 0).all() and (points[:, 2] <= 1).all()
            assert (np.abs(points[:, :2]) <= [2 * read.width, 2 * read.height]).all()
