"""Files and graphs of strangers in the real ComfyUI: an error on that node alone, nothing written elsewhere,
and the next prompt runs.
"""

import json
import urllib.error

import pytest
import torch
from injuries import RAN, code
from safetensors.torch import load_file, save_file
from test_names import REFUSED
from test_nodes import MINIATURE, predict_lora

from lofa_core.lora_files import save_lora


@pytest.fixture
def put(server):
    """Puts a file into one of ComfyUI's model folders until the test ends."""
    made = []

    def put(folder, name, content=b""):
        path = server.data / "models" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        made.append(path)
        return path

    yield put
    for path in made:
        path.unlink()


def saving(prefix="hostile/lora", **changed):
    """Nodes 1 to 5: a LoRA predicted and saved; `changed`: inputs of node 2, the hypernetwork's loader."""
    prompt = predict_lora()
    prompt["2"]["inputs"] |= changed
    inputs = {"lora": ["4", 0], "filename_prefix": prefix, "layout": "default"}
    return prompt | {"5": {"class_type": "LoFASaveLoRA", "inputs": inputs}}


def failed(server, prompt, node):
    """The one error of a workflow that fails at this node; after it the next workflow runs."""
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "error", "it did not fail"
    said = dict(entry["status"]["messages"])["execution_error"]
    assert said["node_id"] == node, said
    server.succeed(saving())
    return said["exception_message"].strip()


def is_one_error(message, *words):
    assert len(message) < 1000 and "\n" not in message and "Traceback" not in message, message
    assert all(word in message for word in words), message


# ------------------------------------------------------------
# Files


@pytest.mark.parametrize("how", ["empty", "noise", "cut", "header", "not_finite", "lora", "code"])
def test_a_bad_hypernetwork_is_an_error_on_its_loader(server, put, how):
    whole = (server.data / "models/lofa/all_kinds.safetensors").read_bytes()
    path = put("lofa", "bad.safetensors")
    if how == "not_finite":
        state = load_file(server.data / "models/lofa/all_kinds.safetensors")
        next(value for value in state.values() if value.is_floating_point()).fill_(float("nan"))
        metadata = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
        save_file(state, path, metadata)
    elif how == "lora":
        save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 4)}, path)
    else:
        put_there = {"empty": b"", "noise": b"\x9d\xff" * 5000, "cut": whole[:-1000], "code": code("1 / 0")}
        path.write_bytes(put_there.get(how, b"\xff" * 8 + whole[8:]))
    message = failed(server, saving(hypernetwork="bad.safetensors"), "2")
    is_one_error(message, "bad.safetensors")


@pytest.mark.parametrize("how", ["code", "noise", "cut"])
def test_a_bad_pth_is_an_error_on_its_loader_and_its_code_is_not_run(server, put, tmp_path, how):
    whole = (server.data / "models/lofa/stage1_preview.pth").read_bytes()
    ran = tmp_path / RAN
    content = {"code": code(f"open({str(ran)!r}, 'w')"), "noise": b"\x9d\xff" * 5000, "cut": whole[:-1000]}
    put("lofa", "bad.pth", content[how])
    for first, second in (("bad.pth", "stage2_preview.pth"), ("stage1_preview.pth", "bad.pth")):
        message = failed(server, saving(hypernetwork=first, stage2=second), "2")
        is_one_error(message, "bad.pth")
    assert not ran.exists()


def test_a_bad_lora_is_an_error_on_the_node_that_reads_it(server, put):
    from hostile_files import random_lora

    path = put("loras", "bad.safetensors", b"\x9d\xff" * 5000)

    def shown(lora_name):
        return {
            "1": {"class_type": "LoFALoadMiniature", "inputs": {}},
            "2": {
                "class_type": "LoFAResponseFromLoRA",
                "inputs": {"model": ["1", 0], "lora_name": lora_name, "threshold": 2.0},
            },
            "3": {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["2", 0], "cell": 32}},
        }

    is_one_error(
        failed(server, shown("bad.safetensors"), "2"), "bad.safetensors", "not a whole safetensors file"
    )
    sdxl = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    save_lora(random_lora({sdxl: (4, 4)}), path)
    is_one_error(failed(server, shown("bad.safetensors"), "2"), "bad.safetensors", "Choose a LoRA made for")


