"""What Response Heatmap tells the page: every layer's figures, and where their maps are."""

from PIL import Image
from test_nodes import predict_lora
from test_rerun import OTHER


def test_two_responses_are_compared_layer_by_layer(server):
    prompt = predict_lora()
    other = predict_lora(text=OTHER)["3"]
    for name, condition in (("6", "3"), ("7", "33")):
        inputs = {"hypernetwork": ["2", 0], "model": ["1", 0], "condition": [condition, 0]}
        prompt[name] = {"class_type": "LoFAPredictResponse", "inputs": inputs}
    inputs = {"response": ["6", 0], "second": ["7", 0], "cell": 32}
    prompt |= {"33": other, "8": {"class_type": "LoFAResponseHeatmap", "inputs": inputs}}
    del prompt["4"]
    shown = server.succeed(prompt)["8"]
    layers, (tiles,) = shown["lofa_layers"], shown["lofa_tiles"]
    assert len(layers) == 32 and layers[0]["name"] == "blocks.0.self_attn.q"
    assert all(0 < layer["share"] < 1 and 0.5 < layer["cosine"] < 1 for layer in layers)
    assert any(layer["share"] != layer["second_share"] for layer in layers)
    first, second = (Image.open(server.file(picture)) for picture in shown["lofa_pictures"])
    assert first.size == second.size and first.tobytes() != second.tobytes()
    assert first.width == tiles["columns"] * tiles["side"]


def test_the_page_loads_the_extension(server):
    assert "/extensions/lofa/response_heatmap.js" in server.json("/extensions")
