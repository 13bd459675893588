"""SDXL at its real shapes: one hypernetwork for its 560 target layers, and the LoRA file that it gives."""

import functools

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from tiny import STYLE, generator

from lofa_core.base_models import SDXL_SHAPES, BaseWeights
from lofa_core.conditions import Given
from lofa_core.descriptions import BaseDescription, ConditionDescription, HypernetworkConfig, LayerDescription
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.lora_files import save_lora, to_state_dict
from lofa_core.prediction import predict
from training.full_size import SDXL

IDENTITY = ConditionDescription("identity", STYLE.width, coarse_prompt="a person")


def small_network(base):
    """The real target layers under a narrow network."""
    layers = tuple(LayerDescription(x.name, x.depth, x.kind, x.shape) for x in base.model.layers)
    config = HypernetworkConfig(
        rank=2, width=8, heads=2, blocks=1, mlp_ratio=1, pooling_queries=1, feature_blocks=(0,)
    )
    torch.manual_seed(0)
    network = Hypernetwork(config, BaseDescription(base.model.name, layers), (IDENTITY,))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for statistics in network.statistics.values():
            statistics.B_scale.fill_(0.01)
    return network.eval()


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


@pytest.fixture(scope="module")
def lora(unet):
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    # One matrix for all layers of a shape: two thousand million random numbers take a minute.
    weights = {shape: 0.02 * torch.randn(shape, generator=generator(1)) for shape in SDXL_SHAPES}
    base = BaseWeights.from_tensors(shapes, lambda key: weights[shapes[key]])
    condition = {"identity": Given(torch.randn(1, 5, IDENTITY.width, generator=generator(2)))}
    network = small_network(base)
    one = torch.zeros(1, dtype=torch.long)
    # Equal matrices have equal patches, and to cut them is most of the work.
    cut = functools.cache(lambda shape, own=network.patches: own(weights[shape].unsqueeze(0), one))
    network.patches = lambda given, index: cut(tuple(given.shape[1:]))
    return predict(network, base, condition, batch_size=16).lora


def test_one_network_predicts_all_560_layers_in_their_four_shapes(lora):
    shapes = [layer.shape for layer in lora.values()]
    assert len(shapes) == 560
    assert {shape: shapes.count(shape) for shape in set(shapes)} == SDXL_SHAPES
    assert all(layer.rank == 2 and layer.delta().abs().max() > 0 for layer in lora.values())


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # the UNet has no memory
def test_its_file_reaches_every_layer_in_diffusers(lora, unet, tmp_path):
    save_lora(lora, tmp_path / "it.safetensors")
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        str(tmp_path / "it.safetensors"), unet_config=unet.config
    )
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
    adapted = {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
    assert adapted.keys() == set(lora)
    for name, module in adapted.items():
        assert module.lora_A["default_0"].weight.shape == lora[name].A.shape, name
        assert module.scaling["default_0"] == 1.0


def test_its_names_are_kohyas(lora):
    keys = to_state_dict(lora)
    assert len(keys) == 3 * 560
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0.alpha" in keys
