"""Looks at ComfyUI's Python objects; run by `Installation.inspect` with ComfyUI's own Python, not by pytest:

python in_comfyui.py <ComfyUI checkout> <this repository> <prompt> <file for its encoding>

What the functions return goes to standard output as one line of JSON, by function name.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

COMFYUI, REPOSITORY, PROMPT, ENCODING = sys.argv[1:]
sys.path[0] = COMFYUI
sys.argv = [str(Path(COMFYUI, "main.py"))]

from comfy.cli_args import args  # noqa: E402

args.cpu = True  # before anything looks for a device

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def load_pack():
    """The repository as ComfyUI imports it: a package found by its path."""
    spec = importlib.util.spec_from_file_location(
        "lofa_pack", Path(REPOSITORY, "__init__.py"), submodule_search_locations=[REPOSITORY]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["lofa_pack"] = module
    spec.loader.exec_module(module)
    from lofa_pack.nodes import host

    host.register_folders()
    return host


def load_miniature() -> tuple:
    """The miniature's MODEL, CLIP, VAE and CLIP_VISION."""
    from lofa_pack.nodes import host_miniature

    return host_miniature.load_miniature()


def load_hypernetwork(host):
    """The embedded one, as Load Hypernetwork gives it."""
    from lofa_pack.nodes.load import LoadHypernetwork

    return LoadHypernetwork.execute(host.EMBEDDED_HYPERNETWORK).result[0]


def unpatched_weights(host) -> dict:
    """Weights read from a MODEL that another LoRA was applied to and that is loaded, against the file's."""
    from lofa_pack.lofa_core import miniature

    model, *_ = load_miniature()
    truth = load_file(miniature.DIFFUSION_MODEL)
    name = "blocks.1.cross_attn.k"
    width = truth[f"{name}.weight"].shape[0]
    lora = {
        f"diffusion_model.{name}.lora_A.weight": torch.randn(2, width),
        f"diffusion_model.{name}.lora_B.weight": torch.randn(width, 2),
    }
    patched = host.apply_lora(model, lora, layers=1, strength=1.0)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    in_memory = patched.model.diffusion_model.blocks[1].cross_attn.k.weight
    weights = host.base_weights(patched)
    differences = [
        (weights.read(layer).float() - truth[f"{layer.name}.weight"].float()).abs().max().item()
        for layer in weights.model.layers
    ]
    return {
        "layers": len(weights.model.layers),
        "name": weights.model.name,
        "largest_difference": max(differences),
        "patched_by": (in_memory.float() - truth[f"{name}.weight"].float()).abs().max().item(),
        "same_fingerprint": weights.fingerprint() == host.base_weights(model).fingerprint(),
    }


def states_of_the_model(host) -> dict:
    """For each state a MODEL may be in: the largest difference between the weights read from it and what its
    file holds, and how their quantisation is called.
    """
    from lofa_pack.lofa_core import miniature

    with safe_open(miniature.DIFFUSION_MODEL, "pt") as file:
        metadata = file.metadata()
    truth = load_file(miniature.DIFFUSION_MODEL)
    targets = {f"{layer.name}.weight" for layer in host.base_weights(load_miniature()[0]).model.layers}
    scaled, dequantised = {"scaled_fp8": torch.tensor([], dtype=torch.float8_e4m3fn)}, {}
    for key, value in truth.items():
        scaled[key] = value.bfloat16()
        if key in targets:
            scale = value.float().abs().max() / 448.0
            scaled[key] = (value.float() / scale).to(torch.float8_e4m3fn)
            scaled[key.removesuffix("weight") + "scale_weight"] = scale
            dequantised[key] = scaled[key].float() * scale
    found = {}

    def check(name, model, wanted):
        weights = host.base_weights(model)
        difference = max(
            (weights.read(layer).float() - wanted[f"{layer.name}.weight"].float()).abs().max().item()
            for layer in weights.model.layers
        )
        found[name] = {
            "difference": difference,
            "called": host.quantisation(model, "diffusion_model.blocks.0.self_attn.q.weight"),
        }

    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        model = comfy.sd.load_diffusion_model(str(miniature.DIFFUSION_MODEL), model_options={"dtype": dtype})
        check(str(dtype), model, {key: value.to(dtype) for key, value in truth.items()})
    model = comfy.sd.load_diffusion_model_state_dict(dict(scaled), metadata=dict(metadata))
    check("scaled fp8", model, dequantised)
    lora = {
        f"diffusion_model.{key.removesuffix('.weight')}.lora_{part}.weight": torch.randn(2, 96).view(shape)
        for key in targets
        for part, shape in (("A", (2, 96)), ("B", (96, 2)))
    }
    patched = host.apply_lora(model, lora, layers=32, strength=1.0)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    check("scaled fp8, loaded with a LoRA", patched, dequantised)
    patched.detach()
    check("scaled fp8, unloaded again", patched, dequantised)
    return found


