"""What touches ComfyUI's internals; no other file of the pack but host_guidance.py and
host_miniature.py imports them.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
from ..lofa_core.memory import memory_for
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


_PIECE = 2**24  # bytes read at once
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
        digest, pieces = hashlib.sha256(), -(-found.st_size // _PIECE)
        try:
            with path.open("rb") as file:
                for piece in watch().each(iter(partial(file.read, _PIECE), b""), pieces):
                    digest.update(piece)
        except comfy.model_management.InterruptProcessingException:
            # No node runs yet, and here the interruption would end ComfyUI's worker for good: the first node
            # that runs shall meet it.
            comfy.model_management.interrupt_current_processing()
            return ""
        _hashes[path] = state, digest.hexdigest()
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
_TELL_EVERY = 0.1  # seconds; ComfyUI's progress bars move no more often


def device() -> torch.device:
    """Where ComfyUI computes."""
    return comfy.model_management.get_torch_device()


def compute_dtype(parameters: int) -> torch.dtype:
    """What a hypernetwork computes in: bfloat16 where it is large and the GPU has it."""
    large = parameters > _LARGE and comfy.model_management.should_use_bf16(device())
    return torch.bfloat16 if large else torch.float32


def managed(network: torch.nn.Module, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """A network, from now on in `dtype`, that ComfyUI's model management loads and offloads."""
    for tensor in (*network.parameters(), *network.buffers()):
        check_cancelled()
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    offload_device = comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(network, device(), offload_device)


def load(patcher: comfy.model_patcher.ModelPatcher, working_memory: int) -> None:
    """Have ComfyUI bring a `managed` network onto `device()`, and unload others until `working_memory` bytes
    are free beside it. Under --novram it leaves the network where it is.

    Raises MemoryError where the network does not fit.
    """
    with memory_for("for the hypernetwork", device()):
        comfy.model_management.load_models_gpu(
            [patcher], memory_required=working_memory, force_full_load=True
        )


def progress() -> Callable[[int, int], None]:
    """A callback (done, total) that moves the running node's progress bar."""
    bar = comfy.utils.ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)


def check_cancelled() -> None:
    """Raises ComfyUI's interruption where the artist pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def watch(node_id: str = "", doing: str = "") -> Watch:
    """The running node's progress bar and the cancel button, for work of many steps. Where a node is named,
    it says below it what each step works on: `doing` and the step's name.
    """
    last = 0.0

    def tell(what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _TELL_EVERY:
            last = time.monotonic()
            _send_text(node_id, f"{doing} {what}")

    return Watch(progress(), check_cancelled, tell if node_id else None)


def show_text(node_id: str, text: str) -> None:
    """Show a line on the node in the page, and in the log."""
    log.info(text)
    _send_text(node_id, text)


def _send_text(node_id: str, text: str) -> None:
    """To whoever queued the workflow: in another's page the node of this id is another one."""
    server = PromptServer.instance
    server.send_progress_text(text, node_id, server.client_id)


# ------------------------------------------------------------
# CLIP and MODEL


def encode_text(clip: comfy.sd.CLIP, text: str) -> Tensor:
    """The last hidden states of `text`, [1, S, d]; WAN's encoder gives zero rows after the prompt.

    Line breaks become spaces, as in the text encoder of lofa_core: the tokeniser knows no others. The
    progress bar counts the encoder's blocks; ComfyUI's own layers ask for the cancel button.
    """
    with _bar_of_blocks(clip.cond_stage_model):
        return clip.encode_from_tokens(clip.tokenize(" ".join(text.split())))


@contextmanager
def _bar_of_blocks(encoder: torch.nn.Module) -> Iterator[None]:
    """Within the context, the running node's progress bar moves with every transformer block."""
    lists = [module for module in encoder.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = max(lists, key=len, default=())
    bar = comfy.utils.ProgressBar(len(blocks))
    hooks = [block.register_forward_hook(lambda *_: bar.update(1)) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
