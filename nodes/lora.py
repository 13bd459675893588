"""What to do with a LoRA, predicted or from a file."""

from comfy_api.latest import io, ui

from ..lofa_core.key_names import LAYOUTS
from ..lofa_core.lora import LoRA
from ..lofa_core.lora_files import (
    from_state_dict,
    load_target_layers,
    save_lora,
    to_state_dict,
)
from ..lofa_core.lora_response import LoRAResponses
from . import host
from .sockets import CATEGORY, LoRAState, ResponseSocket

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
        named = None if layout == DEFAULT_LAYOUT else layout
        save_lora(container, path, named, watch=host.watch())
        host.show_text(cls.hidden.unique_id, f"Saved {shown}")
        return io.NodeOutput(ui=ui.PreviewText(shown))


class BlendLoRAs(io.ComfyNode):
    """LORA_MODEL x 2 -> LORA_MODEL."""

    @classmethod
    def define_schema(cls):
        def weight(name: str) -> io.Input:
            return io.Float.Input(
                name,
                default=1.0,
                min=-10.0,
                max=10.0,
                step=0.05,
                tooltip="How much of this LoRA goes into the blend.",
            )

        return io.Schema(
            node_id="LoFABlendLoRAs",
            display_name="Blend LoRAs (LoFA)",
            category=CATEGORY,
            description="Adds two LoRAs of one base model, each with a weight, into one LoRA. Chain the node "
            "for more. Applied, it does what both together do.",
            search_aliases=["merge lora", "mix lora", "combine lora", "lora rank reduction", "resize lora"],
            inputs=[
                io.LoraModel.Input("first", tooltip="From Predict LoRA or Response from LoRA."),
                io.LoraModel.Input("second", tooltip="Another LoRA of the same base model."),
                weight("first_weight"),
                weight("second_weight"),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="The blend's rank: the closest LoRA of at most this rank (by SVD). 0 keeps the "
                    "sum of both ranks, which is exact.",
                ),
            ],
            outputs=[io.LoraModel.Output(display_name="lora", tooltip="For Save LoRA or core's nodes.")],
        )

    @classmethod
    def execute(cls, first, second, first_weight, second_weight, rank) -> io.NodeOutput:
        parts = [(from_state_dict(first), first_weight), (from_state_dict(second), second_weight)]
        return io.NodeOutput(LoRAState(to_state_dict(LoRA.blend(parts, rank or None, host.watch())), {}))


class ResponseFromLoRA(io.ComfyNode):
    """A LoRA file + MODEL -> LOFA_RESPONSE, LORA_MODEL."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAResponseFromLoRA",
            display_name="Response from LoRA (LoFA)",
            category=CATEGORY,
            description="Shows where any LoRA on your disk changes the model: which weights by more than the "
            "threshold. Needs no hypernetwork.",
            search_aliases=[
                "lora heatmap",
                "inspect lora",
                "analyse lora",
                "analyze lora",
                "load lora model",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the LoRA was made for."),
                io.Combo.Input(
                    "lora_name",
                    options=host.lora_names(),
                    tooltip="A file from models/loras or output/loras.",
                ),
                io.Float.Input(
                    "threshold",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="A weight counts as changed from this many percent of itself on. The paper: 2.",
                ),
            ],
            outputs=[
                ResponseSocket.Output(
                    display_name="response", tooltip="One map per layer, for Response Heatmap."
                ),
                io.LoraModel.Output(
                    display_name="lora", tooltip="Its attention layers, for Blend LoRAs or HM-CFG."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model, lora_name, threshold):
        return [host.content_hashes([host.lora_file(lora_name)]), threshold]

    @classmethod
    def execute(cls, model, lora_name, threshold) -> io.NodeOutput:
        path = host.lora_file(lora_name)
        lora, others = load_target_layers(path, host.watch())
        try:
            responses = LoRAResponses(host.base_weights(model), lora, threshold / 100.0)
        except ValueError as error:
            raise ValueError(f"{lora_name}: {error}") from error
        report = f"{responses.report.summary()}, rank {lora.rank}"
        if others:
            report += f"; {len(others)} tensors of other layers are not shown (first {others[0]})"
        host.show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(responses, LoRAState(to_state_dict(lora), lora.metadata))
