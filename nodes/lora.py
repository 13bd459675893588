"""What to do with a LoRA once it is predicted."""

from comfy_api.latest import io, ui

from ..lofa_core.key_names import LAYOUTS
from ..lofa_core.lora_files import from_state_dict, save_lora
from . import host
from .sockets import CATEGORY

DEFAULT_LAYOUT = "default"  # WAN: comfyui, SDXL: kohya


class SaveLoRA(io.ComfyNode):
    """LORA_MODEL -> a .safetensors file in output/loras."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFASaveLoRA",
            display_name="Save LoRA (LoFA)",
            category=CATEGORY,
            description="Saves a LoRA as an ordinary .safetensors file. Below output/loras, ComfyUI's own "
            "Load LoRA finds it.",
            search_aliases=["export lora", "write lora"],
            is_output_node=True,
            inputs=[
                io.LoraModel.Input(
                    "lora", tooltip="From Predict LoRA, or any other node that makes a LORA_MODEL."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="loras/lofa",
                    tooltip="File name without number and ending, below ComfyUI's output folder.",
                ),
                io.Combo.Input(
                    "layout",
                    options=[DEFAULT_LAYOUT, *LAYOUTS],
                    default=DEFAULT_LAYOUT,
                    advanced=True,
                    tooltip="How the file names its layers. The default loads in ComfyUI and in diffusers; "
                    "choose another only for a tool that asks for it.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, lora, filename_prefix, layout) -> io.NodeOutput:
        own = getattr(lora, "metadata", {})  # other nodes give a plain dict
        workflow = host.workflow_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        container = from_state_dict(lora, {**own, **workflow})
        path, shown = host.new_output_file(filename_prefix, ".safetensors")
        save_lora(container, path, layout=None if layout == DEFAULT_LAYOUT else layout)
        host.show_text(cls.hidden.unique_id, f"Saved {shown}")
        return io.NodeOutput(ui=ui.PreviewText(shown))
