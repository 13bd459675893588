"""A disk that is really full below Save LoRA in the real ComfyUI."""

import pytest
from safetensors.torch import load_file
from small_disk import disk, fill
from test_nodes import predict_lora
from test_rerun import OTHER


def saved(text: str) -> dict:
    """Predict and save, and show the maps: the heatmap writes to another disk."""
    prompt = predict_lora(text=text)
    save = {"lora": ["4", 0], "filename_prefix": "small_disk/lora", "layout": "default"}
    prompt["5"] = {"class_type": "LoFASaveLoRA", "inputs": save}
    prompt["6"] = {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["4", 2], "cell": 32}}
    return prompt


@pytest.mark.parametrize("free", [0, 40_960])
def test_the_old_file_stays_and_only_the_node_fails(server, free):
    place = server.data / "output/small_disk"
    place.parent.mkdir(exist_ok=True)
    try:
        with disk(place, 2**22):
            first = server.succeed(saved(predict_lora()["3"]["inputs"]["text"]))
            (shown,) = first["5"]["text"]
            before = {file.name: file.read_bytes() for file in place.iterdir()}
            assert list(before) == [shown.rpartition("/")[2]]
            ballast = fill(place, free)
            entry = server.run(saved(OTHER))
            messages = dict(entry["status"]["messages"])
            assert entry["status"]["status_str"] == "error"
            assert messages["execution_error"]["node_id"] == "5"
            said = server.error(entry)
            assert "No space left on device" in said and "small_disk/lora_00002_.safetensors" in said
            assert {file.name: file.read_bytes() for file in place.iterdir() if file != ballast} == before
            ballast.unlink()
            (shown,) = server.succeed(saved(OTHER))["5"]["text"]  # ComfyUI still runs, and so does the node
            assert len(load_file(server.data / shown)) == 2 * 32 and len(list(place.iterdir())) == 2
    finally:
        place.rmdir()
