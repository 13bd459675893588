"""Loaders: a hypernetwork, and the embedded miniature base model."""

from comfy_api.latest import io

from ..lofa_core.checkpoint import load_hypernetwork
from ..lofa_core.released import load_released
from . import host
from .sockets import CATEGORY, HypernetworkSocket


class LoadHypernetwork(io.ComfyNode):
    """A hypernetwork file -> LOFA_HYPERNETWORK."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFALoadHypernetwork",
            display_name="Load Hypernetwork (LoFA)",
            category=CATEGORY,
            description="Loads the network that predicts LoRAs. Files go into models/lofa.",
            search_aliases=["lofa loader", "load lofa", "lora predictor"],
            inputs=[
                io.Combo.Input(
                    "hypernetwork",
                    options=host.hypernetwork_names(),
                    default=host.EMBEDDED_HYPERNETWORK,
                    tooltip="A .safetensors file from models/lofa, LoFA_v0's two published .pth files in it, "
                    "or the one that comes with the pack and fits Load Miniature. It only fits the base "
                    "model it was trained for.",
                ),
            ],
            outputs=[
                HypernetworkSocket.Output(
                    display_name="hypernetwork",
                    tooltip="For Text Condition, Encode Text, Predict LoRA and Predict Response.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, hypernetwork):
        return host.file_state(host.hypernetwork_files(hypernetwork))

    @classmethod
    def execute(cls, hypernetwork) -> io.NodeOutput:
        files = host.hypernetwork_files(hypernetwork)
        load = load_released if len(files) == 2 else load_hypernetwork
        return io.NodeOutput(load(*files, dtype=None))


class LoadMiniature(io.ComfyNode):
    """The embedded WAN2.1 miniature -> MODEL, CLIP, VAE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFALoadMiniature",
            display_name="Load Miniature (LoFA)",
            category=CATEGORY,
            description="The base model that comes with the pack: WAN2.1 at a thousandth of the size. It "
            "knows one small world, a figure that moves its arms and legs. Clips are 64x64, 17 frames. "
            "Needs no download.",
            search_aliases=["lofa miniature", "tiny wan", "example model"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The diffusion model, a real WAN2.1 made small."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="Its text encoder. It knows the miniature's words only."
                ),
                io.Vae.Output(
                    display_name="vae", tooltip="Its video VAE, the WAN2.1 architecture made small."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*host.load_miniature())
