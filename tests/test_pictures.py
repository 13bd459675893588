"""The pictures of ComfyUI's templates: what was given, base above, LoRA below; a graph where no clip is."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_videos import write_video

from training.miniature import pictures

WORKFLOWS = sorted((pictures.ROOT / "workflows").glob("*.json"))
MINIATURE = [path for path in WORKFLOWS if path.stem not in pictures.GRAPHS]
RED, BLUE = (200, 30, 30), (30, 30, 200)


def video() -> np.ndarray:
    """17 frames as the templates save them: red on the left, blue on the right."""
    frames = np.full((17, 32, 2 * 32 + 2, 3), 255, np.uint8)
    frames[:, :, :32], frames[:, :, -32:] = RED, BLUE
    return frames


def share(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    """The part of the pixels that are near a colour."""
    return (np.abs(np.asarray(picture).astype(int) - colour).max(-1) < 20).mean()


@pytest.mark.parametrize("workflow", MINIATURE, ids=lambda path: path.stem)
def test_a_miniatures_picture_has_what_was_given_the_base_above_and_the_lora_below(workflow):
    drawn = pictures.clip_thumbnail(json.loads(workflow.read_text(encoding="utf-8")), video())
    assert drawn.size == (pictures.THUMBNAIL, pictures.THUMBNAIL)
    given, clips = pictures.BADGE + pictures.GIVEN, drawn.height
    top = drawn.crop((0, pictures.BADGE, drawn.width, given))
    assert len(top.getcolors(1 << 20)) > 10
    upper = drawn.crop((0, given, drawn.width, (given + clips) // 2))
    lower = drawn.crop((0, (given + clips) // 2, drawn.width, clips))
    assert share(upper, RED) > 0.6 and share(upper, BLUE) == 0
    assert share(lower, BLUE) > 0.6 and share(lower, RED) == 0


def test_no_clip_is_drawn_for_a_model_that_was_not_there(tmp_path):
    Image.new("RGB", (600, 400), RED).save(tmp_path / "wan_style_graph.png")
    write_video(tmp_path / "wan_style.mp4", video()[:, :, :64])
    drawn = pictures.thumbnail(Path("workflows/wan_style.json"), tmp_path)
    assert share(drawn.crop((0, 384 - 200, 384, 384 - 10)), RED) == 1 and share(drawn, BLUE) == 0
    with pytest.raises(OSError, match="sdxl_identity_graph.png"):
        pictures.thumbnail(Path("workflows/sdxl_identity.json"), tmp_path)


def test_words_are_wrapped_to_a_width():
    lines = pictures.wrapped("one two three four five six seven", 90, 15).splitlines()
    assert len(lines) > 2 and " ".join(lines) == "one two three four five six seven"
