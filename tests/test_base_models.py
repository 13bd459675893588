"""Base models found under every layout, in files, folders and shards; their weights and fingerprints."""

import json
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from safetensors.torch import save_file

from lofa_core.base_models import SDXL_SHAPES, WAN_KINDS, BaseWeights, describe
from lofa_core.key_names import layout_name, wan_to_original

WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, "ffn_dim": 13824}
WAN_I2V = WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def shapes_of(model_class, **config):
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in model_class(**config).state_dict().items()}


def tiny(seed=0, blocks=3, width=16):
    """State dict of a tiny WAN transformer with random weights, under original names."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        num_layers=blocks,
        ffn_dim=24,
        text_dim=8,
        freq_dim=8,
    )
    return {wan_to_original(key): tensor.detach() for key, tensor in model.state_dict().items()}


def in_diffusers_names(state):
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, ffn_dim=24, text_dim=8, freq_dim=8
    )
    return {key: state[wan_to_original(key)] for key in model.state_dict()}


@pytest.mark.parametrize(
    ("config", "name", "count", "width"),
    [
        (WAN_1_3B, "WAN2.1-T2V-1.3B", 240, 1536),
        (WAN_14B, "WAN2.1-T2V-14B", 320, 5120),
        (WAN_I2V, "WAN2.1-I2V-14B", 400, 5120),
    ],
)
def test_wan_at_full_size(config, name, count, width):
    shapes = shapes_of(WanTransformer3DModel, **config)
    base = describe(shapes)
    assert (base.name, len(base.layers)) == (name, count)
    assert base.summary() == f"{count} layers of {width}x{width}"
    original = describe({"model.diffusion_model." + wan_to_original(key): s for key, s in shapes.items()})
    assert [(x.name, x.shape) for x in original.layers] == [(x.name, x.shape) for x in base.layers]


def test_sdxl_at_full_size_under_diffusers_and_original_names():
    shapes = shapes_of(UNet2DConditionModel, **SDXL)
    base = describe(shapes)
    assert base.name == "SDXL" and len(base.layers) == 560
    assert Counter(layer.shape for layer in base.layers) == SDXL_SHAPES
    assert base.summary() == "560 layers: 60 of 640x640, 20 of 640x2048, 360 of 1280x1280, 120 of 1280x2048"
    # Every attention of the UNet is a target layer, at running depths.
    attention = [k for k in shapes if ".attn" in k and k.endswith("weight")]
    assert sorted(attention) == sorted(layer.key for layer in base.layers)
    assert [layer.depth for layer in base.layers] == [depth for depth in range(70) for _ in range(8)]
    assert rank_16_parameters(base) == 23_224_320

    checkpoint = {
        f"model.diffusion_model.{layout_name(layer.name, 'original')}.weight": layer.shape
        for layer in base.layers
    }
    found = describe(checkpoint | {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)})
    assert found.name == "SDXL" and [x.name for x in found.layers] == [x.name for x in base.layers]


def rank_16_parameters(base):
    return sum(16 * sum(layer.shape) for layer in base.layers)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "transformer."])
def test_target_layers_come_in_order_whatever_the_order_of_the_keys(prefix):
    state = tiny(blocks=12)
    base = describe({prefix + key: tuple(state[key].shape) for key in sorted(state, reverse=True)})
    assert base.name == "WAN2.1 miniature" and base.summary() == "96 layers of 16x16"
    assert [layer.name for layer in base.layers] == [
        f"blocks.{n}.{kind}" for n in range(12) for kind in WAN_KINDS
    ]
    first = base.layers[0]
    assert (first.depth, first.kind, first.shape) == (0, "self_attn.q", (16, 16))
    assert first.key == f"{prefix}blocks.0.self_attn.q.weight"


def test_other_sizes_are_named_by_their_size():
    wan = shapes_of(
        WanTransformer3DModel, num_attention_heads=4, attention_head_dim=128, num_layers=2, ffn_dim=64
    )
    assert describe(wan).name == "WAN2.1 (dim 512, 2 blocks)"
    narrow = {"block_out_channels": (32, 64, 128), "attention_head_dim": 4, "cross_attention_dim": 48}
    sdxl = shapes_of(UNet2DConditionModel, **SDXL | narrow)
    assert describe(sdxl).name == "SDXL (widths 64, 128)"


def test_what_is_no_base_model_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"No target layers .* \(it is empty\)"):
        describe({})
    with pytest.raises(ValueError, match=r"1 keys, the first is 'decoder.conv1.weight'.*not a VAE"):
        describe({"decoder.conv1.weight": (4, 4, 3, 3, 3)})
    lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 16)}
    with pytest.raises(ValueError, match="No target layers"):
        describe(lora)


def test_incomplete_mixed_and_foreign_networks_are_refused():
    shapes = {key: tuple(tensor.shape) for key, tensor in tiny().items()}
    part = {key: shape for key, shape in shapes.items() if "blocks.1.cross_attn" not in key}
    with pytest.raises(
        ValueError, match="4 of 24 target layers of WAN2.1 are missing, first blocks.1.cross_attn.q"
    ):
        describe(part)
    packed = shapes | {"blocks.2.self_attn.k.weight": (16, 8)}
    with pytest.raises(
        ValueError, match="blocks.2.self_attn.k.weight is 16x8, .* 16x16. If the file packs quantised"
    ):
        describe(packed)
    with pytest.raises(ValueError, match="blocks.0.self_attn.q is there twice"):
        describe(shapes | {"diffusion_model.blocks.0.self_attn.q.weight": (16, 16)})
    sdxl = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": (1280, 1280)}
    with pytest.raises(ValueError, match="Both WAN2.1 and SDXL"):
        describe(shapes | sdxl)
    with pytest.raises(ValueError, match="559 of 560 target layers of SDXL are missing"):
        describe(sdxl)
    with pytest.raises(
        ValueError, match="transformer_blocks.10.attn1.to_q.weight is a layer of a UNet, but SDXL has"
    ):
        describe({"mid_block.attentions.0.transformer_blocks.10.attn1.to_q.weight": (16, 16)})


def test_stable_diffusion_1_is_not_taken_for_sdxl():
    with pytest.raises(ValueError, match="target layers of SDXL are missing|SDXL has none there"):
        describe(shapes_of(UNet2DConditionModel))  # diffusers' default sizes are Stable Diffusion's


@pytest.fixture
def state():
    return tiny()


def check(base, state):
    assert base.model.name == "WAN2.1 miniature" and len(base.model.layers) == 24
    for layer in base.model.layers:
        assert torch.equal(base.read(layer), state[layer.name + ".weight"])


def test_open_a_file_in_each_layout(state, tmp_path):
    fingerprints = set()
    prefixed = {"model.diffusion_model." + key: tensor for key, tensor in state.items()}
    for n, layout in enumerate((state, prefixed, in_diffusers_names(state))):
        save_file(layout, tmp_path / f"{n}.safetensors")
        base = BaseWeights.open(tmp_path / f"{n}.safetensors")
        check(base, state)
        fingerprints.add(base.fingerprint())
    assert len(fingerprints) == 1
    assert BaseWeights.from_tensors(state).fingerprint() in fingerprints


@pytest.mark.parametrize("place", ["transformer", "."])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_open_a_folder_and_an_index(state, tmp_path, place, sharded):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    keys = list(state)
    if sharded:
        names = {key: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(keys)}
        for name in set(names.values()):
            save_file({key: state[key] for key in keys if names[key] == name}, folder / name)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        check(BaseWeights.open(index), state)
        with pytest.raises(ValueError, match="of 24 target layers of WAN2.1 are missing"):
            BaseWeights.open(folder / "model-00001-of-00002.safetensors")
    else:
        save_file(state, folder / "wan.safetensors")
    check(BaseWeights.open(str(tmp_path)), state)


def test_a_folder_may_hold_other_models_beside_the_base(state, tmp_path):
    save_file(state, tmp_path / "wan.safetensors")
    save_file({"decoder.conv1.weight": torch.zeros(2, 2)}, tmp_path / "a_vae.safetensors")
    check(BaseWeights.open(tmp_path), state)
    save_file(state, tmp_path / "wan_too.safetensors")
    with pytest.raises(
        ValueError, match="several base models: wan.safetensors, wan_too.safetensors. Give the file"
    ):
        BaseWeights.open(tmp_path)


def test_diffusers_own_folder_is_read(tmp_path):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, ffn_dim=24, text_dim=8, freq_dim=8
    )
    state = {wan_to_original(key): tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "transformer", max_shard_size="10KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    check(BaseWeights.open(tmp_path), state)


def test_files_that_cannot_be_read_are_named(state, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such file or folder"):
        BaseWeights.open(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="holds no base model: no .safetensors in it"):
        BaseWeights.open(tmp_path)
    bad = tmp_path / "bad.safetensors"
    save_file(state, bad)
    for content in (b"", b"<html>rate limited</html>", bad.read_bytes()[:-100]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.safetensors is not a whole safetensors file"):
            BaseWeights.open(bad)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="foreign.safetensors: No target layers"):
        BaseWeights.open(tmp_path / "foreign.safetensors")
    (tmp_path / "wan.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="wan.pth: a base model is a .safetensors file"):
        BaseWeights.open(tmp_path / "wan.pth")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match="index.json: not a safetensors index"):
        BaseWeights.open(index)


def test_missing_shards_are_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    with pytest.raises(
        FileNotFoundError, match="2 of its 2 files are missing: one.safetensors, two.safetensors"
    ):
        BaseWeights.open(index)


def test_from_shapes_and_a_reader(state):
    read = []

    def reader(key):
        read.append(key)
        return state[key]

    base = BaseWeights.from_tensors({key: tuple(tensor.shape) for key, tensor in state.items()}, reader)
    assert not read  # nothing is read before it is asked for
    check(base, state)
    assert base.fingerprint() == BaseWeights.from_tensors(state).fingerprint()


def test_fingerprint_survives_rounding_and_tells_models_apart(state):
    fingerprint = BaseWeights.from_tensors(state).fingerprint()
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        rounded = {key: tensor.to(dtype) for key, tensor in state.items()}
        assert BaseWeights.from_tensors(rounded).fingerprint() == fingerprint
    assert BaseWeights.from_tensors(tiny(seed=1)).fingerprint() != fingerprint
    tuned = dict(state)
    tuned["blocks.2.cross_attn.v.weight"] = state["blocks.2.cross_attn.v.weight"] + 0.02  # one layer of 24
    assert BaseWeights.from_tensors(tuned).fingerprint() != fingerprint


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_fp8_weights_are_read_at_their_true_size(state, suffix):
    key, scale = "blocks.0.self_attn.q.weight", torch.tensor(0.004)
    W = state[key]
    scaled = state | {key: (W / scale).to(torch.float8_e4m3fn), f"blocks.0.self_attn.q.{suffix}": scale}
    base = BaseWeights.from_tensors(scaled)
    assert torch.allclose(base.read(base.model.layers[0]), W, rtol=0.07, atol=1e-4)
    assert base.read(base.model.layers[1]).dtype == W.dtype
    # A reader that has undone the quantisation is believed.
    undone = BaseWeights.from_tensors(scaled, lambda wanted: W if wanted == key else scaled[wanted])
    assert torch.equal(undone.read(undone.model.layers[0]), W)


def test_weights_quantised_in_blocks_are_refused(state):
    key = "blocks.0.self_attn.q.weight"
    for weight, extra in (
        (torch.zeros(16, 16, dtype=torch.int8), {}),
        (
            torch.zeros(16, 16, dtype=torch.float8_e4m3fn),
            {"blocks.0.self_attn.q.weight_scale": torch.ones(16, 2)},
        ),
    ):
        base = BaseWeights.from_tensors(state | {key: weight} | extra)
        with pytest.raises(ValueError, match="blocks.0.self_attn.q.weight is quantised in blocks"):
            base.read(base.model.layers[0])
