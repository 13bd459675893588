"""The cache: what is encoded, what a rerun leaves alone; training on a folder of the miniature's clips."""

import copy
import dataclasses
import io
import json
import os
import shutil
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from folder_runs import check_stages, run_over, write_lines
from rich.console import Console
from test_media import write_video

from lofa_core import miniature
from lofa_core.base_models import WAN_IMAGE_KINDS, BaseModel, BaseWeights, TargetLayer
from lofa_core.lora_files import read_safetensors, write_safetensors
from training.backbones import load_vae, to_unit
from training.config import DataConfig, TrainingConfig
from training.data import cache, media
from training.data.folder_tasks import FolderTasks, TaskName, open_tasks
from training.loop import Run
from training.miniature import captions, vae, world
from training.miniature.transformer import load_prompt_encoder

ACTIONS = world.all_actions()[::97][:4]  # four, of which the last is held out


def write_dataset(folder):
    """Four tasks of two clips each, from the miniature's world, without loss."""
    rng = np.random.default_rng(0)
    lines = []
    (folder / "clips").mkdir(parents=True)
    for number, action in enumerate(ACTIONS):
        clips = []
        for n in range(2):
            file = f"clips/{number}_{n}.mkv"
            write_video(folder / file, world.draw_clip(action, world.random_look(rng), rng))
            clips.append({"file": file, "caption": captions.fine_caption(action, None, rng) if n else ""})
        split = "held_out" if number == 3 else "training"
        prompt = captions.fine_caption(action, None, rng)
        lines.append({"id": f"task {number}", "prompt": prompt, "split": split, "clips": clips})
    write_lines(folder, lines)
    return lines


class World:
    """A cached dataset and its run."""

    def __init__(self, root):
        self.folder, self.run = root / "data", root / "run"
        self.lines = write_dataset(self.folder)
        self.config = DataConfig(folder=str(self.folder))
        self.said = io.StringIO()
        self.first = self.cache()

    def cache(self, **changes):
        config = dataclasses.replace(self.config, **changes)
        console = Console(file=self.said, width=200)
        return cache.cache_dataset(config, miniature.FOLDER, self.run, Accelerator(cpu=True), console)

    def tasks(self, **changes):
        return FolderTasks(dataclasses.replace(self.config, **changes), self.run, miniature.FOLDER)

    def report(self):
        return json.loads((self.run / "data_report.json").read_text())


