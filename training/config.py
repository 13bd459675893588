"""Training configuration: frozen dataclasses filled from one TOML file; unknown keys are refused."""

import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin


@dataclass(frozen=True)
class DataConfig:
    """The tasks. Only the miniature's world makes its own data so far."""

    clips_per_task: int = 24
    held_out_tasks: int = 32
    lora_tasks: int = 96  # training tasks that get a LoRA of their own
    seed: int = 0


@dataclass(frozen=True)
class LoRAConfig:
    """Per-task LoRAs (the training targets)."""

    rank: int = 4
    steps: int = 200
    batch: int = 8
    learning_rate: float = 3e-3
    tasks_at_once: int = 4
    seed: int = 0


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the hypernetwork; see lofa_core.hypernetwork.HypernetworkConfig."""

    patch: int = 48
    width: int = 128
    heads: int = 4
    blocks: int = 3
    mlp_ratio: int = 2
    pooling_queries: int = 8
    feature_blocks: tuple[int, ...] = (0, 2)


@dataclass(frozen=True)
class Stage1Config:
    """Response maps (LoFA eq. 4) with the likelihood of dW itself as a second, denser target."""

    steps: int = 1500
    tasks: int = 8  # tasks a step and process
    layers: int = 8  # target layers a step
    learning_rate: float = 2e-3
    likelihood_weight: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Stage2Config:
    """LoRA prediction (LoFA eq. 6-8) with function matching."""

    steps: int = 4000
    tasks: int = 8  # tasks a step and process
    clips: int = 3  # clips a task
    learning_rate: float = 2e-3
    reconstruction_weight: float = 0.05
    diffusion_weight: float = 0.25
    distillation_weight: float = 1.0
    teacher_guidance: float = 1.3  # of the fine prompt over the coarse one, in the base model as a teacher
    fine_prompts: float = 0.25  # share of steps under the fine prompt instead of the coarse one
    ema_decay: float = 0.999
    seed: int = 0


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out measures."""

    clips_per_task: int = 6
    sampling_steps: int = 16
    shift: float = 3.0
    seed: int = 1234


@dataclass(frozen=True)
class TrainingConfig:
    """One training run."""

    base: str  # a base folder; "miniature" is the embedded one
    out: str  # the run's folder
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def load_config(path: Path) -> TrainingConfig:
    """Read a TOML file. ValueError names the file, the key, and what was expected."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    return _fill(TrainingConfig, values, str(path))


def _fill(kind: type, values: dict[str, Any], where: str):
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}. Known here: {', '.join(known)}.")
    filled = {}
    for key, value in values.items():
        wanted = known[key].type
        if is_dataclass(wanted):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: [{key}] must be a table, not {value!r}.")
            filled[key] = _fill(wanted, value, f"{where} [{key}]")
        else:
            filled[key] = _checked(wanted, value, f"{where}: {key}")
    try:
        return kind(**filled)
    except TypeError as error:
        missing = [name for name in ("base", "out") if name in known and name not in filled]
        raise ValueError(f"{where}: missing {', '.join(missing) or error}.") from error


def _checked(wanted: Any, value: Any, where: str):
    if get_origin(wanted) is tuple:
        item = get_args(wanted)[0]
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {value!r}.")
        return tuple(_checked(item, v, where) for v in value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {wanted.__name__}, not {value!r}.")
    return value
