"""Response maps of a LoRA that is there already: no hypernetwork is needed for them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .base_models import BaseWeights
from .lora import LoRA
from .lora_files import match
from .response_map import THRESHOLD, response_map


class LoRAResponses(Mapping[str, Tensor]):
    """Layer name -> R (LoFA section 3.2), float32 [out, in] of zeros and ones on the CPU, of every target
    layer that both have; computed when it is asked for.

    Raises ValueError where no layer of the LoRA fits the base model.
    """

    def __init__(self, base: BaseWeights, lora: LoRA, threshold: float = THRESHOLD):
        self._base, self._lora, self._threshold = base, lora, threshold
        self.report = match(lora, base.model)
        if not self.report.matched:
            raise ValueError(
                f"No layer of this LoRA fits the base model: {self.report.summary()}. Choose a LoRA made for "
                f"{base.model.name}."
            )
        self._layers = {layer.name: layer for layer in base.model.layers if layer.name in self.report.matched}

    def __getitem__(self, name: str) -> Tensor:
        W = self._base.read(self._layers[name]).float().cpu()
        delta = self._lora[name].delta().to(W)
        return response_map(W, delta, self._threshold).to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
