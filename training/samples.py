"""What a trained hypernetwork does, to look at: for some held-out tasks, samples of the base model and of the
predicted LoRA from the same noise, and the response heatmap.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lofa_core.heatmap import render
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.whole_files import cleared, whole_file

from .data.folder_tasks import Tasks
from .factors import Factors, by_name
from .injection import injected
from .looks import looks_at, names_by_shape, on
from .over_base import padded

TASKS, STEPS, SHIFT = 2, 20, 3.0
_FRAMES = 9  # of a clip that are shown, at most
_SEED = 97


@torch.no_grad()
def write_samples(hypernetwork: Hypernetwork, data: Tasks, folder: Path, device: torch.device) -> list[Path]:
    """Write <task>.png (the base above, the LoRA below) and <task>_response.png for the first held-out tasks.

    Both samples are under the coarse prompt. Returns the files; none where nothing is held out.
    """
    tasks, written = data.held_out[:TASKS], []
    if not tasks:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    weights = [own.to(device) for own in data.weights_by_shape()]
    looks, groups = looks_at(hypernetwork, weights), names_by_shape(hypernetwork)
    denoiser = data.load_denoiser()
    denoiser.model.to(device)
    modules = denoiser.modules([name for names in groups for name in names])
    prompt = data.coarse().to(device)
    for number, task in enumerate(tasks):
        rng = np.random.default_rng([_SEED, number])
        conditions = on(padded(data.conditions([data.plain_condition(task, rng)]), hypernetwork), device)
        first, second = (
            stage.trunk.project(conditions) for stage in (hypernetwork.stage1, hypernetwork.stage2)
        )
        responses = [hypernetwork.stage1(look, first) for look in looks]
        pairs = [
            hypernetwork.stage2(look, second, response.features)
            for look, response in zip(looks, responses, strict=True)
        ]
        loras = Factors(*map(tuple, zip(*pairs, strict=True)))
        noise = torch.randn(
            1, *data.loss_weights(task).shape, generator=torch.Generator().manual_seed(number)
        )
        base = denoiser.sample(noise.to(device), prompt, STEPS, SHIFT)
        with injected(modules, *by_name(groups, loras)):
            own = denoiser.sample(noise.to(device), prompt, STEPS, SHIFT)
        rows = [_row(data.pictures(latents.cpu())[0]) for latents in (base, own)]
        maps = {
            name: row
            for names, response, W in zip(groups, responses, weights, strict=True)
            for name, row in zip(names, response.probability(W)[0].cpu(), strict=True)
        }
        for name, picture in ((task.id, np.concatenate(rows, 0)), (f"{task.id}_response", render(maps))):
            written.append(folder / f"{name}.png")
            with whole_file(cleared(written[-1])) as unfinished:
                Image.fromarray(picture).save(unfinished, format="PNG")
    return written


def _row(clip: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] -> some of its frames side by side."""
    picks = np.linspace(0, len(clip) - 1, min(_FRAMES, len(clip))).round().astype(int)
    return np.concatenate(list(clip[picks]), 1)
