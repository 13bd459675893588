"""Captions: how an action, clothes and a place are said in English, finely or coarsely.

Every factor value has several wordings. Those under "train" are what the base model, the LoRAs and the
hypernetwork were trained with; those under "reserved", and the reserved sentence plans, occur in the held-out
evaluation only. The text encoder alone has read the reserved words, in training's sentence plans, and knows
what they mean (as a real UMT5 has read the web).
"""

import re
from dataclasses import fields

import numpy as np

from .world import COLOURS, FACTORS, Action, Look

COARSE = "a person is moving"
COARSE_WORDINGS = (COARSE, "someone is moving", "a person moves", "a figure in motion")
SUBJECTS = ("a person", "someone", "a figure")

# (finite form, participle)
SWING = {
    "train": (
        ("swings", "swinging"),
        ("waves", "waving"),
        ("moves", "moving"),
        ("raises", "raising"),
        ("shakes", "shaking"),
        ("rocks", "rocking"),
        ("stretches", "stretching"),
    ),
    "reserved": (("sways", "swaying"), ("lifts", "lifting")),
}
WORDINGS: dict[str, dict[str, dict[str, tuple]]] = {
    "limb": {
        f"{side}_{limb}": {
            "train": (
                f"the {side} {limb}",
                f"their {side} {limb}",
                f"the {limb} on the {side}",
                f"the {side} one of both {limb}s",
                f"the {limb} at the {side} side",
            ),
            "reserved": (f"the {side} {end}",),
        }
        for limb, end in (("arm", "hand"), ("leg", "foot"))
        for side in ("left", "right")
    },
    "amplitude": {
        "small": {
            "train": ("a little", "slightly", "in a small arc", "in a narrow arc", "not far", "a short way"),
            "reserved": ("just a bit", "gently"),
        },
        "wide": {
            "train": (
                "widely",
                "far out",
                "in a big arc",
                "in a wide arc",
                "as far as it goes",
                "a long way",
            ),
            "reserved": ("all the way up", "high"),
        },
    },
    "tempo": {
        "slow": {
            "train": ("slowly", "once", "at a slow pace", "at low speed", "one time", "lazily"),
            "reserved": ("calmly", "without hurry"),
        },
        "fast": {
            "train": ("quickly", "twice", "at a fast pace", "at top speed", "two times", "briskly"),
            "reserved": ("rapidly", "in a hurry"),
        },
    },
    "travel": {
        "stay": {
            "train": (
                ("stays in place", "staying in place"),
                ("stands on the spot", "standing on the spot"),
                ("goes nowhere", "going nowhere"),
                ("keeps to one spot", "keeping to one spot"),
            ),
            "reserved": (("remains here", "remaining here"),),
        },
        **{
            side: {
                "train": (
                    (f"moves to the {side}", f"moving to the {side}"),
                    (f"slides {side}", f"sliding {side}"),
                    (f"walks {side}", f"walking {side}"),
                    (f"goes over to the {side}", f"going over to the {side}"),
                ),
                "reserved": ((f"travels towards the {side} side", f"travelling towards the {side} side"),),
            }
            for side in ("left", "right")
        },
        "up": {
            "train": (
                ("jumps up", "jumping up"),
                ("leaps into the air", "leaping into the air"),
                ("springs upwards", "springing upwards"),
                ("makes a jump", "making a jump"),
            ),
            "reserved": (("hops off the ground", "hopping off the ground"),),
        },
        "down": {
            "train": (
                ("squats down", "squatting down"),
                ("sinks into a crouch", "sinking into a crouch"),
                ("bends the knees", "bending the knees"),
                ("goes down to the floor", "going down to the floor"),
            ),
            "reserved": (("ducks low", "ducking low"),),
        },
    },
    "lean": {
        **{
            side: {
                "train": (
                    f"leaning {side}",
                    f"tilted to the {side}",
                    f"with the body bent {side}",
                    f"slanted to the {side}",
                    f"tipping over {side}",
                ),
                "reserved": (f"inclined {side}wards",),
            }
            for side in ("left", "right")
        },
        "upright": {
            "train": (
                "upright",
                "standing straight",
                "with a straight back",
                "not leaning",
                "with the body straight",
            ),
            "reserved": ("held vertical",),
        },
    },
    "stance": {
        "together": {
            "train": (
                "feet together",
                "with the feet close",
                "legs closed",
                "feet side by side",
                "in a narrow stance",
            ),
            "reserved": ("with heels touching",),
        },
        "apart": {
            "train": (
                "feet apart",
                "in a wide stance",
                "legs spread",
                "feet far from each other",
                "in a broad stance",
            ),
            "reserved": ("with feet planted wide",),
        },
    },
}
PLACES = {
    "meadow": ("on a meadow", "on green grass"),
    "beach": ("on a beach", "by the sea"),
    "night": ("at night", "in the dark under the moon"),
    "studio": ("in a grey studio",),
    "room": ("in a room", "indoors by a window"),
    "snow": ("in the snow", "on a snowy plain"),
}
CLOTHES = ("in a {shirt} shirt and {trousers} trousers", "wearing a {shirt} top and {trousers} pants")

