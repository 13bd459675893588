"""Conditions: what the artist wants, encoded as a token sequence."""

from collections.abc import Sequence

from comfy_api.latest import io
from torch import Tensor

from ..lofa_core.conditions import Given, weakened
from ..lofa_core.conditions.pose import pose_from_keypoints, resample_frames
from ..lofa_core.conditions.text import check_prompt
from ..lofa_core.descriptions import ConditionDescription
from . import host
from .sockets import CATEGORY, Condition, ConditionSocket, HypernetworkSocket, PoseSocket

# One sentence that the miniature's hypernetwork understands, so that a fresh node works as it is.
EXAMPLE = "a person swings the left arm widely and quickly, moves to the right, leaning left, feet together"


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
            outputs=[_output()],
        )

    @classmethod
    def execute(cls, hypernetwork, clip, text) -> io.NodeOutput:
        return io.NodeOutput(text_condition(hypernetwork.model, clip, text))


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
            outputs=[_output()],
        )

    @classmethod
    def execute(cls, hypernetwork, conditioning) -> io.NodeOutput:
        states = host.text_states(conditioning)
        return io.NodeOutput(_tokens(hypernetwork.model, "text", states, "CONDITIONING", ""))


class EncodePose(io.ComfyNode):
    """POSE_KEYPOINT or drawn skeletons -> LOFA_CONDITION."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAEncodePose",
            display_name="Encode Pose (LoFA)",
            category=CATEGORY,
            description="Turns a moving pose into the condition that a LoRA is predicted from. Connect "
            "keypoints, or pictures of skeletons that another node has drawn.",
            search_aliases=["lofa pose", "openpose lora", "dwpose", "motion condition", "skeleton"],
            inputs=[
                HypernetworkSocket.Input(
                    "hypernetwork", tooltip="Says how many frames it reads, and how large."
                ),
                PoseSocket.Input(
                    "keypoints",
                    optional=True,
                    tooltip="POSE_KEYPOINT, a frame for each picture, from DWPose or OpenPose. Any number of "
                    "frames: they are spread evenly.",
                ),
                io.Image.Input(
                    "skeletons",
                    optional=True,
                    tooltip="Instead of keypoints: skeletons in DWPose's colours on black, one a frame.",
                ),
            ],
            outputs=[_output(), io.Image.Output(display_name="pose", tooltip="What the network looks at.")],
        )

    @classmethod
    def execute(cls, hypernetwork, keypoints=None, skeletons=None) -> io.NodeOutput:
        condition = pose_condition(hypernetwork.model, keypoints, skeletons)
        shown = condition.given["pose"].values[0].permute(1, 2, 3, 0)  # [T, H, W, 3]
        return io.NodeOutput(condition, shown)


class EncodeStyle(io.ComfyNode):
    """CLIP_VISION_OUTPUT -> LOFA_CONDITION."""

    @classmethod
    def define_schema(cls):
        return _picture_schema(
            "LoFAEncodeStyle",
            "Encode Style (LoFA)",
            "Turns one or more pictures of a style into the condition that a LoRA is predicted from.",
            ["lofa style", "style reference", "style lora"],
        )

    @classmethod
    def execute(cls, hypernetwork, clip_vision_output) -> io.NodeOutput:
        return io.NodeOutput(picture_condition(hypernetwork.model, "style", clip_vision_output))


class EncodeIdentity(io.ComfyNode):
    """CLIP_VISION_OUTPUT -> LOFA_CONDITION."""

    @classmethod
    def define_schema(cls):
        return _picture_schema(
            "LoFAEncodeIdentity",
            "Encode Identity (LoFA)",
            "Turns one or more pictures of a face into the condition that a LoRA is predicted from. Crop "
            "them to the face.",
            ["lofa face", "face reference", "identity lora", "faceid"],
        )

    @classmethod
    def execute(cls, hypernetwork, clip_vision_output) -> io.NodeOutput:
        return io.NodeOutput(picture_condition(hypernetwork.model, "identity", clip_vision_output))


class CombineConditions(io.ComfyNode):
    """Two LOFA_CONDITION -> one."""

    @classmethod
    def define_schema(cls):
        def strength(name: str) -> io.Input:
            return io.Float.Input(
                name, default=1.0, min=0.0, max=3.0, step=0.05,
                tooltip="How much it counts. 1 is as trained; 0 is as if it were not connected.",
            )  # fmt: skip

        return io.Schema(
            node_id="LoFACombineConditions",
            display_name="Combine Conditions (LoFA)",
            category=CATEGORY,
            description="Joins two conditions of different kinds, such as text and style, for a hypernetwork "
            "that knows both. Chain it for three.",
            search_aliases=["lofa combine", "text and style", "merge conditions"],
            inputs=[
                ConditionSocket.Input("first", tooltip="From an Encode node, or another Combine Conditions."),
                ConditionSocket.Input("second", tooltip="A condition of another kind."),
                strength("first_strength"),
                strength("second_strength"),
            ],
            outputs=[_output()],
        )

    @classmethod
    def execute(cls, first, second, first_strength, second_strength) -> io.NodeOutput:
        return io.NodeOutput(combined([(first, first_strength), (second, second_strength)]))


def _output() -> io.Output:
    return ConditionSocket.Output(
        display_name="condition", tooltip="For Predict LoRA, Predict Response and Combine Conditions."
    )


def _picture_schema(node_id: str, name: str, description: str, aliases: list[str]) -> io.Schema:
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category=CATEGORY,
        description=description,
        search_aliases=aliases,
        inputs=[
            HypernetworkSocket.Input("hypernetwork", tooltip="Says which image encoder it was trained with."),
            io.ClipVisionOutput.Input(
                "clip_vision_output",
                tooltip="From core's CLIP Vision Encode, with the image encoder that the hypernetwork was "
                "trained with. A batch of pictures counts as several references.",
            ),
        ],
        outputs=[_output()],
    )


def combined(parts: Sequence[tuple[Condition, float]]) -> Condition:
    """Conditions of different kinds as one, each with its strength."""
    given: dict[str, Given] = {}
    words: dict[str, str] = {}
    for condition, strength in parts:
        for kind in condition.given:
            if kind in given:
                raise ValueError(
                    f"Both conditions hold {kind}: combine different kinds. Several pictures go into one "
                    "Encode node, as a batch."
                )
            given[kind] = weakened(condition.given[kind], strength)
        words |= condition.words
    return Condition(given, words)


def text_condition(hypernetwork, clip, text: str) -> Condition:
    """A sentence through the base model's text encoder, its words checked."""
    check_prompt(text, _known(hypernetwork, "text").words)
    return _tokens(hypernetwork, "text", host.encode_text(clip, text), "CLIP", text)


