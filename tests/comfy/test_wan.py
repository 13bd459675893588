"""LoFA_v0 in the running ComfyUI: the shipped WAN2.1 workflow, its two files, quantised base weights."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from test_nodes import MINIATURE, predict_lora

ROOT = Path(__file__).resolve().parents[2]


def wan_workflow(server) -> dict:
    """The shipped WAN2.1 workflow with what a test machine lacks replaced: UMT5-XXL, and hours."""
    workflow = json.loads((ROOT / "workflows/wan_text_action.json").read_text(encoding="utf-8"))
    prompt = server.api_form(workflow)
    by_class = {node["class_type"]: name for name, node in prompt.items()}
    prompt[by_class["CLIPLoader"]] = {"class_type": "LoFALoadMiniature", "inputs": {}}
    for node in prompt.values():
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"] |= {"clip": [by_class["CLIPLoader"], 1], "text": "a person jumps up"}
        elif node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    prompt[by_class["EmptyHunyuanLatentVideo"]]["inputs"] |= {"width": 64, "height": 64, "length": 17}
    del prompt[by_class["CreateVideo"]]
    prompt[by_class["SaveVideo"]] = {
        "class_type": "SaveImage",
        "inputs": {"images": [by_class["ImageStitch"], 0], "filename_prefix": "wan"},
    }
    return prompt


def test_the_wan_workflow_predicts_with_lofa_v0s_two_files(server):
    prompt = wan_workflow(server)
    by_class = {node["class_type"]: name for name, node in prompt.items()}
    samplers = [node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler"]
    assert [inputs["cfg"] for inputs in samplers] == [5.0, 5.0]
    assert samplers[0]["seed"] == samplers[1]["seed"] and samplers[0]["model"] != samplers[1]["model"]
    assert prompt[by_class["ModelSamplingSD3"]]["inputs"]["shift"] == 5.0
    outputs = server.succeed(prompt)
    picture = Image.open(server.file(outputs[by_class["SaveImage"]]["images"][8]))
    left, right = picture.crop((0, 0, 64, 64)), picture.crop((picture.width - 64, 0, picture.width, 64))
    assert left.tobytes() != right.tobytes()
    with safe_open(server.data / outputs[by_class["LoFASaveLoRA"]]["text"][0], "pt") as file:
        assert len(list(file.keys())) == 2 * 32 and "lofa_prompt" not in file.metadata()


def test_the_wan_workflow_is_as_published_and_offers_its_downloads():
    workflow = json.loads((ROOT / "workflows/wan_text_action.json").read_text(encoding="utf-8"))
    nodes = {node["type"]: node for node in workflow["nodes"]}
    assert nodes["EmptyHunyuanLatentVideo"]["widgets_values"] == [832, 480, 81, 1]
    assert nodes["KSampler"]["widgets_values"][2:4] == [50, 5]
    offered = 0
    for kind, folder in {
        "UNETLoader": "diffusion_models", "CLIPLoader": "text_encoders", "VAELoader": "vae",
        "LoFALoadHypernetwork": "lofa",
    }.items():  # fmt: skip
        for model in nodes[kind]["properties"]["models"]:
            assert model["name"] in nodes[kind]["widgets_values"] and model["directory"] == folder
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(model["name"])
            offered += 1
    assert offered == 5
    (note,) = nodes["MarkdownNote"]["widgets_values"]
    assert "models/lofa" in note and "MotionX" in note


@pytest.mark.parametrize(
    ("hypernetwork", "stage2", "said"),
    [
        ("stage1_preview.pth", "none", "Choose stage2_preview.pth as stage2"),
        ("stage2_preview.pth", "stage1_preview.pth", "other way round"),
        ("miniature", "stage2_preview.pth", "set stage2 to none"),
    ],
)
def test_half_a_pair_or_one_too_many_is_an_error_that_helps(server, hypernetwork, stage2, said):
    prompt = predict_lora()
    prompt["2"]["inputs"] = {"hypernetwork": hypernetwork, "stage2": stage2}
    prompt["5"] = {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["4", 2], "cell": 32}}
    assert said in server.fail(prompt)


def test_quantised_weights_are_dequantised_and_a_line_says_so(server):
    prompt = predict_lora()
    prompt["5"] = {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": MINIATURE.name, "weight_dtype": "fp8_e4m3fn"},
    }
    prompt["4"]["inputs"]["model"] = ["5", 0]
    prompt["6"] = {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["4", 2], "cell": 32}}
    server.succeed(prompt)
    log = (server.data / "server.log").read_text()
    assert "the model's weights are float8_e4m3fn and were dequantised for it" in log
