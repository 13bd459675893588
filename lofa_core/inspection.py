"""What a file is, in plain words: hypernetwork, base model, LoRA, condition or response maps."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .base_models import BaseWeights, TargetLayer, describe
from .checkpoint import (
    DIFFUSION_FORMAT,
    FORMAT,
    Generator,
    describe_hypernetwork,
    describe_lora_diffusion,
)
from .descriptions import ConditionDescription, LayerDescription
from .key_names import LAYOUTS, canonical_name, default_layout, layout_name
from .lora import LoRA
from .lora_files import each_tensor, load_lora, read_safetensors
from .released import describe_released, read_stage, stage_of
from .safetensors_file import open_safetensors

CONDITION_KEY = "text_emb"
_LAYOUT_WORDS = {
    "comfyui": "ComfyUI's names",
    "original": "WAN's original names, without a prefix",
    "diffusers": "diffusers' names, without a prefix",
    "kohya": "Kohya's names",
    "peft": "PEFT's names",
}
_CHECKPOINT_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Description:
    """`kind` finishes the sentence "this is ..."; `facts` are (name, words) in reading order."""

    kind: str
    facts: tuple[tuple[str, str], ...]


def inspect(path: Path | str) -> Description:
    """Say what a file or folder is.

    Raises FileNotFoundError, or ValueError for a damaged file and for one that LoFA has no use for.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        return _base(path)
    if path.suffix in (".pth", ".pt"):
        return _released_stage(path)
    file = open_safetensors(path)
    keys, metadata = file.keys(), file.metadata
    if metadata.get("format") in (FORMAT, DIFFUSION_FORMAT):
        return _hypernetwork(path, metadata)
    if any(".lora" in key or key.startswith("lora_") or key.endswith(".alpha") for key in keys):
        return _lora(load_lora(path), keys)
    if keys == [CONDITION_KEY]:
        return _condition(path)
    if keys and all(canonical_name(key) == key for key in keys):
        return _responses(path, keys)
    if any(key.endswith(".weight") and canonical_name(key.removesuffix(".weight")) for key in keys):
        return _base(path)
    raise ValueError(
        f"{path}: not a hypernetwork, base model or LoRA that LoFA knows. It holds {len(keys)} tensors, "
        f"the first are {', '.join(keys[:2]) or 'none'}. Check that it is the file you meant."
    )


def _base(path: Path) -> Description:
    weights = BaseWeights.open(path)
    layers = weights.model.layers
    prefixed = all(layer.key.startswith(_CHECKPOINT_PREFIX) for layer in layers)
    layout = _layout((layer.name, layer.key.removesuffix(".weight")) for layer in layers)
    return Description(
        f"a base model, {weights.model.name}",
        (
            ("target layers", weights.model.summary()),
            ("blocks", _blocks(layers)),
            ("layout", "a whole checkpoint's names" if prefixed else layout),
            ("dtype", _dtypes(weights.read(layer) for layer in layers[:1])),
            ("fingerprint", weights.fingerprint()),
            ("fits", f"hypernetworks and LoRAs made for {weights.model.name}"),
        ),
    )


def _lora(lora: LoRA, keys: list[str]) -> Description:
    ranks = Counter(layer.rank for layer in lora.values())
    shapes = Counter(layer.shape for layer in lora.values())
    modules = {key.rsplit(".lora", 1)[0].removesuffix(".alpha") for key in keys}
    layout = _layout((canonical_name(module) or module, module) for module in modules)
    usual = _layout((name, layout_name(name, default_layout(lora))) for name in lora)
    loads = (
        "ComfyUI and diffusers both load it"
        if layout == usual
        else f"not every tool loads it; {usual} are the ones that ComfyUI and diffusers both load"
    )
    alphas = {layer.alpha / layer.rank for layer in lora.values()}
    facts = [
        ("target layers", _shapes(shapes)),
        ("rank", ", ".join(f"{rank}" for rank in sorted(ranks))),
        ("scale", ", ".join(f"{alpha:g}" for alpha in sorted(alphas)[:4]) + " (alpha / rank)"),
        ("parameters", f"{lora.parameter_count:,}"),
        ("dtype", _dtypes(layer.B for layer in lora.values())),
        ("layout", f"{layout}: {loads}"),
        ("fits", _lora_fits(lora)),
    ]
    facts += sorted(
        (name.removeprefix("lofa_").replace("_", " "), text) for name, text in lora.metadata.items()
    )
    return Description("a LoRA", tuple(facts))


def _lora_fits(lora: LoRA) -> str:
    try:
        base = describe({f"{name}.weight": layer.shape for name, layer in lora.items()})
    except ValueError:  # a LoRA of some layers only says too little to tell the sizes of one family apart
        family = "WAN2.1" if default_layout(lora) == "comfyui" else "SDXL"
        return f"a {family} with layers of these shapes (it changes only some of the target layers)"
    return f"{base.name}, all {len(base.layers)} target layers"


