"""What the nodes do with ComfyUI's own Python objects, seen from inside ComfyUI's Python."""

import pytest
from safetensors.torch import load_file

PROMPT = "a person in a green shirt and white trousers in the snow swings the right leg slightly and slowly"


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    return tmp_path_factory.mktemp("encoding") / "tokens.safetensors"


@pytest.fixture(scope="module")
def seen(installation, encoding):
    return installation.inspect(PROMPT, encoding)


def test_base_weights_are_read_without_the_lora_on_them(seen):
    weights = seen["unpatched_weights"]
    assert weights["layers"] == 32 and weights["name"] == "WAN2.1 miniature"
    assert weights["patched_by"] > 0.01  # the LoRA really was in memory
    assert weights["largest_difference"] == 0.0
    assert weights["same_fingerprint"]


@pytest.mark.parametrize(
    ("state", "called"),
    [
        ("torch.float16", ""),
        ("torch.bfloat16", ""),
        ("torch.float8_e4m3fn", "float8_e4m3fn"),
        ("scaled fp8", "FP8E4M3"),
        ("scaled fp8, loaded with a LoRA", "FP8E4M3"),
        ("scaled fp8, unloaded again", "FP8E4M3"),
    ],
)
def test_base_weights_are_the_files_whatever_state_the_model_is_in(seen, state, called):
    found = seen["states_of_the_model"][state]
    assert found["difference"] < 1e-6
    assert found["called"] == called


def test_text_condition_takes_one_prompt_of_the_right_encoder(seen):
    found = seen["text_conditions"]
    assert found["difference"] == 0.0
    assert "2 prompts" in found["two"]
    assert "768" in found["wide"] and "64" in found["wide"] and "CONDITIONING" in found["wide"]


@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
def test_pictures_are_encoded_as_comfyui_encodes_them(seen, shape):
    found = seen["picture_conditions"][shape]
    assert found["shape"] == [1, 65, 64]
    assert found["difference"] < 1e-3 * found["size"]


def test_a_lora_for_sdxl_reaches_all_560_layers_of_comfyuis_sdxl(seen):
    found = seen["sdxl_lora"]
    assert (found["name"], found["layers"], found["patched"]) == ("SDXL", 560, 560)
    assert found["keys"].startswith("lora_unet_down_blocks_1_")


def test_a_lora_is_predicted_for_comfyuis_sdxl(seen):
    found = seen["sdxl_prediction"]
    assert found["said"].startswith("88 of 88 layers matched, predicted in") and found["in_order"]
    assert (found["patched"], found["tensors"]) == (88, 3 * 88)
    assert found["first said"].startswith("Predicting down_blocks.1.attentions.0.transformer_blocks.0.attn1.")


def test_base_weights_are_read_without_a_hook_on_them(seen):
    assert seen["hooked_weights"] == {"name": "blocks.0.self_attn.q", "difference": 0.0}


def test_text_encoder_agrees_with_transformers(seen, encoding):
    pytest.importorskip("transformers")
    from lofa_core import miniature
    from lofa_core.conditions.text import TextEncoder

    assert seen["text_encoding"]["shape"] == [1, 512, 64]
    ours = load_file(encoding)["tokens"]
    reference = TextEncoder.open(miniature.FOLDER).encode(PROMPT).float()
    length = reference.shape[1]
    assert (ours[:, :length] - reference).abs().max() < 1e-4 * reference.abs().max()
    assert (ours[:, length:] == 0).all()


def test_lora_that_matches_nothing_is_an_error(seen):
    assert "0 of the LoRA's 1 layers" in seen["lora_that_does_not_match"]["error"]


def test_text_encoder_of_another_width_is_refused(seen):
    error = seen["wrong_text_encoder"]["error"]
    assert "768" in error and "64" in error and "WAN2.1 miniature" in error
