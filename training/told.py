"""What a network in training is told of a task: each kind of condition often alone, now and then nothing."""

from collections.abc import Sequence

import numpy as np

# Share of conditions that say nothing, where a network knows several kinds, so that a strength can fade to
# the mean LoRA.
NOTHING = 0.03
MOST_PICTURES = 3
_ONE_KIND, _SEVERAL_PICTURES = 0.8, 0.3


def some_kinds(kinds: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Of kinds that describe the same of a task mostly one, else several or all."""
    drawn = rng.random()
    if len(kinds) < 2:
        return list(kinds)
    if drawn < _ONE_KIND:
        return [kinds[len(kinds) - 1 - int(len(kinds) * drawn / _ONE_KIND)]]
    count = int(rng.integers(2, len(kinds) + 1))
    picks = range(count) if count == len(kinds) else sorted(rng.permutation(len(kinds))[:count])
    return [kinds[pick] for pick in picks]


def picture_count(rng: np.random.Generator) -> int:
    """How many pictures to show: mostly one, else up to `MOST_PICTURES`."""
    return int(rng.integers(1, MOST_PICTURES + 1)) if rng.random() < _SEVERAL_PICTURES else 1
