"""LoFA Personalize in the real ComfyUI: the same as the nodes it stands for, and errors that help."""

import pytest
from test_nodes import FINE, frames, predict_lora, sample
from test_rerun import OTHER

from lofa_core import miniature

EXAMPLE = {
    "class_type": "LoFAMiniatureExample",
    "inputs": {"pose": miniature.example_names("pose")[0], "style": miniature.example_names("style")[0]},
}


def start(text: str = "", clip: bool = True, **more: list) -> dict:
    """Nodes 1 and 2 as in `predict_lora`, an example (node 20, 21), and Personalize (node 5)."""
    inputs = {"hypernetwork": ["2", 0], "model": ["1", 0], "text": text, "strength": 1.0, **more}
    if clip:
        inputs["clip"] = ["1", 1]
    known = predict_lora()
    look = {"clip_vision": ["1", 3], "image": ["20", 1], "crop": "center"}
    return {
        "1": known["1"], "2": known["2"], "5": {"class_type": "LoFAPersonalize", "inputs": inputs},
        "20": EXAMPLE, "21": {"class_type": "CLIPVisionEncode", "inputs": look},
    }  # fmt: skip


def test_a_text_gives_what_encode_and_predict_give(server):
    prompt = start(FINE) | predict_lora() | sample(["5", 1], "one", 30) | sample(["4", 1], "many", 40)
    outputs = server.succeed(prompt)
    assert frames(server, outputs, "35") == frames(server, outputs, "45")


def test_text_pose_and_picture_together_give_what_the_single_nodes_give(server):
    both = {"first_strength": 1.0, "second_strength": 1.0}
    prompt = start(FINE, keypoints=["20", 0], clip_vision_output=["21", 0]) | predict_lora()
    prompt |= {
        "6": {"class_type": "LoFAEncodePose", "inputs": {"hypernetwork": ["2", 0], "keypoints": ["20", 0]}},
        "7": {
            "class_type": "LoFAEncodeStyle",
            "inputs": {"hypernetwork": ["2", 0], "clip_vision_output": ["21", 0]},
        },
        "8": {
            "class_type": "LoFACombineConditions",
            "inputs": both | {"first": ["3", 0], "second": ["6", 0]},
        },
        "9": {
            "class_type": "LoFACombineConditions",
            "inputs": both | {"first": ["8", 0], "second": ["7", 0]},
        },
    }
    prompt["4"]["inputs"]["condition"] = ["9", 0]
    outputs = server.succeed(prompt | sample(["5", 1], "one", 30) | sample(["4", 1], "many", 40))
    assert frames(server, outputs, "35") == frames(server, outputs, "45")


def test_a_network_of_text_alone_gives_what_encode_and_predict_give(server):
    """As LoFA_v0 is: such a network takes no strength."""
    files = {"hypernetwork": "stage1_preview.pth", "stage2": "stage2_preview.pth"}
    prompt = start(FINE) | predict_lora() | sample(["5", 1], "one", 30) | sample(["4", 1], "many", 40)
    prompt["2"]["inputs"] = files
    outputs = server.succeed(prompt)
    assert frames(server, outputs, "35") == frames(server, outputs, "45")


def test_another_strength_applies_the_lora_that_was_predicted(server):
    """Two nodes of one hypernetwork, each with a LoRA of its own."""

    def said(strength: float, text: str, seed: int = 0) -> list[str]:
        prompt = start(FINE, keypoints=["20", 0])
        prompt["6"] = start(text, clip_vision_output=["21", 0])["5"]
        for node in ("5", "6"):
            prompt[node]["inputs"] |= {"strength": strength, "seed": seed}
            inputs = {"response": [node, 2], "cell": 32}
            prompt[f"1{node}"] = {"class_type": "LoFAResponseHeatmap", "inputs": inputs}
        log = server.data / "server.log"
        before = len(log.read_text())
        server.succeed(prompt)
        lines = log.read_text()[before:].splitlines()
        return sorted(line.partition("matched, ")[2][:13] for line in lines if "layers matched" in line)

    again, anew = "as predicted ", "predicted in "
    assert said(1.0, FINE) == [anew, anew]
    assert said(0.5, FINE) == [again, again]
    assert said(0.25, OTHER) == [again, anew]
    assert said(0.25, OTHER, seed=1) == [anew, anew]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (start(FINE, clip=False), "a text but no CLIP to read it"),
        (start("  "), "Nothing is asked for"),
        (start("a person rides a bicycle"), "bicycle"),
    ],
)
def test_what_is_missing_is_said(server, prompt, said):
    assert said in server.fail(prompt | sample(["5", 1], "one", 30))
