"""Pose and style in the running ComfyUI: from keypoints and pictures to a LoRA, with an untrained network."""

import json
from pathlib import Path

import pytest
from PIL import Image
from test_nodes import FINE

ROOT = Path(__file__).resolve().parents[2]

KINDS = "all_kinds.safetensors"


def start(hypernetwork: str = KINDS) -> dict:
    """API form: miniature (1), hypernetwork (2), an example pose and picture (3), the picture seen (4)."""
    return {
        "1": {"class_type": "LoFALoadMiniature", "inputs": {}},
        "2": {"class_type": "LoFALoadHypernetwork", "inputs": {"hypernetwork": hypernetwork}},
        "3": {
            "class_type": "LoFAMiniatureExample",
            "inputs": {
                "pose": "left_leg-wide-fast-down-right-apart",
                "style": "red-blue-meadow",
            },
        },
        "4": {
            "class_type": "CLIPVisionEncode",
            "inputs": {"clip_vision": ["1", 3], "image": ["3", 1], "crop": "center"},
        },
    }


POSE = {"class_type": "LoFAEncodePose", "inputs": {"hypernetwork": ["2", 0], "keypoints": ["3", 0]}}
STYLE = {
    "class_type": "LoFAEncodeStyle",
    "inputs": {"hypernetwork": ["2", 0], "clip_vision_output": ["4", 0]},
}
TEXT = {"class_type": "LoFAEncodeText", "inputs": {"hypernetwork": ["2", 0], "clip": ["1", 1], "text": FINE}}


def combined(first: str, second: str, first_strength=1.0, second_strength=1.0) -> dict:
    return {
        "class_type": "LoFACombineConditions",
        "inputs": {
            "first": [first, 0],
            "second": [second, 0],
            "first_strength": first_strength,
            "second_strength": second_strength,
        },
    }


def seen(condition: str, number: int) -> dict:
    """API form: the response map of a condition, its picture saved by node `number` + 1."""
    return {
        str(number): {
            "class_type": "LoFAPredictResponse",
            "inputs": {"hypernetwork": ["2", 0], "model": ["1", 0], "condition": [condition, 0]},
        },
        str(number + 2): {
            "class_type": "LoFAResponseHeatmap",
            "inputs": {"response": [str(number), 0], "cell": 32},
        },
        str(number + 1): {
            "class_type": "SaveImage",
            "inputs": {"images": [str(number + 2), 0], "filename_prefix": "response"},
        },
    }


def picture(server, outputs: dict, node: int) -> bytes:
    return Image.open(server.file(outputs[str(node)]["images"][0])).convert("RGB").tobytes()


def test_pose_and_style_make_loras_and_the_network_s_view_is_shown(server):
    prompt = start() | {"5": POSE, "6": STYLE} | seen("5", 20) | seen("6", 30)
    for node, condition in (("7", "5"), ("8", "6")):
        prompt[node] = {
            "class_type": "LoFAPredictLoRA",
            "inputs": {
                "hypernetwork": ["2", 0],
                "model": ["1", 0],
                "condition": [condition, 0],
                "strength": 1.0,
            },
        }
    prompt["9"] = {"class_type": "SaveImage", "inputs": {"images": ["5", 1], "filename_prefix": "pose"}}
    for node, source in (("10", "7"), ("11", "8")):
        prompt[node] = {
            "class_type": "LoFASaveLoRA",
            "inputs": {"lora": [source, 0], "filename_prefix": f"loras/{node}", "layout": "default"},
        }
    outputs = server.succeed(prompt)
    frames = [Image.open(server.file(shown)) for shown in outputs["9"]["images"]]
    assert len(frames) == 17 and frames[0].size == (64, 64)
    colours = frames[8].convert("RGB").getcolors(1 << 16)
    assert any(colour == (0, 0, 0) for _, colour in colours) and len(colours) > 20  # limbs on black
    assert frames[0].tobytes() != frames[8].tobytes()
    assert picture(server, outputs, 21) != picture(server, outputs, 31)
    saved = [(server.data / outputs[node]["text"][0]).read_bytes() for node in ("10", "11")]
    assert saved[0] != saved[1] and b"lofa_pose" in saved[0] and b"lofa_style" in saved[1]


def test_drawn_skeletons_do_as_well_as_keypoints(server):
    prompt = start() | {"5": POSE} | seen("5", 20)
    prompt["6"] = {
        "class_type": "LoFAEncodePose",
        "inputs": {"hypernetwork": ["2", 0], "skeletons": ["5", 1]},
    }
    outputs = server.succeed(prompt | seen("6", 30))
    assert picture(server, outputs, 21) == picture(server, outputs, 31)


