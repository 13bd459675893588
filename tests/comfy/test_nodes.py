"""Our nodes as the running ComfyUI sees them, and how they get on with core's nodes."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
FINE = (
    "a person in a red shirt and blue trousers on a beach swings the left arm widely and quickly, "
    "moves to the right, leaning left, feet together"
)
NODE_IDS = {
    "LoFALoadHypernetwork",
    "LoFALoadMiniature",
    "LoFAMiniatureExample",
    "LoFAEncodePose",
    "LoFAEncodeStyle",
    "LoFAEncodeIdentity",
    "LoFACombineConditions",
    "LoFAEncodeText",
    "LoFATextCondition",
    "LoFAPredictResponse",
    "LoFAPredictLoRA",
    "LoFAPersonalize",
    "LoFASaveLoRA",
    "LoFABlendLoRAs",
    "LoFAResponseFromLoRA",
    "LoFAHMCFGGuider",
    "LoFAHMCFG",
    "LoFAResponseHeatmap",
}
WORKFLOWS = {path.stem for path in (ROOT / "workflows").glob("*.json")}
MINIATURE = ROOT / "lofa_core/miniature/transformer/wan_miniature.safetensors"


def predict_lora(strength: float = 1.0, text: str = FINE) -> dict:
    """API form of the common start: the miniature (node 1), and a LoRA predicted for it (node 4)."""
    return {
        "1": {"class_type": "LoFALoadMiniature", "inputs": {}},
        "2": {"class_type": "LoFALoadHypernetwork", "inputs": {"hypernetwork": "miniature"}},
        "3": {
            "class_type": "LoFAEncodeText",
            "inputs": {"hypernetwork": ["2", 0], "clip": ["1", 1], "text": text},
        },
        "4": {
            "class_type": "LoFAPredictLoRA",
            "inputs": {
                "hypernetwork": ["2", 0],
                "model": ["1", 0],
                "condition": ["3", 0],
                "strength": strength,
            },
        },
    }


def sample(model: list, prefix: str, start: int, clip=("1", 1), vae=("1", 2)) -> dict:
    """API form of sampling three steps with a model; node `start + 5` saves the frames as `prefix`."""
    encode, latent, sampler, decode, save = (str(start + offset) for offset in range(1, 6))
    return {
        encode: {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": list(clip), "text": "a person is moving"},
        },
        latent: {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 17, "batch_size": 1},
        },
        sampler: {
            "class_type": "KSampler",
            "inputs": {
                "model": model,
                "positive": [encode, 0],
                "negative": [encode, 0],
                "latent_image": [latent, 0],
                "seed": 7,
                "steps": 3,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        decode: {"class_type": "VAEDecode", "inputs": {"samples": [sampler, 0], "vae": list(vae)}},
        save: {
            "class_type": "SaveImage",
            "inputs": {"images": [decode, 0], "filename_prefix": prefix},
        },
    }


def frames(server, outputs: dict, node: str) -> list[bytes]:
    """Pixels of the pictures that a node saved."""
    opened = [Image.open(server.file(shown)) for shown in outputs[node]["images"]]
    assert [picture.size for picture in opened] == [(64, 64)] * 17
    return [picture.tobytes() for picture in opened]


def test_every_node_is_registered_and_explains_itself(server):
    nodes = server.json("/object_info")
    assert {name for name in nodes if name.startswith("LoFA")} == NODE_IDS
    for name in NODE_IDS:
        node = nodes[name]
        assert node["category"] == "LoFA" and node["description"] and node["search_aliases"]
        assert node["display_name"].endswith("(LoFA)") or name == "LoFAPersonalize"
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert all(options["tooltip"] for _, options in inputs.values()), name
        assert all(node["output_tooltips"]), name


def test_help_pages_translations_and_templates_are_served(server):
    for name in NODE_IDS:
        assert server.get(f"/extensions/lofa/docs/{name}.md").startswith(b"# ")
    assert set(server.json("/i18n")["en"]["nodeDefs"]) >= NODE_IDS
    assert set(server.json("/workflow_templates")["lofa"]) == WORKFLOWS


def test_english_locale_repeats_the_schema(server):
    nodes = server.json("/object_info")
    locale = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert set(locale) == NODE_IDS
    for name, entry in locale.items():
        node = nodes[name]
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert entry["display_name"] == node["display_name"]
        assert entry["description"] == node["description"]
        assert {key: value["tooltip"] for key, value in entry.get("inputs", {}).items()} == {
            key: options["tooltip"] for key, (_, options) in inputs.items()
        }
        assert [(value["name"], value["tooltip"]) for value in entry.get("outputs", {}).values()] == list(
            zip(node["output_name"], node["output_tooltips"], strict=True)
        )


def test_shipped_workflow_runs_and_shows_a_difference(server):
    workflow = json.loads((ROOT / "workflows/miniature_text_to_video.json").read_text(encoding="utf-8"))
    prompt = server.api_form(workflow)
    by_class = {node["class_type"]: name for name, node in prompt.items()}
    outputs = server.succeed(prompt)

    clip = server.frames(outputs[by_class["SaveVideo"]]["images"][0])
    assert [frame.size for frame in clip] == [(2 * 512 + 16, 512)] * 17
    base = clip[8].crop((0, 0, 512, 512))
    personalised = clip[8].crop((512 + 16, 0, 2 * 512 + 16, 512))
    assert base.tobytes() != personalised.tobytes()

    heatmap = Image.open(server.file(outputs[by_class["LoFAResponseHeatmap"]]["images"][0]))
    assert len(heatmap.convert("RGB").getcolors(maxcolors=1 << 24)) > 50

    shown = outputs[by_class["LoFASaveLoRA"]]["text"][0]
    with safe_open(server.data / shown, "pt") as file:
        keys = list(file.keys())
        metadata = file.metadata()
    assert len(keys) == 2 * 32
    assert all(key.startswith("diffusion_model.blocks.") for key in keys)
    assert json.loads(metadata["prompt"]) and metadata["lofa_prompt"]


def test_predicted_lora_works_in_every_core_loader(server):
    prompt = predict_lora()
    prompt["5"] = {
        "class_type": "LoraModelLoader",
        "inputs": {"model": ["1", 0], "lora": ["4", 0], "strength_model": 1.0, "bypass": False},
    }
    prompt["6"] = {"class_type": "SaveLoRA", "inputs": {"lora": ["4", 0], "prefix": "loras/core"}}
    prompt["7"] = {
        "class_type": "LoFASaveLoRA",
        "inputs": {"lora": ["4", 0], "filename_prefix": "loras/ours", "layout": "default"},
    }
    prompt |= sample(["1", 0], "base", 10)
    prompt |= sample(["4", 1], "ours", 20)
    prompt |= sample(["5", 0], "core", 30)
    outputs = server.succeed(prompt)
    base, ours, core = (frames(server, outputs, node) for node in ("15", "25", "35"))
    assert ours == core
    assert ours != base

    mine = load_file(server.data / outputs["7"]["text"][0])
    theirs = load_file(next((server.data / "output/loras").glob("core_*.safetensors")))
    assert mine.keys() == theirs.keys() and len(mine) == 64
    assert all((mine[key] == theirs[key]).all() for key in mine)

    file = outputs["7"]["text"][0].removeprefix("output/loras/")
    reloaded = {
        "1": {"class_type": "LoFALoadMiniature", "inputs": {}},
        "2": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["1", 0], "lora_name": file, "strength_model": 1.0},
        },
        **sample(["2", 0], "file", 10),
    }
    assert frames(server, server.succeed(reloaded), "15") == ours


def test_strength_zero_leaves_the_model_as_it_is(server):
    prompt = predict_lora(strength=0.0) | sample(["1", 0], "base", 10) | sample(["4", 1], "zero", 20)
    outputs = server.succeed(prompt)
    assert frames(server, outputs, "15") == frames(server, outputs, "25")


def test_core_loaders_take_the_miniature_as_wan(server):
    prompt = {
        "1": {"class_type": "LoFALoadMiniature", "inputs": {}},
        "2": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": MINIATURE.name, "weight_dtype": "default"},
        },
        "3": {"class_type": "VAELoader", "inputs": {"vae_name": "wan_miniature_vae.safetensors"}},
        **sample(["1", 0], "embedded", 10),
        **sample(["2", 0], "core_loaders", 20, vae=("3", 0)),
    }
    outputs = server.succeed(prompt)
    assert frames(server, outputs, "15") == frames(server, outputs, "25")


def test_response_node_gives_the_same_maps_as_the_lora_node(server):
    prompt = predict_lora()
    prompt["5"] = {
        "class_type": "LoFAPredictResponse",
        "inputs": {"hypernetwork": ["2", 0], "model": ["1", 0], "condition": ["3", 0]},
    }
    for name, source in (("6", ["4", 2]), ("7", ["5", 0])):
        prompt[name] = {"class_type": "LoFAResponseHeatmap", "inputs": {"response": source, "cell": 32}}
    outputs = server.succeed(prompt)
    first, second = (Image.open(server.file(outputs[name]["images"][0])) for name in ("6", "7"))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("text", ["a person rides a bicycle through the rain", "   "])
def test_bad_prompt_is_an_error_that_helps(server, text):
    prompt = predict_lora(text=text)
    prompt["5"] = {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["4", 2], "cell": 32}}
    assert ("bicycle" if text.strip() else "empty") in server.fail(prompt)


def test_model_of_another_base_is_refused(server):
    with safe_open(MINIATURE, "pt") as file:
        metadata = file.metadata()
        kept = [key for key in file.keys() if not key.startswith(("blocks.2.", "blocks.3."))]
        half = {key: file.get_tensor(key) for key in kept}
    save_file(half, server.data / "models/diffusion_models/half.safetensors", metadata=metadata)
    prompt = predict_lora()
    prompt["5"] = {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "half.safetensors", "weight_dtype": "default"},
    }
    prompt["4"]["inputs"]["model"] = ["5", 0]
    prompt["6"] = {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["4", 2], "cell": 32}}
    error = server.fail(prompt)
    assert "32 layers" in error and "16 layers" in error


def test_hypernetwork_file_in_models_lofa_is_offered(server):
    folder = server.data / "models/lofa"
    embedded = ROOT / "lofa_core/miniature/lofa_miniature.safetensors"
    (folder / "mine.safetensors").symlink_to(embedded)
    (folder / "notes.txt").write_text("not a hypernetwork")
    inputs = server.json("/object_info/LoFALoadHypernetwork")["LoFALoadHypernetwork"]["input"]
    offered = [
        kind if isinstance(kind, list) else options["options"]
        for kind, options in (inputs["required"]["hypernetwork"], inputs["optional"]["stage2"])
    ]
    pair = ["stage1_preview.pth", "stage2_preview.pth"]
    assert offered == [
        ["miniature", "all_kinds.safetensors", "lora_diffusion.safetensors", "mine.safetensors", *pair],
        ["none", *pair],
    ]
    prompt = predict_lora()
    prompt["2"]["inputs"]["hypernetwork"] = "mine.safetensors"
    prompt["5"] = {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["4", 2], "cell": 32}}
    server.succeed(prompt)


def test_saved_picture_of_the_heatmap_is_a_grid(server):
    prompt = predict_lora()
    prompt["5"] = {"class_type": "LoFAResponseHeatmap", "inputs": {"response": ["4", 2], "cell": 48}}
    outputs = server.succeed(prompt)
    shown = outputs["5"]["images"][0]
    served = server.get(
        f"/view?filename={shown['filename']}&type={shown['type']}&subfolder={shown['subfolder']}"
    )
    picture = Image.open(io.BytesIO(served))
    assert picture.width > 8 * 48 and picture.height > 4 * 48
