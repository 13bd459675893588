"""Response maps of a LoRA from a file: the paper's rule, the layers both have, what else a file may hold."""

import pytest
import torch
from tiny import SIDE, base_tensors

from lofa_core.base_models import BaseWeights
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import load_target_layers, to_state_dict, write_safetensors
from lofa_core.lora_response import LoRAResponses


@pytest.fixture(scope="module")
def base():
    return BaseWeights.from_tensors(base_tensors())


def lora_of(names, shape=(SIDE, SIDE), size=0.05):
    torch.manual_seed(3)
    out, into = shape
    layers = {n: LoRALayer(torch.randn(2, into), size * torch.randn(out, 2), alpha=4.0) for n in names}
    return LoRA(layers, {"made": "here"})


def test_a_map_is_where_the_change_passes_the_threshold(base):
    names = [layer.name for layer in base.model.layers]
    lora = lora_of(names[3:6])
    responses = LoRAResponses(base, lora, threshold=0.3)
    assert list(responses) == names[3:6] and len(responses) == 3
    for name, layer in zip(names[3:6], base.model.layers[3:6], strict=True):
        W = base.read(layer)
        wanted = (2.0 * lora[name].B @ lora[name].A).abs() > 0.3 * W.abs()  # alpha / rank = 2
        assert torch.equal(responses[name], wanted.float()) and 0 < wanted.float().mean() < 1
    assert responses.report.summary().startswith(f"3 of {len(names)} layers matched")


def test_a_lora_of_another_base_is_refused_with_the_count(base):
    names = [layer.name for layer in base.model.layers[:2]]
    with pytest.raises(ValueError, match="No layer of this LoRA fits.*2 have another shape.*made for"):
        LoRAResponses(base, lora_of(names, shape=(SIDE + 1, SIDE)))


def test_what_is_no_target_layer_is_left_out_and_named(base, tmp_path):
    names = [layer.name for layer in base.model.layers[:2]]
    state = to_state_dict(lora_of(names))
    more = {
        "diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 4),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
        "diffusion_model.blocks.0.norm3.diff_b": torch.zeros(4),
    }
    path = tmp_path / "it.safetensors"
    write_safetensors(more | state, path, {"made": "there"})
    lora, others = load_target_layers(path)
    assert list(lora) == sorted(names) and set(others) == set(more) and lora.metadata == {"made": "there"}
    write_safetensors(more, path, {})
    with pytest.raises(
        ValueError, match=r"it.safetensors: None of these 3 tensors \(first diffusion_model.*ffn"
    ):
        load_target_layers(path)
    write_safetensors({}, path, {})
    with pytest.raises(ValueError, match="None of these 0 tensors belongs"):
        load_target_layers(path)