def text_conditions(host) -> dict:
    """What Text Condition gives for one prompt, and its errors for two prompts and for another width."""
    from lofa_pack.nodes.conditions import TextCondition

    hypernetwork = load_hypernetwork(host)
    _, clip, *_ = load_miniature()
    one = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    condition = TextCondition.execute(hypernetwork, one).result[0]
    difference = condition.given["text"].values - host.encode_text(clip, PROMPT)
    found = {"difference": difference.abs().max().item()}
    for name, conditioning in {"two": one + one, "wide": [[torch.zeros(1, 77, 768), {}]]}.items():
        try:
            TextCondition.execute(hypernetwork, conditioning)
        except ValueError as error:
            found[name] = str(error)
    return found


def picture_conditions(host) -> dict:
    """Our image encoder's states beside those that ComfyUI gives for the same pictures, square and not."""
    from lofa_pack.lofa_core import miniature
    from lofa_pack.lofa_core.conditions.image import CLIPImageEncoder

    _, _, _, encoder = load_miniature()
    found = {}
    try:
        ours = CLIPImageEncoder.open(miniature.FOLDER)
    except ValueError as error:  # transformers is there in every ComfyUI
        return {"error": str(error)}
    for name, (height, width) in {"square": (64, 64), "wide": (90, 201), "tall": (130, 64)}.items():
        picture = torch.randint(256, (height, width, 3), dtype=torch.uint8)
        theirs = host.image_states(encoder.encode_image(picture.float().div(255.0).unsqueeze(0)))
        states = ours.encode([picture.numpy()])
        found[name] = {
            "shape": list(theirs.shape),
            "difference": (states - theirs).abs().max().item(),
            "size": theirs.abs().max().item(),
        }
    return found


def _sdxl(channels: int, blocks: tuple[int, int], context: int, pooled: int, device: str):
    """ComfyUI's SDXL of these sizes (its own: 320, (2, 10), 2048, 1280), without values in its weights."""
    import comfy.supported_models

    few, many = blocks
    unet = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": channels,
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, few, few, many, many],
        "transformer_depth_output": [0, 0, 0, few, few, few, many, many, many],
        "transformer_depth_middle": many, "use_spatial_transformer": True, "use_linear_in_transformer": True,
        "context_dim": context, "num_head_channels": 64, "num_classes": "sequential",
        "adm_in_channels": pooled + 6 * 256, "use_temporal_attention": False, "dtype": torch.float16,
    }  # fmt: skip
    config = comfy.supported_models.SDXL(unet)
    config.set_inference_dtype(torch.float16, None)
    place = torch.device(device)
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", place), place, place)


def sdxl_lora(host) -> dict:
    """Of a LoRA for SDXL's real layers in our default layout, how many ComfyUI's real SDXL takes."""
    from lofa_pack.lofa_core.lora import LoRA, LoRALayer
    from lofa_pack.lofa_core.lora_files import to_state_dict

    model = _sdxl(320, (2, 10), 2048, 1280, "meta")
    base = host.base_weights(model)
    layers = {
        layer.name: LoRALayer(torch.ones(1, layer.shape[1]), torch.ones(layer.shape[0], 1), 1.0)
        for layer in base.model.layers
    }
    state = to_state_dict(LoRA(layers))
    patched = host.apply_lora(model, state, layers=len(layers), strength=1.0)
    return {
        "name": base.model.name,
        "layers": len(layers),
        "keys": sorted(state)[0],
        "patched": len(patched.patches),
    }


