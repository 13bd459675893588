"""The rules of the house that no tool checks: who may import whom, short files, no prints, no catch-alls."""

import ast
import asyncio
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = 350
COMMAND_LINES = {
    "lofa_core/__main__.py",
    "training/train.py",
    "training/benchmark.py",
    "training/miniature/make.py",
    "training/miniature/demo.py",
}
CORE = {"torch", "safetensors", "numpy"}
# Files of lofa_core that may import more, inside functions or not.
CORE_EXTRAS = {
    "lofa_core/__main__.py": {"rich", "PIL"},
    "lofa_core/console.py": {"rich"},
    "lofa_core/pictures.py": {"PIL"},
    "lofa_core/conditions/text.py": {"transformers", "sentencepiece"},
    "lofa_core/conditions/pretrained.py": {"transformers"},
    "lofa_core/conditions/pose_drawing.py": {"cv2"},
    "lofa_core/command_evaluate.py": {"rich"},
    "lofa_core/metrics/clips.py": {"cv2"},
    "lofa_core/metrics/embedders.py": {"transformers"},
    "lofa_core/metrics/fvd.py": {"cdfvd"},
    "lofa_core/metrics/motion.py": {"vbench"},
}
NODES = CORE | {"comfy_api"}
# The files of nodes/ that know ComfyUI's internals.
HOST_FILES = {"host.py", "host_guidance.py", "host_miniature.py"}
HOST = {"comfy", "comfy_extras", "folder_paths", "node_helpers", "nodes", "server", "execution", "aiohttp"}
# Import name -> the name it is installed by, where they differ.
INSTALLED_AS = {
    "cdfvd": "cd-fvd",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# Used where they are there, and not to be installed by us: torchvision comes with it; old pins come with it.
NOT_OURS = {"controlnet_aux", "vbench"}
# The extras whose packages a part may import, beside the project's own dependencies.
EXTRAS_OF = {"lofa_core": ("fvd",), "nodes": (), "training": ("train", "cluster", "pose")}

PARTS = ("lofa_core", "nodes", "training", "tests")
FILES = [ROOT / "__init__.py", *sorted(file for part in PARTS for file in (ROOT / part).rglob("*.py"))]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def of(part: str) -> list:
    return [pytest.param(file, id=name_of(file)) for file in FILES if name_of(file).startswith(part + "/")]


def imports(file: Path) -> Iterator[str]:
    """Every module imported anywhere in the file; `..lofa_core.x` of a node is `relative:lofa_core.x`."""
    package = list(file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ("relative:" + ".".join([*above, *module.split(".")]) for module in modules)


def foreign(file: Path, allowed: set[str]) -> list[str]:
    """Imports of `file` that are neither the standard library's nor of an allowed top-level name."""
    names = [name for name in imports(file) if name.split(".")[0] not in sys.stdlib_module_names]
    return [name for name in names if name.split(".")[0] not in allowed]


@pytest.mark.parametrize("file", of("lofa_core"))
def test_lofa_core_stands_alone(file):
    allowed = CORE | CORE_EXTRAS.get(name_of(file), set()) | {"relative:lofa_core"}
    assert foreign(file, allowed) == []


@pytest.mark.parametrize("file", of("nodes"))
def test_nodes_know_lofa_core_and_only_the_host_files_know_comfyui(file):
    allowed = NODES | {"relative:nodes", "relative:lofa_core"}
    assert foreign(file, allowed | HOST | {"PIL"} if file.name in HOST_FILES else allowed) == []


@pytest.mark.parametrize("file", of("training"))
def test_training_knows_lofa_core_but_no_nodes(file):
    found = {name.split(".")[0] for name in imports(file)}
    assert not found & (HOST | {"comfy_api", "relative:nodes", "relative:lofa_core"})


@pytest.mark.parametrize("part", ["lofa_core", "nodes", "training"])
def test_every_imported_package_is_declared(part):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    entries = [*project["dependencies"], *(entry for extra in EXTRAS_OF[part] for entry in extras[extra])]
    declared = {re.split(r"[<>=!~\[ ]", entry)[0] for entry in entries}
    of_comfyui = HOST | {"comfy_api"} if part == "nodes" else set()
    for param in of(part):
        for name in foreign(param.values[0], {"lofa_core", "training"} | of_comfyui):
            top = name.split(".")[0]
            if top not in NOT_OURS and not top.startswith("relative:"):
                assert INSTALLED_AS.get(top, top) in declared, (param.id, name)


@pytest.mark.parametrize("file", [pytest.param(file, id=name_of(file)) for file in FILES])
def test_files_are_short_quiet_and_catch_what_they_name(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert name_of(file) in COMMAND_LINES, f"print in line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            cleans_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert caught not in {"", "Exception", "BaseException"} or cleans_up, f"line {node.lineno}"


def test_comfyui_finds_the_entry_point_and_nothing_old():
    """The root file imports nothing when it is loaded, or pytest and ComfyUI's registry could not read it."""
    text = (ROOT / "__init__.py").read_text(encoding="utf-8")
    top = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert top == [] and "NODE_CLASS_MAPPINGS" not in text
    spec = importlib.util.spec_from_file_location("lofa_pack", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert asyncio.iscoroutinefunction(module.comfy_entrypoint)
    assert (ROOT / module.WEB_DIRECTORY).is_dir()


def test_the_version_is_said_once_more_and_the_same():
    from lofa_core import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__ and f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(
        "utf-8"
    )


def test_the_constraints_pin_what_the_project_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["dev"]]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()}
    assert {re.split(r"[<>=]", entry)[0] for entry in wanted} <= pinned


def test_the_nodes_requirements_leave_comfyuis_torch_alone():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert not any(name.startswith("torch") for name in names)
