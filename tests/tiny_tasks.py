"""A stand-in for the miniature's tasks: a few actions, random clips, one block, words as random rows."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import torch
from tiny import CONFIG, describe, generator, network

from lofa_core.base_models import BaseWeights
from lofa_core.conditions import Given
from lofa_core.descriptions import ConditionDescription
from training.backbones import fold_padding, use_folded_padding
from training.denoisers import Prompts, WanDenoiser
from training.factors import Factors
from training.miniature import transformer

DIM, RANK, TEXT = 48, 2, 64


class Act(str):
    """An action of two factors of two values."""

    look = None

    @property
    def id(self):
        return str(self)

    @property
    def action(self):
        return str(self)

    def metadata(self):
        return {}

    def factors(self):
        return "half", "parity"

    def indices(self):
        return WORDS.index(self) // 2 % 2, WORDS.index(self) % 2


WORDS = ["wave", "jump", "bow", "turn", "nod", "step", "kneel", "point", "lean", "hop", "sit", "stand"]
ACTIONS = [Act(word) for word in WORDS[:4]]
HELD_OUT = [Act(word) for word in WORDS[4:11]]  # seven: the judge takes four at once


def tiny_model(seed=0, blocks=1):
    """A WAN transformer whose output listens to every layer (an untrained one's gates are nearly closed)."""
    torch.manual_seed(seed)
    model = transformer.build(DIM, blocks).requires_grad_(False).eval()
    with torch.no_grad():
        model.proj_out.weight.normal_(std=0.2)
        for block in model.blocks:
            block.scale_shift_table.normal_(std=0.7)
    use_folded_padding(model)
    return model


def sized_network(seed=0, randomised=True):
    """A hypernetwork for `tiny_model`."""
    words = ConditionDescription("text", TEXT, coarse_prompt="a person moves")
    base = describe(depths=1, shape=(DIM, DIM))
    return network(seed, replace(CONFIG, rank=RANK), base, randomised, (words,))


def loras(count, seed=5, size=0.2):
    """LoRAs of `count` tasks over 8 layers."""
    draw = generator(seed)
    A = 0.2 * torch.randn(1, 8, RANK, DIM, generator=draw) + 0.1 * torch.randn(
        count, 8, RANK, DIM, generator=draw
    )
    return Factors((A,), (size * torch.randn(count, 8, DIM, RANK, generator=draw),))


class Tasks:
    """The part of MiniatureTasks that stages and evaluation use."""

    coarse_prompt = "a person moves"
    base = None

    def __init__(self, training=tuple(ACTIONS), held_out=(), clips=2, seed=0):
        self.training, self.held_out = list(training), list(held_out)
        latents = self._latents(len(self.training) * clips, seed)
        self.latents = dict(zip(self.training, latents.split(clips), strict=True))
        self.model = tiny_model()
        self.weights = BaseWeights.from_tensors(self.model.state_dict())

    @staticmethod
    def _latents(count, seed):
        return torch.randn(count, 16, 2, 4, 4, generator=generator(seed)).half()

    kinds = ("text",)

    def load_denoiser(self):
        return WanDenoiser(self.model)

    def family(self):
        return [self]

    def weights_by_shape(self):
        return [torch.stack([self.weights.read(layer) for layer in self.weights.model.layers])]

    def base_description(self):
        return describe(depths=1, shape=(DIM, DIM))

    def sorts(self):
        return [self.training]

    def draw_task(self, rng):
        return self.training[rng.integers(len(self.training))]

    def latents_of(self, action):
        return self.latents[action]

    def some_latents(self, action, count, rng):
        own = self.latents[action]
        return own[torch.from_numpy(rng.integers(len(own), size=count))]

    def loss_weights(self, action):
        return torch.linspace(0.5, 1.5, 16).view(16, 1, 1, 1).expand(-1, 2, 4, 4)

    def condition(self, action, rng):
        return {"text": self.sentence(action, rng)}

    def plain_condition(self, action, rng):
        return {"text": self.plain_sentence(action, rng)}

    def sentence(self, action, rng):
        return f"someone can {action}"

    def plain_sentence(self, action, rng):
        return f"a person can {action}"

    def reserved_sentence(self, action, rng):
        return f"please {action} now"

    def prompts(self, sentences):
        rows = [
            torch.stack(
                [torch.randn(TEXT, generator=generator(zlib.crc32(w.encode()))) for w in s.split() + ["</s>"]]
            )
            for s in sentences
        ]
        return Prompts(fold_padding(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)))

    def conditions(self, told):
        return {"text": Given(self.prompts([one["text"] for one in told]).states[:, :-1])}

    def coarse(self):
        return self.prompts([self.coarse_prompt])

    def held_out_clips(self, each, offset=0, tasks=None):
        actions = torch.tensor([action.indices() for action in self.held_out]).repeat_interleave(each, 0)
        return SimpleNamespace(latents=self._latents(len(actions), 100 + offset), actions=actions)
