"""Reading folders of videos and pictures, pairing them with references, and prompt files."""

import json

import numpy as np
import pytest
from small_videos import square, write_picture, write_video

from lofa_core.metrics.clips import Clip, read_folder, read_prompts, references_of


def clips(tmp_path, *names):
    return [Clip(tmp_path / f"{name}.png", name, 1, 0.0) for name in names]


def test_videos_and_pictures_come_back_as_they_were_written(tmp_path):
    frames = square(7)
    write_video(tmp_path / "b" / "walk.avi", frames, fps=12.0)
    write_picture(tmp_path / "a.v2.png", frames[0])
    (tmp_path / "notes.txt").write_text("not a video")
    (tmp_path / ".hidden.png").write_bytes(b"")
    found, unreadable = read_folder(tmp_path)
    assert not unreadable
    assert [(clip.name, clip.group, clip.count) for clip in found] == [("a.v2", "", 1), ("b/walk", "b", 7)]
    picture, video = found
    assert video.fps == pytest.approx(12.0) and picture.fps == 0.0
    assert np.array_equal(picture.evenly(5), frames[:1])
    assert np.array_equal(video.evenly(3), frames[[0, 3, 6]])
    assert np.array_equal(video.evenly(1), frames[:1])
    assert np.array_equal(video.evenly(100), frames)
    assert np.array_equal(np.stack(list(video.frames(2))), frames[::2])
    assert np.array_equal(np.stack(list(video.frames())), frames)


def test_what_cannot_be_read_is_named(tmp_path):
    write_picture(tmp_path / "good.png", square(1)[0])
    (tmp_path / "broken.mp4").write_bytes(b"this is no video" * 100)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "wrong.jpg").write_bytes(b"this is no picture")
    found, unreadable = read_folder(tmp_path)
    assert [clip.name for clip in found] == ["good"]
    assert set(unreadable) == {"broken", "empty", "wrong"}
    assert "broken.mp4" in unreadable["broken"] and "picture" in unreadable["empty"]


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no video and no picture"):
        read_folder(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    with pytest.raises(ValueError, match="none of its 1 files can be read; the first: broken.mp4"):
        read_folder(tmp_path)
    for suffix in ("png", "jpg"):
        write_picture(tmp_path / f"twice.{suffix}", square(1)[0])
    with pytest.raises(ValueError, match="the same name twice"):
        read_folder(tmp_path)


def test_a_video_is_paired_by_its_name_then_its_folder_then_the_only_reference(tmp_path):
    videos = clips(tmp_path, "alice/1", "alice/2", "bob/1", "bob/x", "eve/1", "plain")
    references = clips(tmp_path, "alice", "bob/1", "bob/2", "other")
    found = {name: [clip.name for clip in pair] for name, pair in references_of(videos, references).items()}
    assert found == {
        "alice/1": ["alice"],
        "alice/2": ["alice"],
        "bob/1": ["bob/1"],
        "bob/x": ["bob/1", "bob/2"],
    }
    only = references_of(videos, references[3:])
    assert {name: [clip.name for clip in pair] for name, pair in only.items()} == {
        video.name: ["other"] for video in videos
    }
    assert references_of(videos, []) == {}


def test_prompts_a_line_belong_to_the_videos_in_order(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a dog\n  ein Hund läuft \n\n", encoding="utf-8")
    assert read_prompts(path, ["a", "b"]) == ({"a": "a dog", "b": "ein Hund läuft"}, [])
    with pytest.raises(ValueError, match="2 lines for 3 videos"):
        read_prompts(path, ["a", "b", "c"])
    path.write_text("a dog\n\na cat\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        read_prompts(path, ["a", "b", "c"])
    with pytest.raises(ValueError, match="is 10 or 2 first"):  # sorted as text, 10 comes first
        read_prompts(path, ["1", "10", "2"])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(path, ["a"])


def test_prompts_by_name(tmp_path):
    path = tmp_path / "prompts.jsonl"
    entries = [("b/walk.mp4", "walks"), ("a.v2", "stands"), ("gone.mp4", "flies")]
    lines = [json.dumps({"video": video, "prompt": prompt, "seed": 1}) for video, prompt in entries]
    path.write_text("\n\n".join(lines))
    assert read_prompts(path, ["a.v2", "b/walk", "c"]) == (
        {"b/walk": "walks", "a.v2": "stands"},
        ["gone.mp4"],
    )
    for text, message in (
        ("not json", "line 1 is not JSON"),
        ("[1]", "line 1 must be"),
        ('{"video": "a"}', "line 1 must be"),
        ('{"video": "a", "prompt": " "}', "line 1 must be"),
        ('{"video": 3, "prompt": "x"}', "line 1 must be"),
        (lines[0] + "\n" + lines[0].replace(".mp4", ""), "line 2 names b/walk a second time"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(path, ["a", "b/walk"])
