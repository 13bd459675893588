"""LoRA files of every layout: round trips, damaged files, atomic writes, and diffusers applying them."""

import json
import os

import psutil
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file

from lofa_core.base_models import BaseWeights, describe
from lofa_core.key_names import LAYOUTS
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import (
    each_tensor,
    from_state_dict,
    load_lora,
    match,
    read_safetensors,
    save_lora,
    to_state_dict,
    write_safetensors,
)
from lofa_core.steps import Watch

TINY_SDXL = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 32),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
}


def tiny_wan(**sizes):
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        ffn_dim=32,
        text_dim=16,
        freq_dim=16,
        **sizes,
    )


def tiny_sdxl():
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY_SDXL)


def lora_for(model, rank=4, alpha=6.0):
    """A LoRA for every target layer of a model, large enough to see: alpha is not r."""
    generator = torch.Generator().manual_seed(1)

    def layer(out, in_):
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, in_), (out, rank)))
        return LoRALayer(A, B, alpha)

    base = describe({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
    return LoRA(
        {target.name: layer(*target.shape) for target in base.layers}, {"prompt": "a person waves"}
    ), base


@pytest.fixture(scope="module")
def wan():
    return lora_for(tiny_wan())


@pytest.fixture(scope="module")
def sdxl():
    return lora_for(tiny_sdxl())


def same_deltas(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    return all(torch.allclose(a.delta(name), b.delta(name), atol=tolerance, rtol=tolerance) for name in a)


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("which", ["wan", "sdxl"])
def test_every_layout_comes_back_whole(which, layout, tmp_path, request):
    lora, base = request.getfixturevalue(which)
    save_lora(lora, tmp_path / "it.safetensors", layout)
    back = load_lora(tmp_path / "it.safetensors")
    assert same_deltas(back, lora) and back.metadata == lora.metadata
    assert match(back, base).summary() == f"{len(base.layers)} of {len(base.layers)} layers matched"


def test_default_layouts_are_the_documented_ones(wan, sdxl):
    assert list(to_state_dict(wan[0]))[:2] == [
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
    ]
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert sorted(to_state_dict(sdxl[0]))[:3] == sorted(
        f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k.{part}"
        for part in ("alpha", "lora_down.weight", "lora_up.weight")
    )
    state = to_state_dict(sdxl[0])
    assert state[f"{block}.alpha"].item() == 6.0 and state[f"{block}.alpha"].shape == ()
    with pytest.raises(ValueError, match="unknown LoRA layout 'lycoris'"):
        to_state_dict(wan[0], "lycoris")


def test_alpha_is_folded_into_b_where_the_layout_has_no_alpha(wan):
    lora, name = wan[0], "blocks.1.cross_attn.o"
    state = to_state_dict(lora)
    A, B = (state[f"diffusion_model.{name}.lora_{x}.weight"] for x in "AB")
    assert not [key for key in state if "alpha" in key]
    assert torch.equal(A, lora[name].A) and torch.allclose(B @ A, lora.delta(name), atol=1e-5)
    assert from_state_dict(state)[name].alpha == 4  # = r: nothing is scaled twice
    kohya = from_state_dict(to_state_dict(lora, "kohya"))[name]
    assert kohya.alpha == 6 and torch.equal(kohya.B, lora[name].B)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtype_is_what_was_asked_for(wan, layout):
    for key, tensor in to_state_dict(wan[0], layout, torch.bfloat16).items():
        assert tensor.dtype == (torch.float32 if key.endswith("alpha") else torch.bfloat16)
    half = from_state_dict(to_state_dict(wan[0], layout, torch.bfloat16))
    assert same_deltas(half, wan[0], tolerance=0.2)
    assert {tensor.dtype for tensor in to_state_dict(half, "comfyui").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_every_spelling_of_a_and_b_with_and_without_alpha(down, up, alpha):
    A, B = torch.randn(4, 6), torch.randn(8, 4)
    state = {f"transformer.blocks.0.attn1.to_q.{down}": A, f"transformer.blocks.0.attn1.to_q.{up}": B}
    if alpha is not None:
        state["transformer.blocks.0.attn1.to_q.alpha"] = torch.tensor(alpha)
    lora = from_state_dict(state)
    scale = 1.0 if alpha is None else alpha / 4
    assert list(lora) == ["blocks.0.self_attn.q"]
    assert torch.allclose(lora.delta("blocks.0.self_attn.q"), scale * B @ A, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "diffusion_model.blocks.0.ffn.0.lora_A.weight",
            "ffn.0.lora_A.weight changes a layer that LoFA does not",
        ),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "changes a layer that LoFA does not know",
        ),
        ("blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.weight is not a LoRA's key"),
        ("lora_unet_blocks_0_self_attn_q.hada_w1_a", "hada_w1_a is not a LoRA's key"),
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "dora_scale is not a LoRA's key"),
        ("diffusion_model.blocks.0.self_attn.q.diff_b", "diff_b is not a LoRA's key"),
        (
            "transformer.blocks.0.attn1.to_q.lora_A.weight",
            "blocks.0.self_attn.q has its A twice, under two names",
        ),
    ],
)
def test_foreign_keys_are_refused_by_name(wan, key, message, tmp_path):
    file = tmp_path / "foreign.safetensors"
    save_file(to_state_dict(wan[0]) | {key: torch.zeros(4, 24)}, file)
    with pytest.raises(ValueError, match="foreign.safetensors: .*" + message):
        load_lora(file)


