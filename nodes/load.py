"""Loaders: a hypernetwork, and the embedded miniature base model."""

import json

import torch
from comfy_api.latest import io

from ..lofa_core import miniature
from ..lofa_core.checkpoint import load_generator
from ..lofa_core.lora_diffusion import LoRADiffusion
from ..lofa_core.released import load_released
from . import host, host_miniature
from .sockets import CATEGORY, HypernetworkSocket, PoseSocket


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
                    tooltip="A .safetensors file from models/lofa, LoFA_v0's stage1_preview.pth, or the one "
                    "that comes with the pack and fits Load Miniature. It only fits the base model it was "
                    "trained for.",
                ),
                io.Combo.Input(
                    "stage2",
                    options=host.stage2_names(),
                    default=host.NO_STAGE2,
                    optional=True,
                    tooltip="LoFA_v0 was published as two files: its stage2_preview.pth. Leave it at none "
                    "for a .safetensors file.",
                ),
            ],
            outputs=[
                HypernetworkSocket.Output(
                    display_name="hypernetwork",
                    tooltip="For the Encode nodes, Predict LoRA and Predict Response.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, hypernetwork, stage2=host.NO_STAGE2):
        return host.content_hashes(host.hypernetwork_files(hypernetwork, stage2))

    @classmethod
    def execute(cls, hypernetwork, stage2=host.NO_STAGE2) -> io.NodeOutput:
        published, alone = hypernetwork.endswith(".pth"), stage2 == host.NO_STAGE2
        if published and alone:
            raise ValueError(
                f"{hypernetwork} is one of LoFA_v0's two files. Choose stage2_preview.pth as stage2."
            )
        if not published and not alone:
            raise ValueError(f"{hypernetwork} is whole: set stage2 to {host.NO_STAGE2}, not {stage2}.")
        load = load_released if published else load_generator
        network = load(*host.hypernetwork_files(hypernetwork, stage2), dtype=None, watch=host.watch())
        parameters = sum(parameter.numel() for parameter in network.parameters())
        drawn = isinstance(network, LoRADiffusion)  # draws in float32 alone
        return io.NodeOutput(
            host.managed(network, torch.float32 if drawn else host.compute_dtype(parameters))
        )


class LoadMiniature(io.ComfyNode):
    """The embedded WAN2.1 miniature -> MODEL, CLIP, VAE, CLIP_VISION."""

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
                io.ClipVision.Output(
                    display_name="clip_vision", tooltip="Its image encoder, for CLIP Vision Encode."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*host_miniature.load_miniature())


class MiniatureExample(io.ComfyNode):
    """Example poses and style pictures of the miniature's world -> POSE_KEYPOINT, IMAGE."""

    @classmethod
    def define_schema(cls):
        poses, pictures = miniature.example_names("pose"), miniature.example_names("style")
        return io.Schema(
            node_id="LoFAMiniatureExample",
            display_name="Miniature Example (LoFA)",
            category=CATEGORY,
            description="A pose clip and a style picture from the miniature's small world, to try Encode "
            "Pose and Encode Style with. Needs no download.",
            search_aliases=["lofa example", "example pose", "example style"],
            inputs=[
                io.Combo.Input(
                    "pose",
                    options=poses,
                    default=poses[0],
                    tooltip="A clip's skeletons: limb, size and speed of its swing, travel, lean, feet.",
                ),
                io.Combo.Input(
                    "style",
                    options=pictures,
                    default=pictures[0],
                    tooltip="A picture: shirt, trousers, place.",
                ),
            ],
            outputs=[
                PoseSocket.Output(display_name="keypoints", tooltip="17 frames, for Encode Pose."),
                io.Image.Output(display_name="picture", tooltip="For CLIP Vision Encode."),
            ],
        )

    @classmethod
    def execute(cls, pose, style) -> io.NodeOutput:
        keypoints = json.loads(miniature.example("pose", pose).read_text(encoding="utf-8"))
        picture = host.read_picture(miniature.example("style", style))
        return io.NodeOutput(keypoints, picture)
