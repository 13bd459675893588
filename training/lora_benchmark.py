"""Many per-task LoRAs at once against one after another by PEFT: `python -m training.benchmark lora-dataset`.

The same tasks of the miniature, steps, clips a step, rank and optimiser. Clips are noise: times do not depend
on what they show.

On a CPU the default figure is of several processes against one, and PEFT's threads lose time where other
programs want the cores. `OMP_NUM_THREADS=1 ... --processes 1` compares one core with one core.
"""

import copy
import functools
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.table import Table
from torch import Tensor

from lofa_core.key_names import wan_to_diffusers

from .config import DataConfig, LoRAConfig
from .denoisers import Denoiser, Prompts, WanDenoiser
from .lora_factory import train_loras
from .machine import device_name, seconds
from .miniature.tasks import MiniatureTasks

CLIPS = 24  # of a task


def measure_lora_dataset(
    device: torch.device, dtype: torch.dtype, tasks: int, settings: LoRAConfig, processes: int, repeats: int
) -> dict[str, float | int | str]:
    """Seconds to train `tasks` LoRAs both ways, each the median over `repeats`, the two by turns.

    PEFT trains in this process, with the threads PyTorch takes. The factory trains in `processes` of one
    thread each that share the tasks, or here, as PEFT does, if there is but one. Loading the base model and
    putting PEFT's layers into it does not count.
    """
    clips = _clips(tasks)
    with ExitStack() as stack:
        if processes == 1:
            together = functools.partial(_train_together, device, dtype, clips, settings)
        else:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(
                ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,))
            )
            together = functools.partial(_train_apart, pool, processes, device, dtype, clips, settings)
        one_by_one = functools.partial(_train_by_peft, device, dtype, clips, settings)
        together(), one_by_one()()  # warm-up
        times = [(seconds(one_by_one(), device), seconds(together, device)) for _ in range(repeats)]
    peft, ours = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "tasks": tasks,
        "steps": settings.steps,
        "batch": settings.batch,
        "rank": settings.rank,
        "seconds_peft_one_by_one": round(peft, 3),
        "seconds_together": round(ours, 3),
        "speedup": round(peft / ours, 2),
        "processes": processes,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def table(found: dict[str, float | int | str]) -> Table:
    rows = {
        "device": f"{found['device']}, {found['dtype']}",
        "LoRAs": f"{found['tasks']}, rank {found['rank']}, {found['steps']} steps of {found['batch']} clips",
        "one by one, PEFT": f"{found['seconds_peft_one_by_one']} s",
        "together": f"{found['seconds_together']} s, processes: {found['processes']}",
        "times as fast": f"{found['speedup']}",
    }
    result = Table(show_header=False)
    for name, words in rows.items():
        result.add_row(name, words)
    return result


def _clips(tasks: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"task {i}": torch.randn(CLIPS, 16, 5, 8, 8, generator=draw).half() for i in range(tasks)}


@functools.cache
def _base(device: torch.device, dtype: torch.dtype) -> tuple[Denoiser, tuple, Prompts]:
    data = MiniatureTasks(DataConfig(), Path())
    denoiser = data.load_denoiser()
    denoiser.model.to(device, dtype)
    return denoiser, data.weights.model.layers, data.coarse().to(device, dtype)


def _train_together(device, dtype, clips: dict[str, Tensor], settings: LoRAConfig) -> None:
    denoiser, layers, prompt = _base(device, dtype)
    train_loras(denoiser, layers, clips, prompt, settings)


def _train_apart(pool: ProcessPoolExecutor, processes: int, device, dtype, clips, settings) -> None:
    shares = [dict(list(clips.items())[first::processes]) for first in range(processes)]
    done = [pool.submit(_train_together, device, dtype, share, settings) for share in shares if share]
    for future in done:
        future.result()


def _train_by_peft(device, dtype, clips: dict[str, Tensor], settings: LoRAConfig) -> Callable[[], None]:
    """The work of training one LoRA after another, each in a copy of the base that PEFT has prepared."""
    base, layers, prompt = _base(device, dtype)
    names = [wan_to_diffusers(f"{layer.name}.weight").removesuffix(".weight") for layer in layers]
    adapters = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=names)
    models = [inject_adapter_in_model(adapters, copy.deepcopy(base.model)) for _ in clips]
    text = prompt.expanded(settings.batch)

    def train() -> None:
        for model, latents in zip(models, clips.values(), strict=True):
            denoiser = WanDenoiser(model)
            latents = latents.to(device)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimiser = torch.optim.AdamW(
                trained, settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
            )
            for _ in range(settings.steps):
                clean = latents[torch.randint(CLIPS, (settings.batch,), device=device)].float()
                noise, times = torch.randn_like(clean), denoiser.random_times(settings.batch).to(device)
                said = denoiser(denoiser.noised(clean, noise, times).to(dtype), times, text).float()
                loss = (said - denoiser.target(clean, noise)).pow(2).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()

    return train
