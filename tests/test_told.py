"""What training tells a network of a task: one kind mostly, some of them, and how many pictures."""

from collections import Counter

import numpy as np
import pytest

from training.told import MOST_PICTURES, picture_count, some_kinds


@pytest.mark.parametrize("kinds", [["text", "pose"], ["text", "pose", "style"]])
def test_one_kind_is_told_in_four_of_five_and_any_others_together(kinds):
    rng = np.random.default_rng(0)
    told = Counter(tuple(some_kinds(kinds, rng)) for _ in range(10_000))
    alone = {kind: told[(kind,)] / 10_000 for kind in kinds}
    assert sum(alone.values()) == pytest.approx(0.8, abs=0.02)
    assert all(share == pytest.approx(0.8 / len(kinds), abs=0.02) for share in alone.values())
    assert len(told) == 2 ** len(kinds) - 1  # every subset but the empty one
    assert all(list(some) == [kind for kind in kinds if kind in some] for some in told)


def test_a_lone_kind_is_always_told():
    rng = np.random.default_rng(0)
    assert all(some_kinds(["style"], rng) == ["style"] for _ in range(50)) and some_kinds([], rng) == []


def test_the_same_draws_tell_the_same():
    told = [[some_kinds("abc", np.random.default_rng([1, n])) for n in range(50)] for _ in range(2)]
    assert told[0] == told[1]


def test_mostly_one_picture_is_shown():
    rng = np.random.default_rng(0)
    counts = Counter(picture_count(rng) for _ in range(10_000))
    assert set(counts) == set(range(1, MOST_PICTURES + 1)) and counts[1] / 10_000 == pytest.approx(
        0.8, abs=0.02
    )
