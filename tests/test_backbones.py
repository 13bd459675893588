"""Base models in diffusers: both file formats, latent units, and text whose padding is one row."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from tiny import generator

from lofa_core.key_names import wan_to_original
from lofa_core.key_names_vae import vae_to_original
from training import backbones
from training.miniature import transformer, vae


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = transformer.build(48, 2).eval().requires_grad_(False)
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.2)
        for block in model.blocks:
            block.scale_shift_table.normal_(std=0.7)
    return model


def inputs(lengths, rows):
    """Latents, times, and text states [B, rows, 64] that are zero after each prompt's own length."""
    draw = generator(0)
    text = torch.randn(len(lengths), rows, 64, generator=draw)
    for row, length in enumerate(lengths):
        text[row, length:] = 0.0
    return (
        torch.randn(len(lengths), 16, 2, 4, 4, generator=draw),
        torch.tensor([100.0, 500.0, 900.0])[: len(lengths)],
        text,
    )


@torch.no_grad()
@pytest.mark.parametrize("rows", [9, 40])
def test_folded_padding_is_512_rows_of_which_most_are_zero(model, rows):
    x, times, text = inputs((9, 4, 1), rows)
    real = torch.nn.functional.pad(text, (0, 0, 0, 512 - rows))
    wanted = model(x, times, real, return_dict=False)[0]
    folded = copy.deepcopy(model)
    backbones.use_folded_padding(folded)
    found = folded(x, times, backbones.fold_padding(text), return_dict=False)[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    # and it is not what the text without its padding gives, nor one row of padding counted once
    assert not torch.allclose(model(x, times, text, return_dict=False)[0], wanted, atol=1e-3)
    assert not torch.allclose(
        model(x, times, backbones.fold_padding(text), return_dict=False)[0], wanted, atol=1e-3
    )


def test_folding_adds_one_row_of_zeros():
    text = torch.randn(2, 5, 8)
    folded = backbones.fold_padding(text)
    assert folded.shape == (2, 6, 8) and torch.equal(folded[:, :5], text) and not folded[:, 5].any()


@torch.no_grad()
def test_latent_units_by_the_vaes_own_statistics():
    torch.manual_seed(0)
    model = vae.build()
    latents = torch.randn(2, 16, 3, 2, 2)
    found = backbones.to_unit(latents, model)
    for channel in (0, 7, 15):
        mean, deviation = model.config.latents_mean[channel], model.config.latents_std[channel]
        assert torch.allclose(found[:, channel], (latents[:, channel] - mean) / deviation, atol=1e-6)
    assert torch.allclose(backbones.from_unit(found, model), latents, atol=1e-5)
    assert backbones.to_unit(latents.half(), model).dtype == torch.float16


@torch.no_grad()
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_transformer_loads_from_original_names_and_from_diffusers_own_folder(model, tmp_path, layout):
    folder = tmp_path / "transformer"
    if layout == "diffusers":
        model.save_pretrained(folder)
    else:
        model.save_config(folder)
        save_file(
            {wan_to_original(k): v.contiguous() for k, v in model.state_dict().items()},
            folder / "wan.safetensors",
        )
    found = backbones.load_transformer(tmp_path)
    assert not found.training and dict(found.config)["num_layers"] == 2
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())
    given = inputs((5, 5), 5)
    assert torch.allclose(found(*given, return_dict=False)[0], model(*given, return_dict=False)[0], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_vae_loads_from_original_names_and_from_diffusers_own_folder(tmp_path, layout):
    torch.manual_seed(0)
    model, folder = vae.build(), tmp_path / "vae"
    if layout == "diffusers":
        model.save_pretrained(folder)
    else:
        model.save_config(folder)
        save_file(
            {vae_to_original(k): v.contiguous() for k, v in model.state_dict().items()},
            folder / "vae.safetensors",
        )
    found = backbones.load_vae(tmp_path)
    assert set(found.state_dict()) == set(model.state_dict()) and not found.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize(
    ("load", "part"), [(backbones.load_transformer, "transformer"), (backbones.load_vae, "vae")]
)
def test_a_folder_without_weights_is_named(tmp_path, load, part):
    with pytest.raises(FileNotFoundError, match=rf"{part}: no \.safetensors file.*{part}/"):
        load(tmp_path)
