"""HM-CFG: base and personalised model in one sampler step, from one MODEL."""

from comfy_api.latest import io

from ..lofa_core.guidance import HybridGuidance
from . import host_guidance
from .sockets import CATEGORY


def _model_and_lora() -> list[io.Input]:
    return [
        io.Model.Input(
            "model",
            tooltip="The base model without the LoRA: from the loader, not Predict LoRA's model output. "
            "LoRAs already on it count as part of the base.",
        ),
        io.LoraModel.Input(
            "lora",
            tooltip="The LoRA that personalises: from Predict LoRA, or any node that makes a LORA_MODEL.",
        ),
    ]


def _weight(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=5.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def _subject_weight() -> io.Input:
    return _weight(
        "subject_weight",
        "How strongly the sample is pulled from what the base model makes of the prompt towards what the "
        "personalised model makes of it. 0: the base alone. Equal to the base weight: the LoRA acts on the "
        "positive prompt only, at no more time than plain CFG. In between: more of the base's composition.",
    )


def _strength_and_windows() -> list[io.Input]:
    """The strength of the LoRA, and when the two weights act."""
    strength = io.Float.Input(
        "strength",
        default=1.0,
        min=-10.0,
        max=10.0,
        step=0.05,
        tooltip="How strongly the LoRA is applied in the personalised passes. 1.0 is what was trained.",
    )
    windows = [
        io.Float.Input(
            f"{weight}_{edge}",
            default=default,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip=f"The {weight} weight acts {word} this fraction of the sampler's steps. {outside}",
        )
        for weight, outside in (
            ("base", "Outside, the prompt is followed unguided, without the negative pass."),
            ("subject", "Outside, the base model works alone."),
        )
        for edge, default, word in (("start", 0.0, "from"), ("end", 1.0, "until"))
    ]
    return [strength, *windows]


class HMCFGGuider(io.ComfyNode):
    """MODEL, LORA_MODEL, CONDITIONING x 2 -> GUIDER."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAHMCFGGuider",
            display_name="HM-CFG Guider (LoFA)",
            category=CATEGORY,
            description="Guides a sampler with the base model and the personalised model in every step, from "
            "one model in memory: the base keeps the composition, the LoRA brings the subject.",
            search_aliases=[
                "hybrid guidance",
                "hm-cfg",
                "dual model guider",
                "asymmetric cfg",
                "lofa guider",
            ],
            inputs=[
                *_model_and_lora(),
                io.Conditioning.Input("positive", tooltip="The prompt, for both models."),
                io.Conditioning.Input(
                    "negative", tooltip="What to keep away from; only the base model sees it."
                ),
                _weight(
                    "base_weight",
                    "How strongly the base model follows the prompt: the cfg of a plain sampler.",
                ),
                _subject_weight(),
                *_strength_and_windows(),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, model, lora, positive, negative, base_weight, subject_weight, strength,
        base_start, base_end, subject_start, subject_end,
    ) -> io.NodeOutput:  # fmt: skip
        guidance = HybridGuidance(
            base_weight, subject_weight, (base_start, base_end), (subject_start, subject_end)
        )
        return io.NodeOutput(host_guidance.hybrid_guider(model, lora, strength, guidance, positive, negative))


class HMCFG(io.ComfyNode):
    """MODEL, LORA_MODEL -> MODEL."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAHMCFG",
            display_name="HM-CFG (LoFA)",
            category=CATEGORY,
            description="The same guidance as HM-CFG Guider for the plain KSampler, whose cfg is then the "
            "base weight.",
            search_aliases=["hybrid guidance", "hm-cfg", "asymmetric cfg", "apply lora positive only"],
            inputs=[*_model_and_lora(), _subject_weight(), *_strength_and_windows()],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For KSampler, SamplerCustom or CFG Guider; their cfg is the base weight: how "
                    "strongly the base model follows the prompt.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, model, lora, subject_weight, strength, base_start, base_end, subject_start, subject_end
    ) -> io.NodeOutput:
        guidance = HybridGuidance(
            w_subject=subject_weight,
            base_window=(base_start, base_end),
            subject_window=(subject_start, subject_end),
        )
        return io.NodeOutput(host_guidance.hybrid_model(model, lora, strength, guidance))
