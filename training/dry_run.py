"""Two optimiser steps of each stage at full size with random weights: does it fit, and how long is a step?

`python -m training.dry_run` builds WAN2.1-T2V-1.3B (`--base sdxl`: SDXL's UNet) and a hypernetwork of the
size of LoFA_v0, and runs the real training loop over random clips. What it learns is nothing; what it costs
is real.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from .config import Stage1Config, Stage2Config
from .full_size import RELEASED
from .machine import device_name, peak_memory
from .random_tasks import RandomSDXL, RandomTasks, RandomWan
from .stage1 import Stage1
from .stages import Diffusion, Stage2
from .trainer import train

STEPS = 2
BASES: dict[str, type[RandomTasks]] = {"wan": RandomWan, "sdxl": RandomSDXL}


class _Done(Exception):
    """Two steps are enough."""


def measure(
    make: Callable[[], Stage1 | Diffusion], device: torch.device, console: Console
) -> dict[str, float | str]:
    """Build a stage and take two steps; seconds of the second, and the process's peak memory so far."""
    stage, times = make(), []

    def after(step: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
        if step == STEPS:
            raise _Done

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Done):
        train(stage, stage.settings, Path(folder), Accelerator(cpu=device.type == "cpu"), console, after)
    return {
        "stage": stage.name,
        "seconds_per_step": round(times[1] - times[0], 2),
        "peak_memory_bytes": peak_memory(device),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.dry_run", description=__doc__)
    parser.add_argument("--base", choices=list(BASES), default="wan")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, help="of a clip (default: 5; the paper: 81; SDXL: always 1)")
    parser.add_argument("--height", type=int, default=64, help="in pixels (the paper: 480; SDXL: 1024)")
    parser.add_argument("--width", type=int, default=64, help="in pixels (the paper: 832; SDXL: 1024)")
    parser.add_argument(
        "--layers", type=int, default=0, help="as many target layers, evenly spread; 0: all (240; SDXL: 560)"
    )
    parser.add_argument(
        "--network-width",
        type=int,
        default=RELEASED.width,
        help=f"of the hypernetwork, a multiple of {RELEASED.heads} (default: {RELEASED.width}, as LoFA_v0)",
    )
    parser.add_argument("--tasks", type=int, default=1, help="tasks a step")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one object on standard output, nothing else")
    chosen = parser.parse_args()
    frames = chosen.frames or (1 if chosen.base == "sdxl" else 5)
    if chosen.base == "sdxl" and frames != 1:
        parser.error("--frames is 1 for SDXL, which makes pictures")
    if frames % 4 != 1 or chosen.height % 16 or chosen.width % 16:
        parser.error("--frames is 1 more than a multiple of 4, --height and --width are multiples of 16")
    if chosen.network_width < 1 or chosen.network_width % RELEASED.heads:
        parser.error(f"--network-width is a multiple of {RELEASED.heads}")
    device, console = torch.device(chosen.device), Console(stderr=True, highlight=False)
    common = {
        "steps": STEPS + 1, "tasks": chosen.tasks, "optimiser": "adamw", "learning_rate": 1e-4,
        "schedule": "constant", "precision": chosen.precision, "checkpoint_activations": True,
        "checkpoint_every": STEPS + 2, "validate_every": 0,
    }  # fmt: skip
    size = (frames, chosen.height, chosen.width)
    data = BASES[chosen.base](size, chosen.layers, getattr(torch, chosen.precision))
    layers = len(data.base.layers)
    network = data.network(chosen.network_width).requires_grad_(True)
    for stage in (network.stage1, network.stage2):
        stage.trunk.checkpoint_activations = True
    known = data.loras()
    stage1 = Stage1Config(**common, layers=min(10, layers), likelihood_weight=0.0)
    stage2 = Stage2Config(**common, clips=1, with_lora=1.0, distillation_weight=0.0, fine_prompts=0.0)
    found = [
        measure(lambda: Stage1(network, data, known, None, stage1, device), device, console),
        measure(lambda: Stage2(network, data, known, None, stage2, device), device, console),
    ]
    report = {
        "base": data.base.name, "device": device_name(device), "precision": chosen.precision,
        "frames": frames, "height": chosen.height, "width": chosen.width, "layers": layers,
        "network_width": chosen.network_width, "tasks": chosen.tasks, "stages": found,
    }  # fmt: skip
    if chosen.json:
        sys.stdout.write(json.dumps(report) + "\n")
        return 0
    clip = f"{frames} frames of {chosen.width}x{chosen.height}"
    title = f"{data.base.name}, {report['device']}, {clip}, {chosen.tasks} task(s)"
    table = Table("stage", "seconds a step", "peak memory", title=title)
    for row in found:
        table.add_row(row["stage"], f"{row['seconds_per_step']}", f"{row['peak_memory_bytes'] / 1e9:.1f} GB")
    Console(highlight=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
