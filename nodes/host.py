"""What touches ComfyUI's internals; no other file of the pack but host_guidance.py imports them."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import comfy.clip_vision
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..lofa_core import miniature
from ..lofa_core.base_models import BaseWeights
from ..lofa_core.steps import Watch
from .names import check_name

log = logging.getLogger(__name__)

# ------------------------------------------------------------
# Files

FOLDER = "lofa"  # models/lofa, also in extra_model_paths.yaml
EMBEDDED_HYPERNETWORK = "miniature"
NO_STAGE2 = "none"


def register_folders() -> None:
    """Make models/lofa known to ComfyUI, which also lets extra_model_paths.yaml add to it."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir, FOLDER)))
    folder_paths.folder_names_and_paths[FOLDER][1].update((".safetensors", ".pth"))


def hypernetwork_names() -> list[str]:
    """What the loader offers: the embedded hypernetwork, then the files in models/lofa."""
    return [EMBEDDED_HYPERNETWORK, *folder_paths.get_filename_list(FOLDER)]


def stage2_names() -> list[str]:
    """What the loader offers as LoFA_v0's second file."""
    return [NO_STAGE2, *(name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".pth"))]


def hypernetwork_files(name: str, stage2: str = NO_STAGE2) -> list[Path]:
    """The file behind one of `hypernetwork_names()`; with one of `stage2_names()`, LoFA_v0's two."""
    if name == EMBEDDED_HYPERNETWORK:
        return [miniature.HYPERNETWORK]
    names = [name] if stage2 == NO_STAGE2 else [name, stage2]
    return [_offered(FOLDER, file) for file in names]


def lora_names() -> list[str]:
    """The LoRA files that ComfyUI knows."""
    return folder_paths.get_filename_list("loras")


def lora_file(name: str) -> Path:
    """The file behind one of `lora_names()`."""
    return _offered("loras", name)


def _offered(folder: str, name: str) -> Path:
    """A file that ComfyUI lists in one of its model folders.

    ValueError for any other name: ComfyUI checks those that a graph holds itself, but not those that another
    node computes.
    """
    if name not in folder_paths.get_filename_list(folder):
        raise ValueError(
            f"{name!r:.200} is not a file in models/{folder}. Choose one that the node offers; after adding "
            "a file, press R."
        )
    return Path(folder_paths.get_full_path_or_raise(folder, name))


_hashes: dict[Path, tuple[tuple[int, ...], str]] = {}  # what the file system said, and the hash then


def content_hashes(paths: Sequence[Path]) -> list[str]:
    """What changes when a file's content does, and only then.

    A file is read again only where the file system says that it may have changed: a hypernetwork may have
    gigabytes. The change time is part of that, because whoever writes a file can set its modification time.
    """
    return [_content_hash(path) for path in paths]


def _content_hash(path: Path) -> str:
    found = path.stat()
    state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino)
    if path not in _hashes or _hashes[path][0] != state:
        with path.open("rb") as file:
            _hashes[path] = state, hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[path][1]


def read_picture(path: Path) -> Tensor:
    """A picture file as IMAGE [1, H, W, 3] in 0..1."""
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).float().div(255.0).unsqueeze(0)


def new_output_file(prefix: str, suffix: str) -> tuple[Path, str]:
    """The next free numbered file below the output folder, and its name as shown to the artist.

    Creates the folder. Raises ValueError where the prefix leaves the output folder, or is no name that every
    system can have.
    """
    check_name(prefix)
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    file = f"{name}_{counter:05}_{suffix}"
    return Path(folder, file), Path("output", subfolder, file).as_posix()


def workflow_metadata(prompt: object, extra_pnginfo: Mapping[str, object] | None) -> dict[str, str]:
    """The workflow as ComfyUI embeds it in what it saves; empty under --disable-metadata."""
    if args.disable_metadata:
        return {}
    entries = {"prompt": prompt, **(extra_pnginfo or {})}
    return {key: json.dumps(value) for key, value in entries.items() if value is not None}


# ------------------------------------------------------------
# Progress and devices

_LARGE = 50_000_000  # parameters; below, float32 takes no noticeable time


def device() -> torch.device:
    """Where ComfyUI computes."""
    return comfy.model_management.get_torch_device()


def compute_dtype(parameters: int) -> torch.dtype:
    """What a hypernetwork computes in: bfloat16 where it is large and the GPU has it."""
    large = parameters > _LARGE and comfy.model_management.should_use_bf16(device())
    return torch.bfloat16 if large else torch.float32


def make_room(size: int) -> None:
    """Have ComfyUI unload what it can until the GPU has `size` bytes free."""
    if not comfy.model_management.is_device_cpu(device()):
        comfy.model_management.free_memory(size, device())


def progress() -> Callable[[int, int], None]:
    """A callback (done, total) that moves the running node's progress bar."""
    bar = comfy.utils.ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)


def check_cancelled() -> None:
    """Raises ComfyUI's interruption where the artist pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def watch() -> Watch:
    """The running node's progress bar and the cancel button, for work of many steps."""
    return Watch(progress(), check_cancelled)


def show_text(node_id: str, text: str) -> None:
    """Show a line on the node in the page, and in the log."""
    log.info(text)
    PromptServer.instance.send_progress_text(text, node_id)


# ------------------------------------------------------------
# The miniature

# All in float32: at this size speed does not matter, and the hypernetwork was trained on float32 weights.
_MINIATURE_DTYPE = torch.float32


def load_miniature() -> tuple[
    comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE, comfy.clip_vision.ClipVisionModel
]:
    """The embedded base model as ComfyUI's own MODEL, CLIP, VAE and CLIP_VISION."""
    model = comfy.sd.load_diffusion_model(
        str(miniature.DIFFUSION_MODEL), model_options={"dtype": _MINIATURE_DTYPE}
    )
    return model, _load_text_encoder(), _load_vae(), _load_image_encoder()


