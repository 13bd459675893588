"""Pictures that show what LoFA does, from real output: the README's, and those of ComfyUI's templates.

`python -m training.miniature.pictures` draws docs/what_it_does.png from the demo's sentence and clips.
`... --screenshots out/screenshots` also draws workflows/<name>.jpg, which the templates browser shows, from
what `pytest -m "slow or not slow" tests/comfy/test_page.py` leaves there: a miniature's clip, or the graph of
a template for WAN or SDXL (never a clip: those models were not there to make one).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from lofa_core import miniature
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import load_hypernetwork
from lofa_core.conditions import Given
from lofa_core.conditions.pose import pose_from_keypoints
from lofa_core.conditions.text import TextEncoder
from lofa_core.heatmap import overview
from lofa_core.lora_files import save_lora
from lofa_core.prediction import predict

from ..backbones import load_pipeline
from ..data.media import read_whole
from . import demo

ROOT = Path(__file__).resolve().parents[2]
SEED, SHOWN, GAP = 7, (0, 4, 8, 12, 16), 28  # the demo's seed; frames of each clip; pixels between the parts
THUMBNAIL, MOMENTS = 384, (1, 4, 9, 13)  # pixels a side; the frames of a clip in it
BADGE, GIVEN = 54, 84  # what the browser writes over the upper left corner; the row of what was given
PAPER, INK, FAINT, NIGHT, LIGHT = "#ffffff", "#1c1c22", "#6b6b75", "#1e1e22", "#e8e8ec"
# What is written over the graph of a template whose model is not here.
GRAPHS = {
    "wan_text_action": ("WAN2.1", "a sentence becomes a LoRA"),
    "wan_pose_action": ("WAN2.1", "a movement becomes a LoRA"),
    "wan_style": ("WAN2.1", "a style becomes a LoRA"),
    "sdxl_identity": ("SDXL", "a face becomes a LoRA"),
}


def write(canvas: Image.Image, place: tuple[int, int], words: str, size: int, ink: str = INK) -> None:
    """Words whose upper left corner is `place`, in Pillow's own font."""
    ImageDraw.Draw(canvas).multiline_text(
        place, words, fill=ink, font=ImageFont.load_default(size), spacing=size // 3
    )


