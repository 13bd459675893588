"""Conditions: what the artist wants, encoded as a token sequence."""

from comfy_api.latest import io

from ..lofa_core.conditions.text import check_prompt
from . import host
from .sockets import CATEGORY, Condition, ConditionSocket, HypernetworkSocket

# One sentence that the miniature's hypernetwork understands, so that a fresh node works as it is.
EXAMPLE = (
    "a person in a red shirt and blue trousers on a beach swings the left arm widely and quickly, "
    "moves to the right, leaning left, feet together"
)


class EncodeText(io.ComfyNode):
    """A sentence -> LOFA_CONDITION."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAEncodeText",
            display_name="Encode Text (LoFA)",
            category=CATEGORY,
            description="Turns a sentence into the condition that a LoRA is predicted from.",
            search_aliases=["lofa prompt", "lora prompt", "text condition"],
            inputs=[
                HypernetworkSocket.Input(
                    "hypernetwork", tooltip="Says which words and which text encoder it was trained with."
                ),
                io.Clip.Input(
                    "clip", tooltip="The text encoder of the base model the hypernetwork was trained for."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="What the LoRA shall bring out, in full: who, where, which movement, how. "
                    "The prompt that you sample with can then stay short.",
                ),
            ],
            outputs=[
                ConditionSocket.Output(
                    display_name="condition", tooltip="For Predict LoRA and Predict Response."
                ),
            ],
        )

    @classmethod
    def execute(cls, hypernetwork, clip, text) -> io.NodeOutput:
        _check_text(hypernetwork)
        check_prompt(text, hypernetwork.condition.words)
        return io.NodeOutput(_condition(hypernetwork, host.encode_text(clip, text), "CLIP", text))


class TextCondition(io.ComfyNode):
    """CONDITIONING -> LOFA_CONDITION."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFATextCondition",
            display_name="Text Condition (LoFA)",
            category=CATEGORY,
            description="Uses a prompt that is already encoded, by CLIP Text Encode, as the condition that a "
            "LoRA is predicted from.",
            search_aliases=["lofa conditioning", "conditioning to lora", "lofa prompt"],
            inputs=[
                HypernetworkSocket.Input(
                    "hypernetwork", tooltip="Says which text encoder it was trained with."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="One prompt, from CLIP Text Encode with the base model's own text encoder.",
                ),
            ],
            outputs=[
                ConditionSocket.Output(
                    display_name="condition", tooltip="For Predict LoRA and Predict Response."
                ),
            ],
        )

    @classmethod
    def execute(cls, hypernetwork, conditioning) -> io.NodeOutput:
        _check_text(hypernetwork)
        return io.NodeOutput(_condition(hypernetwork, host.text_states(conditioning), "CONDITIONING", ""))


def _check_text(hypernetwork) -> None:
    kind = hypernetwork.condition.kind
    if kind != "text":
        raise ValueError(
            f"This hypernetwork is conditioned on {kind}, not on text. "
            "Load a text hypernetwork, or use the node that encodes its condition."
        )


def _condition(hypernetwork, tokens, source, text) -> Condition:
    width = hypernetwork.condition.width
    if tokens.shape[-1] != width:
        raise ValueError(
            f"This {source} gives {tokens.shape[-1]} numbers per token; the hypernetwork was trained with a "
            f"text encoder of {width}. Connect the text encoder of {hypernetwork.base.name}."
        )
    return Condition("text", tokens, text)
