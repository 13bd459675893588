"""LoRAs of many tasks over layers of several shapes: every way to take them apart, and back."""

import pytest
import torch
from tiny import generator

from training.factors import Factors, by_name

SHAPES = {(4, 6): 2, (5, 3): 1, (6, 6): 3}  # how many layers have it


def some(tasks=4, seed=0, rank=2):
    draw = generator(seed)
    A = (torch.randn(tasks, n, rank, into, generator=draw) for (_, into), n in SHAPES.items())
    B = (torch.randn(tasks, n, out, rank, generator=draw) for (out, _), n in SHAPES.items())
    return Factors(tuple(A), tuple(B))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip((*a.A, *a.B), (*b.A, *b.B), strict=True))


def test_pairs_and_deltas_are_those_of_each_shape():
    loras = some()
    assert len(loras) == 4
    for (A, B), delta, (shape, layers) in zip(loras.pairs(), loras.deltas(), SHAPES.items(), strict=True):
        assert A.shape == (4, layers, 2, shape[1]) and B.shape == (4, layers, shape[0], 2)
        assert delta.shape == (4, layers, *shape)
        assert torch.allclose(delta[3, -1], B[3, -1] @ A[3, -1], atol=1e-6)


@pytest.mark.parametrize(
    "chosen", [slice(1, 3), torch.tensor([3, 0, 3]), torch.tensor([True, False, True, False])]
)
def test_some_tasks_are_taken_in_every_shape(chosen):
    loras = some()
    found = loras[chosen]
    assert len(found) == len(torch.arange(4)[chosen])
    for ours, all_of_them in zip((*found.A, *found.B), (*loras.A, *loras.B), strict=True):
        assert torch.equal(ours, all_of_them[chosen])


def test_a_row_holds_every_number_of_a_task_and_is_undone():
    loras, others = some(), some(tasks=7, seed=1)
    rows = loras.flat()
    assert rows.shape == (4, 2 * sum(n * (out + into) for (out, into), n in SHAPES.items()))
    assert same(loras.unflat(rows), loras)
    assert same(loras.unflat(others.flat()), others)  # of another number of tasks
    assert torch.equal(rows[2], loras[2:3].flat()[0])
    halved = loras.unflat(0.5 * rows)
    assert torch.equal(halved.A[1], 0.5 * loras.A[1]) and torch.equal(halved.B[2], 0.5 * loras.B[2])


def test_tasks_of_several_are_put_one_after_the_other():
    loras = some()
    assert same(Factors.cat([loras[:1], loras[1:3], loras[3:]]), loras)


def test_a_scaled_lora_is_the_same_change_at_another_strength():
    loras = some()
    for delta, scaled in zip(loras.deltas(), loras.scaled(-1.5).deltas(), strict=True):
        assert torch.allclose(scaled, -1.5 * delta, atol=1e-5)
    assert loras.scaled(2.0).A is loras.A


def test_map_and_to_reach_every_factor():
    loras = some()
    assert all(
        x.dtype == torch.float16 for x in (*loras.map(torch.Tensor.half).A, *loras.map(torch.Tensor.half).B)
    )
    assert all(x.device.type == "meta" for x in (*loras.to("meta").A, *loras.to("meta").B))


def test_by_name_gives_each_layer_its_own_factors():
    loras, groups = some(), [["a", "b"], ["c"], ["d", "e", "f"]]
    A, B = by_name(groups, loras)
    assert list(A) == list(B) == list("abcdef")
    assert torch.equal(A["b"], loras.A[0][:, 1]) and torch.equal(B["b"], loras.B[0][:, 1])
    assert torch.equal(A["c"], loras.A[1][:, 0]) and torch.equal(B["f"], loras.B[2][:, 2])
    with pytest.raises(ValueError, match="zip"):
        by_name([["a", "b"], ["c"], ["d"]], loras)