# Finite and participle forms, alone or joined by "and". Parts that are left out leave no trace.
PLANS = {
    "train": (
        "{subject} {clothes} {place} {swing}, {travel}, {lean}, {stance}",
        "{place}, {subject} {clothes}, {lean}, {stance}, {travel_and_swing}",
        "{subject} {clothes} {travel} {place} {while_swinging}, {lean}, {stance}",
        "{stance}, {lean}, {subject} {clothes} {swing_and_travel} {place}",
    ),
    "reserved": (
        "{subject} {clothes}, {stance}, {travelling_and_lean} {place}, {swing}",
        "{lean}, {travelling_and_swinging}, {stance}, {place}: {subject} {clothes}",
    ),
}


def fine_caption(
    action: Action | None,
    look: Look | None,
    rng: np.random.Generator,
    *,
    wordings: str = "train",
    plans: str = "train",
    keep: float = 1.0,
) -> str:
    """A sentence for `action`; each factor, the clothes and the place are kept with probability `keep`.

    `wordings` is "train", "reserved", "both" (an even choice for each part) or "first" (the first of
    training's wordings); `look` None leaves clothes and place out. With every factor dropped, or no action,
    the sentence is a coarse one.
    """
    kept = {field.name: action is not None and rng.random() < keep for field in fields(Action)}
    said = {
        name: _pick(rng, _phrases(name, getattr(action, name), wordings)) if kept[name] else ""
        for name in FACTORS
    }
    clothes = place = ""
    if look is not None and rng.random() < keep:
        clothes = _pick(rng, CLOTHES).format(shirt=look.shirt, trousers=look.trousers)
    if look is not None and rng.random() < keep:
        place = _pick(rng, PLACES[look.backdrop])
    if not any(kept.values()):
        return _tidy(f"{_pick(rng, COARSE_WORDINGS)} {clothes} {place}")

    swing, swinging = "", ""
    if kept["limb"] or kept["amplitude"] or kept["tempo"]:
        verbs = _worded(SWING, wordings)
        rest = f"{said['limb'] or 'a limb'} {said['amplitude']} {said['tempo']}"
        swing, swinging = (f"{form} {rest}" for form in _pick(rng, verbs))
    travel, travelling = said["travel"] or ("", "")
    parts = {
        "swing": swing,
        "travel": travel,
        "travel_and_swing": _both(travel, swing),
        "swing_and_travel": _both(swing, travel),
        "while_swinging": f"while {swinging}" if swinging else "",
        "travelling_and_lean": _both(travelling, said["lean"]),
        "travelling_and_swinging": _both(travelling, swinging),
    }
    plan = _pick(rng, PLANS[plans])
    subject = _pick(rng, SUBJECTS)
    return _tidy(plan.format(**(said | parts), subject=subject, clothes=clothes, place=place))


def _both(first: str, second: str) -> str:
    return " and ".join(part for part in (first, second) if part)


def says(sentence: str, factor: str, value: str) -> bool:
    """Whether `sentence`, made by `fine_caption`, words this value of a factor, "shirt", "trousers" or
    "backdrop".
    """
    if factor == "backdrop":
        phrases = PLACES[value]
    elif factor in ("shirt", "trousers"):
        nouns = ("shirt", "top") if factor == "shirt" else ("trousers", "pants")
        phrases = tuple(f"{value} {noun}" for noun in nouns)
    else:
        phrases = _flat(WORDINGS[factor][value])
    return any(re.search(rf"\b{re.escape(phrase)}\b", sentence) for phrase in phrases)


def said_factors(sentence: str) -> dict[str, str]:
    """The factor values a sentence words plainly: factor -> value, left out where none or more are said."""
    found = {
        name: [value for value in values if says(sentence.lower(), name, value)]
        for name, values in FACTORS.items()
    }
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def known_words() -> tuple[str, ...]:
    """Every word a caption can hold, sorted: the closed vocabulary of the miniature's text encoder."""
    texts = [
        *COARSE_WORDINGS,
        *SUBJECTS,
        "a limb",
        "and while",
        *_flat(WORDINGS),
        *_flat(SWING),
        *_flat(PLACES),
    ]
    for template in CLOTHES:
        texts.append(re.sub(r"\{\w+\}", " ", template))
    return tuple(sorted(set(re.findall(r"[a-z]+", " ".join([*texts, *COLOURS])))))


def _phrases(name: str, value: str, wordings: str) -> tuple:
    return _worded(WORDINGS[name][value], wordings)


def _worded(table: dict[str, tuple], wordings: str) -> tuple:
    if wordings == "both":
        return table["train"] + table["reserved"]
    return table["train"][:1] if wordings == "first" else table[wordings]


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _flat(tree) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [text for child in children for text in _flat(child)]


def _tidy(sentence: str) -> str:
    """Close the gaps that dropped parts leave."""
    sentence = re.sub(r"\s+", " ", sentence)
    sentence = re.sub(r"\s*,[\s,]*", ", ", sentence)
    sentence = re.sub(r"[\s,]*:\s*", ": ", sentence)
    return sentence.strip(" ,:")
