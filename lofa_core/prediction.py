"""Prediction: base weights + condition -> response -> LoRA, layer batch by layer batch."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .base_models import BaseWeights, TargetLayer
from .conditions import Conditions
from .descriptions import BaseDescription, ConditionDescription
from .hypernetwork import Hypernetwork, Response
from .lora import LoRA, LoRALayer
from .memory import at_a_time, memory_for, out_of_memory
from .numbers import check_finite
from .steps import UNWATCHED, Watch
from .trunk import Layers

Batch = Callable[[Layers, list[TargetLayer]], None]
log = logging.getLogger(__name__)

# Tokens in one batch: enough to keep the processor busy, few enough that activations stay small.
CPU_TOKENS, GPU_TOKENS = 1_024, 16_384


class ResponseMaps(Mapping[str, Tensor]):
    """Layer name -> P(|dW| > 0.02 |W|), float32 [out, in] on the CPU, computed when it is asked for.

    It keeps Stage I's low-rank answer, 24 times smaller than the maps of WAN2.1-1.3B, and reads the base
    weight again where the probability depends on it.
    """

    def __init__(self, base: BaseWeights):
        self.short_of_memory = 0  # layers at a time that fitted, where fewer than the device does best
        self._base = base
        self._responses: dict[str, tuple[Response, int, TargetLayer]] = {}

    def add(self, response: Response, layers: Sequence[TargetLayer]) -> None:
        """Keep the first condition's response of a batch of layers. ValueError where it is not finite."""
        kept = response.kept()
        for row, layer in enumerate(layers):
            if not all(bool(part.isfinite().all()) for part in vars(kept.layer(row)).values()):
                raise not_finite("response map", layer.name, response.features)
            self._responses[layer.name] = (kept, row, layer)

    def __getitem__(self, name: str) -> Tensor:
        response, row, layer = self._responses[name]
        with torch.no_grad():
            weights = self._base.read(layer).cpu() if response.needs_weights else torch.empty(0)
            return response.layer(row).probability(weights.unsqueeze(0))[0, 0]

    def __iter__(self) -> Iterator[str]:
        """In the base model's order, whatever the order of the batches."""
        return (layer.name for layer in self._base.model.layers if layer.name in self._responses)

    def __len__(self) -> int:
        return len(self._responses)


class TrainedFor(Protocol):
    """What predicts LoRAs, a Hypernetwork or a LoRADiffusion: the base model and the conditions it knows."""

    base: BaseDescription
    conditions: dict[str, ConditionDescription]


@dataclass
class Prediction:
    """A predicted LoRA, Stage I's response maps by layer name, and the seconds both took."""

    lora: LoRA
    responses: ResponseMaps
    seconds: float = 0.0


def fitting_layers(hypernetwork: TrainedFor, base: BaseWeights) -> list[TargetLayer]:
    """The base model's layers in the hypernetwork's order. ValueError, naming both, where they do not fit."""
    wanted, found = hypernetwork.base, {layer.name: layer for layer in base.model.layers}
    shapes = {layer.name: layer.shape for layer in base.model.layers}
    if any(shapes.get(layer.name) != tuple(layer.shape) for layer in wanted.layers) or len(found) != len(
        wanted.layers
    ):
        size = " and ".join(f"{out}x{into}" for out, into in sorted(wanted.by_shape()))
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
    conditions: Conditions,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    watch: Watch = UNWATCHED,
) -> Prediction:
    """Predict the LoRA for the conditions of one task (LoFA eq. 2), of any of the kinds the network knows.

    Runs on `device` in `dtype`, `batch_size` layers at a time (None: what the device does best). A batch that
    does not fit into memory is halved and done again, which is logged and kept in
    `responses.short_of_memory`; MemoryError where one layer alone does not fit. ValueError where something
    that comes out is not finite. `watch` hears which layers come next and how many are done; it is asked
    whether to go on before each layer is read and before each linear map of the networks.
    """
    started = time.perf_counter()
    with memory_for("for the hypernetwork", device):
        network, given = _ready(hypernetwork, conditions, device, dtype)
        projected = network.stage1.trunk.project(given), network.stage2.trunk.project(given)
    found: dict[str, LoRALayer] = {}
    responses = ResponseMaps(base)

    def batch(layers: Layers, chosen: list[TargetLayer]) -> None:
        response = network.stage1(layers, projected[0])
        A, B = network.stage2(layers, projected[1], response.features)
        responses.add(response, chosen)
        A, B = A[0].cpu().float(), B[0].cpu().float()
        for row, layer in enumerate(chosen):
            found[layer.name] = LoRALayer(A[row], B[row], float(network.config.rank))
            if not found[layer.name].is_finite():
                raise not_finite("LoRA", layer.name, response.features)

    responses.short_of_memory = _in_batches(network, base, device, batch_size, batch, watch)
    in_order = {layer.name: found[layer.name] for layer in hypernetwork.base.layers}
    metadata = metadata_of(hypernetwork, base, conditions)
    return Prediction(LoRA(in_order, metadata), responses, time.perf_counter() - started)


