"""Captions: how a portrait is said in English, finely or coarsely.

Every value has several wordings; the parts stand in changing orders. Proportions are never said: no prompt
brings a person's own ones out, a LoRA can.
"""

import re

import numpy as np

from .world import ATTRIBUTES, FACTORS, Attributes, Identity

COARSE = "a portrait of a person"
SUBJECTS = (COARSE, "a picture of a person", "a portrait of someone")

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "face": {
        "round": ("round face", "circular face"),
        "long": ("long face", "narrow face"),
        "square": ("square face", "angular face"),
    },
    "skin": {
        "pale": ("pale skin", "fair skin"),
        "tan": ("tan skin", "tanned skin"),
        "brown": ("brown skin",),
        "dark": ("dark skin", "deep dark skin"),
    },
    # "{}" is where the colour of the hair goes.
    "hair": {
        "short": ("short {} hair", "{} hair cut short"),
        "long": ("long {} hair", "{} hair down to the shoulders"),
        "curly": ("curly {} hair", "{} curls"),
        "spiky": ("spiky {} hair", "{} spikes of hair"),
        "bun": ("{} hair in a bun", "a {} bun"),
        "bob": ("a {} bob", "{} hair in a bob"),
    },
    "hair_colour": {
        "black": ("black",),
        "brown": ("brown", "chestnut"),
        "blond": ("blond", "golden"),
        "red": ("red", "ginger"),
        "white": ("white",),
    },
    "eyes": {colour: (f"{colour} eyes",) for colour in FACTORS["eyes"]},
    "nose": {
        "small": ("small nose", "tiny nose"),
        "long": ("long nose", "straight nose"),
        "big": ("big nose", "broad nose"),
    },
    "glasses": {
        "none": ("no glasses", "without glasses"),
        "round": ("round glasses", "circular glasses"),
        "square": ("square glasses", "angular glasses"),
    },
    "marks": {
        "none": ("clear cheeks", "shaven"),
        "freckles": ("freckles", "a freckled face"),
        "moustache": ("a moustache",),
        "beard": ("a beard", "bearded"),
    },
    "expression": {
        "smiling": ("smiling", "with a smile"),
        "calm": ("calm", "with a straight mouth"),
        "surprised": ("surprised", "with an open mouth"),
    },
    "turn": {
        "left": ("turned to the left", "looking left"),
        "ahead": ("facing ahead", "looking ahead"),
        "right": ("turned to the right", "looking right"),
    },
    "clothes": {colour: (f"in a {colour} shirt", f"in {colour} clothes") for colour in ATTRIBUTES["clothes"]},
    "place": {
        "meadow": ("on a meadow", "on grass"),
        "beach": ("on a beach", "on sand"),
        "night": ("at night", "under the moon"),
        "studio": ("in a grey studio",),
        "room": ("in a room", "by a window"),
    },
    "light": {
        "bright": ("in bright light",),
        "dim": ("in dim light",),
        "golden": ("in warm light", "in evening light"),
    },
}


def fine_caption(
    identity: Identity | None,
    attributes: Attributes | None,
    rng: np.random.Generator,
    *,
    keep: float = 1.0,
) -> str:
    """A sentence on a portrait; each part is kept with probability `keep`, None leaves its parts out.

    With every part dropped the sentence is a coarse one.
    """
    said = {}
    for source, names in ((identity, FACTORS), (attributes, ATTRIBUTES)):
        for name in names if source is not None else ():
            if rng.random() < keep:
                said[name] = _pick(rng, WORDINGS[name][getattr(source, name)])
    colour = said.pop("hair_colour", None)
    if "hair" in said:
        said["hair"] = " ".join(said["hair"].format(colour or "").split())
    elif colour:
        said["hair"] = f"{colour} hair"
    parts = [said[name] for name in rng.permutation(list(said))]
    return ", ".join([_pick(rng, SUBJECTS), *parts])


def says(sentence: str, name: str, value: str) -> bool:
    """Whether a sentence made by `fine_caption` words this value of a factor or an attribute."""
    return any(re.search(_pattern(name, phrase), sentence) for phrase in WORDINGS[name][value])


def _pattern(name: str, phrase: str) -> str:
    if name == "hair_colour":
        return rf"\b{phrase} (hair|curls|spikes|bun|bob)\b"
    return rf"\b{phrase}\b".replace(" {} ", r" (\w+ )?").replace("{} ", r"")


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
