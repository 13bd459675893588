"""Speed and memory: `python -m training.benchmark {predict,lora-dataset}`.

Times are ratios within one run where it matters: the share of the machine's own matrix-multiplication rate,
measured in the same run, dtype and shapes, tells a slow program from a slow computer.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lofa_core.base_models import WAN_KINDS, BaseWeights
from lofa_core.conditions import Given
from lofa_core.descriptions import HypernetworkConfig
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.prediction import default_batch_size, predict
from lofa_core.steps import Watch
from training.config import LoRAConfig
from training.full_size import LAYERS, SIDE, TEXT_WIDTH, WORDS, random_condition, released_hypernetwork
from training.machine import device_name, peak_memory, seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.benchmark", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "predict",
        help="one whole LoRA by a hypernetwork of LoFA_v0's size",
        description="Predict the LoRA of WAN2.1-T2V-1.3B by a hypernetwork of LoFA_v0's size, both of random "
        "weights. GFLOP are those the algorithm needs: the text counts once, its padding as one row.",
    )
    _common(command, "bfloat16")
    command.add_argument("--layers", type=int, default=LAYERS, help=f"the first N of the {LAYERS} layers")
    command.add_argument("--batch", type=int, help="layers at a time (default: what prediction chooses)")
    command.add_argument("--repeats", type=int, help="the median of these counts (default: GPU 5, CPU 1)")
    command.set_defaults(work=_predict)
    command = commands.add_parser(
        "lora-dataset",
        help="per-task LoRAs many at once against one by one with PEFT",
        description="Train the same LoRAs of the miniature one by one with PEFT and all at once with the "
        "LoRA factory, in the same run.",
    )
    _common(command, "float32")
    command.add_argument("--tasks", type=int, default=32)
    command.add_argument("--steps", type=int, default=10)
    command.add_argument(
        "--batch", type=int, default=4, help="clips a step and task (default 4, the paper's)"
    )
    command.add_argument("--rank", type=int, default=4)
    command.add_argument(
        "--processes", type=int, help="that share the tasks (default: GPU 1, CPU one a core)"
    )
    command.add_argument("--repeats", type=int, default=3, help="the median of these counts (default 3)")
    command.set_defaults(work=_lora_dataset)
    chosen = parser.parse_args()
    found, table = chosen.work(parser, chosen, torch.device(chosen.device), DTYPES[chosen.dtype])
    if chosen.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        Console(highlight=False).print(table)
    return 0


def _common(command: argparse.ArgumentParser, dtype: str) -> None:
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--dtype", choices=DTYPES, default=dtype)
    command.add_argument("--json", action="store_true", help="one object on standard output, nothing else")


def _predict(parser, chosen, device: torch.device, dtype: torch.dtype) -> tuple[dict, Table]:
    if not 1 <= chosen.layers <= LAYERS:
        parser.error(f"--layers {chosen.layers}: expected 1 to {LAYERS}")
    found = measure_prediction(device, dtype, chosen.layers, chosen.batch, chosen.repeats)
    return found, _table(found)


def _lora_dataset(parser, chosen, device: torch.device, dtype: torch.dtype) -> tuple[dict, Table]:
    for name in ("tasks", "steps", "batch", "rank", "repeats"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} {getattr(chosen, name)}: expected 1 or more")
    from training import lora_benchmark  # with diffusers and PEFT, whose import takes seconds

    settings = LoRAConfig(rank=chosen.rank, steps=chosen.steps, batch=chosen.batch)
    processes = chosen.processes or (1 if device.type == "cuda" else os.cpu_count() or 1)
    found = lora_benchmark.measure_lora_dataset(
        device, dtype, chosen.tasks, settings, processes, chosen.repeats
    )
    return found, lora_benchmark.table(found)


def measure_prediction(
    device: torch.device, dtype: torch.dtype, layers: int, batch: int | None, repeats: int | None
) -> dict[str, float | int | str]:
    """The figures of one prediction; `seconds` is the median over `repeats`, after a warm-up of one batch."""
    network = released_hypernetwork(dtype=dtype, device=str(device), layers=layers)
    draw = torch.Generator(device).manual_seed(1)
    condition = random_condition(WORDS, draw)
    # One matrix for all layers: the time does not depend on the values, and the base takes no memory.
    matrix = torch.randn(SIDE, SIDE, generator=draw, device=device).mul_(SIDE**-0.5).bfloat16()
    names = (f"blocks.{depth}.{kind}.weight" for depth in range(LAYERS // 8) for kind in WAN_KINDS)
    base = BaseWeights.from_tensors(dict.fromkeys(names, matrix.shape), lambda key: matrix)
    base.model = replace(base.model, layers=base.model.layers[:layers])
    size = min(layers, batch or default_batch_size(network, device))

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"predicting {layers} layers", total=layers)

        def once() -> None:
            predict(
                network, base, {"text": Given(condition)}, device=device, dtype=dtype, batch_size=batch,
                watch=Watch(lambda done, total: bar.update(task, completed=done)),
            )  # fmt: skip

        if device.type == "cuda":
            once()
        else:  # a whole warm-up would take minutes
            _first_batch(network, matrix, condition, size)
        rate = matmul_rate(network.config, device, dtype, size)
        taken = statistics.median(
            seconds(once, device) for _ in range(repeats or (5 if device.type == "cuda" else 1))
        )
    peak = peak_memory(device)
    rate = statistics.median([rate, matmul_rate(network.config, device, dtype, size)])
    gflop = prediction_flop(network.config, layers, WORDS + 1) / 1e9
    return {
        "layers": layers,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "seconds": round(taken, 4),
        "gflop": round(gflop, 1),
        "gflops_per_s": round(gflop / taken, 1),
        "matmul_gflops_per_s": round(rate / 1e9, 1),
        "share_of_matmul_rate": round(gflop * 1e9 / taken / rate, 4),
        "peak_memory_bytes": peak,
    }


def prediction_flop(config: HypernetworkConfig, layers: int, rows: int) -> int:
    """Multiplications and additions (2 for a product of two numbers) that both stages need.

    `rows`: of the condition that differ; their projection, keys and values count once for all layers.
    """
    d, hidden = config.width, config.mlp_ratio * config.width
    patches = config.grid[0] * config.grid[1]
    tokens = patches + config.cls_token
    channels = 2 if config.weight_input == "magnitude" else 1
    mlp = 2 * tokens * 2 * d * hidden
    self_attention = 2 * tokens * 4 * d * d + 4 * tokens * tokens * d
    cross_attention = 2 * tokens * 2 * d * d + 4 * tokens * rows * d
    embedding = 2 * channels * SIDE * SIDE * d
    heads = 2 * d * config.rank * 2 * SIDE
    stage = embedding + config.blocks * (self_attention + cross_attention + 2 * mlp) + heads
    features = len(config.feature_blocks) * (self_attention + mlp)
    text = 2 * rows * TEXT_WIDTH * d + config.blocks * 2 * rows * 2 * d * d
    return layers * (2 * stage + features) + 2 * text


def matmul_rate(config: HypernetworkConfig, device: torch.device, dtype: torch.dtype, layers: int) -> float:
    """FLOP a second of the matrix products alone that a block does on `layers` layers, in its proportions."""
    d, hidden = config.width, config.mlp_ratio * config.width
    tokens = layers * (config.grid[0] * config.grid[1] + 1)
    flop, taken = 0.0, 0.0
    for inner, outer, count in ((d, d, 6), (d, hidden, 2), (hidden, d, 2)):
        x = torch.randn(tokens, inner, device=device).to(dtype)
        weight = (torch.randn(outer, inner, device=device) * inner**-0.5).to(dtype)

        def product(x=x, weight=weight) -> None:
            F.linear(x, weight)

        product()
        flop += count * 2 * tokens * inner * outer
        taken += count * statistics.median(seconds(product, device) for _ in range(7))
    return flop / taken


@torch.no_grad()
def _first_batch(network: Hypernetwork, matrix: Tensor, condition: Tensor, size: int) -> None:
    given = {"text": Given(condition.to(network.stage1.trunk.norm.weight))}
    network(matrix.expand(size, -1, -1), torch.arange(size), given)


def _table(found: dict[str, float | int | str]) -> Table:
    rows = {
        "layers": f"{found['layers']} of {LAYERS}, both stages, {found['dtype']}",
        "device": str(found["device"]),
        "time": f"{found['seconds']} s",
        "work": f"{found['gflop']:,} GFLOP, {found['gflops_per_s']:,} a second",
        "matrix products alone": f"{found['matmul_gflops_per_s']:,} GFLOP a second",
        "share of that rate": f"{found['share_of_matmul_rate']:.1%}",
        "peak memory": f"{int(found['peak_memory_bytes']) / 1e9:.2f} GB, the two networks' weights included",
    }
    table = Table(show_header=False)
    for name, words in rows.items():
        table.add_row(name, words)
    return table


if __name__ == "__main__":
    sys.exit(main())
