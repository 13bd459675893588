"""Blend LoRAs and Response from LoRA in the real ComfyUI."""

import numpy as np
from test_nodes import frames, predict_lora, sample

OTHER = "a person swings the right leg widely and slowly, slides left, upright, feet apart"


def two_loras() -> dict:
    """Nodes 4 and 34: LoRAs for two sentences."""
    prompt = predict_lora()
    second = predict_lora(text=OTHER)
    second["4"]["inputs"]["condition"] = ["33", 0]
    return prompt | {"33": second["3"], "34": second["4"]}


def blend(first: list, second: list, weights: tuple[float, float], rank: int = 0) -> dict:
    inputs = {"first": first, "second": second, "first_weight": weights[0], "second_weight": weights[1]}
    return {"class_type": "LoFABlendLoRAs", "inputs": inputs | {"rank": rank}}


def applied(lora: list) -> dict:
    return {
        "class_type": "LoraModelLoader",
        "inputs": {"model": ["1", 0], "lora": lora, "strength_model": 1.0, "bypass": False},
    }


def difference(first: list[bytes], second: list[bytes]) -> int:
    """The largest between two clips, of 255."""
    one, other = (np.frombuffer(b"".join(clip), np.uint8).astype(int) for clip in (first, second))
    return int(np.abs(one - other).max())


def test_a_blend_weighs_both_and_takes_one_back(server):
    prompt = two_loras() | {
        "40": blend(["4", 0], ["34", 0], (0.0, 1.0)),
        "41": applied(["40", 0]),
        "42": blend(["4", 0], ["4", 0], (1.0, -1.0)),
        "43": applied(["42", 0]),
        "44": blend(["4", 0], ["34", 0], (1.0, 1.0), rank=2),
        "45": {"class_type": "LoFASaveLoRA", "inputs": {"lora": ["44", 0], "filename_prefix": "loras/blend",
               "layout": "default"}},
        **sample(["34", 1], "second", 50), **sample(["41", 0], "blend", 60),
        **sample(["1", 0], "base", 70), **sample(["43", 0], "nothing", 80),
    }  # fmt: skip
    outputs = server.succeed(prompt)
    second, blended, base, nothing = (frames(server, outputs, node) for node in ("55", "65", "75", "85"))
    assert difference(second, blended) <= 2 and difference(base, nothing) <= 2  # their sums round otherwise
    assert difference(second, base) > 20


def test_a_saved_lora_s_maps_are_shown_without_a_hypernetwork(server):
    save = {"class_type": "LoFASaveLoRA", "inputs": {"lora": ["4", 0], "filename_prefix": "loras/own"}}
    save["inputs"]["layout"] = "default"
    server.succeed(predict_lora() | {"5": save})
    names = server.json("/object_info/LoFAResponseFromLoRA")
    files = names["LoFAResponseFromLoRA"]["input"]["required"]["lora_name"]
    (file,) = [name for name in str(files).split("'") if "own_" in name]
    prompt = {
        "1": {"class_type": "LoFALoadMiniature", "inputs": {}},
        "2": {
            "class_type": "LoFAResponseFromLoRA",
            "inputs": {"model": ["1", 0], "lora_name": file, "threshold": 2.0},
        },
        "3": {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["2", 0], "cell": 32}},
    }
    outputs = server.succeed(prompt)
    assert outputs["3"]["images"]
