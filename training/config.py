"""Training configuration: frozen dataclasses filled from one TOML file; unknown keys are refused."""

import difflib
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lofa_core.descriptions import KINDS, Form, Modulation, Readout, Target, WeightInput
from lofa_core.documents import read_text

_MAX_TOML, _MAX_DOTS = 2**20, 200  # characters of a file, and dots in a line
# Names of the reconstruction losses, in training/losses.py.
RECONSTRUCTIONS = ("factors", "delta", "delta_cosine", "spectral", "canonical")


@dataclass(frozen=True)
class DataConfig:
    """The tasks: the miniature's own world, or a folder with tasks.jsonl (docs/DATA.md)."""

    conditions: tuple[str, ...] = ("text",)  # kinds that the hypernetwork learns to be given, of KINDS
    clips_per_task: int = 24
    held_out_tasks: int = 32  # actions
    held_out_looks: int = 24
    more_bases: tuple[str, ...] = ()  # folders (or patterns of them) of the base's relatives to train on too
    training_tasks: int = 0  # actions that anything is learned from; 0: all but the held-out ones
    lora_tasks: int = 96  # training tasks that get a LoRA of their own
    seed: int = 0
    cache: str = ""  # a folder for the world's encoded clips, which several runs share; empty: the run's own
    loras: str = ""  # a folder of per-task LoRAs that several runs share; empty: the run's own
    folder: str = ""  # of tasks.jsonl; empty: the world, to which the keys below do not apply
    frames: int = 17  # of a clip: 1 and a multiple of 4; WAN2.1 makes 81, SDXL 1
    height: int = 64  # of a clip, a multiple of 16; WAN2.1's smaller size is 480 by 832
    width: int = 64
    fps: float = 0.0  # frames a second, from a video's start (WAN2.1: 16); 0: evenly over the whole video
    coarse_prompt: str = "a person is moving"  # LoRAs are trained under it where tasks.jsonl names no other
    pose_frames: int = 17  # of a pose as the hypernetwork sees it
    pose_size: int = 128  # its height and width in pixels, a multiple of 16
    pose_models: str = ""  # a folder of models that find poses in the clips; empty: tasks.jsonl names poses
    image_encoder: str = ""  # a folder with CLIP's, for style and identity; empty: the base's image_encoder/

    def __post_init__(self):
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"frames = {self.frames}: expected 1 and a multiple of 4, such as 17 or 81.")
        if self.pose_frames < 1:
            raise ValueError(f"pose_frames = {self.pose_frames}: expected 1 or more.")
        for name in ("height", "width", "pose_size"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a multiple of 16.")
        unknown = [kind for kind in self.conditions if kind not in KINDS]
        if unknown or not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise ValueError(
                f"conditions = {list(self.conditions)}: expected some of {', '.join(KINDS)}, each once."
            )
        if self.fps < 0:
            raise ValueError(f"fps = {self.fps}: expected 0 or more.")
        if not self.coarse_prompt.strip():
            raise ValueError("coarse_prompt is empty: say what all tasks have in common.")


@dataclass(frozen=True)
class LoRAConfig:
    """Per-task LoRAs (the training targets)."""

    rank: int = 4
    steps: int = 200
    batch: int = 8  # clips a step and task
    learning_rate: float = 3e-3
    tasks_at_once: int = 8
    seed: int = 0
    shared_A: bool = True  # one initial A for all tasks; false draws one for each
    repeat: int = 0  # another number, other noise and held-out clips from the same A: how far LoRAs repeat
    canonical: bool = False  # store B = U sqrt(S), A = sqrt(S) V^T of dW, signs fixed
    max_relative_norm: float = 1.0  # a LoRA with a larger ||dW|| / ||W|| in any layer has diverged


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the hypernetwork; see lofa_core.hypernetwork.HypernetworkConfig."""

    grid: tuple[int, ...] = (2, 2)  # rows and columns of patches
    width: int = 128
    heads: int = 4
    blocks: int = 3
    stage1_blocks: int = 0
    mlp_ratio: int = 2
    pooling_queries: int = 8
    feature_blocks: tuple[int, ...] = (0, 2)
    weight_input: WeightInput = "magnitude"
    modulation: Modulation = "film"
    readout: Readout = "local"
    cls_token: bool = True
    mask_padding: bool = True


@dataclass(frozen=True)
class StageConfig:
    """How a stage is trained, whatever it learns. A new key's default has to be what was done before there
    was one: checkpoints that are older than a key are taken to have had it.
    """

    steps: int = 1000
    tasks: int = 16  # tasks a step, of all processes together
    accumulate: int = 1  # parts in which a process takes its share of a step, to save memory
    optimiser: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 2e-3
    weight_decay: float = 0.0  # AdamW's
    warm_up: int = 50  # steps
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float = 1.0  # largest norm of a step's gradient
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_activations: bool = False  # compute them again in the backward pass, to save memory
    checkpoint_every: int = 200  # steps between two checkpoints
    validate_every: int = 500  # steps between two looks at held-out tasks; 0: none
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("tasks", 1), ("accumulate", 1), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: expected {least} or more.")
        if self.tasks % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} does not divide tasks = {self.tasks}.")


@dataclass(frozen=True)
class Stage1Config(StageConfig):
    """Response maps (LoFA eq. 4) with the likelihood of dW itself as a second, denser target."""

    lora_tasks: int = 0  # training tasks whose LoRAs it learns from; 0: data.lora_tasks, as all else does
    layers: int = 8  # target layers a step
    target: Literal["response", "lora"] = "response"  # the map; or the LoRA itself, as Stage II
    threshold: float = 0.02  # |dW / W| above which an entry responds
    likelihood_weight: float = 0.1
    reconstruction_weight: float = 0.0  # L1 on the LoRA's own A and B, beside the map
    size_weight: float = 0.0  # of the mean square of Stage I's A and B


@dataclass(frozen=True)
class DiffusionConfig(StageConfig):
    """What is taught through the base model (LoFA eq. 7), with function matching."""

    clips: int = 3  # clips a task
    with_lora: float = 0.25  # share of a step's tasks drawn from those with a LoRA of their own
    diffusion_weight: float = 0.25
    distillation_weight: float = 1.0
    teacher_guidance: float = 1.3  # of the fine prompt over the coarse one, in the base model as a teacher
    fine_prompts: float = 0.25  # share of steps under the fine prompt instead of the coarse one
    ema_decay: float = 0.999


@dataclass(frozen=True)
class ReconstructionConfig(DiffusionConfig):
    """What tasks' own LoRAs teach beside it (LoFA eq. 6-8)."""

    reconstruction: str = "factors"  # a name in training/losses.py
    reconstruction_weight: float = 0.17

    def __post_init__(self):
        super().__post_init__()
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(
                f"reconstruction = {self.reconstruction!r}: expected one of {', '.join(RECONSTRUCTIONS)}."
            )


@dataclass(frozen=True)
class Stage2Config(ReconstructionConfig):
    """LoRA prediction."""

    from_stage1: bool = True  # start from Stage I's weights; false needs feature_blocks = [], too


@dataclass(frozen=True)
class TextToLoRAConfig(ReconstructionConfig):
    """The MLP baseline, taught as Stage II is."""

    width: int = 384
    blocks: int = 3

    def __post_init__(self):
        super().__post_init__()
        if min(self.width, self.blocks) < 1:
            raise ValueError(f"width = {self.width}, blocks = {self.blocks}: expected 1 or more.")


@dataclass(frozen=True)
class EndToEndConfig(DiffusionConfig):
    """Both stages at once from clips alone, without a LoRA dataset (as the HM-CFG paper trains)."""

    with_lora: float = 0.0
    diffusion_weight: float = 1.0
    distillation_weight: float = 0.0
    size_weight: float = 1e-3  # of the mean square of what the network puts out
    output_scale: float = 0.05  # B for an output of one; A starts from one fixed draw

    def __post_init__(self):
        super().__post_init__()
        if self.with_lora:
            raise ValueError(f"with_lora = {self.with_lora}: end-to-end training has no LoRAs; expected 0.")


@dataclass(frozen=True)
class LoRAVAEConfig(StageConfig):
    """The VAE of LoRA Diffusion, between LoRAs and a short vector."""

    optimiser: Literal["muon", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    form: Form = "canonical"  # of the LoRAs; "trained": A and B as they are, where all started from one A
    latent: int = 512
    layer_width: int = 32  # numbers that a layer comes to before all layers meet
    width: int = 512
    blocks: int = 1
    noise: float = 0.1  # added to the LoRAs' numbers, which have unit variance
    kl_weight: float = 1e-4


@dataclass(frozen=True)
class LoRADiffusionConfig(StageConfig):
    """The diffusion model over the VAE's latents."""

    optimiser: Literal["muon", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    width: int = 512
    blocks: int = 4
    pooling_queries: int = 8
    target: Target = "v"  # what the network puts out: "v" or "x0"
    untold: float = 0.1  # share of tasks that nothing is told of, for guidance
    sampling_steps: int = 50
    guidance: float = 1.0  # of the condition over none; 1: the condition alone
    ema_decay: float = 0.999


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
    stored_as: Literal["float32", "bfloat16", "float16", "int8"] = "float16"  # the finished hypernetwork
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    end_to_end: EndToEndConfig = field(default_factory=EndToEndConfig)
    lora_vae: LoRAVAEConfig = field(default_factory=LoRAVAEConfig)
    lora_diffusion: LoRADiffusionConfig = field(default_factory=LoRADiffusionConfig)
    text_to_lora: TextToLoRAConfig = field(default_factory=TextToLoRAConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a TOML file; `overrides` are "section.key=value" (or "key=value"), the value as TOML writes it.

    Raises ValueError naming the file or override, the key, and what was expected.
    """
    values = read_toml(path)
    for override in overrides:
        _override(values, override)
    return fill(TrainingConfig, values, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds. FileNotFoundError, or ValueError naming the file where it is no TOML."""
    text = read_text(path)
    # Names with thousands of parts take tomllib their square in time and memory.
    if len(text) > _MAX_TOML or any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
        raise ValueError(f"{path}: no configuration: it is larger than {_MAX_TOML} characters, or all dots.")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a whole number of many digits is a plain ValueError
        raise ValueError(f"{path}: not valid TOML: {error}") from error


def _override(values: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys) or len(keys) > 2:
        raise ValueError(f"{text!r}: expected section.key=value, for example stage1.steps=100.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value.strip()  # a word without quotes
    table = values.setdefault(keys[0], {}) if len(keys) == 2 else values
    if not isinstance(table, dict):
        raise ValueError(f"{text!r}: {keys[0]} is a value, not a section.")
    table[keys[-1]] = parsed


def fill(kind: type, values: dict[str, Any], where: str):
    """The dataclass `kind` with these values. ValueError naming `where`, the key, and what was expected."""
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}.{_nearest(key, known)}")
    filled = {}
    for key, value in values.items():
        wanted = known[key].type
        if is_dataclass(wanted):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: [{key}] must be a table, not {value!r}.")
            filled[key] = fill(wanted, value, f"{where} [{key}]")
        else:
            filled[key] = _checked(wanted, value, f"{where}: {key}")
    try:
        return kind(**filled)
    except TypeError as error:
        missing = [name for name in ("base", "out") if name in known and name not in filled]
        raise ValueError(f"{where}: missing {', '.join(missing) or error}.") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known here: {', '.join(known)}."


def _checked(wanted: Any, value: Any, where: str):
    if get_origin(wanted) is tuple:
        item = get_args(wanted)[0]
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {value!r}.")
        return tuple(_checked(item, v, where) for v in value)
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise ValueError(
                f"{where} must be one of {', '.join(map(repr, get_args(wanted)))}, not {value!r}."
            )
        return value
    if wanted is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {wanted.__name__}, not {value!r:.100}.")
    return value
