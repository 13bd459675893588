"""The workflows for WAN and SDXL, run to their end from the page on small models with random weights."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
from conftest import described
from page import SOON_MS
from safetensors import safe_open
from safetensors.torch import load_file
from small_videos import square, write_picture
from tiny import CONFIG, network

from lofa_core import miniature
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import save_hypernetwork
from lofa_core.descriptions import BaseDescription, ConditionDescription, LayerDescription

ROOT = Path(__file__).resolve().parents[2]
CLIP_WIDTH = 1024  # OpenAI's CLIP-ViT-L/14
SMALL = {
    "EmptyHunyuanLatentVideo": {"width": 64, "height": 64, "length": 5},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
    "SDPoseKeypointExtractor": {"batch_size": 1},
}
# A workflow, the target layers of its base model, and what the LoRA's file says of the condition.
CASES = [
    ("wan_text_action", 32, {}),
    ("wan_pose_action", 32, {"lofa_pose": "2 frames"}),
    ("wan_style", 32, {"lofa_style": "1 picture"}),
    ("sdxl_identity", 88, {"lofa_identity": "1 picture"}),
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(installation, server, page):
    """What they load, under the names in the workflows. The server's fixture has the rest."""
    models, inputs = server.data / "models", server.data / "input"
    installation.inspect(str(models), script="small_models.py")
    sdxl = load_file(models / "checkpoints/sd_xl_base_1.0.safetensors")
    unet = BaseWeights.from_tensors(
        {key: value for key, value in sdxl.items() if key.startswith("model.diffusion_model.")}
    ).model
    portrait = tuple(LayerDescription(x.name, x.depth, x.kind, x.shape) for x in unet.layers)
    clip = (miniature.FRAMES, miniature.SIZE, miniature.SIZE)
    for name, base, known in (
        ("wan_pose", described(), ConditionDescription("pose", 3, size=clip)),
        ("wan_style", described(), ConditionDescription("style", CLIP_WIDTH)),
        ("sdxl_identity", BaseDescription(unet.name, portrait), ConditionDescription("identity", CLIP_WIDTH)),
    ):
        made = network(1, replace(CONFIG, rank=4), base, conditions=(known,))
        save_hypernetwork(made, models / f"lofa/{name}.safetensors")
    write_picture(inputs / "style.png", square(frames=1)[0])
    write_picture(inputs / "face.png", square(frames=1, seed=1)[0])
    writer = cv2.VideoWriter(str(inputs / "dance.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 8.0, (96, 96))
    for frame in square(frames=2, step=30):
        writer.write(frame)
    writer.release()
    page.refresh()
    yield
    for name in ("wan_pose", "wan_style", "sdxl_identity"):
        (models / f"lofa/{name}.safetensors").unlink()


@pytest.mark.parametrize(("name", "layers", "said"), CASES)
def test_a_workflow_runs_to_its_end(server, page, files, name, layers, said):
    workflow = json.loads((ROOT / f"workflows/{name}.json").read_text(encoding="utf-8"))
    assert page.open(workflow)["in_error"] == []
    for kind, values in SMALL.items():
        for widget, value in values.items():
            page.set(kind, widget, value)
    outputs = page.run()
    page.tab.wait_for_timeout(SOON_MS // 20)
    page.screenshot(f"{name}_ran")
    by_kind = {node["type"]: outputs.get(str(node["id"])) for node in workflow["nodes"]}
    pictures = server.frames((by_kind.get("SaveVideo") or by_kind["SaveImage"])["images"][0])
    for picture in (pictures[0], pictures[-1]):
        left, right = picture.crop((0, 0, 64, 64)), picture.crop((picture.width - 64, 0, picture.width, 64))
        assert picture.width == 2 * 64 + 8
        assert len(left.getcolors(1 << 16)) > 50 and left.tobytes() != right.tobytes()
    with safe_open(server.data / by_kind["LoFASaveLoRA"]["text"][0], "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert len([key for key in keys if "lora_A" in key or "lora_down" in key]) == layers
    assert metadata.items() >= said.items() and json.loads(metadata["workflow"])
