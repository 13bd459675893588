"""Reading tasks.jsonl: what becomes a task, and how everything else is reported."""

import json

import numpy as np
import pytest
from PIL import Image

from training.config import DataConfig
from training.data.task_folder import Clip, read_task_folder

TEXT = DataConfig()
POSE = {"people": [], "canvas_width": 8, "canvas_height": 8}


def dataset(folder, *lines, files=("a.png", "b.png")):
    """A folder with small images and these lines (dicts, or text as it is) in tasks.jsonl."""
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "tasks.jsonl").write_text(text, encoding="utf-8")
    return folder


def task(name="wave", **changes):
    return {"id": name, "prompt": "a person waves", "clips": [{"file": "a.png"}], **changes}


def reasons(found):
    return {problem.what: problem.reason for problem in found.problems}


def test_a_task_takes_its_lines_values_and_defaults(tmp_path):
    (tmp_path / "sub").mkdir()
    full = task(
        "Ünlü 1.b",
        split="held_out",
        coarse_prompt=" someone moves ",
        clips=[{"file": "sub/a.png", "caption": " waving "}, {"file": "b.png"}],
        pose="b.png",
    )
    found = read_task_folder(
        dataset(tmp_path, full, "", task(coarse_prompt=None), files=("a.png", "b.png", "sub/a.png")),
        DataConfig(conditions=("text", "pose"), coarse_prompt="someone moves"),
    )
    first, second = found.tasks
    assert first.clips == (Clip("sub/a.png", "waving"), Clip("b.png")) and first.split == "held_out"
    assert (first.pose, first.style, first.coarse_prompt) == (("b.png",), (), "someone moves")
    assert first.kinds(("pose", "text")) == ["pose", "text"] and second.kinds(("pose", "text")) == ["text"]
    assert second.split == "training" and second.coarse_prompt == "someone moves"
    assert str(first) == "Ünlü 1.b" and len({first, second, first}) == 2 and found.problems == ()


@pytest.mark.parametrize(
    ("line", "what", "reason"),
    [
        ("{", "tasks.jsonl line 2", "not a line of JSON"),
        ("[1]", "tasks.jsonl line 2", "expected an object with the keys id, prompt"),
        ({"prompt": "x"}, "tasks.jsonl line 2", "id is None; expected up to 100 letters"),
        (task("../x"), "tasks.jsonl line 2", "id is '../x'"),
        (task(".x"), "tasks.jsonl line 2", "id is '.x'"),
        (task("WAVE"), "task WAVE (tasks.jsonl line 2)", "another task has this id; the first one counts"),
        (task("b", promt="x"), "task b (tasks.jsonl line 2)", "has the unknown key 'promt'; known are id"),
        (task("b", prompt=3), "task b (tasks.jsonl line 2)", "prompt is 3; expected text"),
        (
            task("b", split="test"),
            "task b (tasks.jsonl line 2)",
            "split is 'test'; expected training or held_out",
        ),
        (task("b", clips="a.png"), "task b (tasks.jsonl line 2)", "clips is 'a.png'; expected a list"),
        (
            task("b", prompt=" ", pose="b.png"),
            "task b (tasks.jsonl line 2)",
            "has no prompt that can be used; data.conditions asks for text",
        ),
        (
            task("b", style=["a.png", 3]),
            "task b (tasks.jsonl line 2)",
            "style is ['a.png', 3]; expected a file or a list of files",
        ),
        (task("b", clips=[]), "task b (tasks.jsonl line 2)", "no clip of it can be used"),
        (task("b", clips=["a.png"]), "clip 1 of task b (tasks.jsonl line 2)", "is 'a.png'; expected"),
        (
            task("b", clips=[{"file": "a.png", "x": 1}]),
            "clip 1 of task b (tasks.jsonl line 2)",
            "unknown key 'x'; known are file, caption",
        ),
        (
            task("b", clips=[{"file": "../a.png"}]),
            "../a.png, clip 1 of task b (tasks.jsonl line 2)",
            "leads out of the dataset's folder",
        ),
        (
            task("b", clips=[{"file": "c.png"}]),
            "c.png, clip 1 of task b (tasks.jsonl line 2)",
            "no such file",
        ),
        (
            task("b", clips=[{"file": "\0"}]),
            "\\x00, clip 1 of task b (tasks.jsonl line 2)",
            "cannot be read (embedded null",
        ),
    ],
)
def test_what_cannot_be_used_is_named_with_its_reason(tmp_path, line, what, reason):
    found = read_task_folder(dataset(tmp_path / "data", task(), line), TEXT)
    assert [kept.id for kept in found.tasks] == ["wave"]
    assert reason in reasons(found)[what]