@pytest.fixture(scope="module")
def world_cached(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def cached(world_cached, tmp_path):
    """A copy that the test may change."""
    own = copy.copy(world_cached)
    own.folder, own.run = tmp_path / "data", tmp_path / "run"
    own.lines, own.said = copy.deepcopy(own.lines), io.StringIO()
    shutil.copytree(world_cached.folder, own.folder)  # with the times of change
    own.config = dataclasses.replace(own.config, folder=str(own.folder))
    shutil.copytree(world_cached.run, own.run)
    index = json.loads((own.run / "cache" / "tasks.json").read_text())
    (own.run / "cache" / "tasks.json").write_text(json.dumps(index | {"folder": str(own.folder)}))
    return own


def test_latents_and_states_are_those_of_the_bases_own_encoders(cached):
    tensors, _ = read_safetensors(cached.run / "cache" / "task 1.safetensors")
    assert sorted(tensors) == ["captions.1", "coarse_prompt", "latents", "prompt"]
    assert tensors["latents"].shape == (2, 16, 5, 8, 8) and tensors["latents"].dtype == torch.float16
    video = vae.to_video(media.read_video(cached.folder / "clips" / "1_0.mkv", 17, 64, 64, 0)[None])
    model = load_vae(miniature.FOLDER)
    with torch.no_grad():
        wanted = to_unit(vae.WholeClipVAE(model).encode(video), model)
    assert torch.allclose(tensors["latents"][:1].float(), wanted, atol=5e-3)
    prompts, tasks = load_prompt_encoder(miniature.FOLDER), cached.tasks()
    sentences = [cached.lines[1]["prompt"], cached.lines[2]["clips"][1]["caption"]]
    assert torch.allclose(tasks.prompts(sentences).states, prompts(sentences), atol=1e-5)
    assert torch.allclose(tasks.coarse().states, prompts([captions.COARSE]), atol=1e-5)


def test_the_report_counts_what_there_is(world_cached):
    assert world_cached.report() == {
        "folder": str(world_cached.folder),
        "training": ["task 0", "task 1", "task 2"],
        "held_out": ["task 3"],
        "clips": 8,
        "encoded": ["task 0", "task 1", "task 2", "task 3"],
        "unchanged": [],
        "conditions": {"text": 3},
        "left_out": [],
    }
    said = world_cached.said.getvalue()
    assert "3 training and 1 held-out tasks with 8 clips; 4 encoded now, 0 were there; 0 left out" in said


def test_a_rerun_encodes_nothing_again(cached, monkeypatch):
    monkeypatch.setattr(cache.TaskEncoder, "encode", None)
    again = cached.cache()
    assert (again.encoded, again.unchanged) == ((), ("task 0", "task 1", "task 2", "task 3"))
    assert again.clips == 8 and cached.tasks().training == [TaskName(f"task {n}") for n in range(3)]


def test_what_changed_is_encoded_again_and_nothing_else(cached):
    later = (cached.folder / "clips" / "0_1.mkv").stat().st_mtime + 5
    os.utime(cached.folder / "clips" / "0_1.mkv", (later, later))
    cached.lines[1]["clips"][1]["caption"] = "a person moves"
    del cached.lines[2]
    write_lines(cached.folder, cached.lines)
    found = cached.cache()
    assert (found.encoded, found.unchanged) == (("task 0", "task 1"), ("task 3",))
    assert not (cached.run / "cache" / "task 2.safetensors").exists()
    assert cached.tasks().prompts(["a person moves"]).states.abs().sum() > 0


@pytest.mark.parametrize("change", ["frames", "encoders", "damaged"])
def test_other_settings_other_encoders_and_damage_are_noticed(cached, monkeypatch, change):
    encoded = []

    def encode(self, task, skip):
        encoded.append(task.id)
        states = {"prompt": torch.zeros(3, 64), "coarse_prompt": torch.zeros(2, 64)}
        return {"latents": torch.zeros(2, 16, 5, 8, 8).half(), **states}, task

    monkeypatch.setattr(cache.TaskEncoder, "encode", encode)
    if change == "encoders":
        monkeypatch.setattr(cache, "fingerprint", lambda *arguments: "another")
    if change == "damaged":
        path = cached.run / "cache" / "task 1.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
    cached.cache(**({"frames": 13} if change == "frames" else {}))
    assert encoded == (["task 1"] if change == "damaged" else [f"task {n}" for n in range(4)])


def test_a_killed_cache_goes_on_and_is_not_trained_on_meanwhile(cached, monkeypatch):
    (cached.run / "cache" / "task 2.safetensors").unlink()
    (cached.run / "cache" / ".task 2.safetensors.0123").write_bytes(b"half")
    real = cache.TaskEncoder.encode

    def killed(self, task, skip):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.TaskEncoder, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        cached.cache()
    with pytest.raises(ValueError, match="is not cached here. Run `cache` first"):
        cached.tasks().training  # noqa: B018
    monkeypatch.setattr(cache.TaskEncoder, "encode", real)
    assert cached.cache().encoded == ("task 2",)
    assert len(cached.tasks().clips) == 8 and not list((cached.run / "cache").glob(".*"))


def test_what_fails_while_it_is_encoded_is_reported_each_time(cached):
    write_video(cached.folder / "short.mkv", np.zeros((3, 64, 64, 3), np.uint8))
    cached.lines[0]["clips"].insert(0, {"file": "short.mkv", "caption": "x"})
    cached.lines[0]["clips"][1]["caption"] = "word " * 600
    cached.lines[1]["prompt"] = "word " * 600
    cached.lines[2]["clips"] = [{"file": "short.mkv"}]
    write_lines(cached.folder, cached.lines)
    for _ in range(2):
        found = cached.cache()
        assert (found.training, found.held_out, found.clips) == (("task 0",), ("task 3",), 4)
        said = {problem.what: problem.reason for problem in found.problems}
        assert said["short.mkv of task task 0"] == "has 3 frames that can be decoded, 17 are wanted."
        assert "tokens" in said["caption of clips/0_0.mkv of task task 0"]
        assert "tokens" in said["task task 1"]
        assert said["task task 2"] == "no clip of it can be used" and len(said) == 5
        assert [entry["what"] for entry in cached.report()["left_out"]] == list(said)
    assert "5 left out, see data_report.json" in cached.said.getvalue()
    tasks = cached.tasks()
    assert tasks.training == [TaskName("task 0")] and tasks.held_out == [TaskName("task 3")]
    assert torch.equal(tasks.latents_of(TaskName("task 0")), tasks.clips[torch.tensor([0, 1])])
    assert tasks.sentence(TaskName("task 0"), _always()) == cached.lines[0]["clips"][2]["caption"]


def _always():
    """A generator whose every draw is the lowest."""

    class Lowest:
        random = staticmethod(lambda: 0.0)
        integers = staticmethod(lambda high: 0)

    return Lowest()


def test_a_dataset_of_which_nothing_can_be_encoded_is_an_error_with_a_report(cached):
    write_video(cached.folder / "short.mkv", np.zeros((3, 64, 64, 3), np.uint8))
    write_lines(cached.folder, [{"id": "a", "prompt": "x", "clips": [{"file": "short.mkv"}]}])
    with pytest.raises(ValueError, match=r"no training task could be encoded; .*data_report\.json says why"):
        cached.cache()
    assert len(cached.report()["left_out"]) == 2


def test_encoders_that_cannot_be_loaded_are_an_error_not_a_skipped_task(cached, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(miniature.FOLDER, base, ignore=shutil.ignore_patterns("__pycache__", "lofa_*"))
    weights = base / "text_encoder" / "model.safetensors"

    def refused(named):
        console = Console(file=io.StringIO())
        with pytest.raises(ValueError, match=named):
            cache.cache_dataset(cached.config, base, cached.run, Accelerator(cpu=True), console)

    tensors, metadata = read_safetensors(weights)
    tensors.pop("encoder.final_layer_norm.weight")
    write_safetensors(tensors, weights, metadata)
    refused("not a complete UMT5 encoder")
    weights.write_bytes(b"")
    refused(r"model\.safetensors is not a whole safetensors file")
    shutil.rmtree(base / "vae")
    refused("vae: is no folder with files in it. Expected a base folder with vae/, text_encoder/")


def test_tasks_are_what_the_stages_ask_for(world_cached):
    tasks, rng = world_cached.tasks(), np.random.default_rng(0)
    first, last = tasks.training[0], tasks.held_out[0]
    assert str(first) == "task 0" and first.id == "task 0" and {first: 1}[TaskName("task 0")] == 1
    assert tasks.plain_sentence(last, rng) == world_cached.lines[3]["prompt"]
    said = {tasks.sentence(first, rng) for _ in range(50)}
    line = world_cached.lines[0]
    assert said == {line["prompt"], line["clips"][1]["caption"]}
    tensors, _ = read_safetensors(world_cached.run / "cache" / "task 2.safetensors")
    assert torch.equal(tasks.latents_of(TaskName("task 2")), tensors["latents"])
    picked = tasks.clips[torch.tensor([5, 5, 0])]
    assert picked.shape == (3, 16, 5, 8, 8) and torch.equal(picked[0], tensors["latents"][1])
    some, own = tasks.some_latents(TaskName("task 2"), 20, rng), tensors["latents"]
    assert len(some) == 20 and {x.sum().item() for x in some} == {x.sum().item() for x in own}
    assert torch.equal(tasks.loss_weights(first), torch.ones(16, 5, 8, 8))
    held_out = tasks.held_out_latents(24)(last)
    assert len(held_out) == 2 and torch.equal(held_out, tasks.clips[torch.tensor([6, 7])])
    assert {tasks.draw_task(rng) for _ in range(50)} == set(tasks.training) and last not in tasks.training
    told = [tasks.plain_condition(task, rng) for task in (first, last)]
    states = tasks.prompts([one["text"] for one in told]).states
    assert torch.equal(tasks.conditions(told)["text"].values, states[:, :-1])
    base, (condition,) = tasks.descriptions()
    assert len(base.layers) == 32 and (condition.width, condition.words) == (64, ())


def test_a_cache_of_something_else_is_refused(world_cached, tmp_path):
    for changes, named in (
        ({"frames": 21}, "was made with frames = 17, now it is 21"),
        ({"folder": "elsewhere"}, "now it is elsewhere"),
    ):
        with pytest.raises(ValueError, match=named):
            world_cached.tasks(**changes).training  # noqa: B018
    with pytest.raises(ValueError, match="Run `cache` first"):
        FolderTasks(world_cached.config, tmp_path, miniature.FOLDER).coarse()


def test_a_base_that_cannot_be_trained_on_is_refused(world_cached, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='base = "sdxl": without data.folder'):
        open_tasks("sdxl", DataConfig(), tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_tasks(str(tmp_path / "nowhere"), world_cached.config, tmp_path)
    layer = TargetLayer("x", 0, WAN_IMAGE_KINDS[0], (640, 640), "x.weight")
    for name, reason in (
        ("WAN2.1-I2V-14B", "WAN2.1's text-to-video models and for SDXL"),
        ("SDXL", "is SDXL, which makes pictures; data.frames is 17, expected 1"),
    ):
        opened = types.SimpleNamespace(model=BaseModel(name, (layer,)))
        monkeypatch.setattr(BaseWeights, "open", classmethod(lambda cls, path, opened=opened: opened))
        with pytest.raises(ValueError, match=reason):
            open_tasks("base", world_cached.config, tmp_path)


def test_a_run_caches_and_trains_on_a_folder(cached, tmp_path):
    data = {"coarse_prompt": cached.config.coarse_prompt}
    run = run_over(cached.folder, "miniature", cached.run, data=data)
    with pytest.raises(ValueError, match="no LoRAs here yet"):
        run.stage1()
    assert run.cache().unchanged == ("task 0", "task 1", "task 2", "task 3")
    held_out, training = run.lora_dataset()
    assert (held_out.done, training.done) == (("task 3",), ("task 0", "task 1", "task 2"))
    assert run._dataset("training").tasks == run.data.training
    check_stages(run, ("stage1", "stage2"))
    for refused in (lambda: run.evaluate(None), run.ship):
        with pytest.raises(ValueError, match="draws and judges clips of the miniature's world"):
            refused()
    with pytest.raises(ValueError, match=r"data\.folder is empty"):
        Run(TrainingConfig("miniature", str(tmp_path / "other")), run.console).cache()
