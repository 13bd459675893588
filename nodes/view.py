"""Seeing what the hypernetwork does."""

import torch
from comfy_api.latest import io, ui

from ..lofa_core.heatmap import render
from .sockets import CATEGORY, ResponseSocket


class ResponseHeatmap(io.ComfyNode):
    """LOFA_RESPONSE -> IMAGE, a grid of depth x kind."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAResponseHeatmap",
            display_name="Response Heatmap (LoFA)",
            category=CATEGORY,
            description="Draws the response maps: one small map per layer, a row per depth, a column per "
            "kind of layer. Bright is where the LoRA changes the base model.",
            search_aliases=["response map", "preview response", "lofa heatmap"],
            is_output_node=True,
            inputs=[
                ResponseSocket.Input("response", tooltip="From Predict LoRA or Predict Response."),
                io.Int.Input(
                    "cell",
                    default=96,
                    min=16,
                    max=512,
                    step=8,
                    tooltip="Width and height of each layer's map in pixels.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The grid as a picture.")],
        )

    @classmethod
    def execute(cls, response, cell) -> io.NodeOutput:
        picture = render(response, cell=cell)
        image = torch.from_numpy(picture).float().div(255.0).unsqueeze(0)  # [1, H, W, 3]
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
