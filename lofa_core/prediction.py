"""Prediction: base weights + condition -> response -> LoRA, layer batch by layer batch."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base_models import BaseWeights, TargetLayer
from .hypernetwork import Hypernetwork, Response
from .lora import LoRA, LoRALayer

Progress = Callable[[int, int], None]  # (layers done, layers in all)
Batch = Callable[[Tensor, Tensor, list[TargetLayer]], None]  # (patches, index [N], layers)
log = logging.getLogger(__name__)

# Tokens in one batch: enough to keep the processor busy, few enough that activations stay small.
CPU_TOKENS, GPU_TOKENS = 1_024, 16_384


class ResponseMaps(Mapping[str, Tensor]):
    """Layer name -> P(|dW| > 0.02 |W|), float32 [out, in] on the CPU, computed when it is asked for.

    It keeps Stage I's low-rank answer, 24 times smaller than the maps of WAN2.1-1.3B, and reads the base
    weight again where the probability depends on it.
    """

    def __init__(self, base: BaseWeights):
        self._base = base
        self._responses: dict[str, tuple[Response, int, TargetLayer]] = {}

    def add(self, response: Response, layers: Sequence[TargetLayer]) -> None:
        """Keep the first condition's response of a batch of layers."""
        kept = response.kept()
        for row, layer in enumerate(layers):
            self._responses[layer.name] = (kept, row, layer)

    def __getitem__(self, name: str) -> Tensor:
        response, row, layer = self._responses[name]
        with torch.no_grad():
            weights = self._base.read(layer).cpu() if response.needs_weights else torch.empty(0)
            return response.layer(row).probability(weights.unsqueeze(0))[0, 0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._responses)

    def __len__(self) -> int:
        return len(self._responses)


@dataclass
class Prediction:
    """A predicted LoRA, Stage I's response maps by layer name, and the seconds both took."""

    lora: LoRA
    responses: ResponseMaps
    seconds: float = 0.0


def fitting_layers(hypernetwork: Hypernetwork, base: BaseWeights) -> list[TargetLayer]:
    """The base model's layers in the hypernetwork's order. ValueError, naming both, where they do not fit."""
    wanted, found = hypernetwork.base, {layer.name: layer for layer in base.model.layers}
    shapes = {layer.name: layer.shape for layer in base.model.layers}
    if any(shapes.get(layer.name) != tuple(layer.shape) for layer in wanted.layers) or len(found) != len(
        wanted.layers
    ):
        kinds = {tuple(layer.shape) for layer in wanted.layers}
        size = " and ".join(f"{out}x{into}" for out, into in sorted(kinds))
        raise ValueError(
            f"This hypernetwork predicts LoRAs for {wanted.name} ({len(wanted.layers)} layers of {size}); "
            f"the model given is {base.model.name} ({base.model.summary()}). "
            f"Load a hypernetwork trained for {base.model.name}."
        )
    return [found[layer.name] for layer in wanted.layers]


@torch.no_grad()
def predict(
    hypernetwork: Hypernetwork,
    base: BaseWeights,
    condition: Tensor,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    progress: Progress | None = None,
    check_cancelled: Callable[[], None] | None = None,
) -> Prediction:
    """Predict the LoRA for one condition [1, S, d] (LoFA eq. 2); rows of zeros after its end are padding.

    Runs on `device` in `dtype`, `batch_size` layers at a time (None: what the device does best), and reports
    after each batch. A batch that does not fit into memory is halved and done again; MemoryError where one
    layer alone does not fit. `check_cancelled` is called before each batch and may raise; nothing is kept
    then.
    """
    started = time.perf_counter()
    network, given = _ready(hypernetwork, condition, device, dtype)
    projected = network.stage1.trunk.project(given), network.stage2.trunk.project(given)
    layers: dict[str, LoRALayer] = {}
    responses = ResponseMaps(base)

    def batch(patches: Tensor, index: Tensor, chosen: list[TargetLayer]) -> None:
        response = network.stage1(patches, index, projected[0])
        A, B = network.stage2(patches, index, projected[1], response.features)
        responses.add(response, chosen)
        A, B = A[0].cpu().float(), B[0].cpu().float()
        for row, layer in enumerate(chosen):
            layers[layer.name] = LoRALayer(A[row], B[row], float(network.config.rank))

    _in_batches(network, base, device, batch_size, batch, progress, check_cancelled)
    fingerprint, known = base.fingerprint(), hypernetwork.base.fingerprint
    metadata = {
        "lofa_condition": hypernetwork.condition.kind,
        "lofa_base": hypernetwork.base.name,
        "lofa_base_fingerprint": fingerprint,
    }
    if known and fingerprint != known:
        metadata["lofa_note"] = "predicted for other weights than the hypernetwork was trained with"
    return Prediction(LoRA(layers, metadata), responses, time.perf_counter() - started)


