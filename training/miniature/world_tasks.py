"""The world's tasks: an action to perform, a look to have, or both."""

import json
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np

from .world import BACKDROPS, COLOURS, FACTORS, Action, Look

LOOK_FACTORS: dict[str, tuple[str, ...]] = {
    "shirt": tuple(COLOURS),
    "trousers": tuple(COLOURS),
    "backdrop": BACKDROPS,
}


@dataclass(frozen=True)
class WorldTask:
    """What every clip of a task shows; what is None varies freely. Prints as its id."""

    action: Action | None = None
    look: Look | None = None

    def __post_init__(self):
        if self.action is None and self.look is None:
            raise ValueError("a task needs an action or a look")

    @property
    def id(self) -> str:
        """Such as left_arm-wide-slow-stay-upright-apart, look-red-blue-beach, or both joined."""
        parts = [] if self.action is None else [*astuple(self.action)]
        return "-".join(parts + ([] if self.look is None else ["look", *astuple(self.look)]))

    def __str__(self) -> str:
        return self.id

    def metadata(self) -> dict[str, str]:
        """What its LoRA's file says about it: action and look, as `Action(**json)` and `Look(**json)`."""
        parts = {"action": self.action, "look": self.look}
        return {name: json.dumps(asdict(value)) for name, value in parts.items() if value is not None}

    @classmethod
    def read(cls, values: dict[str, Any]) -> "WorldTask":
        """From `dataclasses.asdict`."""
        action, look = values["action"], values["look"]
        return cls(action and Action(**action), look and Look(**look))

    def factors(self) -> tuple[str, ...]:
        """Names of the factors it fixes, in the order of `indices`."""
        return (() if self.action is None else tuple(FACTORS)) + (
            () if self.look is None else tuple(LOOK_FACTORS)
        )

    def indices(self) -> tuple[int, ...]:
        """The positions of the values it fixes within their factors: the action's, then the look's."""
        return (() if self.action is None else self.action.indices()) + (
            () if self.look is None else look_indices(self.look)
        )


def look_indices(look: Look) -> tuple[int, ...]:
    """The position of each value within its factor, in the order of `LOOK_FACTORS`."""
    values = zip(LOOK_FACTORS.items(), astuple(look), strict=True)
    return tuple(options.index(value) for (_, options), value in values)


def all_looks() -> list[Look]:
    """Every pair of different clothes in front of every backdrop, in a fixed order."""
    return [
        Look(shirt, trousers, backdrop)
        for shirt in COLOURS
        for trousers in COLOURS
        for backdrop in BACKDROPS
        if shirt != trousers
    ]


def split_looks(held_out: int, seed: int) -> tuple[list[Look], list[Look]]:
    """Split `all_looks()` into (training, held-out); every value of every factor occurs in both parts.

    Raises ValueError where so few are asked for on one side that not every value can occur there.
    """
    looks = all_looks()
    if not 18 <= held_out <= len(looks) - 18:  # enough for a random draw to succeed soon
        raise ValueError(f"held_out_looks = {held_out}: expected 18 to {len(looks) - 18} looks.")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(looks))
        parts = [looks[i] for i in order[held_out:]], [looks[i] for i in order[:held_out]]
        if all(
            {getattr(look, name) for look in part} == set(LOOK_FACTORS[name])
            for part in parts
            for name in LOOK_FACTORS
        ):
            return parts
