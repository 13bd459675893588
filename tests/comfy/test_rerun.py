"""What runs again in the real ComfyUI, what is taken from its cache, and what a cancelled run leaves."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from clock import Clock
from listening import listening
from PIL import Image
from test_nodes import predict_lora, sample
from tiny import CONFIG, network

from lofa_core import miniature
from lofa_core.checkpoint import describe_hypernetwork, save_hypernetwork

OTHER = "a person swings the right leg widely and slowly, slides left, upright, feet apart"
LOADERS = {"1", "2"}


@pytest.fixture
def listener(server):
    with listening(server.url) as listener:
        yield listener


@pytest.fixture
def own_file(server):
    file = server.data / "models/lofa/own.safetensors"
    shutil.copy(miniature.HYPERNETWORK, file)
    yield file
    file.unlink()


def heatmap(prompt: dict) -> dict:
    return prompt | {"5": {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["4", 2], "cell": 32}}}


def with_file(name: str) -> dict:
    prompt = heatmap(predict_lora())
    prompt["2"]["inputs"]["hypernetwork"] = name
    return prompt


def test_nothing_runs_again_where_nothing_changed(listener):
    prompt = heatmap(predict_lora()) | sample(["4", 1], "again", 10)
    assert listener.run(prompt).ended == "success"
    again = listener.run(prompt)
    assert (again.ran, again.cached, again.ended) == ([], set(prompt), "success")


def test_another_strength_applies_the_lora_that_was_predicted_and_another_seed_does_not(server):
    own = "a person swings the left leg widely and quickly, slides left, leaning left, feet apart"

    def said(strength, seed=0, text=own):
        prompt = heatmap(predict_lora(text=text)) | sample(["4", 1], "strength", 10)
        prompt["4"]["inputs"] |= {"strength": strength, "seed": seed}
        log = server.data / "server.log"
        before = len(log.read_text())
        outputs = server.succeed(prompt)
        shown = Image.open(server.file(outputs["15"]["images"][0])).convert("RGB").tobytes()
        return log.read_text()[before:], shown

    whole, half, none = said(1.0), said(0.5), said(0.0)
    assert "32 of 32 layers matched, predicted in" in whole[0]
    for log, _ in (half, none):
        assert "32 of 32 layers matched, as predicted before" in log and "predicted in" not in log
    assert len({shown for _, shown in (whole, half, none)}) == 3
    assert "predicted in" in said(0.5, seed=1)[0] and "as predicted before" in said(0.25, seed=1)[0]
    assert "predicted in" in said(0.25, seed=1, text=OTHER)[0]


def test_a_changed_sentence_runs_what_depends_on_it(listener):
    listener.run(heatmap(predict_lora()) | sample(["1", 0], "base", 10) | sample(["4", 1], "own", 20))
    changed = listener.run(
        heatmap(predict_lora(text=OTHER)) | sample(["1", 0], "base", 10) | sample(["4", 1], "own", 20)
    )
    assert set(changed.ran) == {"3", "4", "5", "23", "24", "25"}
    assert changed.cached >= LOADERS


def test_another_prompt_or_seed_of_the_sampler_predicts_nothing(listener):
    prompt = predict_lora() | sample(["4", 1], "own", 10)
    listener.run(prompt)
    prompt["11"]["inputs"]["text"] = "a person"
    assert set(listener.run(prompt).ran) == {"11", "13", "14", "15"}
    prompt["13"]["inputs"]["seed"] = 8
    assert set(listener.run(prompt).ran) == {"13", "14", "15"}


def test_a_touched_hypernetwork_file_runs_nothing_again(listener, own_file):
    prompt = with_file(own_file.name)
    assert "2" in listener.run(prompt).ran
    os.utime(own_file, (1, 1))
    assert listener.run(prompt).ran == []
    copy = own_file.with_suffix(".copy")  # another file of the same content in its place
    shutil.copy(own_file, copy)
    copy.replace(own_file)
    assert listener.run(prompt).ran == []


@pytest.mark.parametrize("in_place", [True, False])
def test_another_file_of_equal_size_and_time_runs_what_depends_on_it(listener, own_file, in_place):
    prompt = with_file(own_file.name)
    listener.run(prompt)
    before = own_file.stat()
    content = bytearray(own_file.read_bytes())
    content[-1] ^= 1
    target = own_file if in_place else own_file.with_suffix(".copy")
    target.write_bytes(content)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    if not in_place:
        target.replace(own_file)
    after = own_file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    changed = listener.run(prompt)
    assert set(changed.ran) == {"2", "3", "4", "5"} and changed.cached == {"1"}


def test_a_touched_lora_file_runs_nothing_again(listener, server):
    save = {"class_type": "LoFASaveLoRA", "inputs": {"lora": ["4", 0], "filename_prefix": "loras/touched"}}
    save["inputs"]["layout"] = "default"
    (shown,) = listener.run(predict_lora() | {"5": save}).outputs["5"]["text"]
    prompt = {
        "1": {"class_type": "LoFALoadMiniature", "inputs": {}},
        "2": {
            "class_type": "LoFAResponseFromLoRA",
            "inputs": {"model": ["1", 0], "lora_name": shown.removeprefix("output/loras/"), "threshold": 2.0},
        },
        "3": {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["2", 0], "cell": 32}},
    }
    assert "2" in listener.run(prompt).ran
    os.utime(server.data / shown, (1, 1))
    assert listener.run(prompt).ran == []


@pytest.fixture
def large_file(server):
    """A hypernetwork that takes many seconds: 12 blocks a stage over 256 patches of each layer."""
    file = server.data / "models/lofa/large.safetensors"
    config = replace(CONFIG, rank=4, grid=(16, 16), width=256, heads=4, blocks=12, mlp_ratio=4)
    known = describe_hypernetwork(miniature.HYPERNETWORK)
    text = (known.conditions["text"],)
    save_hypernetwork(network(1, config, known.base, conditions=text), file, dtype=torch.bfloat16)
    yield file
    file.unlink()


def test_cancelling_a_prediction_stops_within_a_second_and_the_next_workflow_runs(
    server, listener, large_file
):
    prompt_id = listener.queue(with_file(large_file.name))
    for kind, data in listener.messages():
        assert kind not in ("execution_error", "execution_success"), data
        if kind == "progress" and data["node"] == "4" and data["value"] > 0:
            break
    assert data["value"] < data["max"]
    cancelled = Clock(server.pid)
    listener.post("/interrupt", {})
    assert listener.until_ended(prompt_id).ended == "interrupted"
    assert cancelled.seconds() < 1.0
    after = listener.run(heatmap(predict_lora()))
    assert after.ended == "success" and after.outputs["5"]["images"]
