"""The world: portraits of cartoon people, drawn from identity factors.

A picture is uint8 [SIZE, SIZE, 3] (RGB). Eight factors, which words can say, span 38,880 combinations; every
combination is one person, whose three proportions (which no caption says) are their own. Expression, turn,
clothes, place and light vary freely within an identity. "Left" and "right" are left and right in the picture.
"""

import itertools
import math
from dataclasses import dataclass

import cv2
import numpy as np

SIZE = 64
OVERSAMPLING = 4  # drawn large, then area-averaged: clean edges at 64 pixels

FACTORS: dict[str, tuple[str, ...]] = {
    "face": ("round", "long", "square"),
    "skin": ("pale", "tan", "brown", "dark"),
    "hair": ("short", "long", "curly", "spiky", "bun", "bob"),
    "hair_colour": ("black", "brown", "blond", "red", "white"),
    "eyes": ("brown", "blue", "green"),
    "nose": ("small", "long", "big"),
    "glasses": ("none", "round", "square"),
    "marks": ("none", "freckles", "moustache", "beard"),
}
PROPORTIONS = ("eye_spacing", "eye_height", "mouth_width")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "expression": ("smiling", "calm", "surprised"),
    "turn": ("left", "ahead", "right"),
    "clothes": ("red", "blue", "green", "yellow", "purple", "white"),
    "place": ("meadow", "beach", "night", "studio", "room"),
    "light": ("bright", "dim", "golden"),
}

_SKINS = {"pale": (252, 220, 196), "tan": (226, 172, 122), "brown": (160, 104, 68), "dark": (104, 66, 48)}
_HAIRS = {
    "black": (30, 26, 34),
    "brown": (112, 66, 32),
    "blond": (240, 204, 92),
    "red": (206, 74, 26),
    "white": (232, 232, 236),
}
_IRISES = {"brown": (104, 58, 20), "blue": (36, 104, 232), "green": (24, 160, 72)}
_CLOTHES = {
    "red": (214, 48, 49),
    "blue": (41, 98, 255),
    "green": (0, 150, 85),
    "yellow": (250, 202, 30),
    "purple": (130, 60, 190),
    "white": (244, 244, 244),
}
_LIGHTS = {"bright": (1.0, 1.0, 1.0), "dim": (0.76, 0.79, 0.88), "golden": (1.0, 0.91, 0.76)}
# Half width, half height and squareness (exponent of a superellipse) of a face, in pixels.
_FACES = {"round": (18.0, 18.5, 2.1), "long": (14.0, 21.5, 2.2), "square": (17.0, 19.5, 4.5)}
_CENTRE = np.array([32.0, 34.0])
_DARK, _LIP, _MOUTH, _EYE_WHITE = (40, 30, 36), (186, 62, 70), (96, 20, 32), (252, 252, 252)


@dataclass(frozen=True)
class Identity:
    """A person: one value of every factor of `FACTORS`, and proportions, each within -1..1."""

    face: str
    skin: str
    hair: str
    hair_colour: str
    eyes: str
    nose: str
    glasses: str
    marks: str
    proportions: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def indices(self) -> tuple[int, ...]:
        """The position of each value within its factor, in factor order."""
        return tuple(values.index(getattr(self, name)) for name, values in FACTORS.items())


@dataclass(frozen=True)
class Attributes:
    """What varies freely within an identity."""

    expression: str
    turn: str
    clothes: str
    place: str
    light: str

    def indices(self) -> tuple[int, ...]:
        """The position of each value within its attribute, in the order of `ATTRIBUTES`."""
        return tuple(values.index(getattr(self, name)) for name, values in ATTRIBUTES.items())


def all_identities() -> list[Identity]:
    """One person for every combination of the factors, in a fixed order, with fixed proportions."""
    combinations = list(itertools.product(*FACTORS.values()))
    proportions = np.random.default_rng(0).uniform(-1.0, 1.0, (len(combinations), len(PROPORTIONS)))
    rounded = np.round(proportions, 3).tolist()
    return [Identity(*values, tuple(own)) for values, own in zip(combinations, rounded, strict=True)]