def test_a_bad_base_is_an_error_on_one_node(server, put):
    """Core's loader says what it says of a file that is cut short; one with NaN in it, core loads."""
    whole = MINIATURE.read_bytes()
    path = put("diffusion_models", "bad.safetensors", whole[: len(whole) // 2])
    prompt = saving()
    unet = {"unet_name": "bad.safetensors", "weight_dtype": "default"}
    prompt["6"] = {"class_type": "UNETLoader", "inputs": unet}
    prompt["4"]["inputs"]["model"] = ["6", 0]
    failed(server, prompt, "6")
    state = load_file(MINIATURE)
    state["blocks.1.self_attn.k.weight"][3, 4] = float("nan")
    metadata = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    save_file(state, path, metadata)
    is_one_error(failed(server, prompt, "4"), "blocks.1.self_attn.k", "not finite")


# ------------------------------------------------------------
# Names


def files_outside_the_output(server):
    return {
        path for path in server.data.parent.rglob("*")
        if not path.is_relative_to(server.data / "output") and "custom_nodes" not in path.parts
        and path.name != "server.log" and "__pycache__" not in path.parts
    }  # fmt: skip


def test_a_prefix_that_leads_elsewhere_is_refused_and_nothing_is_written(server, tmp_path):
    (server.data / "output").mkdir(exist_ok=True)
    link = server.data / "output/elsewhere"
    link.symlink_to(tmp_path, target_is_directory=True)
    before, output = files_outside_the_output(server), set((server.data / "output").rglob("*"))
    try:
        # One prompt for all: LoRAs are predicted once, and every node that saves fails or not for itself.
        for prefix in (*REFUSED, str(tmp_path / "x"), "elsewhere/x"):
            if "\ud800" in prefix:
                continue  # JSON has no half a character that a server would take
            entry = server.run(saving(prefix))
            said = dict(entry["status"]["messages"])["execution_error"]
            assert said["node_id"] == "5", prefix
            assert prefix.startswith("elsewhere") or "filename_prefix" in said["exception_message"]
    finally:
        link.unlink()
    assert set((server.data / "output").rglob("*")) == output - {link}
    assert files_outside_the_output(server) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "prefix", ["%year%/x", "loras\\x", "\uff0e\uff0e\uff0fx", "\u732b/\u7d75", "~/x", "$HOME/x"]
)
def test_a_strange_prefix_that_is_accepted_stays_below_the_output_folder(server, prefix):
    before = files_outside_the_output(server)
    known = set((server.data / "output").rglob("*.safetensors"))
    server.succeed(saving(prefix))
    assert len(set((server.data / "output").rglob("*.safetensors")) - known) == 1
    assert files_outside_the_output(server) == before


def computed(value):
    """A text that ComfyUI gives to any input: it does not look at what a switch passes on."""
    return {
        "8": {"class_type": "PrimitiveString", "inputs": {"value": value}},
        "9": {
            "class_type": "ComfySwitchNode",
            "inputs": {"switch": True, "on_true": ["8", 0], "on_false": ["8", 0]},
        },
    }


@pytest.mark.parametrize("how", ["written", "computed"])
def test_a_file_that_is_not_offered_is_not_read(server, tmp_path, how):
    secret = server.data / "secret.safetensors"
    secret.write_bytes((server.data / "models/lofa/all_kinds.safetensors").read_bytes())
    lora = server.data / "models/loras/x.safetensors"
    names = (
        *(str(secret), "../../secret.safetensors", "x/../../../secret.safetensors", "/etc/passwd"),
        *("..\\..\\secret.safetensors", "secret.safetensors\0", "", "x" * 5000),
    )
    assert not lora.exists()
    for name in names:
        for node, field in (("2", "hypernetwork"), ("2", "stage2")):
            prompt = saving()
            prompt[node]["inputs"] |= {"hypernetwork": "stage1_preview.pth"} if field == "stage2" else {}
            prompt[node]["inputs"][field] = name
            if how == "computed":
                prompt |= computed(name)
                prompt[node]["inputs"][field] = ["9", 0]
                message = dict(server.run(prompt)["status"]["messages"])["execution_error"]
                assert (
                    message["node_id"] == node
                    and "is not a file in models/lofa" in message["exception_message"]
                )
            else:
                with pytest.raises(urllib.error.HTTPError) as error:
                    server.post("/prompt", {"prompt": prompt})
                assert error.value.code == 400 and b"value_not_in_list" in error.value.read()
    secret.unlink()
    server.succeed(saving())
