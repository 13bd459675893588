"""Looks at HM-CFG on ComfyUI's Python objects; run as in_comfyui.py is."""

import json
import sys

from guidance_families import STEPS, STRENGTH, WEIGHTS, Apart, distance, families  # makes ComfyUI importable
from in_comfyui import PROMPT

import comfy.lora  # isort: skip
import comfy.model_management
import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualModel

EVERY_SAMPLER = PROMPT == "every sampler"


def samplers(bases) -> dict:
    """Distance from the truth, by family and sampler: some; or every sampler of ComfyUI's for WAN, nine for
    SDXL.
    """
    some = ["euler", "heun", "dpmpp_2m", "lcm", "uni_pc"]
    more = [*some, "dpm_2", "dpmpp_sde", "euler_cfg_pp", "ddim"]
    found = {}
    for name, family in bases.items():
        guider, truth = family.guider(family.load()), family.apart()
        every = comfy.samplers.SAMPLER_NAMES if name == "wan" else more
        names = every if EVERY_SAMPLER else some
        found[name] = {
            sampler: distance(family.sample(guider, sampler), family.sample(truth, sampler))
            for sampler in names
        }
    return found


def special_cases(bases) -> dict:
    """Distance from the truth, or from ComfyUI's own way where it has one."""
    found = {}
    for name, family in bases.items():
        base, windows = family.load(), {"base_window": (0.5, 1.0), "subject_window": (0.0, 0.75)}
        in_windows = [(1.0, 2.5), (1.0, 2.5), (4.0, 2.5), (4.0, 0.0)]
        truth = family.truth
        windowed = family.sample(family.apart(in_windows.__getitem__))
        plain = family.plain
        dual = Guider_DualModel(family.personalised(), family.load())
        dual.set_conds(family.positive, family.negative)
        dual.set_cfg(4.0)
        asymmetric = family.sample(dual)
        personalised_only = family.ksample(family.personalised(), 1.0)
        found[name] = {
            "ksampler": distance(family.ksample(family.patched(base), 4.0), truth),
            "ksampler is the guider": torch.equal(
                family.ksample(family.patched(base), 4.0), family.sample(family.guider(base))
            ),
            "windows": distance(family.sample(family.guider(base, **windows)), windowed),
            "windows, ksampler": distance(family.ksample(family.patched(base, **windows), 4.0), windowed),
            "subject 0": distance(family.sample(family.guider(base, (4.0, 0.0))), plain),
            "strength 0": distance(family.sample(family.guider(base, strength=0.0)), plain),
            "asymmetric": distance(family.sample(family.guider(base, (4.0, 4.0))), asymmetric),
            "personalised": distance(family.sample(family.guider(base, (1.0, 1.0))), personalised_only),
            "base 0": distance(
                family.sample(family.guider(base, (0.0, 2.0))),
                family.sample(family.apart(lambda _: (0.0, 2.0))),
            ),
            "negative strength": distance(
                family.sample(family.guider(base, strength=-0.5)), family.sample(family.apart(strength=-0.5))
            ),
            # How far apart the right answers are, so that the others can fail.
            "least difference": min(
                distance(a, b)
                for place, a in enumerate([truth, windowed, plain, asymmetric, personalised_only])
                for b in [truth, windowed, plain, asymmetric, personalised_only][:place]
            ),
        }
    return found


def core_dual_model(bases) -> dict:
    """Core's DualModelGuider given a base MODEL and a clone of it with the LoRA, and ours: distance from it
    given two models loaded apart.
    """
    found = {}
    for name, family in bases.items():
        base = family.load()
        clone = base.clone()
        clone.add_patches(
            comfy.lora.load_lora(family.lora, comfy.lora.model_lora_keys_unet(base.model, {})), STRENGTH
        )
        samples = []
        for personalised, unconditional in ((clone, base), (family.personalised(), family.load())):
            guider = Guider_DualModel(personalised, unconditional)
            guider.set_conds(family.positive, family.negative)
            guider.set_cfg(4.0)
            samples.append(family.sample(guider))
        ours = family.sample(family.guider(family.load(), (4.0, 4.0)))
        found[name] = {"core": distance(samples[0], samples[1]), "ours": distance(ours, samples[1])}
    return found


def bypassed(model) -> int:
    """How many layers have a LoRA hooked in."""
    return sum(
        getattr(module.forward, "__name__", "") == "_bypass_forward" for module in model.model.modules()
    )


def weights_of(model) -> dict:
    return {key: tensor.clone() for key, tensor in model.model.state_dict().items()}


def interrupted(bases) -> dict:
    """A sampling that is interrupted within a pass without and within a pass with the LoRA."""
    found = {}
    for name, family in bases.items():
        for with_lora in (False, True):
            model = family.load()
            before = weights_of(model)
            seen = []

            def stop(apply, args, seen=seen, model=model, with_lora=with_lora):
                seen.append(bypassed(model))
                output = apply(args["input"], args["timestep"], **args["c"])
                if bool(seen[-1]) == with_lora:
                    raise comfy.model_management.InterruptProcessingException
                return output

            stopping = model.clone()
            stopping.set_model_unet_function_wrapper(stop)
            raised = False
            try:
                family.sample(family.guider(stopping))
            except comfy.model_management.InterruptProcessingException:
                raised = True
            after = model.model.state_dict()
            found[f"{name}, {'with' if with_lora else 'without'}"] = {
                "raised": raised,
                "layers": len(family.container) if with_lora else 0,
                "seen": seen[-1],
                "left": bypassed(model),
                "same weights": all(torch.equal(after[key], tensor) for key, tensor in before.items()),
                "plain": torch.equal(family.ksample(model, 4.0), family.plain),
                "again": distance(family.sample(family.guider(model)), family.truth),
            }
    return found


