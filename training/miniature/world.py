"""The world: short clips of an articulated figure, drawn from compositional action factors.

A clip is uint8 [FRAMES, SIZE, SIZE, 3] (RGB). Six factors span 480 actions; clothes, backdrop and small
jitters vary freely. "Left" and "right" always mean left and right in the picture.
"""

import itertools
import math
from dataclasses import astuple, dataclass
from typing import Any

import cv2
import numpy as np

SIZE = 64
FRAMES = 17
OVERSAMPLING = 4  # drawn large, then area-averaged: clean edges at 64 pixels

FACTORS: dict[str, tuple[str, ...]] = {
    "limb": ("left_arm", "right_arm", "left_leg", "right_leg"),
    "amplitude": ("small", "wide"),
    "tempo": ("slow", "fast"),
    "travel": ("stay", "left", "right", "up", "down"),
    "lean": ("left", "upright", "right"),
    "stance": ("together", "apart"),
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "blue": (41, 98, 255),
    "green": (0, 150, 85),
    "yellow": (250, 202, 30),
    "purple": (130, 60, 190),
    "white": (240, 240, 240),
}
BACKDROPS: tuple[str, ...] = ("meadow", "beach", "night", "studio", "room", "snow")

_SKIN, _SHOE = (240, 190, 150), (50, 40, 40)
_TORSO, _UPPER_LEG, _LOWER_LEG, _ARM = 15.0, 10.0, 10.0, 15.0
_GROUND = 58.0
_SWING_DEGREES = {
    ("arm", "small"): 45.0,
    ("arm", "wide"): 140.0,
    ("leg", "small"): 32.0,
    ("leg", "wide"): 82.0,
}
_REST_DEGREES = {"arm": 14.0, ("leg", "together"): 4.0, ("leg", "apart"): 25.0}
_LEAN_DEGREES = {"left": -22.0, "upright": 0.0, "right": 22.0}
_CYCLES = {"slow": 1.0, "fast": 2.0}
_TRAVEL_PIXELS, _LEAP_PIXELS, _CROUCH_PIXELS = 12.0, 9.0, 9.0


@dataclass(frozen=True)
class Action:
    """One value of every factor of `FACTORS`; the field order is the factor order."""

    limb: str
    amplitude: str
    tempo: str
    travel: str
    lean: str
    stance: str

    def indices(self) -> tuple[int, ...]:
        """The position of each value within its factor, in factor order."""
        return tuple(
            values.index(value) for values, value in zip(FACTORS.values(), astuple(self), strict=True)
        )


@dataclass(frozen=True)
class Look:
    """What varies freely within a task: clothes and backdrop."""

    shirt: str
    trousers: str
    backdrop: str


def all_actions() -> list[Action]:
    """Every combination of the factors, in a fixed order."""
    return [Action(*values) for values in itertools.product(*FACTORS.values())]


def split_actions(held_out: int, seed: int) -> tuple[list[Action], list[Action]]:
    """Split `all_actions()` into (training, held-out); every factor value occurs in both parts.

    Raises ValueError where so few are asked for on one side that not every value can occur there.
    """
    actions = all_actions()
    fewest = 4 * max(len(values) for values in FACTORS.values())  # enough for a random draw to succeed soon
    if not fewest <= held_out <= len(actions) - fewest:
        raise ValueError(f"held_out = {held_out}: expected {fewest} to {len(actions) - fewest} actions.")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(actions))
        parts = [actions[i] for i in order[held_out:]], [actions[i] for i in order[:held_out]]
        if all({getattr(a, name) for a in part} == set(FACTORS[name]) for part in parts for name in FACTORS):
            return parts


def random_look(rng: np.random.Generator) -> Look:
    """Clothes in two different colours in front of any backdrop."""
    shirt, trousers = rng.choice(list(COLOURS), size=2, replace=False)
    return Look(str(shirt), str(trousers), str(rng.choice(BACKDROPS)))


