"""What `comfy node pack` packs: files that git tracks, without those that .comfyignore names."""

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKED = {"CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "locales", "lofa_core", "nodes"}
PACKED |= {"pyproject.toml", "requirements.txt", "workflows"}


@pytest.fixture(scope="module")
def tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in listed.stdout.splitlines()]


def ignored() -> set[str]:
    """The names at the top that .comfyignore leaves out."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    return {line.strip("/") for line in lines if line.startswith("/")}


def test_the_archive_holds_what_the_nodes_need_and_nothing_else(tracked):
    assert {file.parts[0] for file in tracked} - ignored() == PACKED


def test_the_miniature_travels_and_the_archive_stays_small(tracked):
    packed = [file for file in tracked if file.parts[0] in PACKED]
    weights = {file for file in packed if file.suffix == ".safetensors"}
    assert {file.name for file in weights} >= {"wan_miniature.safetensors", "lofa_miniature.safetensors"}
    assert sum((ROOT / file).stat().st_size for file in packed) < 25e6


def test_every_template_travels_with_its_picture(tracked):
    templates = {file for file in tracked if file.parts[0] == "workflows"}
    names = {
        suffix: {file.stem for file in templates if file.suffix == suffix} for suffix in (".json", ".jpg")
    }
    assert names[".json"] == names[".jpg"] != set()


def test_the_registry_is_told_what_it_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy = project["tool"]["comfy"]
    assert project["project"]["name"] == "lofa" and comfy["DisplayName"] == "LoFA"
    assert comfy["requires-comfyui"] == ">=0.33.0" and {"PublisherId", "Icon"} <= comfy.keys()
    for model in comfy["Models"]:
        assert model["location"].startswith("/models/lofa/") and model["model_url"].startswith("https://")
