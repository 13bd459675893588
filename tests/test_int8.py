"""Eight-bit rows: small, near, and refused where a part is missing."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import network, text, weights

from lofa_core.checkpoint import load_hypernetwork, save_hypernetwork
from lofa_core.int8 import SUFFIX, packed, unpacked


def test_rows_come_back_within_half_a_unit_each_by_its_own():
    torch.manual_seed(0)
    value = torch.randn(40, 128) * torch.logspace(-6, 3, 40).unsqueeze(1)
    stored = packed({"w": value})
    assert stored["w"].dtype == torch.int8 and stored["w" + SUFFIX].shape == (40,)
    found = unpacked(stored.items(), torch.float32)["w"]
    assert ((found - value).abs() <= 0.5001 * stored["w" + SUFFIX].unsqueeze(1)).all()
    assert ((found - value).norm(dim=1) / value.norm(dim=1)).max() < 0.01


def test_parts_may_come_in_any_order_and_zero_rows_stay_zero():
    stored = packed({"conv": torch.zeros(16, 4, 3, 3, 3), "bias": torch.ones(16)})
    assert stored["bias"].dtype == torch.float16
    found = unpacked(reversed(list(stored.items())), None)
    assert found["conv"].shape == (16, 4, 3, 3, 3) and not found["conv"].any()
    assert found["conv"].dtype == torch.float16 and torch.equal(found["bias"], torch.ones(16).half())


def test_small_and_whole_numbered_tensors_stay():
    stored = packed({"few": torch.randn(4, 4), "count": torch.arange(5000).view(50, 100)})
    assert stored["few"].dtype == torch.float16 and stored["count"].dtype == torch.int64
    assert set(stored) == {"few", "count"}


@pytest.fixture
def saved(tmp_path):
    """(network, file)."""
    torch.manual_seed(1)
    net, path = network(), tmp_path / "net.safetensors"
    for parameter in net.parameters():
        parameter.data.normal_(0.0, 0.05)
    save_hypernetwork(net, path, dtype=torch.int8)
    return net, path


def test_a_network_in_eight_bits_predicts_nearly_the_same_lora(saved):
    net, path = saved
    assert sum(tensor.dtype == torch.int8 for tensor in load_file(path).values()) > 5
    given = (weights(), torch.arange(16), text())
    with torch.no_grad():
        for asked in (torch.float32, None):
            found = load_hypernetwork(path, asked).float()
            for a, b in zip(found(*given)[:2], net(*given)[:2], strict=True):
                assert (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("lost", ["", SUFFIX])
def test_a_packed_tensor_without_its_unit_or_its_numbers_is_named(saved, lost):
    path = saved[1]
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(SUFFIX)).removesuffix(SUFFIX)
    del tensors[key + lost]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"net\.safetensors: the weights do not fit its header") as error:
        load_hypernetwork(path)
    assert key in str(error.value)
