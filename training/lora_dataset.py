"""The LoRA dataset: per-task LoRAs of a run in one safetensors file."""

import json
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lofa_core.lora_files import write_safetensors

from .miniature.world import Action


@dataclass
class LoRADataset:
    """A [K, L, r, in] and B [K, L, out, r] float32 (alpha folded into B) of K actions."""

    A: Tensor
    B: Tensor
    actions: list[Action]

    def factors(self) -> Tensor:
        """Factor indices [K, F]."""
        return torch.tensor([action.indices() for action in self.actions])

    def save(self, path: Path) -> None:
        """Half precision: the factors are of order 0.1 and are compared through what they do."""
        metadata = {"actions": json.dumps([astuple(action) for action in self.actions])}
        write_safetensors({"A": self.A.half().contiguous(), "B": self.B.half().contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: Path) -> "LoRADataset":
        with safe_open(path, "pt") as file:
            actions = [Action(*values) for values in json.loads(file.metadata()["actions"])]
            return cls(file.get_tensor("A").float(), file.get_tensor("B").float(), actions)
