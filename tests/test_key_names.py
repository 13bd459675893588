"""Every layout's names, both ways; whole-model renames against diffusers' own converters."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)

from lofa_core.key_names import (
    LAYOUTS,
    SDXL_PLACES,
    SDXL_TARGETS,
    WAN_TARGETS,
    canonical_name,
    default_layout,
    layout_name,
    wan_to_diffusers,
    wan_to_original,
)
from lofa_core.key_names_vae import vae_to_diffusers, vae_to_original

WAN_NAMES = [f"blocks.{depth}.{kind}" for depth in (0, 7, 39) for kind in WAN_TARGETS]
SDXL_NAMES = [
    f"{place}.transformer_blocks.{n}.{kind}"
    for place, _, count in SDXL_PLACES
    for n in range(count)
    for kind in SDXL_TARGETS
]


def tiny_wan(**sizes):
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            ffn_dim=32,
            text_dim=16,
            freq_dim=16,
            **sizes,
        )


IMAGE_TO_VIDEO = {"image_dim": 20, "added_kv_proj_dim": 24, "in_channels": 36}


def test_the_spelling_of_each_layout_is_the_documented_one():
    assert {layout: layout_name("blocks.3.cross_attn.o", layout) for layout in LAYOUTS} == {
        "comfyui": "diffusion_model.blocks.3.cross_attn.o",
        "original": "blocks.3.cross_attn.o",
        "diffusers": "blocks.3.attn2.to_out.0",
        "kohya": "lora_unet_blocks_3_cross_attn_o",
        "peft": "transformer.blocks.3.attn2.to_out.0",
    }
    sdxl = "mid_block.attentions.0.transformer_blocks.9.attn1.to_out.0"
    assert {layout: layout_name(sdxl, layout) for layout in LAYOUTS} == {
        "comfyui": "diffusion_model.middle_block.1.transformer_blocks.9.attn1.to_out.0",
        "original": "middle_block.1.transformer_blocks.9.attn1.to_out.0",
        "diffusers": sdxl,
        "kohya": "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn1_to_out_0",
        "peft": "unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_out.0",
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [WAN_NAMES, SDXL_NAMES], ids=["wan", "sdxl"])
def test_every_name_comes_back_from_every_layout(names, layout):
    assert [canonical_name(layout_name(name, layout)) for name in names] == names
    assert len({layout_name(name, layout) for name in names}) == len(names)


def test_prefixes_of_checkpoints_and_raw_peft_files_are_taken_off():
    assert canonical_name("model.diffusion_model.blocks.0.self_attn.q") == "blocks.0.self_attn.q"
    assert canonical_name("base_model.model.blocks.0.attn1.to_q") == "blocks.0.self_attn.q"


def test_original_sdxl_places_agree_with_diffusers_converter():
    # Kohya's own trainer writes SDXL by its original places. Diffusers first finds each index ...
    config = type("Config", (), {"layers_per_block": 2})()
    flat = {"lora_unet_" + layout_name(name, "original").replace(".", "_"): name for name in SDXL_NAMES}
    moved = _maybe_map_sgm_blocks_to_diffusers({f"{key}.alpha": name for key, name in flat.items()}, config)
    # ... and then gives the place its own name.
    for theirs, ours in (("input_blocks", "down_blocks"), ("middle_block", "mid_block"), ("output", "up")):
        moved = {key.replace(theirs, ours): name for key, name in moved.items()}
    assert moved == {f"{layout_name(name, 'kohya')}.alpha": name for name in SDXL_NAMES}
    assert [canonical_name(key) for key in flat] == SDXL_NAMES


@pytest.mark.parametrize(
    "module",
    [
        "blocks.0.ffn.0",
        "vace_blocks.0.self_attn.q",  # another network's block, not this base's
        "blocks.0.self_attn.norm_q",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",  # SD 1.5's first attention; SDXL has none there
        "",
    ],
)
def test_what_is_no_target_layer_has_no_canonical_name(module):
    assert canonical_name(module) is None


def test_default_layout_is_the_one_both_tools_load():
    assert default_layout(WAN_NAMES) == "comfyui"
    assert default_layout(SDXL_NAMES) == "kohya"


def test_unknown_layouts_and_names_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown LoRA layout 'lycoris': choose one of comfyui, original"):
        layout_name("blocks.0.self_attn.q", "lycoris")
    with pytest.raises(ValueError, match="'blocks.0.ffn.0' is not the canonical name"):
        layout_name("blocks.0.ffn.0", "comfyui")
    with pytest.raises(ValueError, match="not the canonical name"):
        layout_name(
            "blocks.0.attn1.to_q", "comfyui"
        )  # a diffusers name is a known layer but not its canonical name


@pytest.mark.parametrize(
    "sizes", [{}, IMAGE_TO_VIDEO, IMAGE_TO_VIDEO | {"pos_embed_seq_len": 4}], ids=["t2v", "i2v", "flf2v"]
)
def test_whole_wan_transformer_both_ways(sizes):
    keys = list(tiny_wan(**sizes).state_dict())
    original = [wan_to_original(key) for key in keys]
    assert [wan_to_diffusers(key) for key in original] == keys
    assert len(set(original)) == len(keys)


@pytest.mark.parametrize("sizes", [{}, IMAGE_TO_VIDEO], ids=["t2v", "i2v"])
def test_wan_transformer_keys_agree_with_diffusers_converter(sizes):
    for key, tensor in tiny_wan(**sizes).state_dict().items():
        assert list(convert_wan_transformer_to_diffusers({wan_to_original(key): tensor})) == [key]


def test_original_wan_keys_are_the_ones_comfyui_looks_for():
    keys = {re.sub(r"blocks\.\d+", "blocks.N", wan_to_original(key)) for key in tiny_wan().state_dict()}
    linear = ["patch_embedding", "time_embedding.0", "time_embedding.2", "time_projection.1", "head.head"]
    linear += ["text_embedding.0", "text_embedding.2"]
    linear += [f"blocks.N.{part}" for part in ("ffn.0", "ffn.2", "norm3")]
    linear += [f"blocks.N.{attn}.{part}" for attn in ("self_attn", "cross_attn") for part in "qkvo"]
    norms = [f"blocks.N.{attn}.norm_{part}.weight" for attn in ("self_attn", "cross_attn") for part in "qk"]
    expected = {f"{module}.{parameter}" for module in linear for parameter in ("weight", "bias")} | set(norms)
    assert keys == expected | {"blocks.N.modulation", "head.modulation"}


def test_whole_wan_vae_both_ways_and_against_diffusers_converter():
    with torch.device("meta"):
        state = AutoencoderKLWan(base_dim=8).state_dict()
    original = {vae_to_original(key): tensor for key, tensor in state.items()}
    assert [vae_to_diffusers(key) for key in original] == list(state)
    assert len(original) == len(state)
    assert convert_wan_vae_to_diffusers(original).keys() == state.keys()
    for key, tensor in original.items():
        assert convert_wan_vae_to_diffusers({key: tensor}).keys() == {vae_to_diffusers(key)}


@pytest.mark.parametrize("rename", [wan_to_diffusers, wan_to_original, vae_to_diffusers, vae_to_original])
@pytest.mark.parametrize(
    "key", ["vace_blocks.0.modulation", "blocks.0.no.weight", "", "decoder.upsamples.15.shortcut.bias"]
)
def test_foreign_keys_are_refused_by_name(rename, key):
    with pytest.raises(ValueError, match=re.escape(repr(key))):
        rename(key)
