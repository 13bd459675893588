"""Where ComfyUI's model management puts things, on a simulated graphics card; run as in_comfyui.py is.

The card is the processor under another name, `cpu:0`, with as much memory as this file says: what is loaded
there is counted by ComfyUI's own books, and no GPU is needed. What cannot be seen so is a real allocation
that fails.
"""

import json
import sys

from in_comfyui import load_hypernetwork, load_miniature, load_pack  # makes ComfyUI importable

import comfy.model_management as management  # isort: skip
from types import SimpleNamespace

import comfy.sample
import torch

CARD = torch.device("cpu", 0)
ENOUGH, WORKING_MEMORY = 64 * 2**30, 2 * 2**30
SENTENCE = "a person swings the left arm widely and quickly, moves to the right, leaning left, feet together"


class Card:
    """Has ComfyUI believe in a card of this many bytes."""

    def __init__(self, size: int = ENOUGH):
        self.size = size
        management.get_torch_device = lambda: CARD
        management.is_device_cpu = lambda device: device != CARD and device.type == "cpu"
        management.get_free_memory = self.free
        management.unet_offload_device = management.text_encoder_offload_device = lambda: torch.device("cpu")

    def free(self, device=None, torch_free_too=False):
        free = self.size - sum(one.model_loaded_memory() for one in management.current_loaded_models)
        return (free, free) if torch_free_too else free


def names() -> list[str]:
    """What is loaded."""
    return sorted(loaded())


def loaded() -> dict[str, int]:
    """The bytes of each model on the card."""
    return {
        one.model.model.__class__.__name__: one.model_loaded_memory()
        for one in management.current_loaded_models
    }


class Session:
    """The miniature, and what its nodes give."""

    def __init__(self, host):
        from lofa_pack.nodes.conditions import EncodeText
        from lofa_pack.nodes.predict import personalised

        self.host, self.personalised = host, personalised
        host.PromptServer.instance = SimpleNamespace(client_id=None, send_progress_text=lambda *_: None)
        self.hypernetwork = load_hypernetwork(host)
        self.model, self.clip, *_ = load_miniature()
        self.condition = EncodeText.execute(self.hypernetwork, self.clip, SENTENCE).result[0]

    def predict(self) -> dict:
        self.condition.memory.clear()
        lora, self.applied, _ = self.personalised(self.hypernetwork, self.model, self.condition, 1.0, 0, "1")
        return {key: tensor.clone() for key, tensor in lora.items()}

    def sample(self) -> torch.Tensor:
        noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(3))
        states = self.condition.given["text"].values
        return comfy.sample.sample(
            self.applied, noise, 2, 1.0, "euler", "simple", [[states, {}]], [[states, {}]],
            torch.zeros_like(noise), disable_pbar=True, seed=3,
        )  # fmt: skip


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def every_way(host) -> dict:
    """By ComfyUI's options for a card: whether LoRA and latent are those of the processor, what was loaded
    after the prediction and after the sampling, and after both were unloaded.
    """
    session = Session(host)
    wanted, latent = session.predict(), session.sample()
    found = {"cpu": names()}
    management.unload_all_models()
    Card()
    for state in (management.VRAMState.NORMAL_VRAM, management.VRAMState.LOW_VRAM,
                  management.VRAMState.NO_VRAM, management.VRAMState.HIGH_VRAM):  # fmt: skip
        management.vram_state, management.set_vram_to = state, state
        session = Session(host)
        row = {"lora": same(session.predict(), wanted), "predicted": names()}
        row |= {"latent": torch.equal(session.sample(), latent), "sampled": names()}
        management.unload_all_models()
        row |= {"unloaded": names(), "again": same(session.predict(), wanted)}
        row["latent again"] = torch.equal(session.sample(), latent)
        management.unload_all_models()
        found[state.name] = row
    management.vram_state = management.VRAMState.NORMAL_VRAM
    return found


def short_of_memory(host) -> dict:
    """On a card too small for the hypernetwork and the base model: the bytes that each has there in turn."""
    card = Card()
    session = Session(host)
    wanted, latent = session.predict(), session.sample()
    management.unload_all_models()
    network = session.hypernetwork.model_size()
    found = {"network": network, "model": session.model.model_size()}
    # Room for the hypernetwork beside what a prediction asks for; ComfyUI adds a tenth.
    card.size = WORKING_MEMORY + management.extra_reserved_memory() + int(1.11 * network)
    session.sample()
    found["sampled"] = loaded()
    found["lora"], found["predicted"] = same(session.predict(), wanted), loaded()
    found["latent"] = torch.equal(session.sample(), latent)
    management.free_memory(card.size, CARD)  # another model needs the whole card
    found["freed"], found["again"] = loaded(), same(session.predict(), wanted)
    return found


def forgotten(host) -> dict:
    """Whether anything holds the hypernetwork when ComfyUI has dropped what the nodes gave."""
    import gc
    import weakref

    session = Session(host)
    session.predict()
    network = weakref.ref(session.hypernetwork.model)
    model = weakref.ref(session.model.model)
    del session
    gc.collect()
    management.cleanup_models_gc()
    return {"network": network() is None, "model": model() is None, "loaded": names()}


def looped(host) -> int:
    """For how many nodes LoFA Personalize remembers a prediction, after as many as a loop makes."""
    from lofa_pack.nodes import personalize

    session = Session(host)
    for time in range(10):
        personalize.Personalize.hidden = SimpleNamespace(unique_id=f"4.0.{time}")
        personalize.Personalize.execute(session.hypernetwork, session.model, SENTENCE, 1.0, session.clip)
    return len(personalize._kept[session.hypernetwork])


if __name__ == "__main__":
    with torch.inference_mode():
        pack = load_pack()
        seen = {look.__name__: look(pack) for look in (forgotten, looped, every_way, short_of_memory)}
    sys.stdout.write("\n" + json.dumps(seen) + "\n")