def wrapped(words: str, width: int, size: int) -> str:
    """The same words in lines of at most `width` pixels."""
    font, lines = ImageFont.load_default(size), [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def enlarged(picture: np.ndarray, width: int) -> Image.Image:
    """uint8 [H, W, 3] at another width, its pixels kept sharp."""
    image = Image.fromarray(picture)
    return image.resize((width, width * image.height // image.width), Image.Resampling.NEAREST)


def strips(clips: np.ndarray) -> np.ndarray:
    """[B, T, H, W, 3] -> the frames of each clip in a row, a row for each clip."""
    return np.concatenate([np.concatenate(list(clip[list(SHOWN)]), 1) for clip in clips], 0)


def what_it_does() -> Image.Image:
    """Sentence -> response map -> the same seeds without and with the LoRA: what `make demo` computes."""
    network, base = load_hypernetwork(miniature.HYPERNETWORK), BaseWeights.open(miniature.FOLDER)
    prediction = predict(
        network, base, {"text": Given(TextEncoder.open(miniature.FOLDER).encode(demo.PROMPT))}
    )
    pipeline = load_pipeline(miniature.FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    before = strips(demo.generate(pipeline, network.coarse_prompt, SEED))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_lora(prediction.lora, file)
        pipeline.load_lora_weights(str(file))
    after = strips(demo.generate(pipeline, network.coarse_prompt, SEED))

    size, column, clip = 22, 470, 560
    line = size + GAP // 2
    responses = Image.fromarray(overview(prediction.responses)).resize((column, column * 388 // 624))
    rows = [enlarged(rows, clip) for rows in (before, after)]
    top = GAP + line
    canvas = Image.new("RGB", (column + 2 * clip + 4 * GAP, top + rows[0].height + GAP), PAPER)
    write(canvas, (GAP, GAP), "1. You say", size)
    write(canvas, (GAP, top), wrapped(f'"{demo.PROMPT}"', column, size), size, FAINT)
    middle = canvas.height - GAP - responses.height
    write(
        canvas, (GAP, middle - 2 * line), "2. LoFA predicts where the model\nmust change, and the LoRA", size
    )
    canvas.paste(responses, (GAP, middle))
    for left, words, strip in zip(
        (column + 2 * GAP, column + clip + 3 * GAP),
        (f'3. The base model: "{network.coarse_prompt}"', "The same prompt and seeds, with the LoRA"),
        rows,
        strict=True,
    ):
        write(canvas, (left, GAP), words, size)
        canvas.paste(strip, (left, top))
    return canvas


def _given(workflow: dict) -> Image.Image:
    """What the template's LoRA is predicted from: a sentence, skeletons, a picture."""
    nodes = {node["type"]: node for node in workflow["nodes"]}
    canvas = Image.new("RGB", (THUMBNAIL, GIVEN), NIGHT)
    x = 8
    if "LoFAEncodePose" in nodes:
        document = json.loads(
            miniature.example("pose", nodes["LoFAMiniatureExample"]["widgets_values"][0]).read_text("utf-8")
        )
        drawn = pose_from_keypoints(document, miniature.FRAMES, miniature.SIZE, miniature.SIZE)[0]
        for moment in MOMENTS:
            frame = (255 * drawn[:, moment].permute(1, 2, 0)).to(torch.uint8).numpy()
            canvas.paste(enlarged(frame, 76), (x, 4))
            x += THUMBNAIL // len(MOMENTS)
    if "LoFAEncodeStyle" in nodes:
        name = nodes["LoFAMiniatureExample"]["widgets_values"][1]
        canvas.paste(Image.open(miniature.example("style", name)).convert("RGB").resize((76, 76)), (x, 4))
        x += 88
    if "LoFAEncodeText" in nodes:
        sentence = nodes["LoFAEncodeText"]["widgets_values"][0]
        write(canvas, (x, 10), wrapped(f'"{sentence}"', THUMBNAIL - x - 8, 15), 15, LIGHT)
    elif "LoFAEncodeStyle" in nodes:
        write(canvas, (x, 32), "clothes and place from a picture", 15, LIGHT)
    return canvas


def clip_thumbnail(workflow: dict, video: np.ndarray) -> Image.Image:
    """A miniature template's given, and three moments of its clip [T, H, W, 3] (base left, LoRA right)."""
    side, cell = video.shape[1], THUMBNAIL // len(MOMENTS)
    canvas = Image.new("RGB", (THUMBNAIL, THUMBNAIL), NIGHT)
    canvas.paste(_given(workflow), (0, BADGE))
    top = BADGE + GIVEN
    for words, left in (("base model", 0), ("with the LoRA", video.shape[2] - side)):
        write(canvas, (8, top + 2), words, 15, LIGHT)
        for number, moment in enumerate(MOMENTS):
            frame = Image.fromarray(video[moment, :, left : left + side]).resize((cell - 2, cell - 2))
            canvas.paste(frame, (number * cell + 1, top + 24))
        top += 24 + cell
    return canvas


def graph_thumbnail(graph: Image.Image, title: str, words: str) -> Image.Image:
    """A screenshot of a graph, under what it is for."""
    canvas = Image.new("RGB", (THUMBNAIL, THUMBNAIL), NIGHT)
    shown = graph.resize((THUMBNAIL, THUMBNAIL * graph.height // graph.width), Image.Resampling.LANCZOS)
    write(canvas, (14, BADGE), title, 40, LIGHT)
    write(canvas, (14, BADGE + 48), words, 20, LIGHT)
    canvas.paste(shown, (0, THUMBNAIL - shown.height - 8))
    return canvas


def thumbnail(workflow: Path, screenshots: Path) -> Image.Image:
    """What the templates browser shows for a workflow. OSError or ValueError names what is missing."""
    if workflow.stem in GRAPHS:
        with Image.open(screenshots / f"{workflow.stem}_graph.png") as graph:
            return graph_thumbnail(graph.convert("RGB"), *GRAPHS[workflow.stem])
    video = read_whole(screenshots / f"{workflow.stem}.mp4", miniature.FRAMES)
    return clip_thumbnail(json.loads(workflow.read_text(encoding="utf-8")), video)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.miniature.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--screenshots", type=Path, help="out/screenshots of the page's tests")
    parser.add_argument("--out", type=Path, default=ROOT, help="the repository (its docs/ and workflows/)")
    chosen, console = parser.parse_args(), Console(highlight=False)
    target = chosen.out / "docs/what_it_does.png"
    # 256 colours, chosen anew where they are: a third of the size.
    what_it_does().quantize(256, kmeans=2, dither=Image.Dither.NONE).save(target, optimize=True)
    console.print(f"wrote {target}")
    if chosen.screenshots:
        for workflow in sorted((ROOT / "workflows").glob("*.json")):
            target = chosen.out / f"workflows/{workflow.stem}.jpg"
            thumbnail(workflow, chosen.screenshots).save(target, quality=88, optimize=True)
            console.print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