def not_finite(what: str, layer: str, computed: Tensor) -> ValueError:
    """What to raise where something predicted for a layer is infinite or not a number; `computed`: a tensor
    of the kind and place that it was computed in.
    """
    dtype = str(computed.dtype).removeprefix("torch.")
    help = "" if computed.dtype == torch.float32 else "Predict in float32; if it stays so, "
    return ValueError(
        f"The {what} predicted for {layer} is not finite (in {dtype} on {computed.device}). {help}the "
        "hypernetwork's file is damaged, or was not trained for such weights: get or train it again."
    )


def metadata_of(hypernetwork: TrainedFor, base: BaseWeights, conditions: Conditions) -> dict[str, str]:
    """What a predicted LoRA's file says of where it came from."""
    fingerprint, known = base.fingerprint(), hypernetwork.base.fingerprint
    metadata = {
        "lofa_condition": " + ".join(conditions),
        "lofa_base": hypernetwork.base.name,
        "lofa_base_fingerprint": fingerprint,
    }
    if known and fingerprint != known:
        metadata["lofa_note"] = "predicted for other weights than the hypernetwork was trained with"
    return metadata


@torch.no_grad()
def predict_response(
    hypernetwork: Hypernetwork,
    base: BaseWeights,
    conditions: Conditions,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    watch: Watch = UNWATCHED,
) -> ResponseMaps:
    """Stage I alone. Arguments as of `predict`."""
    with memory_for("for the hypernetwork", device):
        network, given = _ready(hypernetwork, conditions, device, dtype)
        projected = network.stage1.trunk.project(given)
    responses = ResponseMaps(base)

    def batch(layers: Layers, chosen: list[TargetLayer]) -> None:
        responses.add(network.stage1(layers, projected), chosen)

    responses.short_of_memory = _in_batches(network, base, device, batch_size, batch, watch)
    return responses


def _ready(
    hypernetwork: Hypernetwork, conditions: Conditions, device: torch.device | str, dtype: torch.dtype
) -> tuple[Hypernetwork, Conditions]:
    """(the network on `device` in `dtype`, the conditions likewise); a copy, so that the caller's network
    stays where and as exact as it is.
    """
    check_conditions(hypernetwork, conditions)
    held, wanted = next(hypernetwork.parameters()), torch.empty(0, device=device, dtype=dtype)
    if held.dtype != dtype or held.device != wanted.device:
        copied = Hypernetwork.unfilled(
            hypernetwork.config, hypernetwork.base, tuple(hypernetwork.conditions.values())
        )
        tensors = {key: tensor.to(wanted) for key, tensor in hypernetwork.own_state().items()}
        hypernetwork = copied.filled(tensors).to(device)
    return hypernetwork, {kind: given.to(wanted) for kind, given in conditions.items()}