def sdxl_prediction(host) -> dict:
    """What Predict LoRA does with an SDXL of a fifth of the width and a network of random weights."""
    from lofa_pack.lofa_core import descriptions
    from lofa_pack.lofa_core.conditions import Given
    from lofa_pack.lofa_core.hypernetwork import Hypernetwork
    from lofa_pack.nodes.predict import personalised
    from lofa_pack.nodes.sockets import Condition

    model, said = _sdxl(64, (1, 1), 32, 16, "cpu"), []
    for weight in model.model.diffusion_model.parameters():
        weight.data.normal_(std=0.1)
    layers = host.base_weights(model).model.layers
    described = (descriptions.LayerDescription(x.name, x.depth, x.kind, x.shape) for x in layers)
    base = descriptions.BaseDescription("SDXL miniature", tuple(described))
    config = descriptions.HypernetworkConfig(
        rank=2, grid=(2, 2), width=16, heads=2, blocks=1, feature_blocks=()
    )
    network = Hypernetwork(config, base, (descriptions.ConditionDescription("identity", 8),))
    condition = Condition({"identity": Given(torch.randn(1, 5, 8))}, {"identity": "1 picture"})
    page = SimpleNamespace(client_id=None, send_progress_text=lambda text, *_: said.append(text))
    host.PromptServer.instance = page  # there is none here
    hypernetwork = host.managed(network.eval(), torch.float32)
    lora, applied, response = personalised(hypernetwork, model, condition, 1.0, 0, "1")
    return {
        "said": said[-1], "first said": said[0], "patched": len(applied.patches), "tensors": len(lora),
        "in_order": list(response) == [layer.name for layer in layers],
    }  # fmt: skip


def hooked_weights(host) -> dict:
    """A weight that a hook has changed in place, as ComfyUI leaves it while hooks are applied."""
    model, *_ = load_miniature()
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    weight = model.model.diffusion_model.blocks[0].self_attn.q.weight
    truth = weight.detach().clone()
    model.hook_backup[key] = (truth.clone(), truth.device)
    weight.data += 1.0
    layer = host.base_weights(model).model.layers[0]
    return {
        "name": layer.name,
        "difference": (host.base_weights(model).read(layer) - truth).abs().max().item(),
    }


def text_encoding(host) -> dict:
    """Writes the prompt as encoded by the miniature's CLIP."""
    _, clip, *_ = load_miniature()
    tokens = host.encode_text(clip, PROMPT)
    save_file({"tokens": tokens.float().contiguous()}, ENCODING)
    return {"shape": list(tokens.shape)}


def lora_that_does_not_match(host) -> dict:
    """The error for a LoRA whose layers this MODEL lacks."""
    model, *_ = load_miniature()
    lora = {
        "diffusion_model.blocks.99.self_attn.q.lora_A.weight": torch.zeros(2, 96),
        "diffusion_model.blocks.99.self_attn.q.lora_B.weight": torch.zeros(96, 2),
    }
    try:
        host.apply_lora(model, lora, layers=1, strength=1.0)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


def wrong_text_encoder(host) -> dict:
    """The error for a CLIP of another width than the hypernetwork was trained with."""
    from lofa_pack.nodes.conditions import EXAMPLE, EncodeText

    class Wide:
        cond_stage_model = torch.nn.Module()

        def tokenize(self, text):
            return text

        def encode_from_tokens(self, tokens):
            return torch.zeros(1, 77, 768)

    hypernetwork = load_hypernetwork(host)
    try:
        EncodeText.execute(hypernetwork, Wide(), EXAMPLE)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


if __name__ == "__main__":
    with torch.inference_mode():
        pack = load_pack()
        looks = (
            unpatched_weights,
            states_of_the_model,
            hooked_weights,
            text_conditions,
            picture_conditions,
            sdxl_lora,
            sdxl_prediction,
            text_encoding,
            lora_that_does_not_match,
            wrong_text_encoder,
        )
        seen = {look.__name__: look(pack) for look in looks}
    sys.stdout.write("\n" + json.dumps(seen) + "\n")