@torch.no_grad()
def predict_response(
    hypernetwork: Hypernetwork,
    base: BaseWeights,
    condition: Tensor,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    progress: Progress | None = None,
    check_cancelled: Callable[[], None] | None = None,
) -> ResponseMaps:
    """Stage I alone. Arguments as of `predict`."""
    network, given = _ready(hypernetwork, condition, device, dtype)
    projected = network.stage1.trunk.project(given)
    responses = ResponseMaps(base)

    def batch(patches: Tensor, index: Tensor, chosen: list[TargetLayer]) -> None:
        responses.add(network.stage1(patches, index, projected), chosen)

    _in_batches(network, base, device, batch_size, batch, progress, check_cancelled)
    return responses


def _ready(
    hypernetwork: Hypernetwork, condition: Tensor, device: torch.device | str, dtype: torch.dtype
) -> tuple[Hypernetwork, Tensor]:
    """(the network on `device` in `dtype`, the condition likewise); a copy, so that the caller's network
    stays where and as exact as it is.
    """
    if condition.ndim != 3 or len(condition) != 1 or condition.shape[2] != hypernetwork.condition.width:
        raise ValueError(
            f"The condition is {list(condition.shape)}; this hypernetwork expects [1, tokens, "
            f"{hypernetwork.condition.width}] ({hypernetwork.condition.kind}). "
            "Encode it with the encoder it was trained with."
        )
    held, wanted = next(hypernetwork.parameters()), torch.empty(0, device=device, dtype=dtype)
    if held.dtype != dtype or held.device != wanted.device:
        copied = Hypernetwork.unfilled(hypernetwork.config, hypernetwork.base, hypernetwork.condition)
        tensors = {key: tensor.to(wanted) for key, tensor in hypernetwork.own_state().items()}
        hypernetwork = copied.filled(tensors).to(device)
    return hypernetwork, condition.to(wanted)


def _in_batches(
    hypernetwork: Hypernetwork,
    base: BaseWeights,
    device: torch.device | str,
    batch_size: int | None,
    batch: Batch,
    progress: Progress | None,
    check_cancelled: Callable[[], None] | None,
) -> None:
    """Call `batch` with (patches, index [N], layers) of one batch after another until all layers are done."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: expected at least 1 layer, or None.")
    layers = fitting_layers(hypernetwork, base)
    size, done = batch_size or default_batch_size(hypernetwork, device), 0
    while done < len(layers):
        if check_cancelled is not None:
            check_cancelled()
        chosen = layers[done : done + size]
        if _fits(batch, hypernetwork, base, chosen, done, device):
            done += len(chosen)
            if progress is not None:
                progress(done, len(layers))
            continue
        if len(chosen) == 1:
            raise MemoryError(
                f"There is not enough memory on {device} to predict even one layer at a time. "
                "Close other programs, or use another device or bfloat16."
            )
        size = len(chosen) // 2
        log.warning("Not enough memory on %s; going on with %d layers at a time.", device, size)
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def default_batch_size(hypernetwork: Hypernetwork, device: torch.device | str) -> int:
    """Layers at a time that use the device well."""
    trunk = hypernetwork.stage1.trunk
    tokens = CPU_TOKENS if torch.device(device).type == "cpu" else GPU_TOKENS
    return max(1, tokens // (trunk.rows * trunk.columns))


def _fits(
    batch: Batch,
    hypernetwork: Hypernetwork,
    base: BaseWeights,
    chosen: list[TargetLayer],
    start: int,
    device: torch.device | str,
) -> bool:
    """Do one batch; False where memory ran out. Here, so that nothing of the failed batch stays alive."""
    try:
        read = (base.read(layer).to(device).float() for layer in chosen)
        if torch.device(device).type == "cpu":  # one by one stays in the caches
            patches = torch.cat([hypernetwork.patches(weight.unsqueeze(0)) for weight in read])
        else:
            patches = hypernetwork.patches(torch.stack(list(read)))
        batch(patches, torch.arange(start, start + len(chosen), device=device), chosen)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        return False
    return True


def _out_of_memory(error: BaseException) -> bool:
    # On the CPU PyTorch raises a plain RuntimeError, which only its words tell from others.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