def split_identities(held_out: int, seed: int) -> tuple[list[Identity], list[Identity]]:
    """Split `all_identities()` into (training, held-out); every factor value occurs in both parts.

    Raises ValueError where so few are asked for on one side that not every value can occur there.
    """
    identities = all_identities()
    fewest = 4 * max(len(values) for values in FACTORS.values())  # enough for a random draw to succeed soon
    if not fewest <= held_out <= len(identities) - fewest:
        raise ValueError(f"held_out = {held_out}: expected {fewest} to {len(identities) - fewest}.")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(identities))
        parts = [identities[i] for i in order[held_out:]], [identities[i] for i in order[:held_out]]
        if all({getattr(p, name) for p in part} == set(FACTORS[name]) for part in parts for name in FACTORS):
            return parts


def random_attributes(rng: np.random.Generator) -> Attributes:
    """Any value of every attribute."""
    return Attributes(*(values[int(rng.integers(len(values)))] for values in ATTRIBUTES.values()))


def draw(identity: Identity, attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Draw one portrait, uint8 [SIZE, SIZE, 3]. Position, size and tilt of the head are jittered by `rng`."""
    canvas = _draw_place(attributes.place)
    brush = _Brush(
        canvas, _CENTRE + rng.uniform(-1.2, 1.2, 2), rng.uniform(0.96, 1.04), rng.uniform(-5.0, 5.0)
    )
    turn = {"left": -4.5, "ahead": 0.0, "right": 4.5}[attributes.turn]
    shape = _FACES[identity.face]
    skin = _SKINS[identity.skin]
    _draw_hair_behind(brush, identity, shape)
    _draw_body(brush, skin, _CLOTHES[attributes.clothes])
    for side in (-1.0, 1.0):
        brush.disc((side * shape[0] - 0.4 * turn, 1.0), 3.4, _shade(skin, 0.88))
    brush.polygon(_superellipse(*shape), skin)
    if identity.marks == "beard":
        _draw_beard(brush, identity, shape)
    _draw_hair_in_front(brush, identity, shape)
    _draw_features(brush, identity, attributes, turn)
    lit = cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA) * np.array(_LIGHTS[attributes.light])
    return lit.round().astype(np.uint8)


class _Brush:
    """Draws in the head's own coordinates: pixels from its centre, x to the right, y down, then tilted."""

    def __init__(self, canvas: np.ndarray, centre: np.ndarray, size: float, tilt_degrees: float):
        cosine, sine = math.cos(math.radians(tilt_degrees)), math.sin(math.radians(tilt_degrees))
        self.canvas, self.centre = canvas, centre
        self.size, self.rotation = size, size * np.array([[cosine, -sine], [sine, cosine]])

    def _place(self, points) -> np.ndarray:
        """OpenCV's fixed-point coordinates with 4 fractional bits, [N, 2]."""
        placed = np.atleast_2d(np.asarray(points, float)) @ self.rotation.T + self.centre
        return np.round(placed * OVERSAMPLING * 16).astype(np.int32)

    def disc(self, centre, radius: float, colour) -> None:
        x, y = self._place(centre)[0].tolist()
        radius = round(radius * self.size * OVERSAMPLING * 16)
        cv2.circle(self.canvas, (x, y), radius, colour, -1, cv2.LINE_AA, 4)

    def polygon(self, points, colour) -> None:
        cv2.fillPoly(self.canvas, [self._place(points)], colour, cv2.LINE_AA, 4)

    def line(self, points, colour, width: float, closed: bool = False) -> None:
        width = max(1, round(width * self.size * OVERSAMPLING))
        cv2.polylines(self.canvas, [self._place(points)], closed, colour, width, cv2.LINE_AA, 4)


def _shade(colour, factor: float) -> tuple[int, ...]:
    return tuple(min(255, round(c * factor)) for c in colour)


def _superellipse(width: float, height: float, power: float, centre=(0.0, 0.0), start=0.0, end=360.0):
    """Points [N, 2] on |x / width|^power + |y / height|^power = 1 between two angles (0 right, 90 down)."""
    angles = np.radians(np.linspace(start, end, 49))
    cosine, sine = np.cos(angles), np.sin(angles)
    x = width * np.sign(cosine) * np.abs(cosine) ** (2.0 / power)
    y = height * np.sign(sine) * np.abs(sine) ** (2.0 / power)
    return np.stack([x + centre[0], y + centre[1]], 1)


def _draw_body(brush: _Brush, skin, clothes) -> None:
    brush.polygon([(-6, 12), (6, 12), (7, 27), (-7, 27)], _shade(skin, 0.82))
    brush.polygon(_superellipse(27.0, 16.0, 2.6, (0.0, 40.0)), clothes)
    brush.polygon([(-6.5, 23.5), (6.5, 23.5), (0, 29)], _shade(skin, 0.82))


def _draw_hair_behind(brush: _Brush, identity: Identity, shape) -> None:
    colour, (width, height, _) = _HAIRS[identity.hair_colour], shape
    if identity.hair == "long":
        brush.polygon(_superellipse(width + 5.0, height + 12.0, 3.0, (0.0, 7.0)), colour)
    elif identity.hair == "bob":
        brush.polygon(_superellipse(width + 5.5, height - 1.0, 3.5, (0.0, -3.0)), colour)
    elif identity.hair == "curly":
        for angle in np.linspace(150.0, 390.0, 13):
            x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            brush.disc(((width + 3.0) * x, (height + 1.0) * y - 1.0), 5.4, colour)
    elif identity.hair == "bun":
        brush.disc((0.0, -height - 4.5), 7.5, colour)
    elif identity.hair == "spiky":
        for x in np.linspace(-1.0, 1.0, 6):
            foot = (width * x, -height * 0.62)
            tip = (1.25 * width * x, -height - 9.0 + 6.0 * x * x)
            brush.polygon([(foot[0] - 5.0, foot[1]), tip, (foot[0] + 5.0, foot[1])], colour)


def _draw_hair_in_front(brush: _Brush, identity: Identity, shape) -> None:
    """The cap over the forehead; its lower edge tells a fringe from a parting."""
    colour, (width, height, power) = _HAIRS[identity.hair_colour], shape
    rim = _superellipse(width + 1.0, height + 1.2, power, start=192.0, end=348.0)
    edges = {
        "short": [(width * 0.75, -height * 0.52), (-width * 0.75, -height * 0.52)],
        "long": [(width * 0.8, -height * 0.3), (0.0, -height * 0.88), (-width * 0.8, -height * 0.3)],
        "curly": [(width * 0.6, -height * 0.6), (0.0, -height * 0.66), (-width * 0.6, -height * 0.6)],
        "spiky": [
            (width * x, -height * (0.66 if i % 2 else 0.48)) for i, x in enumerate((0.7, 0.3, -0.1, -0.5))
        ],
        "bun": [(width * 0.7, -height * 0.5), (0.0, -height * 0.84), (-width * 0.7, -height * 0.5)],
        "bob": [(width * 0.95, -height * 0.42), (-width * 0.95, -height * 0.42)],
    }
    brush.polygon(np.concatenate([rim, np.array(edges[identity.hair])]), colour)


def _draw_beard(brush: _Brush, identity: Identity, shape) -> None:
    width, height, power = shape
    jaw = _superellipse(width + 0.6, height + 2.2, power, start=-4.0, end=184.0)
    inner = _superellipse(width - 5.0, 5.0, 2.4, (0.0, 2.5), start=184.0, end=-4.0)
    brush.polygon(np.concatenate([jaw, inner + (0.0, 1.0)]), _facial_hair(identity))


def _facial_hair(identity: Identity) -> tuple[int, ...]:
    """The hair's colour, darker where it would hardly show on the skin."""
    hair, skin = _HAIRS[identity.hair_colour], _SKINS[identity.skin]
    return _shade(hair, 0.5 if math.dist(hair, skin) < 90.0 else 1.0)


def _draw_features(brush: _Brush, identity: Identity, attributes: Attributes, turn: float) -> None:
    """Eyes, brows, nose, mouth, marks and glasses: all of what moves when the head turns."""
    spacing, lift, wide = identity.proportions
    half = 7.6 + 1.5 * spacing
    eye_y = -2.2 - 1.8 * lift
    surprised = attributes.expression == "surprised"
    for side in (-1.0, 1.0):
        x = side * half + turn
        brush.polygon(_superellipse(4.3, 4.6 if surprised else 3.7, 2.0, (x, eye_y)), _EYE_WHITE)
        brush.disc((x + 0.22 * turn, eye_y + 0.2), 2.9, _IRISES[identity.eyes])
        brush.disc((x + 0.22 * turn, eye_y + 0.2), 1.2, (12, 10, 14))
        brow = eye_y - (8.2 if surprised else 6.4)
        brush.line([(x - 3.6, brow + 0.9), (x, brow), (x + 3.6, brow + 0.9)], _DARK, 1.3)
    _draw_nose(brush, identity, 1.25 * turn)
    if identity.marks == "freckles":
        spots = ((-3.0, 0.4), (0.0, 2.4), (3.0, 0.4), (0.0, -1.4))
        for side, (x, y) in itertools.product((-1.0, 1.0), spots):
            brush.disc((side * 9.0 + x + turn, 5.4 + y), 1.25, _shade(_SKINS[identity.skin], 0.55))
    if identity.marks == "moustache":
        colour = _facial_hair(identity)
        for side in (-1.0, 1.0):
            brush.polygon(_superellipse(4.6, 2.0, 2.0, (side * 3.8 + 1.1 * turn, 8.0)), colour)
    _draw_mouth(brush, attributes.expression, 5.2 + 1.6 * wide, 1.1 * turn)
    if identity.glasses != "none":
        power = 2.0 if identity.glasses == "round" else 7.0
        for side in (-1.0, 1.0):
            rim = _superellipse(6.0, 6.0 if power == 2.0 else 4.9, power, (side * half + turn, eye_y))
            brush.line(rim, (20, 20, 24), 1.4, closed=True)
        brush.line([(turn - half + 6.0, eye_y), (turn + half - 6.0, eye_y)], (20, 20, 24), 1.4)


def _draw_nose(brush: _Brush, identity: Identity, turn: float) -> None:
    shadow = _shade(_SKINS[identity.skin], 0.62)
    if identity.nose == "small":
        brush.disc((turn, 3.6), 1.6, shadow)
    elif identity.nose == "long":
        brush.polygon([(turn - 0.9, -4.0), (turn + 0.9, -4.0), (turn + 2.6, 5.8), (turn - 2.6, 5.8)], shadow)
    else:
        brush.polygon(_superellipse(4.4, 3.6, 2.0, (turn, 3.0)), shadow)


def _draw_mouth(brush: _Brush, expression: str, half: float, x: float) -> None:
    if expression == "surprised":
        brush.polygon(_superellipse(0.62 * half, 3.6, 2.0, (x, 13.2)), _MOUTH)
    elif expression == "smiling":
        brush.polygon(_superellipse(half, 4.6, 2.0, (x, 10.8), 0.0, 180.0), _MOUTH)
        upper, lower = 0.8 * half, 0.6 * half
        teeth = [(x - upper, 10.8), (x + upper, 10.8), (x + lower, 12.4), (x - lower, 12.4)]
        brush.polygon(teeth, _EYE_WHITE)
    else:
        brush.line([(x - half, 12.0), (x + half, 12.0)], _LIP, 1.9)


# Wall or sky, floor or ground, and the height at which they meet.
_PLACES = {
    "meadow": ((150, 205, 245), (95, 170, 75), 40),
    "beach": ((120, 200, 235), (236, 214, 156), 44),
    "night": ((26, 30, 72), (44, 52, 76), 48),
    "studio": ((140, 142, 148), (140, 142, 148), 64),
    "room": ((232, 180, 150), (150, 98, 64), 46),
}


def _draw_place(name: str) -> np.ndarray:
    wall, ground, horizon = _PLACES[name]
    canvas = np.empty((SIZE * OVERSAMPLING, SIZE * OVERSAMPLING, 3), np.uint8)
    canvas[:] = wall
    canvas[horizon * OVERSAMPLING :] = ground
    if name == "night":
        cv2.circle(
            canvas, (9 * OVERSAMPLING, 9 * OVERSAMPLING), 5 * OVERSAMPLING, (238, 236, 205), -1, cv2.LINE_AA
        )
    if name == "room":
        canvas[5 * OVERSAMPLING : 22 * OVERSAMPLING, 3 * OVERSAMPLING : 13 * OVERSAMPLING] = (190, 228, 248)
    return canvas
