"""HM-CFG in the real ComfyUI: right where two separately loaded models say so, and gone afterwards."""

import pytest
from test_nodes import frames, predict_lora, sample

CLOSE = 1e-4  # of the largest value; the truth adds the LoRA to float32 weights, the bypass to activations
FAMILIES = ["wan", "sdxl"]


@pytest.fixture(scope="module")
def seen(installation):
    return installation.inspect(script="guidance_in_comfyui.py")


def far(found: dict) -> dict:
    """Distances that are not close, by family and sampler."""
    return {
        (family, name): distance
        for family, row in found.items()
        for name, distance in row.items()
        if not distance < CLOSE
    }


def test_core_samplers_give_what_two_models_give(seen):
    found = seen["samplers"]
    assert len(found["wan"]) == len(found["sdxl"]) == 5
    assert far(found) == {}


@pytest.mark.slow
def test_every_core_sampler_gives_what_two_models_give(installation):
    found = installation.inspect("every sampler", script="guidance_in_comfyui.py")["samplers"]
    assert len(found["wan"]) > 30 and len(found["sdxl"]) == 9
    assert far(found) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_special_cases_are_the_models_own_ways(seen, family):
    found = dict(seen["special_cases"][family])
    assert found.pop("least difference") > 100 * CLOSE
    assert found.pop("ksampler is the guider") is True
    assert {case: distance for case, distance in found.items() if not distance < CLOSE} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_cores_dual_model_guider_is_wrong_with_a_clone_and_ours_is_right(seen, family):
    found = seen["core_dual_model"][family]
    assert found["ours"] < CLOSE and found["core"] > 100 * CLOSE


@pytest.mark.parametrize("where", ["with", "without"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_of_an_interrupted_sampling(seen, family, where):
    found = seen["interrupted"][f"{family}, {where}"]
    assert found["raised"] and found["seen"] == found["layers"]
    assert found["left"] == 0 and found["same weights"] and found["plain"]
    assert found["again"] < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_one_model_feeds_several_branches(seen, family):
    found = dict(seen["two_branches"][family])
    assert found.pop("same weights") is True and found.pop("left") == 0
    assert found.pop("plain") == 0.0  # to the last bit as a model that never met HM-CFG
    assert {branch: distance for branch, distance in found.items() if not distance < CLOSE} == {}


def test_passes_that_change_nothing_are_not_computed(seen):
    assert seen["passes"] == {
        "(4.0, 2.5)": [2.0, 1.0],
        "(4.0, 4.0)": [1.0, 1.0],
        "(4.0, 0.0)": [2.0, 0.0],
        "(1.0, 2.0)": [1.0, 1.0],
        "(1.0, 1.0)": [0.0, 1.0],
        "(1.0, 0.0)": [1.0, 0.0],
    }


def test_other_nodes_hooks_go_on_working(seen):
    found = seen["other_nodes_hooks"]
    assert found["calls"] == 4 and found["negative seen"] > 0.0 and found["changed"] > 100 * CLOSE
    assert found["uuids"] == [2, 1, 0]


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        ("another base", "match no layer of this MODEL (first lora_unet_"),
        ("nothing", "0 of the LoRA's 0 tensors match"),
        ("one layer too many", "1 of the LoRA's 65 tensors match no layer"),
        ("wider", "is [96, 96] in this MODEL, and the LoRA changes a layer of [192, 192]"),
        ("dora", "ordinary LoRAs"),
        ("full difference", "ordinary LoRAs"),
        ("twice", "has HM-CFG already"),
        ("rescale", "replaces CFG (sampler_cfg_function)"),
        ("dual cfg", "Guider_DualCFG combines predictions in its own way"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_so(seen, attempt, said):
    assert said in seen["refusals"][attempt]


def with_guider(guider: list, prefix: str, start: int) -> dict:
    """As `sample`, by SamplerCustomAdvanced with this GUIDER."""
    noise, choice, steps = (str(start + offset) for offset in (6, 7, 8))
    prompt = sample(["1", 0], prefix, start)
    prompt[str(start + 3)] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": [noise, 0],
            "guider": guider,
            "sampler": [choice, 0],
            "sigmas": [steps, 0],
            "latent_image": [str(start + 2), 0],
        },
    }
    prompt[noise] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}}
    prompt[choice] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    prompt[steps] = {
        "class_type": "BasicScheduler",
        "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 3, "denoise": 1.0},
    }
    return prompt


def test_both_nodes_in_one_workflow_beside_a_plain_branch(server):
    own = {
        "model": ["1", 0], "lora": ["4", 0], "subject_weight": 3.0, "strength": 1.0, "base_start": 0.0,
        "base_end": 1.0, "subject_start": 0.0, "subject_end": 1.0,
    }  # fmt: skip
    prompt = predict_lora()
    prompt["5"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a person jumps up"}}
    prompt["6"] = {
        "class_type": "LoFAHMCFGGuider",
        "inputs": own | {"positive": ["21", 0], "negative": ["5", 0], "base_weight": 4.0},
    }
    prompt["7"] = {"class_type": "LoFAHMCFG", "inputs": own}
    for start, prefix, model in ((10, "plain", ["1", 0]), (30, "patched", ["7", 0])):
        prompt |= sample(model, prefix, start)
        prompt[str(start + 3)]["inputs"] |= {"cfg": 4.0, "negative": ["5", 0]}
    prompt |= with_guider(["6", 0], "guided", 20)
    outputs = server.succeed(prompt)
    plain, guided, patched = (frames(server, outputs, node) for node in ("15", "25", "35"))
    assert guided == patched and guided != plain

    alone = predict_lora() | {"5": prompt["5"]} | sample(["1", 0], "alone", 10)
    alone["13"]["inputs"] |= {"cfg": 4.0, "negative": ["5", 0]}
    assert frames(server, server.succeed(alone), "15") == plain
