"""Our hypernetwork file: what is written comes back, and every kind of damage is named."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import describe, network, text, weights

from lofa_core.checkpoint import FORMAT, load_hypernetwork, save_hypernetwork


@pytest.fixture
def saved(tmp_path):
    """(network, file)."""
    net, path = network(base=describe(fingerprint="0123456789abcdef")), tmp_path / "net.safetensors"
    save_hypernetwork(net, path)
    return net, path


def rewrite(path, change_tensors=None, change_header=None, change_metadata=None):
    """Damage a file in one place."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["lofa"])
    if change_tensors:
        change_tensors(tensors)
    if change_header:
        change_header(header)
    metadata["lofa"] = json.dumps(header)
    if change_metadata:
        change_metadata(metadata)
    save_file(tensors, path, metadata)


def test_everything_comes_back_as_it_was(saved):
    net, path = saved
    found = load_hypernetwork(path)
    assert (found.config, found.base, found.conditions) == (net.config, net.base, net.conditions)
    assert set(found.state_dict()) == set(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in found.state_dict().items())
    with torch.no_grad():
        given = (weights(), torch.arange(16), text(count=2))
        for a, b in zip(found(*given)[:2], net(*given)[:2], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_loaded_network_is_for_prediction_and_holds_one_set_of_statistics(saved):
    found = load_hypernetwork(saved[1])
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())
    for stage in (found.stage1, found.stage2):
        assert stage.heads["16x16"].statistics is found.statistics["16x16"]
    stored = [key for key in load_file(saved[1]) if "A_mean" in key]
    assert stored == ["statistics.16x16.A_mean"]


def test_it_loads_in_the_dtype_asked_for_or_as_stored(saved):
    half = saved[1].with_name("half.safetensors")
    save_hypernetwork(saved[0], half, dtype=torch.bfloat16)
    for asked, found in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        loaded = load_hypernetwork(half, asked).state_dict().values()
        assert {value.dtype for value in loaded} == {found}


def test_a_loaded_network_does_not_change_with_its_file(saved):
    net, path = saved
    found = load_hypernetwork(path)
    before = {key: value.clone() for key, value in found.state_dict().items()}
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(value, before[key]) for key, value in found.state_dict().items())


def test_half_precision_halves_the_file_and_loads_in_float32(saved):
    net, path = saved
    half = path.with_name("half.safetensors")
    save_hypernetwork(net, half, dtype=torch.float16, notes="trained for a test")
    assert all(tensor.dtype == torch.float16 for tensor in load_file(half).values())
    assert half.stat().st_size < 0.7 * path.stat().st_size
    found = load_hypernetwork(half)
    for key, value in found.state_dict().items():
        assert value.dtype == net.state_dict()[key].dtype
        assert torch.allclose(value, net.state_dict()[key], atol=1e-3, rtol=1e-3)
    with safe_open(half, "pt") as file:
        assert file.metadata()["notes"] == "trained for a test" and file.metadata()["format"] == FORMAT


def test_a_failed_write_leaves_the_old_file(saved, tmp_path):
    net, path = saved
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_hypernetwork(net, tmp_path / "nowhere" / "net.safetensors")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("said", [{}, {"format": "lofa.hypernetwork.1"}])
def test_a_file_of_another_kind_is_refused_by_its_name_and_format(tmp_path, said):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path, said)
    with pytest.raises(
        ValueError, match=rf"other\.safetensors: not a LoFA hypernetwork.*expected '{FORMAT}'"
    ) as error:
        load_hypernetwork(path)
    assert repr(said.get("format", "nothing")) in str(error.value)


def test_a_file_that_is_cut_short_or_absent_is_named(saved, tmp_path):
    path = saved[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"net\.safetensors"):
        load_hypernetwork(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load_hypernetwork(tmp_path / "absent.safetensors")


DAMAGE = {
    "not JSON": dict(change_metadata=lambda metadata: metadata.update(lofa="{")),
    "no header": dict(change_metadata=lambda metadata: metadata.pop("lofa")),
    "no part": dict(change_header=lambda header: header.pop("base")),
    "no key": dict(change_header=lambda header: header["conditions"][0].pop("words")),
    "unknown size": dict(change_header=lambda header: header["config"].update(depth=3)),
    "no layers": dict(change_header=lambda header: header["base"].update(layers=[])),
    "unknown kind": dict(change_header=lambda header: header["conditions"][0].update(kind="smell")),
    "short layer": dict(change_header=lambda header: header["base"]["layers"][3].pop()),
    "sizes that do not fit": dict(change_header=lambda header: header["config"].update(grid=[5, 2])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_header_is_named_with_its_file(saved, damage):
    rewrite(saved[1], **DAMAGE[damage])
    with pytest.raises(ValueError, match=r"net\.safetensors: its LoFA header is damaged"):
        load_hypernetwork(saved[1])


def test_missing_and_unknown_tensors_are_counted_and_named(saved):
    def change(tensors):
        del tensors["stage2.heads.16x16.to_A.bias"], tensors["stage1.trunk.cls_token"]
        tensors["stage3.bias"] = torch.zeros(2)

    rewrite(saved[1], change_tensors=change)
    with pytest.raises(
        ValueError, match=r"net\.safetensors.*2 missing.*stage1\.trunk\.cls_token.*1 unknown.*stage3\.bias"
    ):
        load_hypernetwork(saved[1])


@pytest.mark.parametrize("key", ["stage2.heads.16x16.to_A.bias", "statistics.16x16.B_mean"])
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(saved, key):
    shape = list(load_file(saved[1])[key].shape)
    rewrite(saved[1], change_tensors=lambda tensors: tensors.update({key: torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match=rf"net\.safetensors: {key} is \[2, 3\]") as error:
        load_hypernetwork(saved[1])
    assert str(shape) in str(error.value)