def _hypernetwork(path: Path, metadata: dict[str, str]) -> Description:
    diffusion = metadata["format"] == DIFFUSION_FORMAT
    hypernetwork: Generator = describe_lora_diffusion(path) if diffusion else describe_hypernetwork(path)
    dtypes = _dtypes(tensor for _, tensor in each_tensor(path))  # as stored: in memory it is float32
    base = hypernetwork.base
    shapes = Counter(tuple(layer.shape) for layer in base.layers)
    return Description(
        f"a {'LoRA Diffusion: it draws' if diffusion else 'hypernetwork: it predicts'} LoRAs for {base.name}",
        (
            ("target layers", _shapes(shapes)),
            ("blocks", _blocks(base.layers)),
            ("rank", f"{hypernetwork.config.rank}"),
            *(("condition", _condition_words(known)) for known in hypernetwork.conditions.values()),
            ("coarse prompt", hypernetwork.coarse_prompt or "none"),
            ("parameters", f"{sum(p.numel() for p in hypernetwork.parameters()):,}"),
            ("dtype", dtypes),
            (
                "layout",
                "LoFA's own, " + ("VAE and diffusion" if diffusion else "both stages") + " in one file",
            ),
            ("fits", f"{base.name}, fingerprint {base.fingerprint or 'not recorded'}"),
            *((name, metadata[name]) for name in ("notes",) if name in metadata),
        ),
    )


def _condition_words(known: ConditionDescription) -> str:
    match known.kind:
        case "text":
            words = f"a closed vocabulary of {len(known.words)} words" if known.words else "any words"
            return f"text, {known.width} numbers per token; {words}"
        case "pose":
            frames, height, width = known.size
            return f"pose, skeletons drawn in {frames} frames of {width}x{height}"
        case _:
            return (
                f"{known.kind}, pictures as a CLIP image encoder's states of {known.width} numbers per token"
            )


def _released_stage(path: Path) -> Description:
    published = read_stage(path)
    stage = stage_of(published)
    if stage is None:
        raise ValueError(
            f"{path}: not a stage of LoFA_v0, the only .pth files that LoFA knows. "
            "Check that it is the file you meant."
        )
    try:
        config, base, (condition,) = describe_released(published)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    number, other = ("I", "stage2") if stage == "stage1" else ("II", "stage1")
    return Description(
        f"Stage {number} of LoFA_v0, one of the two published files",
        (
            ("target layers", _shapes(Counter(layer.shape for layer in base.layers))),
            ("blocks", _blocks(base.layers)),
            ("rank", f"{config.rank}"),
            ("condition", _condition_words(condition)),
            ("parameters", f"{sum(tensor.numel() for tensor in published.values()):,}"),
            ("dtype", _dtypes(published.values())),
            ("layout", f"the published one; `python -m lofa_core convert` joins it with its {other} file"),
            ("fits", base.name),
        ),
    )


def _condition(path: Path) -> Description:
    tensor = open_safetensors(path).tensor(CONDITION_KEY)
    if tensor.ndim != 3:
        raise ValueError(f"{path}: {CONDITION_KEY} is {list(tensor.shape)}; expected [1, S, d].")
    return Description(
        "a text condition",
        (
            ("shape", "x".join(str(size) for size in tensor.shape) + " (1, tokens, numbers per token)"),
            ("dtype", _dtypes([tensor])),
            ("fits", f"hypernetworks conditioned on text of {tensor.shape[-1]} numbers per token"),
        ),
    )


def _responses(path: Path, keys: list[str]) -> Description:
    tensors = list(read_safetensors(path)[0].values())
    mean = sum(tensor.float().mean().item() for tensor in tensors) / len(tensors)
    return Description(
        "a set of response maps",
        (
            ("target layers", _shapes(Counter(tuple(tensor.shape) for tensor in tensors))),
            ("dtype", _dtypes(tensors)),
            ("mean response", f"{mean:.1%} of the weights"),
        ),
    )


def _shapes(counts: Counter) -> str:
    """`240 layers of 1536x1536`, or each shape with its count."""
    parts = [f"{count} of {'x'.join(map(str, shape))}" for shape, count in sorted(counts.items())]
    return (
        parts[0].replace(" of ", " layers of ", 1)
        if len(parts) == 1
        else f"{counts.total()}: {', '.join(parts)}"
    )


def _blocks(layers: Sequence[TargetLayer] | Sequence[LayerDescription]) -> str:
    """`30, each with self_attn (q, k, v, o) and cross_attn (q, k, v, o)`."""
    parts: dict[str, list[str]] = {}
    for kind in dict.fromkeys(layer.kind for layer in layers):
        part, _, weight = kind.partition(".")
        parts.setdefault(part, []).append(weight)
    kinds = " and ".join(f"{part} ({', '.join(weights)})" for part, weights in parts.items())
    return f"{len({layer.depth for layer in layers})}, each with {kinds}"


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _layout(names: Iterable[tuple[str, str]]) -> str:
    """The layout in which all (canonical name, module name) pairs are spelled."""
    pairs = list(names)
    for layout in LAYOUTS:
        if all(module == layout_name(name, layout) for name, module in pairs):
            return _LAYOUT_WORDS[layout]
    return "names of no known tool, or of several"
