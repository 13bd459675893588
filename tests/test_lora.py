"""Every operation of the LoRA container against the explicit dW."""

import pytest
import torch

from lofa_core.lora import LoRA, LoRALayer

NAMES = {"blocks.0.self_attn.q": (12, 20), "blocks.0.cross_attn.o": (16, 10)}


def lora(seed=0, rank=4, alpha=6.0, names=NAMES):
    generator = torch.Generator().manual_seed(seed)
    return LoRA(
        {
            name: LoRALayer(
                torch.randn(rank, in_, generator=generator),
                torch.randn(out, rank, generator=generator),
                alpha,
            )
            for name, (out, in_) in names.items()
        },
        {"prompt": "a test"},
    )


def explicit(layer):
    """alpha / r * sum_k B[:, k] A[k, :], term by term."""
    dW = torch.zeros(layer.B.shape[0], layer.A.shape[1])
    for k in range(layer.A.shape[0]):
        dW += layer.alpha / layer.A.shape[0] * torch.outer(layer.B[:, k].float(), layer.A[k].float())
    return dW


def close(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_delta_is_alpha_over_r_times_b_a():
    a = lora()
    assert all(close(a.delta(name), explicit(a[name])) for name in NAMES)
    assert lora(alpha=12.0)["blocks.0.self_attn.q"].delta().norm() == pytest.approx(
        2 * a.delta("blocks.0.self_attn.q").norm().item()
    )


def test_it_reads_like_a_dict_and_counts():
    a = lora()
    assert list(a) == list(NAMES) and len(a) == 2 and "blocks.0.self_attn.q" in a
    assert a.rank == 4 and a.parameter_count == 4 * (12 + 20 + 16 + 10)
    assert a["blocks.0.self_attn.q"].shape == (12, 20)
    assert LoRA({}).rank == 0


def test_merged_adds_in_float32_and_keeps_the_dtype():
    a, name = lora(), "blocks.0.self_attn.q"
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    assert close(a.merged(name, W), W + explicit(a[name]))
    half = a.merged(name, W.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, (W.bfloat16().float() + a.delta(name)).bfloat16())
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q: the LoRA changes a weight of \[12, 20\]"):
        a.merged(name, W.T)


def test_scaled_scales_every_delta():
    a = lora()
    assert all(close(a.scaled(-0.3).delta(name), -0.3 * explicit(a[name])) for name in NAMES)
    assert a.scaled(0.5).metadata == a.metadata


def test_blend_is_the_exact_weighted_sum_over_different_ranks_and_alphas():
    a, b = lora(0, rank=4, alpha=6.0), lora(1, rank=3, alpha=1.0)
    blended = LoRA.blend([(a, 0.7), (b, -1.5)])
    assert all(close(blended.delta(n), 0.7 * explicit(a[n]) - 1.5 * explicit(b[n])) for n in NAMES)
    assert blended.rank == 7


def test_blend_keeps_a_layer_that_only_one_part_has():
    a, b = lora(0), lora(1, names={"blocks.1.self_attn.q": (8, 8)})
    blended = LoRA.blend([(a, 2.0), (b, 0.5)])
    assert set(blended) == set(a) | set(b)
    assert close(blended.delta("blocks.1.self_attn.q"), 0.5 * explicit(b["blocks.1.self_attn.q"]))


def test_blend_refuses_loras_of_different_bases():
    other = lora(names={"blocks.0.self_attn.q": (8, 8)})
    with pytest.raises(ValueError, match="blocks.0.self_attn.q: LoRAs of different base models do not blend"):
        LoRA.blend([(lora(), 1.0), (other, 1.0)])


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_reduced_is_the_best_approximation_of_each_delta(rank):
    # Rank 24 is more than the smaller side of both layers: a blend of many may be.
    for a in (lora(), lora(rank=24)):
        for name in NAMES:
            dW = explicit(a[name])
            U, S, Vt = torch.linalg.svd(dW)
            best = U[:, :rank] @ torch.diag(S)[:rank, :rank] @ Vt[:rank]
            reduced = a.reduced(rank)
            assert torch.allclose(reduced.delta(name), best, atol=1e-4 * S[0].item())
            assert reduced[name].rank == min(rank, a[name].rank, *dW.shape)
    with pytest.raises(ValueError, match="rank 0"):
        a.reduced(0)


def test_canonical_form_is_the_same_delta_whatever_factors_it_came_from():
    a = lora()
    M = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))  # B A = (B M)(M^-1 A)
    mixed = LoRA({n: LoRALayer(torch.linalg.solve(M, a[n].A), -(a[n].B @ M), -a[n].alpha) for n in a})
    for name in NAMES:
        one, other = a.canonical()[name], mixed.canonical()[name]
        assert close(one.delta(), explicit(a[name])) and one.alpha == one.rank == 4
        assert torch.allclose(one.A, other.A, atol=1e-3) and torch.allclose(one.B, other.B, atol=1e-3)
        S = torch.linalg.svdvals(explicit(a[name]))[:4]
        assert torch.allclose(one.A @ one.A.T, torch.diag(S), atol=1e-3)
        assert torch.allclose(one.B.T @ one.B, torch.diag(S), atol=1e-3)
        assert (one.B.gather(0, one.B.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_canonical_form_of_no_change_at_all():
    nothing = LoRA({"blocks.0.self_attn.q": LoRALayer(torch.randn(4, 20), torch.zeros(12, 4), 4.0)})
    assert not nothing.canonical().delta("blocks.0.self_attn.q").any()


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"A is \[4, 20\] and B is \[12, 3\]"):
        LoRALayer(torch.zeros(4, 20), torch.zeros(12, 3), 4.0)
    with pytest.raises(ValueError, match="expected A"):
        LoRALayer(torch.zeros(0, 20), torch.zeros(12, 0), 4.0)
    with pytest.raises(ValueError, match="expected A"):
        LoRALayer(torch.zeros(4, 20, 1, 1), torch.zeros(12, 4, 1, 1), 4.0)
