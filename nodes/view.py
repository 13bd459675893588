"""Seeing what the hypernetwork does."""

import math

import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..lofa_core.heatmap import overview, render
from ..lofa_core.response_view import LayerView, atlas, views
from ..lofa_core.steps import Watch
from . import host
from .sockets import CATEGORY, ResponseSocket

# The maps that the page shows large: sides at most this, and this many pixels in all.
LARGEST_MAP, PIXELS = 192, 6_000_000


class ResponseHeatmap(io.ComfyNode):
    """LOFA_RESPONSE -> IMAGE, a grid of depth x kind; and what web/response_heatmap.js shows."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAResponseHeatmap",
            display_name="Response Heatmap (LoFA)",
            category=CATEGORY,
            description="Draws the response maps: one small map per layer, a row per depth, a column per "
            "kind of layer. Bright is where the LoRA changes the base model. Look closer shows one layer "
            "large.",
            search_aliases=["response map", "preview response", "lofa heatmap", "compare responses"],
            is_output_node=True,
            inputs=[
                ResponseSocket.Input("response", tooltip="From Predict LoRA or Predict Response."),
                io.Int.Input(
                    "cell",
                    default=96,
                    min=16,
                    max=512,
                    step=8,
                    tooltip="Width and height of each layer's map in the picture, in pixels. The preview on "
                    "the node has a size of its own.",
                ),
                ResponseSocket.Input(
                    "second",
                    optional=True,
                    tooltip="To compare with: another response of the same base model. Look closer shows "
                    "both, and how far they agree.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The grid as a picture.")],
        )

    @classmethod
    def execute(cls, response, cell, second=None) -> io.NodeOutput:
        sides = (math.isqrt(PIXELS // max(1, len(response))), LARGEST_MAP)
        watch = host.watch()
        layers = views(response, second, small=cell, large=min(sides), watch=watch)
        image = _image(render(_maps(layers, "small"), cell=cell, watch=watch))
        small = overview(_maps(layers, "large"), Watch(check_cancelled=host.check_cancelled))
        preview = ui.PreviewImage(_image(small), cls=cls).as_dict()
        return io.NodeOutput(image, ui=preview | _for_the_page(layers))


def _maps(layers: list[LayerView], size: str) -> dict[str, Tensor]:
    return {layer.name: torch.from_numpy(getattr(layer, size)) for layer in layers}


def _image(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> IMAGE [1, H, W, 3]; with large cells it has a gigabyte."""
    image = torch.empty(1, *picture.shape)
    for rows, into in zip(torch.from_numpy(picture).split(512), image[0].split(512), strict=True):
        host.check_cancelled()
        into.copy_(rows).div_(255.0)
    return image


def _for_the_page(layers: list[LayerView]) -> dict[str, list]:
    """Each layer's figures, and where their maps are: all in one picture in ComfyUI's temporary folder, and
    those of the second response in another. ComfyUI wants every value to be a list.
    """
    columns = math.ceil(math.sqrt(len(layers)))
    both = [[layer.large for layer in layers]]
    if any(layer.second for layer in layers):
        missing = np.zeros_like(layers[0].large)
        both.append([layer.second.large if layer.second else missing for layer in layers])
    cancelling = Watch(check_cancelled=host.check_cancelled)
    pictures = [
        ui.ImageSaveHelper.save_images(
            _image(atlas(maps, columns, cancelling)),
            "lofa_response",
            io.FolderType.temp,
            cls=None,
            compress_level=1,
        )[0]
        for maps in both
    ]
    figures = [
        {
            "name": layer.name,
            "depth": layer.depth,
            "kind": layer.kind,
            "shape": layer.shape,
            "share": layer.share,
            "second_share": layer.second.share if layer.second else None,
            "cosine": layer.cosine,
        }
        for layer in layers
    ]
    tiles = {"side": len(layers[0].large), "columns": columns}
    return {"lofa_layers": figures, "lofa_pictures": pictures, "lofa_tiles": [tiles]}
