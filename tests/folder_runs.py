"""Runs over small folder datasets that several tests share: every stage takes two steps."""

import io
import json

import numpy as np
from rich.console import Console

from training.config import (
    DataConfig,
    EndToEndConfig,
    LoRAConfig,
    NetworkConfig,
    Stage1Config,
    Stage2Config,
    TrainingConfig,
)
from training.loop import Run

SMALL = NetworkConfig(width=16, heads=2, blocks=2, mlp_ratio=1, pooling_queries=2, feature_blocks=(1,))
STEPS = {"steps": 2, "tasks": 3, "validate_every": 2, "checkpoint_every": 1}


def picture(seed, size=(20, 30)):
    return np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)


def write_lines(folder, lines):
    (folder / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_over(folder, base, out, **changes):
    """A run whose every stage takes two steps."""
    data = {"folder": str(folder), "coarse_prompt": "a thing", **changes.pop("data")}
    config = TrainingConfig(
        str(base), str(out), data=DataConfig(**data), lora=LoRAConfig(rank=2, steps=2, batch=1),
        network=SMALL, stage1=Stage1Config(layers=4, **STEPS),
        stage2=Stage2Config(clips=1, **({"with_lora": 0.4} | STEPS | changes.pop("stage2", {}))),
        end_to_end=EndToEndConfig(clips=1, **(STEPS | changes.pop("end_to_end", {}))),
    )  # fmt: skip
    return Run(config, Console(file=io.StringIO(), width=200))


def losses_of(run, stage):
    lines = (run.folder / stage / "losses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_stages(run, names):
    for name in names:
        getattr(run, name)()
        found = losses_of(run, name)
        assert [line["step"] for line in found] == [1, 2]
        assert all(np.isfinite([v for v in line.values() if isinstance(v, float)]).all() for line in found)
