"""Poses from raw video, for pose datasets: POSE_KEYPOINT documents by rtmlib, or controlnet-aux's OpenPose.

The weights are files that the user names; nothing is downloaded. Either package is imported when it is used.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lofa_core.conditions.pose_keypoints import MAX_FRAMES

from .media import decoded

# RGB uint8 [H, W, 3] -> the people of a POSE_KEYPOINT frame, points in pixels of this picture.
PoseFinder = Callable[[np.ndarray], list[dict[str, list[float]]]]

# Names of the files that controlnet-aux looks for in a folder.
_OPENPOSE_FILES = ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth")
_SEEN = 0.3  # a model's score below which DWPose, too, takes a point for not seen
_NECK = -1
# COCO's 17 body points in OpenPose's order of 18, whose neck COCO lacks.
_COCO_BODY = [0, _NECK, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
_LEFT_SHOULDER, _RIGHT_SHOULDER, _LEFT_EYE, _RIGHT_EYE = 5, 6, 1, 2
# Where COCO-WholeBody has each part. OpenPose's face ends with the pupils: here the eyes of the body.
_WHOLE_BODY = {
    "pose_keypoints_2d": _COCO_BODY,
    "foot_keypoints_2d": range(17, 23),
    "face_keypoints_2d": [*range(23, 91), _RIGHT_EYE, _LEFT_EYE],
    "hand_left_keypoints_2d": range(91, 112),
    "hand_right_keypoints_2d": range(112, 133),
}
_POINTS = 133


def poses_of_video(
    video: Path | np.ndarray, models: Path | PoseFinder, device: str = "cpu"
) -> list[dict[str, Any]]:
    """The POSE_KEYPOINT document of a video file's frames, or of frames uint8 [T, H, W, 3] (RGB).

    `models` is what `open_pose_finder` takes, or what it gave: open it once for many videos. A frame in which
    nobody is found has no people. Raises ValueError for a video that cannot be read, has no frame or more
    than MAX_FRAMES, and where no finder can be opened.
    """
    find = open_pose_finder(models, device) if isinstance(models, Path) else models
    document: list[dict[str, Any]] = []
    for frame in _frames(video):
        if len(document) == MAX_FRAMES:
            raise ValueError(f"{_name(video)}: more than {MAX_FRAMES} frames. Cut it into shorter clips.")
        height, width = frame.shape[:2]
        document.append({"people": find(frame), "canvas_width": width, "canvas_height": height})
    if not document:
        raise ValueError(f"{_name(video)}: there is no frame to find poses in.")
    return document


def open_pose_finder(models: Path, device: str = "cpu") -> PoseFinder:
    """Read the models of a folder onto a device of onnxruntime's or torch's ("cpu", "cuda").

    For rtmlib two ONNX files: a YOLOX person detector, known by "yolox" in its name, and a whole-body model
    of 133 points (DWPose, RTMW). For OpenPose, licensed for non-commercial use alone, body_pose_model.pth,
    hand_pose_model.pth and facenet.pth. Raises ValueError for any other folder and for a missing package, and
    onnxruntime's or torch's own error for a damaged file.
    """
    networks = sorted(file for file in models.glob("*.onnx") if file.is_file())
    detectors = [file for file in networks if "yolox" in file.name.lower()]
    if len(networks) == 2 and len(detectors) == 1:
        return _open_rtmlib(detectors[0], next(file for file in networks if file != detectors[0]), device)
    if all((models / name).is_file() for name in _OPENPOSE_FILES):
        return _open_openpose(models, device)
    held = ", ".join(file.name for file in networks) or "no ONNX file"
    raise ValueError(
        f'{models}: holds {held}; expected two ONNX files, a YOLOX person detector with "yolox" in its name '
        "and a whole-body pose model (for example DWPose's yolox_l.onnx and dw-ll_ucoco_384.onnx), or "
        f"OpenPose's {', '.join(_OPENPOSE_FILES)}."
    )


def people_of_whole_body(points: np.ndarray, scores: np.ndarray) -> list[dict[str, list[float]]]:
    """COCO-WholeBody points [N, 133, 2] in pixels and scores [N, 133] -> the people of a POSE_KEYPOINT frame.

    The neck is the middle of the shoulders, as sure as the less sure one. Raises ValueError for other shapes.
    """
    if points.shape[1:] != (_POINTS, 2) or scores.shape != points.shape[:2]:
        raise ValueError(
            f"The pose model gives points {points.shape} and scores {scores.shape}; expected [N, 133, 2] and "
            "[N, 133]: a whole-body model of COCO-WholeBody's 133 points."
        )
    people = []
    for place, score in zip(points, scores, strict=True):
        shoulders = [_LEFT_SHOULDER, _RIGHT_SHOULDER]
        with_neck = np.c_[
            np.concatenate([place, place[shoulders].mean(0, keepdims=True)]),
            np.append(score, score[shoulders].min()),
        ]
        people.append({key: _triples(with_neck[list(order)]) for key, order in _WHOLE_BODY.items()})
    return people


def _triples(points: np.ndarray) -> list[float]:
    """[n, 3] -> a flat list with 0, 0, 0 for what was not seen; SimCC's scores may exceed 1."""
    seen = np.isfinite(points).all(1) & (points[:, 2] >= _SEEN)
    points = np.where(seen[:, None], points, 0.0)
    points[:, 2] = points[:, 2].clip(0.0, 1.0)
    return points.round(3).ravel().tolist()


