"""Before/after sheets: for each kind of condition, held-out tasks shown beside what the base model makes.

`python -m training.miniature.sheets --hypernetwork FILE --out docs` writes condition_<kinds>.png for each
kind that the hypernetwork knows, and one for text and style together. Every clip is a row of frames: what was
given, the base under the coarse prompt, and the same noise with the predicted LoRA.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console

from lofa_core import miniature
from lofa_core.checkpoint import load_hypernetwork
from lofa_core.hypernetwork import Hypernetwork

from ..backbones import load_vae
from ..config import DataConfig
from ..factors import Factors, by_name
from ..injection import injected
from ..judge import predicted_factors
from . import image_encoder, world
from .latents import decode_clips
from .tasks import POSE_SIZE, MiniatureTasks, drawn_pose
from .vae import WholeClipVAE
from .world_tasks import WorldTask

EXAMPLES, CLIPS, STEPS, SHIFT, SCALE = 2, 2, 16, 3.0, 2
_BAR = 18  # pixels of a line of words


class Studio:
    """Generates clips of the miniature with and without a LoRA."""

    def __init__(self, data: MiniatureTasks, seed: int):
        self.data, self.denoiser = data, data.load_denoiser()
        layers = data.base_description()
        self.groups = [[layers.layers[i].name for i in places] for places in layers.by_shape().values()]
        self.modules = self.denoiser.modules([name for names in self.groups for name in names])
        self.decoder = WholeClipVAE(load_vae(data.base))
        self.noise = torch.randn(CLIPS, 16, 5, 8, 8, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def clips(self, loras: Factors | None) -> np.ndarray:
        """uint8 [CLIPS, T, H, W, 3] under the coarse prompt, from the same noise each time."""
        prompts = self.data.coarse().expanded(CLIPS)
        if loras is None:
            latents = self.denoiser.sample(self.noise, prompts, STEPS, SHIFT)
        else:
            with injected(self.modules, *by_name(self.groups, loras)):
                latents = self.denoiser.sample(self.noise, prompts, STEPS, SHIFT)
        return decode_clips(self.decoder, latents)


def filmstrip(clip: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] -> every other frame side by side."""
    return np.concatenate(list(clip[::2]), 1)


def sheet(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Pictures [H, W, 3] below each other, each under its words."""
    width = SCALE * max(picture.shape[1] for _, picture in rows)
    height = sum(SCALE * picture.shape[0] + _BAR for _, picture in rows)
    whole = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(whole), 0
    for words, picture in rows:
        draw.text((4, top + 3), words, fill="black")
        size = (SCALE * picture.shape[1], SCALE * picture.shape[0])
        image = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
        whole.paste(image, (0, top + _BAR))
        top += SCALE * picture.shape[0] + _BAR
    return whole


def given(data: MiniatureTasks, task: WorldTask, kinds: list[str], seed: int) -> tuple[dict, list]:
    """A task's condition of these kinds, and rows that show it."""
    rng = np.random.default_rng(seed)
    told, rows = {}, []
    for kind in kinds:
        if kind == "text":
            told[kind] = data.reserved_sentence(WorldTask(task.action), rng)
            rows.append((f'text: "{told[kind]}"', np.full((2, 9 * world.SIZE, 3), 255, np.uint8)))
        elif kind == "pose":
            told[kind] = data.pose(task, rng)
            shown = drawn_pose(told[kind])[0].permute(1, 2, 3, 0).numpy()
            rows.append((f"pose, {POSE_SIZE[0]} frames", filmstrip((shown * 255).astype(np.uint8))))
        else:
            told[kind] = [(task.look, 0)]
            picture = image_encoder.picture(task.look, world.all_actions(), rng)
            rows.append(("style: a picture of this look", picture))
    return told, rows


def condition_sheet(
    hypernetwork: Hypernetwork, studio: Studio, kinds: list[str], tasks: list[WorldTask], seed: int
) -> Image.Image:
    """Base and LoRA for each of the tasks."""
    rows = []
    for task in tasks:
        told, shown = given(studio.data, task, kinds, seed)
        loras = predicted_factors(hypernetwork, studio.data, [told])
        rows += shown
        for words, clips in (
            (f'base, "{studio.data.coarse_prompt}"', studio.clips(None)),
            (f"with the LoRA predicted from {' and '.join(kinds)} ({task})", studio.clips(loras)),
        ):
            rows.append((words, np.concatenate([filmstrip(clip) for clip in clips], 0)))
    return sheet(rows)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.miniature.sheets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hypernetwork", type=Path, default=miniature.HYPERNETWORK)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--cache", type=Path, default=Path("runs/miniature"), help="of encoded pictures")
    parser.add_argument("--seed", type=int, default=11)
    chosen = parser.parse_args()
    hypernetwork = load_hypernetwork(chosen.hypernetwork)
    data = MiniatureTasks(DataConfig(conditions=tuple(hypernetwork.conditions)), chosen.cache)
    studio, console = Studio(data, chosen.seed), Console(highlight=False)
    actions = [task for task in data.held_out if task.action is not None][:EXAMPLES]
    looks = [task for task in data.held_out if task.look is not None][:EXAMPLES]
    wanted = [([kind], looks if kind == "style" else actions) for kind in data.kinds]
    if {"text", "style"} <= set(data.kinds):
        both = [WorldTask(a.action, b.look) for a, b in zip(actions, looks, strict=True)]
        wanted.append((["text", "style"], both))
    chosen.out.mkdir(parents=True, exist_ok=True)
    for kinds, tasks in wanted:
        path = chosen.out / f"condition_{'_'.join(kinds)}.png"
        condition_sheet(hypernetwork, studio, kinds, tasks, chosen.seed).save(path, optimize=True)
        console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
