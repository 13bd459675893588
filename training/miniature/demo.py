"""`make demo`: a sentence becomes a LoRA becomes a personalised clip, on the embedded miniature.

Writes the LoRA, a before/after contact sheet and animation, and the response heatmap; prints what the
evaluator reads.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lofa_core import miniature
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import load_hypernetwork
from lofa_core.conditions import Given
from lofa_core.conditions.text import TextEncoder, check_prompt
from lofa_core.heatmap import render
from lofa_core.lora_files import match, save_lora
from lofa_core.prediction import predict

from ..backbones import load_pipeline
from . import captions, evaluator, world

PROMPT = "a person swings the left arm widely and quickly, jumps up, leaning right, feet apart"
CLIPS, STEPS, SCALE = 4, 20, 3


def generate(pipeline, prompt: str, seed: int) -> np.ndarray:
    """`CLIPS` clips from one seed, uint8 [B, T, H, W, 3]."""
    frames = pipeline(
        [prompt] * CLIPS, height=miniature.SIZE, width=miniature.SIZE, num_frames=miniature.FRAMES,
        guidance_scale=1.0, num_inference_steps=STEPS, output_type="np",
        generator=torch.Generator().manual_seed(seed),
    ).frames  # fmt: skip
    return (np.asarray(frames) * 255.0).round().astype(np.uint8)


def contact_sheet(before: np.ndarray, after: np.ndarray, titles: tuple[str, str]) -> Image.Image:
    """Every other frame of each clip in a row: the base's clips above, the personalised ones below."""
    blocks = [
        np.concatenate([np.concatenate(list(clip[::2]), 1) for clip in clips], 0) for clips in (before, after)
    ]
    height, width = blocks[0].shape[0] * 2, blocks[0].shape[1] * 2
    bar = 22
    sheet = Image.new("RGB", (width, 2 * (height + bar)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (block, title) in enumerate(zip(blocks, titles, strict=True)):
        top = row * (height + bar)
        draw.text((6, top + 5), title, fill="black")
        sheet.paste(Image.fromarray(block).resize((width, height), Image.Resampling.NEAREST), (0, top + bar))
    return sheet


def animation(before: np.ndarray, after: np.ndarray) -> list[Image.Image]:
    """Frames with the base's clips in the upper row and the personalised ones in the lower."""
    rows = [np.concatenate(list(clips), axis=2) for clips in (before, after)]  # [T, H, B * W, 3]
    both = np.concatenate(rows, axis=1)
    size = (both.shape[2] * SCALE, both.shape[1] * SCALE)
    return [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in both]


def readings(asked: dict[str, str], before: np.ndarray, after: np.ndarray) -> Table:
    """What the evaluator reads in each clip, beside what the sentence asked for."""
    judge = evaluator.load()
    table = Table("", *world.FACTORS, "as asked", padding=(0, 0))
    table.add_row("the sentence", *(asked.get(name, "-") for name in world.FACTORS), "")
    for title, clips in (("base", before), ("LoRA", after)):
        for number, row in enumerate(judge.read(clips)[0], 1):
            values = [options[i] for options, i in zip(world.FACTORS.values(), row, strict=True)]
            right = sum(asked.get(name) == value for name, value in zip(world.FACTORS, values, strict=True))
            table.add_row(f"{title} {number}", *values, f"{right}/{len(asked)}")
    return table


def run(prompt: str, out: Path, seed: int, console: Console) -> None:
    """The whole path once."""
    network = load_hypernetwork(miniature.HYPERNETWORK)
    check_prompt(prompt, network.conditions["text"].words)
    base = BaseWeights.open(miniature.FOLDER)
    conditions = {"text": Given(TextEncoder.open(miniature.FOLDER).encode(prompt))}
    started = time.perf_counter()
    prediction = predict(network, base, conditions)
    seconds = time.perf_counter() - started

    out.mkdir(parents=True, exist_ok=True)
    file = out / "lora.safetensors"
    save_lora(prediction.lora, file)
    Image.fromarray(render(prediction.responses)).save(out / "response.png")

    pipeline = load_pipeline(miniature.FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    before = generate(pipeline, network.coarse_prompt, seed)
    pipeline.load_lora_weights(str(file))
    after = generate(pipeline, network.coarse_prompt, seed)
    titles = (f'base, "{network.coarse_prompt}"', f'with the LoRA predicted from "{prompt}"')
    contact_sheet(before, after, titles).save(out / "before_after.png")
    frames = animation(before, after)
    frames[0].save(
        out / "before_after.webp", save_all=True, append_images=frames[1:], duration=90, loop=0, lossless=True
    )

    console.print(readings(captions.said_factors(prompt), before, after))
    console.print(f"LoRA predicted in {seconds:.2f} s; {match(prediction.lora, base.model).summary()}")
    for name in ("lora.safetensors", "before_after.png", "before_after.webp", "response.png"):
        console.print(f"wrote {out / name}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompt", default=PROMPT, help="your own sentence, in the miniature's small vocabulary"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--seed", type=int, default=7)
    chosen = parser.parse_args()
    try:
        run(chosen.prompt, chosen.out, chosen.seed, Console(highlight=False))
    except (ValueError, OSError) as error:
        Console(stderr=True).print(Text("error ", "bold red"), Text(str(error)), soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
