"""The LoFA nodes: sockets in, one lofa_core call, sockets out."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .conditions import (
    CombineConditions,
    EncodeIdentity,
    EncodePose,
    EncodeStyle,
    EncodeText,
    TextCondition,
)
from .guidance import HMCFG, HMCFGGuider
from .load import LoadHypernetwork, LoadMiniature, MiniatureExample
from .lora import BlendLoRAs, ResponseFromLoRA, SaveLoRA
from .personalize import Personalize
from .predict import PredictLoRA, PredictResponse
from .view import ResponseHeatmap


class LoFAExtension(ComfyExtension):
    """What ComfyUI asks for when it loads the pack."""

    async def on_load(self) -> None:
        host.register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadHypernetwork,
            LoadMiniature,
            MiniatureExample,
            EncodeText,
            TextCondition,
            EncodePose,
            EncodeStyle,
            EncodeIdentity,
            CombineConditions,
            Personalize,
            PredictResponse,
            PredictLoRA,
            SaveLoRA,
            BlendLoRAs,
            ResponseFromLoRA,
            HMCFGGuider,
            HMCFG,
            ResponseHeatmap,
        ]
