"""Hypernetwork and base model are placed by ComfyUI's model management: loaded, offloaded, unloaded, and the
result stays the same.
"""

import pytest
from listening import listening
from test_nodes import predict_lora

STATES = ["NORMAL_VRAM", "LOW_VRAM", "NO_VRAM", "HIGH_VRAM"]


@pytest.fixture(scope="module")
def seen(installation):
    return installation.inspect(script="placement_in_comfyui.py")


@pytest.mark.parametrize("state", STATES)
def test_on_a_simulated_card_all_is_loaded_and_unloaded_by_comfyui(seen, state):
    found = seen["every_way"][state]
    assert "Hypernetwork" in found["predicted"] and "WAN21" not in found["predicted"]  # read where it is
    assert {"Hypernetwork", "WAN21"} <= set(found["sampled"])
    assert not {"Hypernetwork", "WAN21"} & set(found["unloaded"])
    assert all(found[what] for what in ("lora", "latent", "again", "latent again"))


def test_where_memory_is_short_one_makes_room_for_the_other(seen):
    found = seen["short_of_memory"]
    assert found["sampled"]["WAN21"] > 0.9 * found["model"] and "Hypernetwork" not in found["sampled"]
    assert found["predicted"]["Hypernetwork"] == found["network"]
    assert found["predicted"].get("WAN21", 0) < found["sampled"]["WAN21"]
    assert "Hypernetwork" not in found["freed"]
    assert found["lora"] and found["latent"] and found["again"]


def test_nothing_holds_a_hypernetwork_that_no_node_gives_any_more(seen):
    assert seen["forgotten"] == {"network": True, "model": True, "loaded": []}


def test_a_node_in_a_loop_is_not_remembered_for_ever(seen):
    assert seen["looped"] == 4


def digests(listener) -> tuple[list[str], list[str]]:
    """(hashes of the LoRA and of the response maps, what was said below the node)."""
    prompt = predict_lora()
    for node, slot in (("8", 0), ("9", 2)):
        prompt[node] = {"class_type": "TestDigest", "inputs": {"value": ["4", slot]}}
    listener.texts.clear()
    run = listener.run(prompt)
    assert run.ended == "success"
    return [run.outputs[node]["text"][0] for node in ("8", "9")], listener.texts.get("4", [])


def test_after_unloading_and_freeing_the_next_prompt_gives_the_same_bytes(server):
    with listening(server.url) as listener:
        wanted, _ = digests(listener)
        listener.post("/free", {"unload_models": True})
        assert digests(listener)[0] == wanted
        server.forget()
        again, said = digests(listener)
        assert again == wanted and "predicted in" in said[-1]