def test_conditions_combine_and_a_strength_of_zero_is_as_if_left_out(server):
    prompt = start() | {"5": TEXT, "6": STYLE, "7": combined("5", "6"), "8": combined("5", "6", 1.0, 0.0)}
    prompt |= {"9": combined("6", "5", 1.0, 0.5)}
    for condition, number in (("5", 20), ("7", 30), ("8", 40), ("9", 50)):
        prompt |= seen(condition, number)
    outputs = server.succeed(prompt)
    text, both, silenced, halved = (picture(server, outputs, number) for number in (21, 31, 41, 51))
    assert text == silenced
    assert len({text, both, halved}) == 3


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            {"5": {"class_type": "LoFAEncodePose", "inputs": {"hypernetwork": ["2", 0]}}},
            "either keypoints or",
        ),
        ({"5": STYLE, "6": STYLE, "7": combined("5", "6")}, "Both conditions hold style"),
    ],
)
def test_what_does_not_go_together_is_an_error_that_helps(server, nodes, said):
    assert said in server.fail(start() | nodes | seen(max(nodes), 20))


def test_a_network_says_which_kind_it_does_not_know(server):
    face = STYLE | {"class_type": "LoFAEncodeIdentity"}
    said = server.fail(start("miniature") | {"5": face} | seen("5", 20))
    assert "conditioned on text and pose and style, not on identity" in said


def full_size_workflow(server, name: str) -> dict:
    """A shipped WAN2.1 workflow with the miniature's parts for what a test machine lacks."""
    workflow = json.loads((ROOT / f"workflows/{name}.json").read_text(encoding="utf-8"))
    prompt = server.api_form(workflow)
    by_class = {node["class_type"]: number for number, node in prompt.items()}
    prompt["100"] = {"class_type": "LoFALoadMiniature", "inputs": {}}
    prompt["101"] = start()["3"]
    for node in prompt.values():
        inputs = node["inputs"]
        match node["class_type"]:
            case "CLIPTextEncode":
                inputs |= {"clip": ["100", 1], "text": "a person jumps up"}
            case "KSampler":
                inputs["steps"] = 2
            case "LoFALoadHypernetwork":
                inputs["hypernetwork"] = KINDS
            case "LoFAEncodePose":
                inputs["keypoints"] = ["101", 0]
            case "CLIPVisionEncode":
                inputs |= {"clip_vision": ["100", 3], "image": ["101", 1]}
            case "EmptyHunyuanLatentVideo":
                inputs |= {"width": 64, "height": 64, "length": 17}
            case "SaveVideo":
                saved = {"images": [by_class["ImageStitch"], 0], "filename_prefix": name}
                node |= {"class_type": "SaveImage", "inputs": saved}
    absent = {"CLIPLoader", "CreateVideo", "LoadVideo", "GetVideoComponents", "CheckpointLoaderSimple"}
    absent |= {"SDPoseKeypointExtractor", "LoadImage", "CLIPVisionLoader"}
    return {number: node for number, node in prompt.items() if node["class_type"] not in absent}


@pytest.mark.parametrize("name", ["wan_pose_action", "wan_style"])
def test_the_wan_workflows_for_pose_and_style_run_to_the_end(server, name):
    prompt = full_size_workflow(server, name)
    outputs = server.succeed(prompt)
    (saved,) = (n for n, node in prompt.items() if node["class_type"] == "SaveImage")
    shown = Image.open(server.file(outputs[saved]["images"][8]))
    left, right = shown.crop((0, 0, 64, 64)), shown.crop((shown.width - 64, 0, shown.width, 64))
    assert left.tobytes() != right.tobytes()


@pytest.mark.parametrize("name", ["wan_pose_action", "wan_style", "sdxl_identity"])
def test_every_link_of_a_workflow_joins_sockets_of_one_type(server, name):
    workflow = json.loads((ROOT / f"workflows/{name}.json").read_text(encoding="utf-8"))
    nodes, info = {node["id"]: node for node in workflow["nodes"]}, server.json("/object_info")
    prompt = server.api_form(workflow)  # fails where a node or a widget is unknown
    assert len(prompt) == len(nodes) - 1  # the note stays in the page
    for _, source, slot, target, place, kind in workflow["links"]:
        assert info[nodes[source]["type"]]["output"][slot] == kind
        assert nodes[target]["inputs"][place]["type"] == kind
