"""POSE_KEYPOINT, the poses that ComfyUI's DWPose and OpenPose nodes give: read and checked.

A document is a list of frames, one frame, or JSON text of either. A frame is {"people": [...],
"canvas_width": W, "canvas_height": H}; a person has a list x, y, confidence, x, y, confidence ... per part.

Points are pixels of the canvas or shares of it (0..1), which is decided once per document: where no seen
point of any frame lies further than 1.5 from 0, they are shares. That leaves half a canvas for joints guessed
outside the picture, and no real pose in pixels fits between -1.5 and 1.5.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_FRAMES = 10_000
MAX_PEOPLE = 100
MAX_SIDE = 16_384

# Each part's name in a document, how many points it has, and how many a document may give. A body may be in
# the order BODY_25. OpenPose's node leaves out what it did not see of a face, and adds a point that is none.
_PARTS: dict[str, tuple[str, int, Sequence[int]]] = {
    "body": ("pose_keypoints_2d", 18, (18, 25)),
    "face": ("face_keypoints_2d", 70, range(1, 72)),
    "left_hand": ("hand_left_keypoints_2d", 21, (21,)),
    "right_hand": ("hand_right_keypoints_2d", 21, (21,)),
    "feet": ("foot_keypoints_2d", 6, (6,)),
}
_BODY_25 = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]  # all but the middle of the hips
_FEET_25 = slice(19, 25)
_FURTHEST_SHARE = 1.5


@dataclass(frozen=True, eq=False)
class Person:
    """Points float32 [n, 3]: x, y in pixels of the canvas from its upper left corner, confidence 0..1.

    A point that was not seen is 0, 0, 0, and so are all of a part that is missing. Left and right are the
    person's own.
    """

    body: np.ndarray  # [18, 3]: nose, neck; right shoulder, elbow, wrist; left; right hip, knee, ankle; left;
    #                            right eye, left eye, right ear, left ear
    face: np.ndarray  # [70, 3]
    left_hand: np.ndarray  # [21, 3]: wrist, then four points of each finger
    right_hand: np.ndarray  # [21, 3]
    feet: np.ndarray  # [6, 3]: big toe, small toe, heel of the left foot, then of the right


@dataclass(frozen=True, eq=False)
class PoseFrame:
    """The people of one frame, none or more, on a canvas of width x height pixels."""

    people: tuple[Person, ...]
    width: int
    height: int


def parse_pose(document: object) -> list[PoseFrame]:
    """Read a POSE_KEYPOINT document: a list of frames, one frame, or JSON text of either.

    A point counts as not seen where its confidence is 0 or less, where it is 0, 0 or -1, -1 (how some writers
    mark it), and where it is further from the canvas than the canvas is long. A confidence above 1 counts as
    1. Raises ValueError naming the frame for anything that is not such a document or not finite, and for more
    than MAX_FRAMES frames, MAX_PEOPLE people in one or MAX_SIDE pixels along a side.
    """
    frames = _frames(document)
    canvases = [
        (_side(frame, "canvas_width", number), _side(frame, "canvas_height", number))
        for number, frame in enumerate(frames)
    ]
    read = [_people(frame["people"], f"Frame {number} of the pose") for number, frame in enumerate(frames)]
    parts = (part for people in read for person in people for part in person.values())
    shares = max((np.abs(points[:, :2]).max() for points in parts), default=0.0) <= _FURTHEST_SHARE
    return [
        PoseFrame(tuple(_placed(person, width, height, bool(shares)) for person in people), width, height)
        for people, (width, height) in zip(read, canvases, strict=True)
    ]


def _frames(document: object) -> list[dict[str, Any]]:
    if isinstance(document, str):
        try:
            document = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The pose is not JSON ({error}). Save it again with a pose node.") from error
    frames = [document] if isinstance(document, dict) else document
    if not isinstance(frames, list | tuple):
        raise ValueError(
            f"The pose is {_short(document)}; expected POSE_KEYPOINT: a list of frames with "
            '"people", "canvas_width" and "canvas_height", or JSON text of it.'
        )
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ValueError(f"The pose has {len(frames)} frames; expected 1 to {MAX_FRAMES}.")
    for number, frame in enumerate(frames):
        if not isinstance(frame, dict) or "people" not in frame:
            what = 'has no "people"' if isinstance(frame, dict) else f"is {_short(frame)}"
            raise ValueError(
                f'Frame {number} of the pose {what}; expected {{"people": [...], "canvas_width": ..., '
                '"canvas_height": ...} as a pose node for people gives it (poses of animals are not read).'
            )
    return list(frames)


def _side(frame: dict[str, Any], key: str, number: int) -> int:
    side: Any = frame.get(key)
    if not _is_number(side) or not 1 <= side <= MAX_SIDE or side != int(side):
        said = _short(side) if key in frame else "missing"
        raise ValueError(
            f"Frame {number} of the pose: {key} is {said}; expected 1 to {MAX_SIDE} whole pixels. "
            "Give the size of the picture that the pose was found in."
        )
    return int(side)


def _people(people: object, where: str) -> list[dict[str, np.ndarray]]:
    """Each person's parts, those that are there, as points float64 [n, 3] in the document's own units."""
    people = [] if people is None else people
    if not isinstance(people, list | tuple):
        raise ValueError(f'{where}: "people" is {_short(people)}; expected a list, empty if nobody is seen.')
    if len(people) > MAX_PEOPLE:
        raise ValueError(f"{where} has {len(people)} people; at most {MAX_PEOPLE} are read. Leave some out.")
    found = []
    for number, person in enumerate(people):
        if not isinstance(person, dict):
            raise ValueError(f"{where}: person {number} is {_short(person)}; expected lists of keypoints.")
        parts = {}
        for part, (key, _, counts) in _PARTS.items():
            if person.get(key) is not None:
                parts[part] = _points(person[key], counts, f"{where}, person {number}: {key}")
        if len(parts.get("body", ())) == 25:
            parts.setdefault("feet", parts["body"][_FEET_25])
            parts["body"] = parts["body"][_BODY_25]
        found.append({part: points[: _PARTS[part][1]] for part, points in parts.items() if len(points)})
    return found


def _points(values: object, counts: Sequence[int], where: str) -> np.ndarray:
    """float64 [n, 3] of a flat list, or of a list of triples as some writers nest it; unseen points are 0."""
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list | tuple):
        raise ValueError(f"{where} is {_short(values)}; expected a list of x, y, confidence.")
    if values and all(isinstance(point, list | tuple) and len(point) == 3 for point in values):
        values = [number for point in values for number in point]
    if len(values) not in (0, *(3 * count for count in counts)):
        said = f"1 to {counts[-1]}" if isinstance(counts, range) else " or ".join(map(str, counts))
        raise ValueError(f"{where} has {len(values)} numbers; expected x, y, confidence of {said} points.")
    strange = [value for value in values if not _is_number(value)]
    if strange:
        raise ValueError(f"{where} holds {_short(strange[0])}; expected finite numbers, 0 where not seen.")
    points = np.array(values, np.float64).reshape(-1, 3)
    points[:, 2] = points[:, 2].clip(0.0, 1.0)
    marked = (points[:, :2] == 0.0).all(1) | (points[:, :2] == -1.0).all(1)
    points[marked | (points[:, 2] == 0.0)] = 0.0
    return points


def _is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _short(value: object) -> str:
    """A value as an error names it; repr() of a hostile one could fill the screen."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"
    if value is not None and not isinstance(value, int | float | str):
        return f"a {type(value).__name__}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _placed(parts: dict[str, np.ndarray], width: int, height: int, shares: bool) -> Person:
    """A person in pixels of the canvas."""
    canvas = np.array([width, height], np.float64)
    placed = dict(_MISSING)
    for part, points in parts.items():
        pixels = points[:, :2] * canvas if shares else points[:, :2]
        far = ((pixels < -canvas) | (pixels > 2.0 * canvas)).any(1)
        marked = np.isclose(pixels, -1.0, atol=1e-3).all(1)  # OpenPose's node divides its -1 by the canvas
        placed[part] = np.zeros((_PARTS[part][1], 3), np.float32)
        placed[part][: len(points)] = np.where((far | marked)[:, None], 0.0, np.c_[pixels, points[:, 2]])
    return Person(**placed)


def _nothing(count: int) -> np.ndarray:
    """Points that were not seen: one array for all people, or a crowd of empty ones could fill the memory."""
    points = np.zeros((count, 3), np.float32)
    points.setflags(write=False)
    return points


_MISSING = {part: _nothing(count) for part, (_, count, _) in _PARTS.items()}