def check_conditions(hypernetwork: TrainedFor, conditions: Conditions) -> None:
    """ValueError where the conditions of one task are not such as the hypernetwork knows."""
    known = hypernetwork.conditions
    for kind, given in conditions.items():
        if kind not in known:
            raise ValueError(
                f"This hypernetwork is conditioned on {' and '.join(known)}, not on {kind}. Load one "
                f"that knows {kind}, or encode another kind of condition."
            )
        shape, wanted = list(given.values.shape), known[kind]
        expected: list[int | str]
        if kind == "pose":
            expected = [1, wanted.width, *wanted.size]
            fits = shape == expected
        else:
            expected = [1, "tokens", wanted.width]
            fits = len(shape) == 3 and (shape[0], shape[2]) == (1, wanted.width)
        if not fits:
            raise ValueError(
                f"The {kind} condition is {shape}; this hypernetwork expects "
                f"[{', '.join(map(str, expected))}]. Encode it with the encoder it was trained with."
            )
        check_finite(given.values, f"The {kind} condition")


def _in_batches(
    hypernetwork: Hypernetwork,
    base: BaseWeights,
    device: torch.device | str,
    batch_size: int | None,
    batch: Batch,
    watch: Watch,
) -> int:
    """Call `batch` with one batch of layers of one shape after another, until all layers are done. How many
    at a time fitted into memory, 0 where that was no matter.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: expected at least 1 layer, or None.")
    layers = fitting_layers(hypernetwork, base)
    size, short = batch_size or default_batch_size(hypernetwork, device), 0
    left, done = list(hypernetwork.base.by_shape().values()), 0
    with asked_often(hypernetwork, watch):
        while left:
            chosen = left[0][:size]
            others = f" and {len(chosen) - 1} more" if len(chosen) > 1 else ""
            watch.before(layers[chosen[0]].name + others)
            error = _out_of_memory_in(batch, hypernetwork, base, layers, chosen, device, watch)
            if not error:
                left = [left[0][size:], *left[1:]] if len(left[0]) > size else left[1:]
                done += len(chosen)
                watch.after(done, len(layers))
                continue
            if len(chosen) == 1:
                raise MemoryError(
                    f"There is not enough memory on {device} to predict even one layer at a time ({error}). "
                    "Close other programs, or use another device or bfloat16."
                )
            size = short = len(chosen) // 2
            log.warning("Not enough memory on %s; going on with %s.", device, at_a_time(size))
            gc.collect()
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
    return short


@contextmanager
def asked_often(network: nn.Module, watch: Watch) -> Iterator[None]:
    """Ask `watch` before each linear map within: on a slow processor one block takes seconds."""
    if watch.check_cancelled is None:
        yield
        return
    maps = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(lambda *_: watch.before()) for module in maps]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def default_batch_size(hypernetwork: Hypernetwork, device: torch.device | str) -> int:
    """Layers at a time that use the device well."""
    trunk = hypernetwork.stage1.trunk
    tokens = CPU_TOKENS if torch.device(device).type == "cpu" else GPU_TOKENS
    return max(1, tokens // (trunk.rows * trunk.columns))


def _out_of_memory_in(
    batch: Batch,
    hypernetwork: Hypernetwork,
    base: BaseWeights,
    layers: list[TargetLayer],
    places: list[int],
    device: torch.device | str,
    watch: Watch,
) -> str:
    """Do one batch, the layers at these places; the error's words where memory ran out, else none. Here, so
    that nothing of the failed batch stays alive.
    """
    chosen = [layers[place] for place in places]

    def weights() -> Iterator[Tensor]:
        for layer in chosen:
            watch.before()
            yield base.read(layer).to(device).float()

    try:
        index = torch.tensor(places, device=device)
        if torch.device(device).type == "cpu":  # one by one stays in the caches
            each = zip(weights(), index.split(1), strict=True)
            patches = torch.cat([hypernetwork.patches(weight.unsqueeze(0), own) for weight, own in each])
        else:
            patches = hypernetwork.patches(torch.stack(list(weights())), index)
        batch(hypernetwork.layers(chosen[0].shape, index, patches), chosen)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return str(error).partition("\n")[0] or type(error).__name__
    return ""
