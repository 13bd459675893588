"""The pack in ComfyUI's page: every workflow by file and as a template, help pages, and what a run shows."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_nodes import NODE_IDS

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "workflows").glob("*.json"))
}
MINIATURE = [name for name in WORKFLOWS if name.startswith("miniature_")]
HEATMAP = "LoFAResponseHeatmap"
FOLDERS = {
    "CheckpointLoaderSimple": "models/checkpoints", "CLIPLoader": "models/text_encoders",
    "CLIPVisionLoader": "models/clip_vision", "LoFALoadHypernetwork": "models/lofa", "LoadImage": "input",
    "LoadVideo": "input",
}  # fmt: skip


def slow_but(*kept: str, names=WORKFLOWS) -> list:
    """Names as parameters; all but a few only in the slow tests."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def named_files(server, page):
    """What the workflows for WAN and SDXL load by name, empty: the page only asks whether it is there."""
    made = []
    for node in (node for workflow in WORKFLOWS.values() for node in workflow["nodes"]):
        if node["type"] in FOLDERS and node["widgets_values"][0] != "miniature":
            file = server.data / FOLDERS[node["type"]] / node["widgets_values"][0]
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                made.append(file)
    assert made
    page.refresh()
    yield
    for file in made:
        file.unlink()


@pytest.fixture
def fresh(page, named_files):
    """The page with no script of it in trouble, before and after."""
    page.broken.clear()
    yield page
    assert page.broken == []


def whole(workflow: dict) -> dict:
    """What the page says of a workflow that it takes as it is in the file."""
    counts = {"nodes": len(workflow["nodes"]), "links": len(workflow["links"])}
    return counts | {"unknown": [], "in_error": [], "wrong_links": [], "overlapping": [], "unreadable": False}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens_by_file_as_it_was_saved(fresh, name):
    assert fresh.open(WORKFLOWS[name]) == whole(WORKFLOWS[name])
    fresh.screenshot(name)
    fresh.picture_of_graph(name)


@pytest.mark.parametrize("name", slow_but("miniature_pose_to_video", "wan_style"))
def test_a_workflow_opens_as_a_template(fresh, name):
    assert fresh.open_template(name, len(WORKFLOWS[name]["nodes"])) == whole(WORKFLOWS[name])


@pytest.mark.parametrize(
    ("name", "steps"),
    [("miniature_text_and_style", 3), *(pytest.param(x, 20, marks=pytest.mark.slow) for x in MINIATURE)],
)
def test_a_miniature_workflow_runs_from_the_page(fresh, server, name, steps):
    fresh.open(WORKFLOWS[name])
    fresh.set("KSampler", "steps", steps)
    outputs = fresh.run()
    fresh.screenshot(f"{name}_after_{steps}_steps")
    shown = {
        node["type"] if node["type"] == HEATMAP else node.get("title"): outputs[str(node["id"])]
        for node in WORKFLOWS[name]["nodes"]
        if str(node["id"]) in outputs
    }
    (saved,) = shown["Left: base model. Right: with the LoRA"]["images"]
    clip = server.frames(saved)
    assert [frame.size for frame in clip] == [(2 * 512 + 16, 512)] * 17
    left, right = clip[8].crop((0, 0, 512, 512)), clip[8].crop((512 + 16, 0, 2 * 512 + 16, 512))
    assert left.tobytes() != right.tobytes()
    if steps == 20:  # as it is shipped: training.miniature.pictures makes the template's picture of it
        shutil.copyfile(server.file(saved), fresh.pictures / f"{name}.mp4")
    heatmap = Image.open(server.file(shown[HEATMAP]["images"][0]))
    assert len(heatmap.convert("RGB").getcolors(maxcolors=1 << 24)) > 50


def test_the_help_panel_shows_every_nodes_page(fresh):
    for name in sorted(NODE_IDS):
        page = (ROOT / f"nodes/web/docs/{name}.md").read_text(encoding="utf-8")
        assert fresh.help(name).startswith(page.partition("\n")[0].removeprefix("# ")), name