def test_incomplete_layers_are_refused(wan):
    state = to_state_dict(wan[0])
    del state["diffusion_model.blocks.0.self_attn.q.lora_B.weight"]
    with pytest.raises(ValueError, match="blocks.0.self_attn.q has no B: it has only A"):
        from_state_dict(state)
    state["diffusion_model.blocks.0.self_attn.q.lora_B.weight"] = torch.zeros(24, 5)
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q: A is \[4, 24\] and B is \[24, 5\]"):
        from_state_dict(state)
    with pytest.raises(ValueError, match="no LoRA"):
        from_state_dict({})


def test_damaged_and_absent_files_are_named(wan, tmp_path):
    file = tmp_path / "mine.safetensors"
    save_lora(wan[0], file)
    whole = file.read_bytes()
    for content in (b"", b"<!DOCTYPE html><html>not found</html>", whole[: len(whole) // 2], whole[:20]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="mine.safetensors is not a whole safetensors file"):
            load_lora(file)
    with pytest.raises(FileNotFoundError, match="absent.safetensors: no such file"):
        load_lora(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_lora(tmp_path)  # a folder


def test_saving_needs_a_folder_and_a_safetensors_name(wan, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere to write into"):
        save_lora(wan[0], tmp_path / "nowhere" / "it.safetensors")
    with pytest.raises(ValueError, match="has to end in .safetensors"):
        save_lora(wan[0], tmp_path / "it.pt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(wan, tmp_path):
    file = tmp_path / "it.safetensors"
    save_lora(wan[0], file)
    before = file.read_bytes()

    def disk_full(done, total):
        if done == total // 2:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_lora(wan[0].scaled(2.0), file, watch=Watch(disk_full))
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["it.safetensors"]
    save_lora(wan[0].scaled(2.0), file)
    assert same_deltas(load_lora(file), wan[0].scaled(2.0)) and os.listdir(tmp_path) == ["it.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_others_may_read_the_file_as_any_other(wan, tmp_path):
    (tmp_path / "plain").touch()
    save_lora(wan[0], tmp_path / "it.safetensors")
    assert (tmp_path / "it.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tensors_that_share_memory_or_are_views_are_written(tmp_path):
    shared = torch.arange(24.0).reshape(4, 6)
    write_safetensors(
        {"a": shared, "b": shared, "c": shared.T}, tmp_path / "it.safetensors", {"what": "views"}
    )
    tensors, metadata = read_safetensors(tmp_path / "it.safetensors")
    assert metadata == {"what": "views"}
    assert torch.equal(tensors["b"], shared) and torch.equal(tensors["c"], shared.T)


def test_match_counts_what_fits_and_names_what_does_not(wan, sdxl):
    lora, base = wan
    layers = dict(lora.layers)
    del layers["blocks.0.self_attn.k"]
    layers["blocks.0.self_attn.q"] = LoRALayer(torch.zeros(4, 8), torch.zeros(8, 4), 4.0)
    layers["blocks.7.self_attn.q"] = layers["blocks.1.self_attn.q"]
    report = match(LoRA(layers), base)
    assert report.missing == ("blocks.0.self_attn.k",) and len(report.matched) == 14
    assert report.wrong_shape == ("blocks.0.self_attn.q",) and report.unexpected == ("blocks.7.self_attn.q",)
    assert report.summary() == (
        "14 of 16 layers matched; 1 have another shape (first blocks.0.self_attn.q); "
        "1 are not in WAN2.1 miniature (first blocks.7.self_attn.q)"
    )
    other = match(sdxl[0], base)
    assert other.summary().startswith(
        "0 of 16 layers matched; 560 are not in WAN2.1 miniature (first down_blocks.1"
    )


def adapted_layers_give_w_plus_dw(model, lora, load):
    """Each target linear of a diffusers model gives (W + dW) x + b once `load` has put the LoRA on it."""
    weights = BaseWeights.from_tensors({key: tensor.clone() for key, tensor in model.state_dict().items()})
    biases = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.endswith(".bias")}
    load()
    for target in weights.model.layers:
        module = target.key.removesuffix(".weight")
        x = torch.randn(5, target.shape[1]) / target.shape[1] ** 0.5
        expected = x @ lora.merged(target.name, weights.read(target)).T + biases.get(f"{module}.bias", 0.0)
        with torch.no_grad():
            assert torch.allclose(model.get_submodule(module)(x), expected, atol=1e-5), target.name


# Diffusers refuses Kohya's names for WAN when only attention has a LoRA, and silently skips bare names.
@pytest.mark.parametrize("layout", ["comfyui", "peft"])
@pytest.mark.parametrize("sizes", [{}, {"image_dim": 20, "added_kv_proj_dim": 24}], ids=["t2v", "i2v"])
def test_diffusers_wan_pipeline_applies_w_plus_dw(layout, sizes, tmp_path):
    model = tiny_wan(**sizes)
    lora, _ = lora_for(model)
    save_lora(lora, tmp_path / "it.safetensors", layout)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = WanPipeline(None, None, None, scheduler, transformer=model)
    adapted_layers_give_w_plus_dw(
        model, lora, lambda: pipeline.load_lora_weights(str(tmp_path / "it.safetensors"))
    )


@pytest.mark.parametrize(("layout", "prefix"), [("diffusers", None), ("peft", "transformer")])
def test_diffusers_wan_transformer_applies_w_plus_dw(layout, prefix, tmp_path):
    model = tiny_wan()
    lora, _ = lora_for(model)
    save_lora(lora, tmp_path / "it.safetensors", layout)
    state = load_file(tmp_path / "it.safetensors")
    adapted_layers_give_w_plus_dw(model, lora, lambda: model.load_lora_adapter(state, prefix=prefix))


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_diffusers_sdxl_applies_w_plus_dw(layout, sdxl, tmp_path):
    model, lora = tiny_sdxl(), sdxl[0]
    save_lora(lora, tmp_path / "it.safetensors", layout)

    def load():
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(
            str(tmp_path / "it.safetensors"), unet_config=model.config
        )
        StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, model)

    adapted_layers_give_w_plus_dw(model, lora, load)


def test_a_large_file_is_read_tensor_by_tensor_and_none_stays_in_memory(tmp_path):
    size, names = 2**22, [f"t{n}" for n in range(70)]  # 4 MB each, 280 in all
    header = {
        name: {"dtype": "F32", "shape": [2**20], "data_offsets": [n * size, (n + 1) * size]}
        for n, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 70 * size)
    before, peak, found = psutil.Process().memory_info().rss, 0, []
    for key, _ in each_tensor(tmp_path / "large.safetensors"):
        found.append(key)
        peak = max(peak, psutil.Process().memory_info().rss)
    assert found == names and peak - before < 40e6
