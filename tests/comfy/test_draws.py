"""A LoRA Diffusion in the real ComfyUI: the hypernetwork's nodes take it, and its seed draws."""

import pytest
from test_nodes import frames, predict_lora, sample


def drawn(seed: int | None) -> dict:
    """As `predict_lora`, with the LoRA Diffusion of conftest.py and a seed; None: the input left out."""
    prompt = predict_lora()
    prompt["2"]["inputs"]["hypernetwork"] = "lora_diffusion.safetensors"
    if seed is not None:
        prompt["4"]["inputs"]["seed"] = seed
    return prompt


def test_a_seed_draws_the_same_clip_again_and_another_seed_another(server):
    clips = []
    for seed in (None, 0, 2**64 - 1):
        outputs = server.succeed(drawn(seed) | sample(["4", 1], f"drawn_{seed}", 30))
        clips.append(frames(server, outputs, "35"))
    assert clips[0] == clips[1] != clips[2]


def test_personalize_draws_what_predict_lora_draws(server):
    prompt = drawn(3)
    inputs = {"hypernetwork": ["2", 0], "model": ["1", 0], "clip": ["1", 1], "strength": 1.0, "seed": 3}
    inputs["text"] = prompt["3"]["inputs"]["text"]
    prompt["5"] = {"class_type": "LoFAPersonalize", "inputs": inputs}
    outputs = server.succeed(prompt | sample(["5", 1], "one", 30) | sample(["4", 1], "many", 40))
    assert frames(server, outputs, "35") == frames(server, outputs, "45")


@pytest.mark.parametrize("source", ["4", "6"])
def test_that_there_are_no_response_maps_is_said(server, source):
    prompt = drawn(0)
    inputs = {name: prompt["4"]["inputs"][name] for name in ("hypernetwork", "model", "condition")}
    prompt["6"] = {"class_type": "LoFAPredictResponse", "inputs": inputs}
    slot = [source, 2 if source == "4" else 0]
    prompt["7"] = {"class_type": "LoFAResponseHeatmap", "inputs": {"response": slot, "cell": 16}}
    left_out = "6" if source == "4" else "4"
    said = server.fail({name: node for name, node in prompt.items() if name != left_out})
    assert "LoRA Diffusion" in said and "Response from LoRA" in said
