"""Two hundred prompts in a row in one real ComfyUI: its memory does not grow."""

import itertools
import os
import random
import sys

import pytest
from listening import listening
from test_nodes import predict_lora, sample
from test_personalize import start

from lofa_core import miniature
from lofa_core.checkpoint import describe_hypernetwork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

PROMPTS, WARM_UP, GROWTH = 200, 20, 50 * 2**20


def memory(pid: int) -> int:
    """Bytes of a process that are in memory."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sentences(count: int) -> list[str]:
    """Different ones, of the words that the miniature knows."""
    parts = (
        ["swings the left arm", "swings the right arm", "swings the left leg", "swings the right leg"],
        ["widely", "slightly"],
        ["quickly", "slowly"],
        ["moves to the right", "slides left", "goes to the right", "remains in place"],
        ["leaning left", "leaning right", "upright"],
        ["feet together", "feet apart"],
    )
    known = set(describe_hypernetwork(miniature.HYPERNETWORK).conditions["text"].words)
    every = [
        f"a person {limb} {size} and {speed}, {way}, {lean}, {feet}"
        for limb, size, speed, way, lean, feet in itertools.product(*parts)
    ]
    fit = [text for text in every if set(text.replace(",", "").split()) <= known]
    random.Random(0).shuffle(fit)
    assert len(fit) >= count
    return fit[:count]


def workflow(text: str, number: int) -> dict:
    """Both ways to predict, all that is made of it, and sampling with and without HM-CFG."""
    prompt = predict_lora(text=text) | {"5": start(text)["5"]}
    blend = {"first": ["4", 0], "second": ["5", 0], "first_weight": 1.0, "second_weight": 0.5, "rank": 4}
    save = {"lora": ["6", 0], "filename_prefix": "loras/many", "layout": "default"}
    hybrid = {
        "model": ["1", 0], "lora": ["5", 0], "subject_weight": 3.0, "strength": 1.0, "base_start": 0.0,
        "base_end": 1.0, "subject_start": 0.0, "subject_end": 1.0,
    }  # fmt: skip
    prompt |= {
        "6": {"class_type": "LoFABlendLoRAs", "inputs": blend},
        "7": {"class_type": "LoFASaveLoRA", "inputs": save},
        "8": {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["4", 2], "cell": 32}},
        "9": {"class_type": "LoFAHMCFG", "inputs": hybrid},
        **sample(["4", 1], "many", 10),
        **sample(["9", 0], "hybrid", 20),
    }
    for sampler in ("13", "23"):
        prompt[sampler]["inputs"]["seed"] = number
    prompt["23"]["inputs"]["cfg"] = 4.0
    return prompt


def test_memory_does_not_grow(comfyui, tmp_path, record_property):
    curve = []
    with comfyui(tmp_path) as server, listening(server.url) as listener:
        for number, text in enumerate(sentences(PROMPTS)):
            run = listener.run(workflow(text, number))
            assert run.ended == "success" and {"3", "4", "5", "6", "7", "8", "13", "23"} <= set(run.ran)
            curve.append(memory(server.pid))
    shown = {number + 1: round(curve[number] / 2**20) for number in range(WARM_UP - 1, PROMPTS, 20)}
    record_property("MB after so many prompts", shown)
    # The lowest of ten, since a collection of garbage comes when it comes.
    growth = min(curve[-10:]) - min(curve[WARM_UP - 10 : WARM_UP])
    assert growth < GROWTH, shown