def two_branches(bases) -> dict:
    """One MODEL sampled plainly, with HM-CFG and with another LoRA in turn: each as if it were alone."""
    found = {}
    for name, family in bases.items():
        model = family.load()
        before = weights_of(model)
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        other = model.clone()
        other.add_patches(comfy.lora.load_lora(family.lora, keys), 0.4)
        hybrid, further = family.guider(model), family.patched(model).clone()
        alone = family.plain
        truth = family.truth
        other_alone = family.ksample(family.personalised(0.4), 4.0)
        rows = {"plain": [], "hybrid": [], "a clone of hybrid": [], "other LoRA": [], "on other LoRA": []}
        on_other = family.guider(other, strength=0.3)  # 0.4 of the LoRA belong to the base here
        apart = Apart(family, family.personalised(0.4), family.personalised(0.4 + 0.3), lambda _: WEIGHTS)
        truth_on_other = family.sample(apart)
        for _ in range(2):
            rows["hybrid"].append(distance(family.sample(hybrid), truth))
            rows["plain"].append(float(not torch.equal(family.ksample(model, 4.0), alone)))
            rows["on other LoRA"].append(distance(family.sample(on_other), truth_on_other))
            rows["other LoRA"].append(distance(family.ksample(other, 4.0), other_alone))
            rows["a clone of hybrid"].append(distance(family.ksample(further, 4.0), truth))
        comfy.model_management.unload_all_models()
        after = model.model.state_dict()
        found[name] = {key: max(row) for key, row in rows.items()} | {
            "same weights": all(torch.equal(after[key], tensor) for key, tensor in before.items()),
            "left": bypassed(model),
        }
    return found


def passes(bases) -> dict:
    """[conditions asked of the base, of the personalised model] in a step of Euler, by weights."""
    family, found = bases["wan"], {}
    for weights in ((4.0, 2.5), (4.0, 4.0), (4.0, 0.0), (1.0, 2.0), (1.0, 1.0), (1.0, 0.0)):
        asked = [0, 0]
        model = family.load()

        def count(apply, args, asked=asked, model=model):
            asked[bool(bypassed(model))] += len(args["cond_or_uncond"])
            return apply(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(count)
        family.sample(family.guider(model, weights))
        found[str(weights)] = [total / STEPS for total in asked]
    return found


def other_nodes_hooks(bases) -> dict:
    """What a post-CFG hook sees that asks for the negative prediction at a base weight of 1 too; and that
    predictions of the two models are told apart by uuid.
    """
    family, seen, uuids = bases["wan"], [], {False: set(), True: set()}
    model = family.load()
    own = model.model

    def look(apply, args):
        uuids[bool(bypassed(model))].update(map(str, args["c"]["transformer_options"]["uuids"]))
        return apply(args["input"], args["timestep"], **args["c"])

    def hook(args):
        seen.append(args["uncond_denoised"].abs().max().item())
        return args["denoised"] * 0.5

    model.set_model_sampler_post_cfg_function(hook, disable_cfg1_optimization=True)
    model.set_model_unet_function_wrapper(look)
    halved = family.sample(family.guider(model, (1.0, 2.0)))
    return {
        "calls": len(seen),
        "negative seen": min(seen),
        "changed": distance(halved, family.sample(family.guider(family.load(), (1.0, 2.0)))),
        "uuids": [len(uuids[False]), len(uuids[True]), len(uuids[False] & uuids[True])],
        "same model": model.model is own,
    }


def refusals(bases) -> dict:
    """The error for each thing that HM-CFG cannot do."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG
    from comfy_extras.nodes_model_advanced import RescaleCFG

    wan, sdxl = bases["wan"], bases["sdxl"]
    key = next(iter(wan.lora)).removesuffix("_A.weight")
    dora = wan.lora | {f"{key.removesuffix('.lora')}.dora_scale": torch.ones(96, 1)}
    full = wan.lora | {"diffusion_model.blocks.0.self_attn.q.diff": torch.zeros(96, 96)}
    wide = {name: torch.cat([tensor, tensor], int("_A." in name)) for name, tensor in wan.lora.items()}

    def with_lora(lora):
        from lofa_pack.lofa_core.guidance import HybridGuidance
        from lofa_pack.nodes import host_guidance

        return host_guidance.hybrid_model(wan.load(), lora, 1.0, HybridGuidance())

    def dual_cfg():
        guider = Guider_DualCFG(wan.patched(wan.load()))
        guider.set_conds(wan.positive, wan.positive, wan.negative)
        guider.set_cfg(2.0, 3.0)
        return wan.sample(guider)

    attempts = {
        "another base": lambda: with_lora(sdxl.lora),
        "nothing": lambda: with_lora({}),
        "one layer too many": lambda: with_lora(
            wan.lora | {"diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(2, 96)}
        ),
        "wider": lambda: with_lora(wide),
        "dora": lambda: with_lora(dora),
        "full difference": lambda: with_lora(full),
        "twice": lambda: wan.patched(wan.patched(wan.load())),
        "rescale": lambda: wan.ksample(RescaleCFG().patch(wan.patched(wan.load()), 0.7)[0], 4.0),
        "dual cfg": dual_cfg,
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    with torch.inference_mode():
        own = families()
        looks = (samplers, special_cases, core_dual_model, interrupted, two_branches, passes,
                 other_nodes_hooks, refusals)  # fmt: skip
        if EVERY_SAMPLER:
            looks = (samplers,)
        found = {look.__name__: look(own) for look in looks}
    sys.stdout.write("\n" + json.dumps(found) + "\n")
