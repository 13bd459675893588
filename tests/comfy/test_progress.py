"""What the page is told while a node predicts: a bar that moves, and the layer it is at."""

import pytest
from listening import listening
from test_nodes import predict_lora
from test_rerun import heatmap, large_file, with_file  # noqa: F401 (a fixture)

from lofa_core import miniature
from lofa_core.base_models import BaseWeights


def predicting(node: str, file: str) -> dict:
    """Node 4 is one of those that predict, with a hypernetwork that takes seconds."""
    prompt = with_file(file)
    text = prompt["3"]["inputs"]["text"]
    known = {name: prompt["4"]["inputs"][name] for name in ("hypernetwork", "model")}
    if node == "LoFAPredictResponse":
        prompt["4"] = {"class_type": node, "inputs": known | {"condition": ["3", 0]}}
        prompt["5"]["inputs"]["response"] = ["4", 0]
    elif node == "LoFAPersonalize":
        prompt["4"] = {
            "class_type": node,
            "inputs": known | {"text": text, "clip": ["1", 1], "strength": 1.0},
        }
        del prompt["3"]
    return prompt


@pytest.mark.parametrize("node", ["LoFAPredictLoRA", "LoFAPredictResponse", "LoFAPersonalize"])
def test_a_prediction_says_which_layers_it_is_at(server, large_file, node):  # noqa: F811
    names = {layer.name for layer in BaseWeights.open(miniature.FOLDER).model.layers}
    said, bar = [], []
    with listening(server.url) as listener:
        prompt_id = listener.queue(predicting(node, large_file.name))
        for kind, data in listener.messages():
            assert kind not in ("execution_error", "execution_success"), data.get("exception_message")
            if data.get("node") == "4" and kind == "progress_text":
                said.append(data["text"])
            elif data.get("node") == "4" and kind == "progress" and said:  # Personalize encodes before
                bar.append((data["value"], data["max"]))
            if len(said) >= 3 and len(bar) >= 3:
                break
        listener.post("/interrupt", {"prompt_id": prompt_id})
        assert listener.until_ended(prompt_id).ended == "interrupted"
    words = [text.split() for text in said]
    assert all(first == "Predicting" and layer in names for first, layer, *_ in words), said
    assert len({layer for _, layer, *_ in words}) == len(said)
    values = [value for value, _ in bar]
    assert values == sorted(set(values)) and {total for _, total in bar} == {len(names)}


def test_the_last_line_below_the_node_is_what_came_out(server):
    text = "a person swings the left leg slightly and slowly, slides left, upright, feet apart"
    with listening(server.url) as listener:
        listener.run(heatmap(predict_lora(text=text)))
        assert listener.texts["4"][-1].startswith("32 of 32 layers matched, predicted in")
