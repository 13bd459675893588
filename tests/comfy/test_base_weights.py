"""The base model in the real ComfyUI is bit for bit what it was, whatever was done with a LoRA on it."""

import time
from collections.abc import Callable

import pytest
from listening import listening
from test_hm_cfg import with_guider
from test_nodes import frames, predict_lora, sample

STEPS = 40  # of what is interrupted or fails: seconds


def weights(after: list | None = None) -> dict:
    """A node that tells the hash of the weights of node 1 and how many layers have a bypass."""
    inputs = {"value": ["1", 0]} | ({"after": after} if after else {})
    return {"90": {"class_type": "TestDigest", "inputs": inputs}}


def hybrid(strength: float = 1.0, base_weight: float = 4.0) -> dict:
    """`predict_lora`, and node 6, a guider with the predicted LoRA, its prompts those of `sample` at 20."""
    own = {"subject_weight": 3.0, "base_start": 0.0, "base_end": 1.0, "subject_start": 0.0}
    inputs = own | {"subject_end": 1.0, "model": ["1", 0], "lora": ["4", 0], "strength": strength}
    inputs |= {"positive": ["21", 0], "negative": ["5", 0], "base_weight": base_weight}
    encode = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a person jumps up"}}
    return predict_lora() | {"5": encode, "6": {"class_type": "LoFAHMCFGGuider", "inputs": inputs}}


def patched(steps: int = 3) -> dict:
    """Sampling with the LoRA in the weights."""
    prompt = predict_lora() | sample(["4", 1], "patched", 20)
    prompt["23"]["inputs"]["steps"] = steps
    return prompt


def bypassed(steps: int = 3) -> dict:
    """Sampling with the LoRA hooked in for some passes."""
    prompt = hybrid() | with_guider(["6", 0], "bypassed", 20)
    prompt["28"]["inputs"]["steps"] = steps
    return prompt


WAYS = [patched, bypassed]


@pytest.fixture
def base(server):
    """Compares the base model with what it was when the test began, weights and pictures."""

    def look() -> tuple:
        outputs = server.succeed(predict_lora() | weights(["15", 0]) | sample(["1", 0], "base", 10))
        return outputs["90"]["text"], frames(server, outputs, "15")

    def unloaded() -> None:
        server.post("/free", {"unload_models": True})
        time.sleep(1.0)  # ComfyUI does it when its worker wakes up

    unloaded()
    before = look()
    assert before[0][1] == "0"

    def same() -> bool:
        again = look()  # by ComfyUI's own change from one clone to another
        unloaded()
        return again == look() == before

    return before, same


def changed(server, way: Callable[[], dict]) -> tuple:
    """Samples; what the weights are right after it, and the picture."""
    outputs = server.succeed(way() | weights(["24", 0]))
    return outputs["90"]["text"], frames(server, outputs, "25")


def test_after_sampling_with_the_lora_in_the_weights(server, base):
    before, same = base
    found = changed(server, patched)
    assert found[0] != before[0] and found[1] != before[1]  # the LoRA really was in memory
    assert same() and changed(server, patched) == found


def test_after_sampling_with_the_lora_hooked_in(server, base):
    before, same = base
    found = changed(server, bypassed)
    assert found[0] == before[0] and found[1] != before[1]
    assert same() and changed(server, bypassed) == found


@pytest.mark.parametrize("way", WAYS)
def test_after_an_interrupt_in_the_middle(server, base, way):
    _, same = base
    undisturbed = changed(server, way)
    with listening(server.url) as listener:
        prompt_id = listener.queue(way(STEPS) | weights(["24", 0]))
        for kind, data in listener.messages():
            assert kind not in ("execution_error", "execution_success"), data
            if kind == "progress" and data["node"] == "23" and data["value"] >= 2:
                break
        assert data["value"] < data["max"]
        listener.post("/interrupt", {})
        run = listener.until_ended(prompt_id)
        assert (run.ended, run.ended_at) == ("interrupted", "23")
    assert same() and changed(server, way) == undisturbed


@pytest.mark.parametrize(("way", "number"), [(patched, 3), (bypassed, 3), (bypassed, 4)])
def test_after_an_error_in_the_middle(server, base, way, number):
    """Of two passes one after the other, HM-CFG has the LoRA hooked in during one."""
    _, same = base
    undisturbed = changed(server, way)
    prompt = way(STEPS)
    sampler, model = ("23", ["4", 1]) if way is patched else ("6", ["1", 0])
    prompt["91"] = {"class_type": "TestFailInPass", "inputs": {"model": model, "number": number}}
    prompt[sampler]["inputs"]["model"] = ["91", 0]
    assert "fails on purpose" in server.fail(prompt)
    assert same() and changed(server, way) == undisturbed


def test_strength_0_of_the_guider_gives_the_bases_picture(server):
    prompt = hybrid(strength=0.0) | with_guider(["6", 0], "nothing", 20) | sample(["1", 0], "base", 10)
    prompt["13"]["inputs"] |= {"cfg": 4.0, "negative": ["5", 0]}
    outputs = server.succeed(prompt)
    assert frames(server, outputs, "25") == frames(server, outputs, "15")