def _load_vae() -> comfy.sd.VAE:
    state, metadata = comfy.utils.load_torch_file(str(miniature.VAE), return_metadata=True)
    vae = comfy.sd.VAE(sd=state, metadata=metadata, dtype=_MINIATURE_DTYPE)
    vae.throw_exception_if_invalid()
    # How ComfyUI makes a second copy on another device.
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (str(miniature.VAE), metadata, None))
    return vae


def _load_image_encoder() -> comfy.clip_vision.ClipVisionModel:
    folder = miniature.IMAGE_ENCODER.parent
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    encoder = comfy.clip_vision.ClipVisionModel(config)
    encoder.load_sd(comfy.utils.load_torch_file(str(miniature.IMAGE_ENCODER)))
    return encoder


class _TextEncoderTarget:
    """What comfy.sd.CLIP builds: WAN's text encoder and tokeniser, with no further arguments."""

    clip = comfy.text_encoders.wan.te()
    tokenizer = comfy.text_encoders.wan.WanT5Tokenizer
    params: dict[str, object] = {}


# The sizes in which the miniature's text encoder differs from WAN's own.
_TEXT_ENCODER_SIZES = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")


def _load_text_encoder(disable_dynamic: bool = False) -> comfy.sd.CLIP:
    config = json.loads(miniature.TEXT_ENCODER_CONFIG.read_text(encoding="utf-8"))
    sizes = {name: config[name] for name in _TEXT_ENCODER_SIZES}
    vocabulary = torch.frombuffer(bytearray(miniature.TOKENIZER.read_bytes()), dtype=torch.uint8)
    clip = comfy.sd.CLIP(
        _TextEncoderTarget,
        tokenizer_data={"spiece_model": vocabulary},
        state_dict=[comfy.utils.load_torch_file(str(miniature.TEXT_ENCODER))],
        model_options={"dtype": _MINIATURE_DTYPE, "umt5xxl_model_config": sizes},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_load_text_encoder_patcher, ())
    return clip


def _load_text_encoder_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return _load_text_encoder(disable_dynamic).patcher


# ------------------------------------------------------------
# CLIP and MODEL


def encode_text(clip: comfy.sd.CLIP, text: str) -> Tensor:
    """The last hidden states of `text`, [1, S, d]; WAN's encoder gives zero rows after the prompt.

    Line breaks become spaces, as in the text encoder of lofa_core: the tokeniser knows no others.
    """
    return clip.encode_from_tokens(clip.tokenize(" ".join(text.split())))


def text_states(conditioning: Sequence[Sequence]) -> Tensor:
    """The token states [1, S, d] in a CONDITIONING.

    Raises ValueError where it holds several prompts (as after Conditioning Combine) or none.
    """
    if len(conditioning) != 1 or conditioning[0][0].ndim != 3 or len(conditioning[0][0]) != 1:
        raise ValueError(
            f"This CONDITIONING holds {len(conditioning)} prompts; a LoRA is predicted from one. "
            "Connect the CLIP Text Encode node of the prompt you mean."
        )
    return conditioning[0][0]


def image_states(seen: comfy.clip_vision.Output) -> Tensor:
    """The states before CLIP's last layer, of each picture, [n, S, d]."""
    return seen.penultimate_hidden_states


def base_weights(model: comfy.model_patcher.ModelPatcher) -> BaseWeights:
    """The MODEL's own weights, read one layer at a time and without the LoRAs applied to it."""
    parameters = model.model.diffusion_model.named_parameters(prefix="diffusion_model")
    shapes = {key: tuple(parameter.shape) for key, parameter in parameters}
    return BaseWeights.from_tensors(shapes, lambda key: _unpatched_weight(model, key))


def _unpatched_weight(model: comfy.model_patcher.ModelPatcher, key: str) -> Tensor:
    """One weight as the file had it, [out, in], on `device()`; quantised weights come out dequantised.

    When ComfyUI patches a weight in place it keeps the original in `backup`, or in `hook_backup` where only a
    hook patched it. Otherwise patches are added during the forward pass and the model holds the original.
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
    if key in model.backup:
        weight = model.backup[key].weight
    elif key in model.hook_backup:
        weight = model.hook_backup[key][0]
    weight = weight.to(device())  # a partly offloaded model has some here and some there
    return weight if convert is None else convert(weight)


def quantisation(model: comfy.model_patcher.ModelPatcher, key: str) -> str:
    """How a weight of the MODEL is quantised, in words; empty where it is not."""
    weight, _, _ = comfy.model_patcher.get_key_weight(model.model, key)
    layout = getattr(weight, "_layout_cls", None)
    if isinstance(weight, comfy.quant_ops.QuantizedTensor):
        return str(layout or "quantised").removeprefix("TensorCore").removesuffix("Layout")
    return str(weight.dtype).removeprefix("torch.") if weight.dtype.itemsize == 1 else ""


def apply_lora(
    model: comfy.model_patcher.ModelPatcher, lora: Mapping[str, Tensor], layers: int, strength: float
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the MODEL with the LoRA of `layers` layers applied by ComfyUI's own functions.

    Raises ValueError where a layer finds no weight: ComfyUI itself only writes that to its log.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    clone = model.clone()
    matched = clone.add_patches(comfy.lora.load_lora(lora, keys), strength)
    if len(matched) != layers:
        raise ValueError(
            f"Only {len(matched)} of the LoRA's {layers} layers match this MODEL. "
            "Predict it for the same base model."
        )
    return clone