def _frames(video: Path | np.ndarray) -> Iterable[np.ndarray]:
    if isinstance(video, np.ndarray):
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
            raise ValueError(f"{_name(video)}: expected uint8 [T, H, W, 3].")
        return video
    return (np.asarray(frame.to_image().rotate(frame.rotation, expand=True)) for frame in decoded(video))


def _name(video: Path | np.ndarray) -> str:
    return f"Frames {video.dtype} {video.shape}" if isinstance(video, np.ndarray) else str(video)


def _open_rtmlib(detector_file: Path, pose_file: Path, device: str) -> PoseFinder:
    try:
        import rtmlib

        detector = rtmlib.YOLOX(str(detector_file), det_mode="multiclass", device=device)
        pose = rtmlib.RTMPose(str(pose_file), device=device)
    except ImportError as error:  # rtmlib imports onnxruntime when it opens a file
        raise ValueError(
            f"{detector_file.parent}: finding poses with these files needs: pip install rtmlib onnxruntime"
        ) from error
    # The library takes sizes that it is not told for one fixed size; the two classes count them in two ways.
    detector.model_input_size = _input_size(detector, detector_file)
    pose.model_input_size = _input_size(pose, pose_file)[::-1]
    # More than one output: the file itself chooses among the boxes, and knows people alone.
    suppressed = len(detector.session.get_outputs()) > 1
    if suppressed:
        detector.det_mode = "human"

    def find(frame: np.ndarray) -> list[dict[str, list[float]]]:
        picture = np.ascontiguousarray(frame[..., ::-1])  # rtmlib takes pictures as OpenCV reads them
        boxes = detector(picture)
        if not suppressed:
            boxes, classes = boxes
            boxes = boxes[classes == 0]  # COCO's first class is people
        # Without a box the library would look for somebody in the whole picture.
        return people_of_whole_body(*pose(picture, bboxes=boxes)) if len(boxes) else []

    return find


def _input_size(tool: Any, file: Path) -> tuple[int, int]:
    """(height, width) of the picture that an opened ONNX file takes."""
    shape = tool.session.get_inputs()[0].shape
    if len(shape) != 4 or not all(isinstance(side, int) for side in shape[2:]):
        raise ValueError(f"{file}: takes an input {shape}; expected [N, 3, height, width] of a fixed size.")
    return shape[2], shape[3]


def _open_openpose(models: Path, device: str) -> PoseFinder:
    try:
        import controlnet_aux
    except ImportError as error:
        raise ValueError(
            f"{models}: finding poses with these files needs: pip install controlnet-aux"
        ) from error
    detector = controlnet_aux.OpenposeDetector.from_pretrained(str(models.resolve())).to(device)

    def find(frame: np.ndarray) -> list[dict[str, list[float]]]:
        found = detector.detect_poses(frame, include_hand=True, include_face=True)
        return [_person_of_openpose(result, *frame.shape[:2]) for result in found]

    return find


def _person_of_openpose(result: Any, height: int, width: int) -> dict[str, list[float]]:
    """A PoseResult of controlnet-aux: points are shares of the picture; None, or below 0, was not seen."""
    parts = {
        "pose_keypoints_2d": result.body.keypoints,
        "face_keypoints_2d": result.face,
        "hand_left_keypoints_2d": result.left_hand,
        "hand_right_keypoints_2d": result.right_hand,
    }
    person: dict[str, list[float]] = {}
    for key, points in parts.items():
        person[key] = []
        for point in points or ():
            if point is None or min(point.x, point.y) < 0.0:
                person[key] += 0.0, 0.0, 0.0
            else:
                person[key] += round(float(point.x) * width, 3), round(float(point.y) * height, 3), 1.0
    return person
