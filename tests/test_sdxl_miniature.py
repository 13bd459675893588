"""Narrow SDXLs with fewer blocks: found, counted and named like the real one; the real one must be whole."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_sdxl import build_unet

from lofa_core.base_models import BaseWeights, describe
from lofa_core.key_names import SDXL_PLACES, SDXL_TARGETS, canonical_name, default_layout, layout_name


def shapes_of(counts, width=32):
    """Target layers alone: place -> blocks there."""
    return {
        f"{place}.transformer_blocks.{n}.{kind}.weight": (width, width)
        for place, count in counts.items()
        for n in range(count)
        for kind in SDXL_TARGETS
    }


ONE = {place: 1 for place, _, _ in SDXL_PLACES}
REAL = {place: blocks for place, _, blocks in SDXL_PLACES}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return build_unet(blocks=2).state_dict()


def test_a_narrow_unet_with_fewer_blocks_is_an_sdxl_miniature(state):
    base = describe({key: tuple(value.shape) for key, value in state.items()})
    # Two blocks at each of the six widest places, one at the other five.
    assert base.name == "SDXL miniature" and len(base.layers) == 8 * (6 * 2 + 5)
    assert [layer.depth for layer in base.layers] == [depth for depth in range(17) for _ in range(8)]
    assert sorted(layer.key for layer in base.layers) == sorted(
        key for key in state if ".attn" in key and key.endswith("weight")
    )
    assert {layer.shape for layer in base.layers} == {(16, 16), (16, 20), (32, 32), (32, 20)}
    places = [layer.name.split(".transformer_blocks.")[0] for layer in base.layers]
    assert list(dict.fromkeys(places)) == [place for place, _, _ in SDXL_PLACES]


def test_every_layout_spells_it_as_the_real_one(state):
    base = describe({key: tuple(value.shape) for key, value in state.items()})
    names = [layer.name for layer in base.layers]
    assert default_layout(names) == "kohya"
    last = "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0"
    assert last in names
    assert (
        layout_name(last, "kohya") == "lora_unet_up_blocks_0_attentions_2_transformer_blocks_1_attn2_to_out_0"
    )
    assert layout_name(last, "original") == "output_blocks.2.1.transformer_blocks.1.attn2.to_out.0"
    for layout in ("kohya", "original", "comfyui", "peft"):
        assert [canonical_name(layout_name(name, layout)) for name in names] == names
    renamed = BaseWeights.from_tensors(
        {
            f"model.diffusion_model.{layout_name(layer.name, 'original')}.weight": state[layer.key]
            for layer in base.layers
        }
    )
    assert renamed.model.name == "SDXL miniature"
    assert renamed.fingerprint() == BaseWeights.from_tensors(state).fingerprint()


def test_blocks_are_numbered_from_nought_without_gaps():
    assert describe(shapes_of(ONE)).name == "SDXL miniature"
    gap = shapes_of(ONE | {"mid_block.attentions.0": 3})
    gap = {
        key: shape for key, shape in gap.items() if "mid_block.attentions.0.transformer_blocks.1" not in key
    }
    with pytest.raises(
        ValueError, match=r"8 of 104 .* SDXL miniature are missing, first mid_block.*\.1\.attn1"
    ):
        describe(gap)
    place = {key: shape for key, shape in shapes_of(ONE).items() if "up_blocks.1.attentions.1" not in key}
    with pytest.raises(ValueError, match="8 of 88 target layers of SDXL miniature are missing"):
        describe(place)
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.2\..* is a layer of a UNet, but SDXL has none"
    ):
        describe(shapes_of(ONE | {"up_blocks.1.attentions.0": 3}))


@pytest.mark.parametrize("width", [320, 640, 1280])
def test_a_wide_one_must_have_all_560(width):
    with pytest.raises(ValueError, match="472 of 560 target layers of SDXL are missing"):
        describe(shapes_of(ONE, width))
    almost = shapes_of(REAL, width)
    almost.pop("mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0.weight")
    with pytest.raises(ValueError, match="1 of 560 target layers of SDXL are missing"):
        describe(almost)
    last = {key: shape for key, shape in almost.items() if ".transformer_blocks.9." not in key}
    with pytest.raises(ValueError, match="48 of 560 target layers of SDXL are missing"):
        describe(last)
    # One wide layer is enough to tell: a real one's part is not taken for a small one.
    part = shapes_of(ONE) | {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": (width, width)}
    with pytest.raises(ValueError, match="472 of 560"):
        describe(part)


def test_a_full_precision_file_and_its_half_are_one_model(state, tmp_path):
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    half = {key: value.half() for key, value in state.items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    found = BaseWeights.open(tmp_path)
    assert found.read(found.model.layers[0]).dtype == torch.float32
    save_file(half, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="several base models"):
        BaseWeights.open(tmp_path)
