"""Numbers: what is predicted is finite or refused, always the same bytes, and close in every dtype."""

import hashlib
import math

import pytest
import torch
from test_lora_diffusion import small
from tiny import base_tensors, network, text
from tiny_tasks import loras, tiny_model

from lofa_core import generators, miniature
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import load_hypernetwork
from lofa_core.conditions import Given
from lofa_core.conditions.text import TextEncoder
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import load_lora, read_safetensors, save_lora, write_safetensors
from lofa_core.prediction import predict, predict_response
from training.injection import injected

SENTENCE = "a person swings the left arm widely and quickly, moves to the right, leaning left, feet together"
# Of a layer's |dW|, against float32 with the device's own batches; docs/RELIABILITY.md states them.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 0.005, torch.bfloat16: 0.03}
NOT_NUMBERS = [math.nan, math.inf, -math.inf]


def base(**changes):
    return BaseWeights.from_tensors(base_tensors() | changes)


@torch.no_grad()
def spoilt(part, value, row=(0, 0)):
    """A network with a number of one of its heads replaced."""
    net = network()
    dict(net.named_parameters())[f"{part}.weight"][row] = value
    return net


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("head", ["to_A", "to_B"])
def test_a_lora_that_is_not_finite_is_refused(head, value):
    with pytest.raises(ValueError, match=r"The LoRA predicted for blocks\.0\.self_attn\.q is not finite"):
        predict(spoilt(f"stage2.heads.16x16.{head}", value), base(), text())


def test_a_lora_whose_dw_is_too_large_is_refused_though_a_and_b_are_finite():
    net = network()
    with torch.no_grad():
        for head in (net.stage2.heads["16x16"].to_A, net.stage2.heads["16x16"].to_B):
            head.bias += 1e25
    with pytest.raises(ValueError, match="The LoRA predicted for .* is not finite"):
        predict(net, base(), text())


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("part", ["heads.16x16.to_B", "deviations.16x16.rows", "deviations.16x16.columns"])
def test_a_response_map_that_is_not_finite_is_refused(part, value):
    with pytest.raises(ValueError, match="The response map predicted for .* is not finite"):
        predict_response(spoilt(f"stage1.{part}", value), base(), text())


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_weights_of_the_base_that_are_not_finite_are_named(value):
    weight = base_tensors()["blocks.1.cross_attn.k.weight"].clone()
    weight[3, 4] = value
    damaged = base(**{"blocks.1.cross_attn.k.weight": weight})
    for run in (predict, predict_response):
        with pytest.raises(ValueError, match=r"blocks\.1\.cross_attn\.k of the WAN2.1 miniature .* damaged"):
            run(network(), damaged, text())


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_a_condition_that_is_not_finite_is_refused(value):
    given = text()
    given["text"].values[0, 2, 1] = value
    for run in (predict, predict_response):
        with pytest.raises(ValueError, match="The text condition holds numbers that are not finite"):
            run(network(), base(), given)
    with pytest.raises(ValueError, match="The text condition holds numbers that are not finite"):
        generators.predict(small(), base(), given)


def test_what_half_precision_cannot_hold_is_refused_and_float32_is_named():
    net = network()
    with torch.no_grad():
        net.stage2.heads["16x16"].to_B.bias += 1e6  # finite in float32, beyond float16's 65504
    assert all(layer.is_finite() for layer in predict(net, base(), text()).lora.values())
    with pytest.raises(ValueError, match=r"\(in float16 on cpu\)\. Predict in float32"):
        predict(net, base(), text(), dtype=torch.float16)


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_lora_diffusion_draws_is_finite_or_refused(value):
    net = small()
    with torch.no_grad():
        net.denoiser.out.weight[0, 0] = value
    with pytest.raises(ValueError, match="What this LoRA Diffusion draws is not finite"):
        generators.predict(net, base(), text())


def test_statistics_of_a_lora_diffusion_that_are_not_finite_are_refused():
    net = small()
    next(iter(net.codec.statistics.values())).B_scale[0] = math.inf
    with pytest.raises(ValueError, match="is not finite"):
        generators.predict(net, base(), text())