def draw_clip(action: Action, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Draw one clip, uint8 [FRAMES, SIZE, SIZE, 3]. Position, size, phase and swing are jittered by `rng`."""
    backdrop = _draw_backdrop(look.backdrop)
    frames = []
    for figure in _figures(action, rng):
        canvas = backdrop.copy()
        _draw_figure(canvas, figure, look)
        frames.append(cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    return np.stack(frames)


def pose_of_clip(action: Action, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The POSE_KEYPOINT document of the clip that `draw_clip` draws with the same state of `rng`.

    FRAMES frames of one person, 18 points in pixels of SIZE x SIZE. `rng` is left as `draw_clip` leaves it.
    """
    return [
        {
            "people": [{"pose_keypoints_2d": _keypoints(figure)}],
            "canvas_width": SIZE,
            "canvas_height": SIZE,
        }
        for figure in _figures(action, rng)
    ]


@dataclass(frozen=True)
class _Figure:
    """Joints as x, y in pixels; of a pair the first is on the picture's left."""

    size: float
    up: np.ndarray  # unit vectors of the body: from the hip to the neck
    across: np.ndarray  # and to the picture's right
    hip: np.ndarray
    neck: np.ndarray
    head: np.ndarray
    arms: tuple[tuple[np.ndarray, ...], ...]  # a pair of shoulder, hand
    legs: tuple[tuple[np.ndarray, ...], ...]  # a pair of hip, knee, foot


def _figures(action: Action, rng: np.random.Generator) -> list[_Figure]:
    """The figure in each frame of a clip."""
    offset = rng.uniform(-3.0, 3.0)
    size = rng.uniform(0.95, 1.05)
    phase = rng.uniform(-0.03, 0.03)
    swing = rng.uniform(0.93, 1.07)
    return [_figure(action, n / (FRAMES - 1), offset, size, phase, swing) for n in range(FRAMES)]


def _direction(degrees: float) -> np.ndarray:
    """Unit vector that hangs straight down at 0 degrees and points to the picture's right at 90."""
    return np.array([math.sin(math.radians(degrees)), math.cos(math.radians(degrees))])


def _figure(action: Action, time: float, offset: float, size: float, phase: float, swing: float) -> _Figure:
    x, lift, crouch = _travel(action.travel, time)
    parted = _REST_DEGREES["leg", action.stance]
    hip = np.array([SIZE / 2 + offset + x, 0.0])
    standing = (_UPPER_LEG + _LOWER_LEG) * math.cos(math.radians(parted)) * size
    hip[1] = _GROUND - standing - lift + crouch

    limb_kind = action.limb.split("_")[1]
    reach = _SWING_DEGREES[limb_kind, action.amplitude] * swing
    raised = reach * 0.5 * (1.0 - math.cos(2.0 * math.pi * (_CYCLES[action.tempo] * time + phase)))

    up = -_direction(-_LEAN_DEGREES[action.lean])
    across = np.array([-up[1], up[0]])
    neck = hip + up * _TORSO * size
    arms, legs = [], []
    for side, sign in (("left", -1.0), ("right", 1.0)):
        joint = hip + np.array([sign * 2.2 * size, 0.0])
        if action.limb == f"{side}_leg":
            foot = joint + (_UPPER_LEG + _LOWER_LEG) * size * _direction(sign * (parted + raised))
        else:
            foot = np.array([joint[0] + sign * standing * math.tan(math.radians(parted)), _GROUND - lift])
        legs.append((joint, _knee(joint, foot, sign, size), foot))
        shoulder = neck + across * sign * 3.8 * size
        degrees = sign * (_REST_DEGREES["arm"] + (raised if action.limb == f"{side}_arm" else 0.0))
        hand = shoulder + _ARM * size * _direction(degrees - _LEAN_DEGREES[action.lean] * 0.5)
        arms.append((shoulder, hand))
    return _Figure(size, up, across, hip, neck, neck + up * 7.0 * size, tuple(arms), tuple(legs))


def _draw_figure(canvas: np.ndarray, figure: _Figure, look: Look) -> None:
    shirt, trousers, size = COLOURS[look.shirt], COLOURS[look.trousers], figure.size
    for hip, knee, foot in figure.legs:
        _line(canvas, hip, knee, trousers, 4.4 * size)
        _line(canvas, knee, foot, trousers, 4.4 * size)
        _disc(canvas, foot, 2.5 * size, _SHOE)
    _line(canvas, figure.hip, figure.neck, shirt, 8.5 * size)
    _disc(canvas, figure.head, 5.0 * size, _SKIN)
    for shoulder, hand in figure.arms:
        _line(canvas, shoulder, hand, shirt, 3.6 * size)
        _disc(canvas, hand, 2.3 * size, _SKIN)


def _keypoints(figure: _Figure) -> list[float]:
    """x, y, confidence of 18 points in OpenPose's order, right before left.

    The figure faces us: its right is the picture's left.
    """
    points = [figure.head, figure.neck]
    for shoulder, hand in figure.arms:
        points += [shoulder, (shoulder + hand) / 2, hand]  # an arm is one bone, its middle the elbow
    for leg in figure.legs:
        points += leg
    for aside, above in ((1.8, 1.5), (4.2, 0.8)):  # eyes, ears
        for sign in (-1.0, 1.0):
            points.append(figure.head + (figure.across * sign * aside + figure.up * above) * figure.size)
    # The drawing counts from the middle of the large canvas's first pixel, a document from the corner.
    corner = 0.5 / OVERSAMPLING
    return [number for x, y in points for number in (float(x) + corner, float(y) + corner, 1.0)]


def _travel(travel: str, time: float) -> tuple[float, float, float]:
    """(sideways, lift, crouch) of the hip in pixels at a time in 0..1."""
    if travel in ("left", "right"):
        sign = -1.0 if travel == "left" else 1.0
        return sign * _TRAVEL_PIXELS * (2.0 * time - 1.0), 0.0, 0.0
    if travel == "up":
        return 0.0, _LEAP_PIXELS * math.sin(math.pi * time), 0.0
    if travel == "down":
        return 0.0, 0.0, _CROUCH_PIXELS * min(1.0, time / 0.6)
    return 0.0, 0.0, 0.0


def _knee(hip: np.ndarray, foot: np.ndarray, sign: float, size: float) -> np.ndarray:
    """Where the two bones of a leg meet: bent outwards where the foot is nearer than the leg is long."""
    upper, lower = _UPPER_LEG * size, _LOWER_LEG * size
    gap = foot - hip
    distance = min(max(float(np.linalg.norm(gap)), 1e-3), upper + lower)
    along = (upper**2 - lower**2 + distance**2) / (2.0 * distance)
    bend = math.sqrt(max(upper**2 - along**2, 0.0))
    unit = gap / np.linalg.norm(gap)
    return hip + unit * along + sign * bend * np.array([unit[1], -unit[0]])


def _fixed(point: np.ndarray) -> tuple[int, int]:
    """OpenCV's fixed-point coordinates with 4 fractional bits."""
    return int(round(point[0] * OVERSAMPLING * 16)), int(round(point[1] * OVERSAMPLING * 16))


def _line(canvas, start, end, colour, width) -> None:
    cv2.line(canvas, _fixed(start), _fixed(end), colour, int(round(width * OVERSAMPLING)), cv2.LINE_AA, 4)


def _disc(canvas, centre, radius, colour) -> None:
    cv2.circle(canvas, _fixed(centre), int(round(radius * OVERSAMPLING * 16)), colour, -1, cv2.LINE_AA, 4)


# Sky or wall, ground or floor, and one landmark (shape, colour): enough to tell the places apart at a glance.
_PLACES = {
    "meadow": ((150, 205, 245), (95, 170, 75), ("disc", (52, 10), 5, (255, 240, 140))),
    "beach": ((185, 225, 250), (235, 210, 150), ("band", (46, 52), (60, 140, 200))),
    "night": ((22, 26, 60), (40, 48, 70), ("disc", (11, 10), 5, (235, 235, 215))),
    "studio": ((120, 122, 128), (96, 98, 104), None),
    "room": ((225, 190, 160), (140, 92, 60), ("window", (6, 6), (18, 20), (190, 225, 245))),
    "snow": ((205, 215, 228), (250, 250, 252), ("peak", (48, 26), (160, 172, 190))),
}
_HORIZON = 52


def _draw_backdrop(name: str) -> np.ndarray:
    wall, ground, landmark = _PLACES[name]
    scale = OVERSAMPLING
    canvas = np.empty((SIZE * scale, SIZE * scale, 3), np.uint8)
    canvas[:] = wall
    canvas[_HORIZON * scale :] = ground
    match landmark:
        case ("disc", centre, radius, colour):
            _disc(canvas, np.array(centre), radius, colour)
        case ("band", (top, bottom), colour):
            canvas[top * scale : bottom * scale] = colour
        case ("window", (left, top), (right, bottom), colour):
            canvas[top * scale : bottom * scale, left * scale : right * scale] = colour
        case ("peak", (x, y), colour):
            corners = np.array([(x - 22, _HORIZON), (x, y), (x + 22, _HORIZON)]) * scale
            cv2.fillPoly(canvas, [corners.astype(np.int32)], colour, cv2.LINE_AA)
    return canvas
