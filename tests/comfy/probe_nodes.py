"""Custom nodes for the tests' ComfyUI: they look into what a node gives, and make sampling fail."""

import hashlib
from collections.abc import Mapping

import torch


class Digest:
    """The hash of everything in a value, whatever its socket, and how many layers of a MODEL have a bypass. A
    MODEL's weights are hashed as they are in memory now, patched or not. Never cached.
    """

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "tests", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}, "optional": {"after": ("IMAGE",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def look(self, value, after=None):
        digest = hashlib.sha256()
        _take(digest, value)
        modules = value.model.modules() if hasattr(value, "model") else ()
        bypassed = sum("bypass" in module.forward.__qualname__ for module in modules)
        return {"ui": {"text": [digest.hexdigest(), str(bypassed)]}}


def _take(digest, value) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(key.encode())
            _take(digest, value[key])
    elif isinstance(value, list | tuple):
        for part in value:
            _take(digest, part)
    elif hasattr(value, "model"):  # MODEL, LOFA_HYPERNETWORK
        _take(digest, value.model.state_dict())
    elif hasattr(value, "given"):  # LOFA_CONDITION
        _take(digest, value.given)
    elif hasattr(value, "values"):  # what is given of one kind
        _take(digest, [value.values, value.strength])
    else:
        digest.update(str(value).encode())


class FailInPass:
    """A MODEL whose sampling raises an error in a pass of this number."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "number": ("INT",)}}

    def patch(self, model, number):
        passes = []

        def apply(model_apply, arguments):
            passes.append(True)
            if len(passes) == number:
                raise RuntimeError("this pass fails on purpose")
            return model_apply(arguments["input"], arguments["timestep"], **arguments["c"])

        clone = model.clone()
        clone.set_model_unet_function_wrapper(apply)
        return (clone,)


NODE_CLASS_MAPPINGS = {"TestDigest": Digest, "TestFailInPass": FailInPass}
