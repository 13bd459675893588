"""Prediction: hypernetwork + base weights + condition -> response maps and LoRA."""

import weakref
from functools import partial

from comfy_api.latest import io

from ..lofa_core.generators import predict, predict_response
from ..lofa_core.lora_files import to_state_dict
from ..lofa_core.memory import at_a_time
from ..lofa_core.prediction import Prediction, ResponseMaps, check_conditions
from . import host
from .sockets import (
    CATEGORY,
    Condition,
    ConditionSocket,
    HypernetworkSocket,
    LoRAState,
    ResponseSocket,
)

WORKING_MEMORY = 2 * 2**30  # bytes beside the weights, for one batch of layers


def _inputs() -> list[io.Input]:
    """The three inputs both nodes share."""
    return [
        HypernetworkSocket.Input("hypernetwork", tooltip="From Load Hypernetwork; it must fit the model."),
        io.Model.Input(
            "model",
            tooltip="The base model to personalise. LoRAs already applied to it are looked past: the "
            "prediction starts from its own weights.",
        ),
        ConditionSocket.Input("condition", tooltip="What to personalise for, from one of the Encode nodes."),
    ]


def _predict(run, hypernetwork, model, condition: Condition, node_id: str):
    """`predict` or `predict_response` with ComfyUI's device, progress bar and interruption."""
    network = hypernetwork.model
    check_conditions(network, condition.given)
    host.load(hypernetwork, WORKING_MEMORY)
    return run(
        network,
        host.base_weights(model),
        condition.given,
        device=host.device(),
        dtype=next(network.parameters()).dtype,
        watch=host.watch(node_id, "Predicting"),
    )


def _prediction(
    hypernetwork, model, condition: Condition, seed: int, node_id: str
) -> tuple[Prediction, bool]:
    """The prediction, and whether it is the last one again: another strength needs no other LoRA."""
    parts, kept = (hypernetwork, model.model), condition.memory.get("last")
    if kept is not None:
        made_from, of_seed, prediction = kept
        if of_seed == seed and all(ref() is part for ref, part in zip(made_from, parts, strict=True)):
            return prediction, True
    prediction = _predict(partial(predict, seed=seed), hypernetwork, model, condition, node_id)
    condition.memory["last"] = tuple(map(weakref.ref, parts)), seed, prediction
    return prediction, False


def _memory_note(responses: ResponseMaps) -> str:
    """What to add to a report where memory was short."""
    short = responses.short_of_memory
    return f", {at_a_time(short)} because memory was short" if short else ""


def personalised(
    hypernetwork, model, condition: Condition, strength: float, seed: int, node_id: str
) -> tuple:
    """(LORA_MODEL, MODEL with it applied, LOFA_RESPONSE); says below the node what came out."""
    prediction, again = _prediction(hypernetwork, model, condition, seed, node_id)
    metadata = dict(prediction.lora.metadata)
    for kind, words in condition.words.items():
        if words:
            metadata["lofa_prompt" if kind == "text" else f"lofa_{kind}"] = words
    lora = LoRAState(to_state_dict(prediction.lora), metadata)
    layers = len(prediction.lora)
    applied = host.apply_lora(model, lora, layers, strength)
    report = f"{layers} of {layers} layers matched, "
    report += "as predicted before" if again else f"predicted in {prediction.seconds:.2f} s"
    report += _memory_note(prediction.responses)
    first = host.base_weights(model).model.layers[0].key  # as the MODEL names it: in SDXL another name
    if quantisation := host.quantisation(model, first):
        report += f"; the model's weights are {quantisation} and were dequantised for it"
    host.show_text(node_id, report)
    return lora, applied, prediction.responses


def lora_outputs() -> list[io.Output]:
    """What `personalised` gives."""
    return [
        io.LoraModel.Output(display_name="lora", tooltip="For Save LoRA, or core's own LORA_MODEL nodes."),
        io.Model.Output(display_name="model", tooltip="The model with the LoRA applied; sample with it."),
        ResponseSocket.Output(
            display_name="response", tooltip="Which weights are predicted to change, for the heatmap."
        ),
    ]


def strength_input() -> io.Input:
    """How strongly the LoRA is applied to the MODEL output."""
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-10.0,
        max=10.0,
        step=0.05,
        tooltip="How strongly the LoRA is applied to the model output here. The LoRA output itself is not "
        "scaled. 1.0 is what was trained; 0 leaves the model as it is.",
    )


def seed_input() -> io.Input:
    """What LoRA Diffusion starts from. Optional: workflows from before it was there go on working."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**64 - 1,
        control_after_generate=io.ControlAfterGenerate.fixed,
        optional=True,
        tooltip="Only LoRA Diffusion draws: another seed, another LoRA for the same condition. A "
        "hypernetwork gives one LoRA whatever the seed.",
    )


class PredictResponse(io.ComfyNode):
    """Stage I only -> LOFA_RESPONSE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAPredictResponse",
            display_name="Predict Response (LoFA)",
            category=CATEGORY,
            description="Predicts which weights of the base model the LoRA will change (Stage I), "
            "without the LoRA.",
            search_aliases=["response map", "lofa stage 1"],
            inputs=_inputs(),
            outputs=[
                ResponseSocket.Output(
                    display_name="response", tooltip="One map per layer, for Response Heatmap."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, hypernetwork, model, condition) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        responses = _predict(predict_response, hypernetwork, model, condition, node_id)
        host.show_text(node_id, f"{len(responses)} response maps{_memory_note(responses)}")
        return io.NodeOutput(responses)


class PredictLoRA(io.ComfyNode):
    """Both stages -> LORA_MODEL, the MODEL with it applied, LOFA_RESPONSE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoFAPredictLoRA",
            display_name="Predict LoRA (LoFA)",
            category=CATEGORY,
            description="Predicts an ordinary LoRA for the model from the condition, in one pass, "
            "and applies it.",
            search_aliases=["lofa", "text to lora", "personalize", "personalise", "generate lora"],
            inputs=[
                *_inputs(),
                strength_input(),
                seed_input(),
            ],
            outputs=lora_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, hypernetwork, model, condition, strength, seed=0) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        return io.NodeOutput(*personalised(hypernetwork, model, condition, strength, seed, node_id))
