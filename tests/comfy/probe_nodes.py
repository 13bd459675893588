"""Custom nodes for the tests' ComfyUI: they look at a MODEL's weights, and make its sampling fail."""

import hashlib

import torch


class WeightsHash:
    """The hash of all weights of a MODEL as they are in memory now, patched or not. Never cached."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "tests", "look", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}, "optional": {"after": ("IMAGE",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def look(self, model, after=None):
        digest = hashlib.sha256()
        for name, tensor in sorted(model.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        hooked = sum("bypass" in module.forward.__qualname__ for module in model.model.modules())
        return {"ui": {"text": [digest.hexdigest(), str(hooked)]}}


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


NODE_CLASS_MAPPINGS = {"TestWeightsHash": WeightsHash, "TestFailInPass": FailInPass}
