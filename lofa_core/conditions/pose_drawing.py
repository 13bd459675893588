"""Poses drawn as skeletons, in the colours that pose conditions are drawn in everywhere (DWPose, OpenPose).

OpenCV draws them and is imported when the first is drawn: the rest of the library does without it.
"""

import colorsys
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ..steps import UNWATCHED, Watch
from .pose_keypoints import MAX_SIDE, Person, PoseFrame

_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_FINGERS = tuple((0 if n % 4 == 0 else n, n + 1) for n in range(20))  # five chains of four from the wrist
_FEET = ((13, 0), (10, 3))  # an ankle of the body, the first of its foot's three points
_SMALL, _OVERSAMPLING = 256, 4  # smaller pictures are drawn larger: dots of less than a pixel stay distinct
_FAINTEST = 0.05  # fainter guesses are not drawn, as in OpenPose's own pictures


def draw_pose(frames: Sequence[PoseFrame], height: int, width: int, watch: Watch = UNWATCHED) -> np.ndarray:
    """Draw skeletons on black: uint8 [T, height, width, 3] (RGB).

    Each frame's canvas is fitted into the picture whole, its shape kept, and centred. Lines are as wide as
    suits the fitted canvas, but never too thin to be seen. Raises ValueError for a size that is not 1 to
    MAX_SIDE pixels, and where OpenCV is missing.
    """
    check_size(height, width)
    opencv = _opencv()
    pictures = np.zeros((len(frames), height, width, 3), np.uint8)
    for picture, frame in zip(pictures, watch.each(frames, len(frames)), strict=True):
        top, left, rows, columns = fitted_box(frame.height, frame.width, height, width)
        grain = _OVERSAMPLING if min(rows, columns) < _SMALL else 1
        drawn = np.zeros((rows * grain, columns * grain, 3), np.uint8)
        pen = _Pen(opencv, drawn, frame, grain)
        for person in frame.people:
            _draw_person(pen, person)
        if grain > 1:
            drawn = opencv.resize(drawn, (columns, rows), interpolation=opencv.INTER_AREA)
        picture[top : top + rows, left : left + columns] = drawn
    return pictures


def fitted_box(height: int, width: int, into_height: int, into_width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a picture enlarged or shrunk to fit whole into another, and centred."""
    scale = min(into_height / height, into_width / width)
    rows = min(into_height, max(1, round(height * scale)))
    columns = min(into_width, max(1, round(width * scale)))
    return (into_height - rows) // 2, (into_width - columns) // 2, rows, columns


def check_size(height: int, width: int) -> None:
    """Raises ValueError for a height or width that is not 1 to MAX_SIDE pixels."""
    for name, value in (("height", height), ("width", width)):
        if not 1 <= value <= MAX_SIDE:
            raise ValueError(f"{name} is {value}; expected 1 to {MAX_SIDE} pixels.")


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ValueError("Drawing poses needs OpenCV: pip install opencv-python-headless") from error
    return cv2


def _rainbow(count: int) -> tuple[tuple[int, int, int], ...]:
    """Full colours at even steps around the hue circle, from red on."""
    shares = (colorsys.hsv_to_rgb(number / count, 1.0, 1.0) for number in range(count))
    return tuple((round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in shares)


_JOINT_COLOURS, _FINGER_COLOURS = _rainbow(18), _rainbow(len(_FINGERS))
_LIMB_COLOURS = tuple(tuple(int(0.6 * part) for part in colour) for colour in _JOINT_COLOURS)
_KNUCKLE, _FACE = (0, 0, 255), (255, 255, 255)


class _Pen:
    """Draws on one picture with smooth edges, at places between pixels too.

    The picture is `grain` times as large as it will be shown.
    """

    def __init__(self, opencv: ModuleType, picture: np.ndarray, frame: PoseFrame, grain: int):
        self._opencv, self._picture = opencv, picture
        rows, columns = picture.shape[:2]
        self._scale = np.array([columns / frame.width, rows / frame.height])
        self.unit = min(rows, columns) / 512  # the pixel of a picture that DWPose's own widths are made for
        self.thinnest = float(grain)  # half the width that a limb needs to be seen

    def place(self, points: np.ndarray) -> np.ndarray:
        """[n, 3] on the canvas -> [n, 2] on the picture, as OpenCV counts: from the first pixel's centre."""
        return points[:, :2] * self._scale - 0.5

    def limb(self, start: np.ndarray, end: np.ndarray, half: float, colour: tuple[int, ...]) -> None:
        """An ellipse along a bone, 2 `half` wide."""
        along = end - start
        axes = max(float(np.hypot(*along)) / 2, half), half
        angle = float(np.degrees(np.arctan2(along[1], along[0])))
        smooth = self._opencv.LINE_AA
        middle = _fixed((start + end) / 2)
        self._opencv.ellipse(self._picture, middle, _fixed(axes), angle, 0, 360, colour, -1, smooth, _BITS)

    def line(self, start: np.ndarray, end: np.ndarray, width: float, colour: tuple[int, ...]) -> None:
        whole, smooth = max(1, round(width)), self._opencv.LINE_AA
        self._opencv.line(self._picture, _fixed(start), _fixed(end), colour, whole, smooth, _BITS)

    def dot(self, centre: np.ndarray, radius: float, colour: tuple[int, ...]) -> None:
        size, smooth = round(radius * 2**_BITS), self._opencv.LINE_AA
        self._opencv.circle(self._picture, _fixed(centre), size, colour, -1, smooth, _BITS)


_BITS = 4  # of the fraction in OpenCV's fixed-point numbers


def _fixed(pair: Sequence[float] | np.ndarray) -> tuple[int, int]:
    return round(float(pair[0]) * 2**_BITS), round(float(pair[1]) * 2**_BITS)


def _draw_person(pen: _Pen, person: Person) -> None:
    """Limbs and feet, joints, hands, face in this order; a line is drawn where both of its ends were seen."""
    half = max(pen.thinnest, 4 * pen.unit)
    body, seen = pen.place(person.body), person.body[:, 2] > _FAINTEST
    for (a, b), colour in zip(_LIMBS, _LIMB_COLOURS, strict=False):  # the last colour is a joint's alone
        if seen[a] and seen[b]:
            pen.limb(body[a], body[b], half, colour)
    feet, trodden = pen.place(person.feet), person.feet[:, 2] > _FAINTEST
    for ankle, first in _FEET:
        foot = np.concatenate([body[ankle, None], feet[first : first + 3]])
        there = [seen[ankle], *trodden[first : first + 3]]
        for a, b in ((0, 1), (1, 2), (0, 3)):  # to the big toe and on to the small one, to the heel
            if there[a] and there[b]:
                pen.limb(foot[a], foot[b], half / 2, _LIMB_COLOURS[ankle])
    for joint in np.flatnonzero(seen):
        pen.dot(body[joint], half, _JOINT_COLOURS[joint])
    for hand in (person.left_hand, person.right_hand):
        points, seen = pen.place(hand), hand[:, 2] > _FAINTEST
        for (a, b), colour in zip(_FINGERS, _FINGER_COLOURS, strict=True):
            if seen[a] and seen[b]:
                pen.line(points[a], points[b], 2 * pen.unit, colour)
        for point in points[seen]:
            pen.dot(point, 4 * pen.unit, _KNUCKLE)
    for point in pen.place(person.face)[person.face[:, 2] > _FAINTEST]:
        pen.dot(point, 3 * pen.unit, _FACE)
