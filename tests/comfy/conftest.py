"""A real ComfyUI for the tests in this folder: found, started once with our pack, talked to over HTTP, ended.

The checkout is $COMFYUI_PATH, else ~/comfy/ComfyUI; its Python is $COMFYUI_PYTHON, else <checkout>/.venv.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import pytest
import torch
from page import CHROMIUM, find_chromium, opened
from PIL import Image
from test_released import SMALL, published_files, released
from tiny import CONFIG, network

from lofa_core import miniature
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import save_hypernetwork, save_lora_diffusion
from lofa_core.descriptions import BaseDescription, ConditionDescription, LayerDescription
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.lora_diffusion import LoRADiffusion, LoRADiffusionConfig

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, RUN_SECONDS = 300, 300
MENU = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", MENU}
WAN = "wan2.1_t2v_1.3B_fp16.safetensors"
MINIATURE_V0 = replace(SMALL, grid=(4, 4), width=24, feature_blocks=(0, 2))
PAGE_ONLY = {"Note", "MarkdownNote"}  # nodes that live in the page and are never sent to the server


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.comfy)
            if reason := lacking(item.fixturenames):
                item.add_marker(pytest.mark.skip(reason))


def lacking(fixtures: Collection[str]) -> str | None:
    """In one line what a test with these fixtures needs and this machine has not got; nothing is started."""
    if find_installation() is None:
        return "no ComfyUI here; set COMFYUI_PATH (and COMFYUI_PYTHON)"
    if "page" in fixtures and find_spec("playwright") is None:
        return "no playwright here, which opens the page: pip install playwright"
    if "page" in fixtures and find_chromium() is None:
        return f"no Chromium here to open the page in; one of {', '.join(CHROMIUM)} has to be on the PATH"
    return None


@dataclass(frozen=True)
class Installation:
    """A ComfyUI checkout and the Python that runs it."""

    path: Path
    python: Path

    def environment(self) -> dict[str, str]:
        """ComfyUI's own environment: two threads at most, and none of this Python's paths."""
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {"OMP_NUM_THREADS": "2", **kept}

    def inspect(self, prompt: str = "", encoding: Path = Path(), script: str = "in_comfyui.py") -> dict:
        """Run a script of this folder with ComfyUI's Python; what it saw."""
        command = [self.python, Path(__file__).with_name(script), self.path, ROOT, prompt, encoding]
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            env=self.environment(),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Server:
    """A running ComfyUI. `data` is its base directory."""

    url: str
    data: Path
    pid: int = 0

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def json(self, path: str) -> dict:
        return json.loads(self.get(path))

    def post(self, path: str, value: object) -> bytes:
        request = urllib.request.Request(
            self.url + path, data=json.dumps(value).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def forget(self) -> None:
        """Have ComfyUI drop all that nodes gave, and unload all models. Asked in a bad moment it would do so
        only after the next workflow.
        """
        log, said = self.data / "server.log", "Using RAM pressure cache"  # of a new cache
        before, deadline = log.read_text().count(said), time.monotonic() + START_SECONDS
        while log.read_text().count(said) == before:
            assert time.monotonic() < deadline, "ComfyUI did not free its memory"
            self.post("/free", {"unload_models": True, "free_memory": True})
            time.sleep(0.3)

    def run(self, prompt: dict) -> dict:
        """Queue a workflow in API form and wait; its entry in the history. Fails where ComfyUI refuses it."""
        try:
            prompt_id = json.loads(self.post("/prompt", {"prompt": prompt}))["prompt_id"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"ComfyUI refused the workflow: {error.read().decode()[:2000]}")
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            history = self.json(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.2)
        pytest.fail(f"the workflow did not end within {RUN_SECONDS} s")

    def succeed(self, prompt: dict) -> dict:
        """Run a workflow that must succeed; what its nodes gave, by node id."""
        entry = self.run(prompt)
        assert entry["status"]["status_str"] == "success", self.error(entry)
        return entry["outputs"]

    def fail(self, prompt: dict) -> str:
        """Run a workflow that must fail while it runs; the error text that the page shows."""
        entry = self.run(prompt)
        assert entry["status"]["status_str"] == "error"
        return self.error(entry)

    @staticmethod
    def error(entry: dict) -> str:
        """The error text of a history entry, empty where there was none."""
        messages = dict(entry["status"]["messages"])
        return messages.get("execution_error", {}).get("exception_message", "")

    def file(self, shown: dict) -> Path:
        """The file behind one entry of a node's images."""
        return self.data / shown["type"] / shown["subfolder"] / shown["filename"]

    def frames(self, shown: dict) -> list[Image.Image]:
        """The pictures of one entry: a picture, or every frame of a video."""
        file = self.file(shown)
        if file.suffix == ".png":
            return [Image.open(file).convert("RGB")]
        video, found = cv2.VideoCapture(str(file)), []
        while (read := video.read())[0]:
            found.append(Image.fromarray(read[1][:, :, ::-1]))
        return found

    def api_form(self, workflow: dict) -> dict:
        """What the page sends when this saved workflow is queued."""
        nodes = self.json("/object_info")
        sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
        prompt = {}
        for node in workflow["nodes"]:
            if node["type"] in PAGE_ONLY:
                continue
            values = _widget_values(nodes[node["type"]], node.get("widgets_values", []))
            linked = {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot.get("link")}
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
        return prompt


def _widget_values(info: dict, values: list) -> dict:
    """A node's saved widget values by input name (a seed is followed by its control-after-generate value)."""
    return _taken(info["input"], iter(values))


def _taken(inputs: dict, remaining: Iterator, prefix: str = "") -> dict:
    named = {}
    for name, (kind, *options) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
        options = options[0] if options else {}
        if options.get("forceInput") or not (isinstance(kind, list) or kind in WIDGET_TYPES):
            continue
        named[prefix + name] = value = next(remaining)
        if options.get("control_after_generate") or name in ("seed", "noise_seed"):
            next(remaining)
        if kind == MENU:  # what was chosen brings inputs of its own
            (chosen,) = (option for option in options["options"] if option["key"] == value)
            named |= _taken(chosen["inputs"], remaining, f"{prefix}{name}.")
    return named


def find_installation() -> Installation | None:
    """The checkout named in the docstring above, or None where there is none."""
    path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI")
    scripts = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    python = Path(os.environ.get("COMFYUI_PYTHON") or path / ".venv" / scripts)
    found = (path / "main.py").is_file() and python.is_file()
    return Installation(path, python) if found else None


@pytest.fixture(scope="session")
def installation() -> Installation:
    return find_installation()


@pytest.fixture(scope="session")
def comfyui(installation):
    """Starts a ComfyUI over an empty folder; it ends with the context."""

    def furnished(data: Path):
        furnish(data)
        return started(installation, data)

    return furnished


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """One for all tests that need none of their own."""
    with comfyui(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


def furnish(data: Path) -> None:
    """What the tests' workflows load, in a base directory."""
    _link(ROOT, data / "custom_nodes/lofa")
    for own in ("small_sizes.py", "probe_nodes.py"):
        _link(Path(__file__).with_name(own), data / "custom_nodes")
    _link(miniature.DIFFUSION_MODEL, data / "models/diffusion_models")
    _link(miniature.VAE, data / "models/vae")
    # Under the names in workflows/wan_text_action.json: the miniature for WAN, random stages for LoFA_v0.
    _link(miniature.DIFFUSION_MODEL, data / "models/diffusion_models" / WAN)
    _link(miniature.VAE, data / "models/vae/wan_2.1_vae.safetensors")
    (data / "models/lofa").mkdir()
    save_hypernetwork(network_of_all_kinds(), data / "models/lofa/all_kinds.safetensors")
    save_lora_diffusion(lora_diffusion(), data / "models/lofa/lora_diffusion.safetensors")
    published_files(data / "models/lofa", released(MINIATURE_V0, depths=4, shape=(96, 96), words=64))


@contextmanager
def started(installation: Installation, data: Path) -> Iterator[Server]:
    """ComfyUI over a base directory; ended with the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [installation.python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", port]
    command += ["--base-directory", data, "--database-url", "sqlite:///:memory:"]
    command += ["--disable-api-nodes", "--disable-auto-launch"]
    log = data / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=installation.path,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=installation.environment(),
        )
    try:
        running = Server(f"http://127.0.0.1:{port}", data, process.pid)
        _wait_until_up(running, process, log)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def page(server):
    """The server's page, open in a browser; its screenshots go to out/screenshots."""
    from playwright.sync_api import sync_playwright

    server.post("/settings/Comfy.TutorialCompleted", True)  # no greeting for the first visit
    server.post("/settings/Comfy.Minimap.Visible", False)  # it lies over the nodes
    with sync_playwright() as playwright:
        with opened(playwright, find_chromium(), server.url, ROOT / "out/screenshots") as page:
            yield page


def network_of_all_kinds() -> Hypernetwork:
    """For the miniature: text, pose and style, its weights random."""
    conditions = (
        ConditionDescription("text", 64),
        ConditionDescription("pose", 3, size=(miniature.FRAMES, miniature.SIZE, miniature.SIZE)),
        ConditionDescription("style", 64),
    )
    return network(1, replace(CONFIG, rank=4), described(), conditions=conditions)


def lora_diffusion() -> LoRADiffusion:
    """For the miniature: text alone, its weights random, a decoder that hears the latent."""
    torch.manual_seed(2)
    config = LoRADiffusionConfig(
        rank=4, latent=8, layer_width=4, vae_width=16, width=16, blocks=1, pooling_queries=2, steps=4
    )
    found = LoRADiffusion(config, described(), (ConditionDescription("text", 64),))
    found.requires_grad_(False).denoiser.out.weight.normal_()
    for statistics in found.codec.statistics.values():
        statistics.A_scale.fill_(0.05)
        statistics.B_scale.fill_(0.05)
    return found


def described() -> BaseDescription:
    """The miniature, as what is trained for it describes it."""
    base = BaseWeights.open(miniature.FOLDER)
    layers = tuple(LayerDescription(x.name, x.depth, x.kind, x.shape) for x in base.model.layers)
    return BaseDescription(base.model.name, layers, base.fingerprint())


def _link(target: Path, place: Path) -> None:
    """A symbolic link at `place`, or in it where the target is a file and `place` names a folder."""
    place = place / target.name if target.is_file() and not place.suffix else place
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target, target_is_directory=target.is_dir())


def _wait_until_up(server: Server, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            server.get("/system_stats")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"ComfyUI did not start:\n{log.read_text()[-3000:]}")