def one_layer(value):
    B = torch.ones(4, 2)
    B[1, 1] = value
    return LoRA({"blocks.0.self_attn.q": LoRALayer(torch.ones(2, 4), B, 2.0)})


@pytest.mark.parametrize(
    ("value", "dtype"), [(value, None) for value in NOT_NUMBERS] + [(7e4, torch.float16)]
)
def test_no_file_is_written_with_numbers_that_are_not_finite(tmp_path, value, dtype):
    path = tmp_path / "lora.safetensors"
    save_lora(one_layer(3.0), path)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"lora\.safetensors is not written: .*self_attn\.q\.lora_B.* finite"
    ):
        save_lora(one_layer(value), path, dtype=dtype)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


METADATA = {
    "lofa_prompt": 'a "person"\n\twaves \x01\x7f\\ \u00e9\u2028 \U0001f600',
    **{f"key {number}": str(number) for number in range(9)},
}


def test_one_lora_is_one_file_byte_for_byte(tmp_path):
    """The safetensors library writes the metadata in another order every time."""
    found = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        write_safetensors({"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int8)}, path, METADATA)
        found.add(path.read_bytes())
    assert len(found) == 1
    tensors, metadata = read_safetensors(path)
    assert metadata == METADATA and torch.equal(tensors["b"], torch.ones(3))


def test_predicting_twice_gives_the_same_bytes(tmp_path):
    files = []
    for number in range(2):
        files.append(tmp_path / f"{number}.safetensors")
        save_lora(predict(network(), base(), text()).lora, files[-1])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert all(layer.is_finite() for layer in load_lora(files[0]).values())


# ------------------------------------------------------------
# The hypernetwork that is shipped


@pytest.fixture(scope="module")
def shipped():
    """(hypernetwork, base, condition, the LoRA in float32)."""
    net, weights = load_hypernetwork(miniature.HYPERNETWORK), BaseWeights.open(miniature.FOLDER)
    given = {"text": Given(TextEncoder.open(miniature.FOLDER).encode(SENTENCE))}
    return net, weights, given, predict(net, weights, given)


def furthest(lora, wanted):
    """The largest |difference of dW| / |dW| of a layer."""
    return max(
        ((lora.delta(name) - wanted.delta(name)).norm() / wanted.delta(name).norm()).item() for name in wanted
    )


@pytest.mark.parametrize("size", [1, 5, 32])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes_and_batch_sizes_agree_to_the_stated_tolerances(shipped, dtype, size):
    net, weights, given, wanted = shipped
    found = predict(net, weights, given, dtype=dtype, batch_size=size)
    assert furthest(found.lora, wanted.lora) < TOLERANCES[dtype]
    name = "blocks.2.cross_attn.v"
    assert (found.responses[name] - wanted.responses[name]).abs().max() < 2 * TOLERANCES[dtype]


def test_strength_zero_is_the_base(shipped):
    _, weights, _, found = shipped
    none = found.lora.scaled(0.0)
    for layer in weights.model.layers:
        W = weights.read(layer)
        assert torch.equal(none.merged(layer.name, W), W)
        assert not torch.equal(found.lora.merged(layer.name, W), W)


def test_a_lora_applied_and_taken_off_leaves_every_bit_of_the_base():
    def state():
        parts = (tensor.numpy().tobytes() for tensor in model.state_dict().values())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    model = tiny_model()
    before, modules = state(), dict(model.named_modules())
    names = [layer.name for layer in BaseWeights.from_tensors(model.state_dict()).model.layers]
    linear = [name for name in modules if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    assert len(linear) == len(names) == 8
    factors = loras(1)
    A, B = ({name: own[:, row] for row, name in enumerate(linear)} for own in (factors.A[0], factors.B[0]))
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 64), "return_dict": False,
    }  # fmt: skip

    def output():
        with torch.no_grad():
            return model(**inputs)[0]

    plain = output()
    with injected(modules, A, B):
        assert not torch.equal(output(), plain)
    assert torch.equal(output(), plain) and state() == before
    with pytest.raises(KeyboardInterrupt), injected(modules, A, B):
        raise KeyboardInterrupt
    assert torch.equal(output(), plain) and state() == before
