"""LoRAs as numbers and as latents: nothing of dW is lost, and where the VAE starts."""

import pytest
import torch
from tiny import SIDE, describe, generator

from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_latent import LoRACodec, LoRAVAE


def some_loras(count, rank=3, seed=0):
    draw = generator(seed)
    return [
        LoRA(
            {
                layer.name: LoRALayer(
                    torch.randn(rank, layer.shape[1], generator=draw),
                    torch.randn(layer.shape[0], rank, generator=draw),
                    alpha=2.0,
                )
                for layer in describe().layers
            }
        )
        for _ in range(count)
    ]


def same(one, other):
    return all(torch.allclose(one.delta(name), other.delta(name), atol=1e-3) for name in one)


@pytest.mark.parametrize("form", ["canonical", "trained"])
@pytest.mark.parametrize("ranks", [(3, 3), (3, 2)])
def test_a_lora_comes_back_from_its_numbers_with_the_same_dw(form, ranks):
    codec, given = LoRACodec(describe(), 3, form), [some_loras(1, rank, rank)[0] for rank in ranks]
    codec.fit(some_loras(6, seed=9))
    numbers = codec.numbers(given)
    assert [tuple(own.shape) for own in numbers] == [(2, 16, 3 * 2 * SIDE)]
    assert all(same(one, other) for one, other in zip(given, codec.loras(numbers), strict=True))


def test_the_canonical_form_does_not_depend_on_the_basis_and_the_trained_one_does():
    (lora,) = some_loras(1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator(4))).Q
    turned = LoRA({n: LoRALayer(turn.T @ own.A, own.B @ turn, own.alpha) for n, own in lora.items()})
    for form, alike in (("canonical", True), ("trained", False)):
        (one,), (other,) = (LoRACodec(describe(), 3, form).numbers([given]) for given in (lora, turned))
        assert torch.allclose(one, other, atol=1e-3) == alike


def test_numbers_of_the_fitted_loras_have_zero_mean_and_unit_variance_in_every_layer():
    codec, given = LoRACodec(describe(), 3, "canonical"), some_loras(12)
    codec.fit(given)
    (numbers,) = codec.numbers(given)
    assert numbers.mean(0).abs().max() < 1e-4
    for part in numbers.split(3 * SIDE, -1):
        assert torch.allclose(part.square().mean(dim=(0, 2)), torch.ones(16), atol=1e-3)


def test_loras_that_do_not_fit_the_codec_are_named():
    codec, (lora,) = LoRACodec(describe(), 2, "trained"), some_loras(1)
    with pytest.raises(ValueError, match="rank 3: expected at most 2"):
        codec.numbers([lora])
    with pytest.raises(ValueError, match="1 layers: expected the 16 target layers of WAN2.1 miniature"):
        codec.numbers([LoRA(dict(list(lora.items())[:1]))])


def test_a_new_vae_keeps_what_few_loras_differ_in_and_has_nearly_no_noise():
    codec, given = LoRACodec(describe(), 3, "canonical"), some_loras(4)
    codec.fit(given)
    numbers, vae = codec.numbers(given), LoRAVAE(describe(), 3, 5, 8, 1, 6)
    vae.start(numbers)
    (down,), (up,) = vae.down.values(), vae.up.values()
    found = down(numbers[0])
    assert torch.allclose(up(found), numbers[0], atol=1e-3)
    # Unit variance, averaged over the four directions kept.
    assert torch.allclose(found.square().sum(-1).mean(0), torch.full((16,), 4.0), atol=1e-3)
    latent, log_variance = vae.encode(numbers)
    assert latent.shape == (4, 6) and log_variance.mean() < -4.0
    assert [own.shape for own in vae.decode(latent)] == [numbers[0].shape]
