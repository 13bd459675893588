"""Small parts that several tests share: a hypernetwork and a base model of a few kilobytes, all random."""

import torch

from lofa_core.base_models import WAN_KINDS
from lofa_core.conditions import Given
from lofa_core.descriptions import BaseDescription, ConditionDescription, HypernetworkConfig, LayerDescription
from lofa_core.hypernetwork import Hypernetwork

SIDE, WORDS_WIDE = 16, 6  # a weight's side, a condition's width
CONFIG = HypernetworkConfig(
    rank=3,
    grid=(2, 2),
    width=16,
    heads=2,
    blocks=2,
    mlp_ratio=2,
    pooling_queries=3,
    feature_blocks=(1,),
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def describe(depths=2, shape=(SIDE, SIDE), name="WAN2.1 miniature", fingerprint=""):
    layers = tuple(
        LayerDescription(f"blocks.{depth}.{kind}", depth, kind, shape)
        for depth in range(depths)
        for kind in WAN_KINDS
    )
    return BaseDescription(name, layers, fingerprint)


TEXT = ConditionDescription("text", WORDS_WIDE, ("a", "person"), "a person")
POSE = ConditionDescription("pose", 3, size=(5, 32, 16))
STYLE = ConditionDescription("style", 7)


def network(seed=0, config=CONFIG, base=None, randomised=True, conditions=(TEXT,)):
    """A hypernetwork over 2 x 8 layers. `randomised`: nothing in it is zero, so all of it is heard."""
    base = base or describe()
    torch.manual_seed(seed)
    net = Hypernetwork(config, base, conditions)
    if randomised:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
            for statistics in (net.statistics or {}).values():
                statistics.A_mean.normal_()
                statistics.B_mean.normal_(std=0.1)
                statistics.A_scale.uniform_(0.5, 2.0)
                statistics.B_scale.uniform_(0.1, 0.3)
                statistics.delta_log_deviation.uniform_(-4.0, -2.0)
    return net.eval()


def condition(count=1, tokens=5, seed=0, width=WORDS_WIDE):
    return torch.randn(count, tokens, width, generator=generator(seed))


def text(tokens=None, **arguments):
    """Tokens [B, S, d] (or those of `condition`) as a network is given them."""
    return {"text": Given(condition(**arguments) if tokens is None else tokens)}


def weights(layers=16, out=SIDE, into=SIDE, seed=1):
    """[layers, out, in], each layer with a spread of its own."""
    spread = torch.linspace(0.02, 0.5, layers).view(-1, 1, 1)
    return torch.randn(layers, out, into, generator=generator(seed)) * spread


def base_tensors(depths=2, side=SIDE, seed=1):
    """A WAN state dict under original names with the target weights alone."""
    names = [f"blocks.{depth}.{kind}.weight" for depth in range(depths) for kind in WAN_KINDS]
    return dict(zip(names, weights(len(names), side, side, seed).unbind(), strict=True))
