"""What the nodes do with ComfyUI's own Python objects, checked inside ComfyUI's Python."""

import pytest
from safetensors.torch import load_file

PROMPT = "a person in a green shirt and white trousers in the snow swings the right leg slightly and slowly"


def test_base_weights_are_read_without_the_lora_on_them(installation):
    seen = installation.check("unpatched_weights")
    assert seen["layers"] == 32 and seen["name"] == "WAN2.1 miniature"
    assert seen["patched_by"] > 0.01  # the LoRA really was in memory
    assert seen["largest_difference"] == 0.0
    assert seen["same_fingerprint"]


def test_base_weights_are_read_without_a_hook_on_them(installation):
    seen = installation.check("hooked_weights")
    assert seen == {"name": "blocks.0.self_attn.q", "difference": 0.0}


def test_text_encoder_agrees_with_transformers(installation, tmp_path):
    pytest.importorskip("transformers")
    from lofa_core import miniature
    from lofa_core.conditions.text import TextEncoder

    out = tmp_path / "tokens.safetensors"
    assert installation.check("text_encoding", PROMPT, out)["shape"] == [1, 512, 64]
    ours = load_file(out)["tokens"]
    reference = TextEncoder.open(miniature.FOLDER).encode(PROMPT).float()
    length = reference.shape[1]
    assert (ours[:, :length] - reference).abs().max() < 1e-4 * reference.abs().max()
    assert (ours[:, length:] == 0).all()


def test_lora_that_matches_nothing_is_an_error(installation):
    assert "0 of the LoRA's 1 layers" in installation.check("lora_that_does_not_match")["error"]


def test_text_encoder_of_another_width_is_refused(installation):
    error = installation.check("wrong_text_encoder")["error"]
    assert "768" in error and "64" in error and "WAN2.1 miniature" in error
