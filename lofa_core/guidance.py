"""Hybrid-model classifier-free guidance: the base model's composition and the LoRA's subject in one step.

HM-CFG is of arXiv 2511.03156. Its exact formula is not in our sources; this one is ours:

    eps = eps_B(neg) + w_base (eps_B(c) - eps_B(neg)) + w_subject (eps_P(c) - eps_B(c))

with B the base model, P the personalised one (base + LoRA), c the prompt and neg the negative prompt. The
coefficients of the three predictions add up to 1, so it holds for predicted noise, velocity and clean samples
alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class Prediction(Enum):
    """What a model may be asked in one step."""

    NEGATIVE = "base model, negative prompt"
    BASE = "base model, prompt"
    PERSONALISED = "personalised model, prompt"


Window = tuple[float, float]
ALWAYS: Window = (0.0, 1.0)


@dataclass(frozen=True)
class HybridGuidance:
    """w_base and w_subject, each with its window [start, end) of sampling: 0 is its beginning, 1 its end.

    w_subject = 0 is plain CFG on the base model; w_subject = w_base is asymmetric CFG, with the LoRA on the
    positive pass only. Outside its window a weight does nothing: w_base is then 1 (the prompt, unguided) and
    w_subject 0. Raises ValueError for a weight that is no finite number and a window not within 0..1.
    """

    w_base: float = 5.0
    w_subject: float = 5.0
    base_window: Window = ALWAYS
    subject_window: Window = ALWAYS

    def __post_init__(self) -> None:
        for name, weight in (("w_base", self.w_base), ("w_subject", self.w_subject)):
            if not math.isfinite(weight):
                raise ValueError(f"{name} {weight}: a weight is a finite number, such as 5.")
        for name, (start, end) in (("base", self.base_window), ("subject", self.subject_window)):
            if not 0.0 <= start <= end <= 1.0:
                raise ValueError(
                    f"The {name} window goes from {start} to {end}; give a start and an end between 0 and 1, "
                    "the start first."
                )

    def at(self, progress: float) -> tuple[float, float]:
        """(w_base, w_subject) where `progress` (0..1) of sampling is done."""
        return (
            self.w_base if _within(self.base_window, progress) else 1.0,
            self.w_subject if _within(self.subject_window, progress) else 0.0,
        )


def _within(window: Window, progress: float) -> bool:
    return window[0] <= progress < window[1]


def progress(now: float, schedule: Sequence[float]) -> float:
    """The fraction of the steps that lie behind at noise level `now`.

    `schedule` holds the levels (sigmas or timesteps) at which the steps begin; a level that is named twice,
    as Heun's are, is one step. Samplers also ask between two levels: that is the nearer step.
    """
    levels = list(dict.fromkeys(schedule))
    step = min(range(len(levels)), key=lambda place: abs(levels[place] - now))
    return step / len(levels)


def coefficients(w_base: float, w_subject: float) -> dict[Prediction, float]:
    """What each prediction is multiplied by. Those of 0 are left out: they need not be made.

    One is left at w_base = w_subject = 1 (the personalised model unguided), two in plain and asymmetric CFG.
    """
    every = {
        Prediction.NEGATIVE: 1.0 - w_base,
        Prediction.BASE: w_base - w_subject,
        Prediction.PERSONALISED: w_subject,
    }
    return {prediction: factor for prediction, factor in every.items() if factor}


def guide(predictions: Mapping[Prediction, Tensor], w_base: float, w_subject: float) -> Tensor:
    """eps of this module's formula, in the shape of the predictions (any, but all of one).

    `predictions` has at least those in `coefficients(w_base, w_subject)`. Raises ValueError naming one that
    is missing or has another shape.
    """
    factors = coefficients(w_base, w_subject)
    for prediction in factors:
        if prediction not in predictions:
            raise ValueError(
                f"w_base {w_base} and w_subject {w_subject} need: {prediction.value}. Give it too."
            )
    first, *others = factors
    # As differences from the first: with all of them large and alike, sums of products would lose digits.
    eps = predictions[first]
    for other in others:
        if predictions[other].shape != predictions[first].shape:
            raise ValueError(
                f"The predictions have the shapes {list(predictions[first].shape)} ({first.value}) and "
                f"{list(predictions[other].shape)} ({other.value}); they must be alike."
            )
        eps = eps + factors[other] * (predictions[other] - predictions[first])
    return eps