def pose_condition(hypernetwork, keypoints=None, skeletons=None) -> Condition:
    """POSE_KEYPOINT, or an IMAGE batch of skeletons that are drawn already."""
    known = _known(hypernetwork, "pose")
    if (keypoints is None) == (skeletons is None):
        raise ValueError("Connect either keypoints or skeletons: this node reads one of them.")
    if keypoints is not None:
        clip = pose_from_keypoints(keypoints, *known.size, watch=host.watch())
    else:
        clip = resample_frames(skeletons[..., :3], *known.size, watch=host.watch())
    words = f"{len(keypoints if skeletons is None else skeletons)} frames"
    return Condition({"pose": Given(clip)}, {"pose": words})


def picture_condition(hypernetwork, kind: str, seen) -> Condition:
    """Pictures of a style or a face, as CLIP_VISION_OUTPUT."""
    states = host.image_states(seen)
    words = f"{len(states)} pictures" if len(states) > 1 else "1 picture"
    tokens = states.flatten(0, 1).unsqueeze(0)
    return _tokens(hypernetwork, kind, tokens, "CLIP_VISION_OUTPUT", words)


def _known(hypernetwork, kind: str) -> ConditionDescription:
    if kind not in hypernetwork.conditions:
        raise ValueError(
            f"This hypernetwork is conditioned on {' and '.join(hypernetwork.conditions)}, not on {kind}. "
            f"Load one that knows {kind}, or use the node that encodes its condition."
        )
    return hypernetwork.conditions[kind]


def _tokens(hypernetwork, kind: str, tokens: Tensor, source: str, words: str) -> Condition:
    known = _known(hypernetwork, kind)
    if tokens.shape[-1] != known.width:
        raise ValueError(
            f"This {source} gives {tokens.shape[-1]} numbers per token; the hypernetwork was trained with "
            f"{known.width}. Connect the {'text' if kind == 'text' else 'image'} encoder it was trained with "
            f"(base model: {hypernetwork.base.name})."
        )
    return Condition({kind: Given(tokens)}, {kind: words})
