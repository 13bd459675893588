"""A stand-in for SDXL in training: the toy UNet as a denoiser, and tasks over it that are pictures."""

import torch
from diffusers import DDPMScheduler
from tiny import CONFIG, condition, generator, network
from tiny_sdxl import POOLED, WIDTHS, build_unet
from tiny_tasks import ACTIONS, Tasks

from lofa_core.base_models import BaseWeights
from lofa_core.conditions import Given
from lofa_core.descriptions import BaseDescription, ConditionDescription, LayerDescription
from training.denoisers import Prompts, SDXLDenoiser
from training.factors import Factors

CONTEXT, PIXELS = sum(WIDTHS), 8
IDENTITY = ConditionDescription("identity", 7, coarse_prompt="a person")


def schedule(kind=DDPMScheduler, **more):
    """SDXL's."""
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **more)


def tiny_unet(seed=0):
    """Frozen, with random weights."""
    torch.manual_seed(seed)
    return build_unet().requires_grad_(False).eval()


def denoiser(model=None):
    return SDXLDenoiser(model or tiny_unet(), schedule(), PIXELS)


def prompts(count, seed=0):
    draw = generator(seed)
    return Prompts(torch.randn(count, 5, CONTEXT, generator=draw), torch.randn(count, POOLED, generator=draw))


class PictureTasks(Tasks):
    """Identities: told by picture states, over the tiny UNet."""

    kinds = ("identity",)

    def __init__(self, training=tuple(ACTIONS), clips=2):
        self.training, self.held_out = list(training), []
        latents = torch.randn(len(self.training) * clips, 4, 8, 8, generator=generator(3)).half()
        self.latents = dict(zip(self.training, latents.split(clips), strict=True))
        self.model = tiny_unet()
        self.weights = BaseWeights.from_tensors(self.model.state_dict())

    def load_denoiser(self):
        return denoiser(self.model)

    def base_description(self):
        model = self.weights.model
        layers = tuple(LayerDescription(x.name, x.depth, x.kind, x.shape) for x in model.layers)
        return BaseDescription(model.name, layers)

    def family(self):
        return [self]

    def weights_by_shape(self):
        layers = self.weights.model.layers
        return [
            torch.stack([self.weights.read(layers[place]) for place in places])
            for places in self.base_description().by_shape().values()
        ]

    def loss_weights(self, task):
        return torch.linspace(0.5, 1.5, 4).view(4, 1, 1).expand(-1, 8, 8)

    def condition(self, task, rng):
        return {"identity": self.training.index(task)}

    def conditions(self, told):
        return {"identity": Given(torch.cat([condition(seed=one["identity"], width=7) for one in told]))}

    def prompts(self, sentences):
        rows = [prompts(1, len(sentence)) for sentence in sentences]
        return Prompts(torch.cat([row.states for row in rows]), torch.cat([row.pooled for row in rows]))


def unet_network(data, randomised=True):
    """A hypernetwork of rank 3 for it."""
    return network(0, CONFIG, data.base_description(), randomised, (IDENTITY,))


def unet_loras(data, count, seed=5, size=0.1):
    """LoRAs of `count` tasks over all its layers."""
    draw = generator(seed)
    groups = data.base_description().by_shape()
    A = (0.2 * torch.randn(count, len(own), 3, shape[1], generator=draw) for shape, own in groups.items())
    B = (size * torch.randn(count, len(own), shape[0], 3, generator=draw) for shape, own in groups.items())
    return Factors(tuple(A), tuple(B))
