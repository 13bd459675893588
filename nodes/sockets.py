"""The sockets that ComfyUI's core has no type for, and what travels through them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..lofa_core.conditions import Conditions

CATEGORY = "LoFA"

HypernetworkSocket = io.Custom("LOFA_HYPERNETWORK")  # ModelPatcher of a lofa_core.checkpoint.Generator
ConditionSocket = io.Custom("LOFA_CONDITION")  # Condition
PoseSocket = io.Custom("POSE_KEYPOINT")  # as DWPose and OpenPose nodes give it; core has no class for it
ResponseSocket = io.Custom("LOFA_RESPONSE")  # {layer name: [out, in] in 0..1}


@dataclass(frozen=True)
class Condition:
    """What personalises: each kind (text, pose, style, identity) as the hypernetwork takes it, and what the
    artist gave for it in words, for the metadata of the LoRA's file.
    """

    given: Conditions
    words: Mapping[str, str]
    # The last LoRA predicted of it and what from, kept as long as ComfyUI keeps the condition (predict.py).
    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


class LoRAState(dict[str, Tensor]):
    """Core's LORA_MODEL, a dict of tensors by key, that also remembers where it came from.

    A subclass, because core's nodes treat the socket as a plain dict and Save LoRA wants the metadata.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]):
        super().__init__(tensors)
        self.metadata = dict(metadata)
