"""Folder datasets with pose, style and text: cached, told to a network, and trained on end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from folder_runs import STEPS, check_stages, losses_of, picture, run_over, write_lines
from PIL import Image
from test_media import write_video

from lofa_core import miniature
from lofa_core.checkpoint import load_hypernetwork
from lofa_core.conditions.image import CLIPImageEncoder
from lofa_core.conditions.pose import pose_from_keypoints, resample_frames
from lofa_core.lora_files import read_safetensors
from training.data import media, task_encoder
from training.data.folder_tasks import TaskName

SIZE = (5, 32, 32)  # of a pose


def skeleton(shift=0.0):
    """A POSE_KEYPOINT document of two frames: a person who moves to the right."""
    frames = []
    for n in range(2):
        points = [
            value for joint in range(18) for value in (20.0 + shift + 8 * n + joint, 10.0 + 3 * joint, 1.0)
        ]
        frames.append({"people": [{"pose_keypoints_2d": points}], "canvas_width": 96, "canvas_height": 64})
    return frames


def write_wan_dataset(folder):
    folder.mkdir()
    for n in range(4):
        moving = np.stack([np.roll(picture(n, (64, 64)), 4 * t, 1) for t in range(5)])
        write_video(folder / f"{n}.mkv", moving)
    drawn = (255 * pose_from_keypoints(skeleton(), 3, 64, 96)[0]).permute(1, 2, 3, 0).byte().numpy()
    write_video(folder / "drawn.mkv", drawn)
    (folder / "pose.json").write_text(json.dumps(skeleton()))
    for n in range(3):
        Image.fromarray(picture(10 + n)).save(folder / f"style{n}.png")
    write_video(folder / "black.mkv", np.zeros((3, 32, 32, 3), np.uint8))
    lines = [
        {"id": "all", "prompt": "a person waves", "pose": "pose.json", "style": ["style0.png", "style1.png"]},
        {"id": "posed", "pose": ["drawn.mkv", "pose.json", "black.mkv"]},
        {"id": "styled", "style": "style2.png"},
        {"id": "told", "prompt": "a person bows", "split": "held_out"},
        {"id": "mute", "identity": "style0.png"},
    ]
    for n, line in enumerate(lines):
        line["clips"] = [{"file": f"{n % 4}.mkv", "caption": "a person moves" if n == 0 else ""}]
    write_lines(folder, lines)
    return lines


WAN_DATA = {
    "conditions": ("text", "pose", "style"), "frames": 5, "pose_frames": SIZE[0], "pose_size": SIZE[1]
}  # fmt: skip


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    write_wan_dataset(root / "data")
    run = run_over(root / "data", miniature.FOLDER, root / "run", data=WAN_DATA)
    run.summary = run.cache()
    run.lora_dataset()
    return run


def test_the_report_says_what_each_kind_has_and_what_was_left_out(wan):
    assert wan.summary.training == ("all", "posed", "styled") and wan.summary.held_out == ("told",)
    assert wan.summary.conditions == {"text": 1, "pose": 2, "style": 2}
    said = {problem.what: problem.reason for problem in wan.summary.problems}
    assert said == {
        "black.mkv, pose of task posed": "shows nobody in any of its frames.",
        "task mute (tasks.jsonl line 5)": "has no prompt and no pose and no style that can be used; "
        "data.conditions asks for text, pose, style",
    }


def test_what_is_cached_is_what_the_conditions_own_functions_give(wan):
    folder = wan.folder / "cache"
    tensors, _ = read_safetensors(folder / "all.safetensors")
    assert sorted(tensors) == ["captions.0", "coarse_prompt", "latents", "pose", "prompt", "style"]
    assert tensors["pose"].dtype == torch.uint8 and tensors["pose"].shape == (1, 3, *SIZE)
    assert torch.equal(tensors["pose"].float(), (255 * pose_from_keypoints(skeleton(), *SIZE)).round())
    encoder = CLIPImageEncoder.open(miniature.FOLDER)
    states = torch.cat([encoder.encode([picture(seed)]) for seed in (10, 11)])
    assert tensors["style"].dtype == torch.float16 and tensors["style"].shape == states.shape
    assert torch.allclose(tensors["style"].float(), states, atol=5e-3)
    posed, _ = read_safetensors(folder / "posed.safetensors")
    assert sorted(posed) == ["coarse_prompt", "latents", "pose"] and len(posed["pose"]) == 2
    frames = media.read_whole(Path(wan.config.data.folder) / "drawn.mkv", 5)
    assert torch.equal(posed["pose"][0].float(), (255 * resample_frames(frames, *SIZE)[0]).round())
    assert sorted(read_safetensors(folder / "styled.safetensors")[0]) == ["coarse_prompt", "latents", "style"]


def test_conditions_are_told_as_given_with_strengths(wan):
    data = wan.data
    names = [TaskName(name) for name in ("all", "posed", "styled")]
    told = [{"text": "a person waves", "style": (names[0], [1, 0])}, {"pose": (names[1], [1])}, {}]
    given = data.conditions(told)
    assert {kind: one.strength.tolist() for kind, one in given.items()} == {
        "text": [1, 0, 0], "pose": [0, 1, 0], "style": [1, 0, 0],
    }  # fmt: skip
    tensors, _ = read_safetensors(wan.folder / "cache" / "all.safetensors")
    assert torch.equal(given["style"].values[0], tensors["style"][[1, 0]].flatten(0, 1).float())
    pose = pose_from_keypoints(skeleton(), *SIZE)[0]
    assert torch.allclose(given["pose"].values[1], pose, atol=0.5 / 255)
    assert not given["pose"].values[0].any() and not given["style"].values[1:].any()
    nothing = data.conditions([{}, {}])
    assert list(nothing) == ["text"] and nothing["text"].strength.tolist() == [0, 0]
    assert list(data.conditions([told[1]])) == ["pose"]


def test_a_training_condition_is_drawn_from_what_the_task_has(wan):
    data, rng = wan.data, np.random.default_rng(0)
    drawn = [data.condition(TaskName("all"), rng) for _ in range(400)]
    kinds = {frozenset(one) for one in drawn}
    assert kinds == {
        frozenset(some) for some in ((), ("text",), ("pose",), ("style",), ("text", "pose"),
                                     ("text", "style"), ("pose", "style"), ("text", "pose", "style"))
    }  # fmt: skip
    assert sum(len(one) == 1 for one in drawn) > 250
    assert {tuple(one["style"][1]) for one in drawn if "style" in one} == {(0,), (1,), (0, 1), (1, 0)}
    assert {one["text"] for one in drawn if "text" in one} == {"a person waves", "a person moves"}
    posed = [data.condition(TaskName("posed"), rng) for _ in range(100)]
    assert {tuple(one["pose"][1]) for one in posed if one} == {(0,), (1,)}
    again = [data.condition(TaskName("all"), np.random.default_rng([3, n])) for n in range(20)]
    assert again == [data.condition(TaskName("all"), np.random.default_rng([3, n])) for n in range(20)]
    plain = data.plain_condition(TaskName("all"), rng)
    assert plain == {
        "text": "a person waves",
        "pose": (TaskName("all"), [0]),
        "style": (TaskName("all"), [0]),
    }
    assert data.plain_sentence(TaskName("styled"), rng) == "a thing"


def test_the_network_is_described_by_kind(wan):
    base, known = wan.data.descriptions()
    assert base.name == "WAN2.1 miniature" and [one.kind for one in known] == ["text", "pose", "style"]
    assert known[1].size == SIZE and known[0].width == 64
    assert known[2].width == CLIPImageEncoder.open(miniature.FOLDER).width
    assert {one.coarse_prompt for one in known} == {"a thing"}


def test_tasks_without_a_prompt_need_a_lora_or_no_distillation(wan, tmp_path):
    assert [str(task) for task in wan.data.without_prompt()] == ["posed", "styled"]
    folder = wan.config.data.folder
    run = run_over(
        folder, miniature.FOLDER, wan.folder, data=WAN_DATA, end_to_end={"distillation_weight": 1.0}
    )
    with pytest.raises(ValueError, match=r"2 training tasks have neither a prompt .* first posed"):
        run.end_to_end()


def test_all_stages_train_on_pose_style_and_text_and_go_on_after_a_kill(wan, tmp_path, monkeypatch):
    check_stages(wan, ("stage1", "stage2", "end_to_end"))
    whole = losses_of(wan, "end_to_end")
    network = load_hypernetwork(wan.folder / "hypernetwork.safetensors")
    assert list(network.conditions) == ["text", "pose", "style"]
    assert {path.name for path in (wan.folder / "samples").iterdir()} == {"told.png", "told_response.png"}

    again = run_over(wan.config.data.folder, miniature.FOLDER, tmp_path, data=WAN_DATA)
    (tmp_path / "cache").symlink_to(wan.folder / "cache")
    condition, calls = again.data.condition, []

    def killed(task, rng):
        calls.append(task)
        if len(calls) > STEPS["tasks"]:  # in the second step
            raise KeyboardInterrupt
        return condition(task, rng)

    monkeypatch.setattr(again.data, "condition", killed)
    with pytest.raises(KeyboardInterrupt):
        again.end_to_end()
    resumed = run_over(wan.config.data.folder, miniature.FOLDER, tmp_path, data=WAN_DATA)
    resumed.end_to_end()
    assert [line["loss"] for line in losses_of(resumed, "end_to_end")] == [line["loss"] for line in whole]


def test_other_conditions_are_another_cache(wan):
    folder = wan.config.data.folder
    for changes, named in (
        ({"conditions": ("text", "pose")}, r"was made with conditions = \['text', 'pose', 'style'\]"),
        ({"pose_size": 48}, "was made with pose_size = 32, now it is 48"),
    ):
        run = run_over(folder, miniature.FOLDER, wan.folder, data=WAN_DATA | changes)
        with pytest.raises(ValueError, match=named):
            run.data.training  # noqa: B018
    changes = {"conditions": ("text", "identity"), "image_encoder": "nowhere"}
    with pytest.raises(ValueError, match=r"nowhere: is no folder .* Set data\.image_encoder to a folder"):
        run_over(folder, miniature.FOLDER, wan.folder, data=WAN_DATA | changes)
    with pytest.raises(ValueError, match=r"nowhere: is no folder .* Set data\.pose_models to a folder"):
        run_over(folder, miniature.FOLDER, wan.folder, data=WAN_DATA | {"pose_models": "nowhere"})


def test_a_kind_that_no_training_task_has_is_an_error(wan, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("0.mkv", "pose.json"):
        (tmp_path / "data" / name).write_bytes(
            (tmp_path.__class__(wan.config.data.folder) / name).read_bytes()
        )
    clips = [{"file": "0.mkv"}]
    lines = [
        {"id": "a", "prompt": "x", "clips": clips},
        {"id": "b", "pose": "pose.json", "clips": clips, "split": "held_out"},
    ]
    write_lines(tmp_path / "data", lines)
    data = WAN_DATA | {"conditions": ("text", "pose")}
    run = run_over(tmp_path / "data", miniature.FOLDER, tmp_path / "run", data=data)
    with pytest.raises(ValueError, match="no training task has a pose that can be used, though"):
        run.cache()
    assert not (tmp_path / "run" / "cache" / "tasks.json").exists()


def test_poses_are_found_in_the_clips_where_models_are_named(wan, tmp_path, monkeypatch):
    seen = []

    def poses(clip, find):
        seen.append((clip, find))
        return skeleton()

    monkeypatch.setattr(task_encoder, "poses_of_video", poses)
    monkeypatch.setattr(task_encoder, "open_pose_finder", lambda models, device: (models.name, device))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "yolox.onnx").write_bytes(b"x")
    data = WAN_DATA | {"conditions": ("pose",), "pose_models": str(tmp_path / "models"), "pose_frames": 3}
    run = run_over(wan.config.data.folder, miniature.FOLDER, tmp_path / "run", data=data)
    found = run.cache()
    assert found.training == ("all", "posed", "styled", "mute") and found.held_out == ("told",)
    clip, find = seen[-1]
    assert find == ("models", "cpu") and clip.shape == (3, 64, 64, 3)  # of a clip's five frames
    wanted = media.read_video(Path(wan.config.data.folder) / "0.mkv", 5, 64, 64, 0)
    assert np.array_equal(clip, wanted[::2])
    given = run.data.conditions([run.data.plain_condition(TaskName("styled"), np.random.default_rng(0))])
    assert list(given) == ["pose"] and given["pose"].strength is None
    assert torch.allclose(given["pose"].values, pose_from_keypoints(skeleton(), 3, 32, 32), atol=0.5 / 255)