def test_a_clip_that_cannot_be_used_leaves_the_others(tmp_path):
    folder = dataset(
        tmp_path / "data",
        task(clips=[{"file": name} for name in ("text.mp4", "empty.png", "out.png", "a.png", "/a.png")]),
        task("other", style="nowhere.png"),  # no style is asked for
    )
    (folder / "text.mp4").write_text("once upon a time")
    (folder / "empty.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    found = read_task_folder(folder, TEXT)
    assert [kept.clips for kept in found.tasks] == [(Clip("a.png"),), (Clip("a.png"),)]
    said = reasons(found)
    where = "of task wave (tasks.jsonl line 1)"
    assert said.pop(f"text.mp4, clip 1 {where}").startswith("cannot be decoded as a video")
    assert said.pop(f"empty.png, clip 2 {where}").startswith("cannot be decoded as an image")
    assert said.pop(f"out.png, clip 3 {where}").startswith("leads out of the dataset's folder")
    assert said.pop(f"/a.png, clip 5 {where}").startswith("leads out of the dataset's folder")
    assert said == {}


def test_a_line_that_is_not_utf_8_is_reported(tmp_path):
    folder = dataset(tmp_path / "data", task())
    with (folder / "tasks.jsonl").open("ab") as file:
        file.write(b'\n{"id": "b\xff"}\n')
    assert "not a line of JSON" in reasons(read_task_folder(folder, TEXT))["tasks.jsonl line 2"]


def test_a_dataset_that_is_none_is_one_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no tasks\.jsonl here\. Expected a folder"):
        read_task_folder(tmp_path / "nowhere", TEXT)
    folder = dataset(tmp_path / "data", "{", task(split="held_out"), files=("a.png",))
    with pytest.raises(ValueError) as error:
        read_task_folder(folder, TEXT)
    said = str(error.value)
    assert f"{folder}: no training task can be read (1 held-out, 1 problems)" in said
    assert "tasks.jsonl line 1: not a line of JSON" in said and 'such as {"id": "wave"' in said


def test_coarse_prompts_that_differ_are_refused(tmp_path):
    folder = dataset(tmp_path, task("a", coarse_prompt="one"), task("b", coarse_prompt="two"))
    with pytest.raises(ValueError, match='task a has the coarse prompt "one", b has "two"'):
        read_task_folder(folder, TEXT)


def test_conditions_are_looked_into_where_they_are_asked_for(tmp_path):
    folder = dataset(
        tmp_path / "data",
        task("one", prompt=None, style=["b.png", "text.png", "a.json", "../a.png"]),
        task("two", prompt=None, pose="a.json", identity="b.png"),
        task("three", prompt=None, pose=["broken.json", "b.png", "latin.json"]),
        task("four", identity=["b.png"]),
        task("five", prompt="", style="nowhere.png"),
    )
    (folder / "text.png").write_text("once upon a time")
    (folder / "a.json").write_text(json.dumps(POSE))
    (folder / "broken.json").write_text('{"people": 3}')
    (folder / "latin.json").write_bytes(b'{"people": "\xff"}')
    found = read_task_folder(folder, DataConfig(conditions=("style", "pose")))
    assert [(kept.id, kept.style, kept.pose, kept.identity) for kept in found.tasks] == [
        ("one", ("b.png",), (), ()),
        ("two", (), ("a.json",), ()),
        ("three", (), ("b.png",), ()),
    ]
    said = reasons(found)
    one = "style of task one (tasks.jsonl line 1)"
    assert said.pop(f"text.png, {one}").startswith("cannot be decoded as an image")
    assert said.pop(f"a.json, {one}").startswith("is no picture; expected .png")
    assert said.pop(f"../a.png, {one}").startswith("leads out of the dataset's folder")
    assert "canvas_width is missing" in said.pop("broken.json, pose of task three (tasks.jsonl line 3)")
    assert "is not UTF-8" in said.pop("latin.json, pose of task three (tasks.jsonl line 3)")
    assert said.pop("nowhere.png, style of task five (tasks.jsonl line 5)") == "no such file"
    nothing = "has no style and no pose that can be used; data.conditions asks for style, pose"
    assert said == {f"task {n} (tasks.jsonl line {i})": nothing for n, i in (("four", 4), ("five", 5))}


def test_clips_stand_for_poses_where_models_can_find_them(tmp_path):
    lines = task("a", clips=[{"file": "a.png"}, {"file": "b.png"}]), task("b", pose="b.png")
    folder = dataset(tmp_path, *lines)
    config = DataConfig(conditions=("pose",), pose_models="models")
    assert [kept.pose for kept in read_task_folder(folder, config).tasks] == [("a.png", "b.png"), ("b.png",)]
    without = read_task_folder(folder, DataConfig(conditions=("pose",)))
    assert [kept.id for kept in without.tasks] == ["b"]
