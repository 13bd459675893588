"""Poses from video, with stand-ins for the libraries that give arrays of the real ones' shapes."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from test_media import numbered, write_video

from lofa_core.conditions.pose_keypoints import parse_pose
from training.data import pose_video
from training.data.pose_video import open_pose_finder, people_of_whole_body, poses_of_video

# COCO-WholeBody's body and feet, by number.
COCO = (
    "nose l_eye r_eye l_ear r_ear l_shoulder r_shoulder l_elbow r_elbow l_wrist r_wrist l_hip r_hip l_knee "
    "r_knee l_ankle r_ankle l_big_toe l_small_toe l_heel r_big_toe r_small_toe r_heel"
).split()
OPENPOSE = (
    "nose neck r_shoulder r_elbow r_wrist l_shoulder l_elbow l_wrist r_hip r_knee r_ankle l_hip l_knee "
    "l_ankle r_eye l_eye r_ear l_ear"
).split()


def whole_body(people=1):
    """Point n of person p lies at 10 + 3 n, 400 - 2 n + p, and is surely seen."""
    points = np.stack([10 + 3.0 * np.arange(133), 400 - 2.0 * np.arange(133)], -1)
    return np.stack([points + [0, p] for p in range(people)]), np.full((people, 133), 0.9, np.float32)


def triples(values):
    return np.array(values).reshape(-1, 3)


def test_every_point_of_coco_whole_body_goes_to_its_place():
    points, scores = whole_body(2)
    people = people_of_whole_body(points, scores)
    assert len(people) == 2
    for p, person in enumerate(people):
        place = dict(zip(COCO, points[p], strict=False))
        place["neck"] = (place["l_shoulder"] + place["r_shoulder"]) / 2
        for name, got in zip(OPENPOSE, triples(person["pose_keypoints_2d"]), strict=True):
            assert np.allclose(got, [*place[name], 0.9], atol=1e-3), name
        for name, got in zip(COCO[17:], triples(person["foot_keypoints_2d"]), strict=True):
            assert np.allclose(got[:2], place[name]), name
        face = triples(person["face_keypoints_2d"])[:, :2]
        assert np.allclose(face[:68], points[p, 23:91])
        assert np.allclose(face[68], place["r_eye"]) and np.allclose(face[69], place["l_eye"])
        assert np.allclose(triples(person["hand_left_keypoints_2d"])[:, :2], points[p, 91:112])
        assert np.allclose(triples(person["hand_right_keypoints_2d"])[:, :2], points[p, 112:133])


def test_points_not_sure_enough_are_not_seen_and_the_neck_needs_both_shoulders():
    points, scores = whole_body()
    scores[0, 5], scores[0, 10], scores[0, 0], points[0, 1] = 0.29, 0.31, 7.5, np.nan
    (person,) = people_of_whole_body(points, scores)
    body = dict(zip(OPENPOSE, triples(person["pose_keypoints_2d"]), strict=True))
    for name in ("l_shoulder", "neck", "l_eye"):
        assert not body[name].any(), name
    assert body["r_wrist"][2] == pytest.approx(0.31, abs=1e-3) and body["nose"][2] == 1
    assert all(type(value) is float for values in person.values() for value in values)


@pytest.mark.parametrize(
    ("points", "scores"), [((1, 17, 2), (1, 17)), ((1, 133, 3), (1, 133)), ((2, 133, 2), (1, 133))]
)
def test_points_of_other_models_are_refused(points, scores):
    with pytest.raises(ValueError, match=r"expected \[N, 133, 2\]"):
        people_of_whole_body(np.zeros(points), np.zeros(scores))


class Tool:
    """What rtmlib's YOLOX and RTMPose have in common: a session that knows the file's shapes."""

    def __init__(self, file, device="cpu", **options):
        self.file, self.device, self.model_input_size, self.det_mode = file, device, None, None
        self.__dict__.update(options)
        shape, outputs = SHAPES[file.rsplit("/", 1)[-1]]
        self.session = SimpleNamespace(
            get_inputs=lambda: [SimpleNamespace(shape=shape)], get_outputs=lambda: [None] * outputs
        )


SHAPES = {
    "yolox_l.onnx": (["batch", 3, 640, 512], 1),
    "yolox_nms.onnx": (["batch", 3, 640, 512], 2),
    "yolox_any.onnx": (["batch", 3, "height", "width"], 1),
    "dw-ll_ucoco_384.onnx": (["batch", 3, 384, 288], 2),
}
seen = []


class YOLOX(Tool):
    """People and a dog (class 16) where a picture's blue is not 0."""

    def __call__(self, picture):
        assert self.model_input_size == (640, 512)
        seen.append(picture[0, 0].tolist())
        found = np.array([[0, 0, 9, 9], [5, 5, 9, 9], [1, 1, 4, 4]], float)[: 3 if picture[0, 0, 0] else 0]
        classes = np.array([0, 16, 0])[: len(found)]
        assert picture.flags.c_contiguous
        return (found, classes) if self.det_mode == "multiclass" else found[classes == 0]


class RTMPose(Tool):
    """As the library does, a pose in the whole picture where there is no box."""

    def __call__(self, picture, bboxes=()):
        assert self.model_input_size == (288, 384)
        return whole_body(max(1, len(bboxes)))


@pytest.fixture
def rtmlib(monkeypatch):
    seen.clear()
    monkeypatch.setitem(sys.modules, "rtmlib", SimpleNamespace(YOLOX=YOLOX, RTMPose=RTMPose))


