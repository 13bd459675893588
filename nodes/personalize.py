"""The common path in one node: what the artist wants -> the LoRA, applied."""

import weakref
from collections.abc import Callable

from comfy_api.latest import io

from .conditions import EXAMPLE, combined, picture_condition, pose_condition, text_condition
from .predict import lora_outputs, personalised, seed_input, strength_input
from .sockets import CATEGORY, Condition, HypernetworkSocket, PoseSocket

# Hypernetwork -> node id -> what the node was given last, and the condition made of it, which remembers the
# LoRA predicted of it (predict.py). ComfyUI caches no part of a node, so it is kept here, as long as the
# hypernetwork.
_kept: weakref.WeakKeyDictionary[object, dict[str, tuple[list[Callable[[], object]], Condition]]]
_kept = weakref.WeakKeyDictionary()
_NODES = 4  # the last so many nodes: in a graph that loops, every time around is a node of its own


class Personalize(io.ComfyNode):
    """Text, POSE_KEYPOINT and CLIP_VISION_OUTPUT, any of them -> LORA_MODEL, MODEL, LOFA_RESPONSE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAPersonalize",
            display_name="LoFA Personalize",
            category=CATEGORY,
            description="Predicts a LoRA from a sentence, a pose, a picture, or several of them, and applies "
            "it: the Encode nodes, Combine Conditions and Predict LoRA in one.",
            search_aliases=["lofa", "personalise", "text to lora", "generate lora", "predict lora"],
            inputs=[
                HypernetworkSocket.Input(
                    "hypernetwork", tooltip="From Load Hypernetwork; it must fit the model."
                ),
                io.Model.Input("model", tooltip="The base model to personalise."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="What the LoRA shall bring out, in full. Empty: nothing is said in words.",
                ),
                strength_input(),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The base model's text encoder; needed where there is a text.",
                ),
                PoseSocket.Input(
                    "keypoints", optional=True, tooltip="POSE_KEYPOINT of a clip, from DWPose or OpenPose."
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="A picture of the style or the face, from core's CLIP Vision Encode; which of "
                    "them is what the hypernetwork knows.",
                ),
                seed_input(),
            ],
            outputs=lora_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, hypernetwork, model, text, strength, clip=None, keypoints=None, clip_vision_output=None, seed=0
    ) -> io.NodeOutput:
        node_id, kept = cls.hidden.unique_id, _kept.setdefault(hypernetwork, {})
        parts = (text, clip, keypoints, clip_vision_output)
        if node_id not in kept or not _are(parts, kept[node_id][0]):
            made = _condition(hypernetwork.model, *parts)
            kept[node_id] = [_reference(part) for part in parts], made
            while len(kept) > _NODES:
                del kept[next(iter(kept))]
        condition = kept[node_id][1]
        return io.NodeOutput(*personalised(hypernetwork, model, condition, strength, seed, node_id))


def _reference(part: object) -> Callable[[], object]:
    """Weak where it holds on to tensors; a text and keypoints are small, and know no weak references."""
    return (lambda: part) if part is None or isinstance(part, (str, list)) else weakref.ref(part)


def _are(parts: tuple, references: list[Callable[[], object]]) -> bool:
    """Whether these inputs are those of the references: the same text, and the same objects."""
    (text, *objects), (known, *others) = parts, (reference() for reference in references)
    return text == known and all(one is other for one, other in zip(objects, others, strict=True))


def _condition(hypernetwork, text: str, clip, keypoints, clip_vision_output) -> Condition:
    """All that is given as one condition. Raises ValueError where something is missing."""
    given = []
    if text.strip():
        if clip is None:
            raise ValueError("There is a text but no CLIP to read it: connect clip, or empty the text.")
        given.append(text_condition(hypernetwork, clip, text))
    if keypoints is not None:
        given.append(pose_condition(hypernetwork, keypoints))
    if clip_vision_output is not None:
        kinds = [kind for kind in ("style", "identity") if kind in hypernetwork.conditions]
        if len(kinds) > 1:
            raise ValueError(
                "This hypernetwork knows style and identity, and a picture may be either: use Encode "
                "Style or Encode Identity, and Predict LoRA."
            )
        given.append(picture_condition(hypernetwork, (kinds or ["style"])[0], clip_vision_output))
    if not given:
        raise ValueError("Nothing is asked for: write a text, or connect keypoints or a picture.")
    return combined([(one, 1.0) for one in given])