def folder(tmp_path, *names):
    for name in names:
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("detector", ["yolox_l.onnx", "yolox_nms.onnx"])
def test_a_document_of_frames_with_the_people_that_rtmlib_finds(tmp_path, rtmlib, detector):
    frames = np.zeros((3, 200, 300, 3), np.uint8)
    frames[[0, 2]] = 10, 20, 30  # in the middle one nobody is found
    models = folder(tmp_path, detector, "dw-ll_ucoco_384.onnx")
    document = poses_of_video(frames, models)
    read = parse_pose(document)
    assert [len(frame.people) for frame in read] == [2, 0, 2] and (read[0].width, read[0].height) == (
        300,
        200,
    )
    assert seen == [[30, 20, 10], [0, 0, 0], [30, 20, 10]]  # blue first, as OpenCV reads pictures
    assert read[0].people[0].body[0].tolist() == pytest.approx([10, 400, 0.9], abs=1e-3)
    finder = open_pose_finder(models)
    assert poses_of_video(frames, finder) == document


def test_every_frame_of_a_file_is_searched(tmp_path, rtmlib):
    path = write_video(tmp_path / "clip.mkv", numbered(7, 32, 48))
    document = poses_of_video(path, folder(tmp_path, "yolox_l.onnx", "dw-ll_ucoco_384.onnx"))
    assert len(document) == 7 and [picture[2] for picture in seen] == [8 * n for n in range(7)]
    assert {(frame["canvas_width"], frame["canvas_height"]) for frame in document} == {(48, 32)}


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("yolox_l.onnx",),
        ("a.onnx", "b.onnx"),
        ("yolox_l.onnx", "a.onnx", "b.onnx"),
        ("body_pose_model.pth",),
    ],
)
def test_a_folder_without_the_files_is_refused(tmp_path, names):
    with pytest.raises(ValueError, match="expected two ONNX files.*yolox.*facenet.pth"):
        open_pose_finder(folder(tmp_path, *names))


def test_a_file_of_no_fixed_size_is_refused(tmp_path, rtmlib):
    with pytest.raises(ValueError, match=r"yolox_any.onnx: takes an input \['batch', 3, 'height', 'width'\]"):
        open_pose_finder(folder(tmp_path, "yolox_any.onnx", "dw-ll_ucoco_384.onnx"))


OPENPOSE_FILES = ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth")


@pytest.mark.parametrize(
    ("package", "names", "said"),
    [
        ("rtmlib", ("yolox_l.onnx", "pose.onnx"), "pip install rtmlib onnxruntime"),
        ("controlnet_aux", OPENPOSE_FILES, "pip install controlnet-aux"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, names, said):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=said):
        open_pose_finder(folder(tmp_path, *names))


class OpenposeDetector:
    """As controlnet-aux's: shares of a picture; unseen points of a hand are -1 pixel, of a face left out."""

    @classmethod
    def from_pretrained(cls, path):
        assert path.startswith("/")
        return cls()

    def to(self, device):
        self.device = device
        return self

    def detect_poses(self, picture, include_hand, include_face):
        assert (
            include_hand and include_face and picture[0, 0].tolist() == [10, 20, 30] and self.device == "cuda"
        )
        point = SimpleNamespace
        body = [None, *(point(x=n / 20, y=0.5) for n in range(1, 18))]
        hand = [point(x=-1 / 300, y=-1 / 200), *(point(x=0.25, y=n / 40) for n in range(1, 21))]
        face = [point(x=0.5, y=n / 100) for n in range(1, 50)]
        return [
            SimpleNamespace(body=SimpleNamespace(keypoints=body), left_hand=hand, right_hand=None, face=face)
        ]


def test_openpose_by_controlnet_aux_is_the_second_choice(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "controlnet_aux", SimpleNamespace(OpenposeDetector=OpenposeDetector))
    frames = np.empty((1, 200, 300, 3), np.uint8)
    frames[:] = 10, 20, 30
    document = poses_of_video(frames, folder(tmp_path, *OPENPOSE_FILES), "cuda")
    (person,) = parse_pose(document)[0].people
    assert not person.body[0].any() and np.allclose(person.body[1:, 0], 15 * np.arange(1, 18), atol=1e-3)
    assert not person.left_hand[0].any() and np.allclose(
        person.left_hand[1:, 1], 5 * np.arange(1, 21), atol=1e-3
    )
    assert np.allclose(person.face[:49, 1], 2 * np.arange(1, 50), atol=1e-3) and not person.right_hand.any()
    given = document[0]["people"][0]
    assert given["hand_right_keypoints_2d"] == [] and given["hand_left_keypoints_2d"][:3] == [0, 0, 0]


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (np.zeros((2, 8, 8, 3)), r"Frames float64 \(2, 8, 8, 3\): expected uint8"),
        (np.zeros((8, 8, 3), np.uint8), "expected uint8"),
        (np.zeros((2, 8, 8, 4), np.uint8), "expected uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), "there is no frame"),
    ],
)
def test_what_is_no_clip_is_refused(frames, said):
    with pytest.raises(ValueError, match=said):
        poses_of_video(frames, lambda frame: [])


def test_a_video_that_is_none_or_too_long_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"a.mp4: cannot be decoded"):
        poses_of_video(tmp_path / "a.mp4", lambda frame: [])
    monkeypatch.setattr(pose_video, "MAX_FRAMES", 3)
    assert len(poses_of_video(np.zeros((3, 8, 8, 3), np.uint8), lambda frame: [])) == 3
    with pytest.raises(ValueError, match="more than 3 frames"):
        poses_of_video(np.zeros((4, 8, 8, 3), np.uint8), lambda frame: [])
