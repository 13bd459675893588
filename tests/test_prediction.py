"""Prediction: the same LoRA whatever the batches, progress, a clean stop, and what does not fit is named."""

import pytest
import torch
from tiny import base_tensors, condition, describe, network, text

from lofa_core.base_models import BaseWeights
from lofa_core.prediction import Prediction, predict, predict_response
from lofa_core.steps import Watch


def parts(**changes):
    """(hypernetwork, base weights, conditions)."""
    return network(**changes), BaseWeights.from_tensors(base_tensors()), text()


def watched_base():
    """(base weights, the keys that are read of them, in their order)."""
    read, tensors = [], base_tensors()

    def reader(key):
        read.append(key)
        return tensors[key]

    return BaseWeights.from_tensors({key: value.shape for key, value in tensors.items()}, reader), read


def same(a: Prediction, b: Prediction, tolerance=1e-5):
    return list(a.lora) == list(b.lora) and all(
        torch.allclose(
            getattr(a.lora[name], part), getattr(b.lora[name], part), atol=tolerance, rtol=tolerance
        )
        for name in a.lora
        for part in ("A", "B")
    )


def test_it_gives_what_the_network_gives_for_each_layer():
    net, base, given = parts()
    found = predict(net, base, given)
    assert list(found.lora) == [layer.name for layer in net.base.layers] and list(found.responses) == list(
        found.lora
    )
    assert found.seconds > 0
    for number, (name, W) in enumerate(base_tensors().items()):
        layer = name.removesuffix(".weight")
        with torch.no_grad():
            A, B, response = net(W[None], torch.tensor([number]), given)
        assert torch.allclose(found.lora[layer].A, A[0, 0], atol=1e-5)
        assert torch.allclose(found.lora[layer].B, B[0, 0], atol=1e-5)
        assert torch.allclose(
            found.lora.delta(layer), B[0, 0] @ A[0, 0], atol=1e-5
        )  # alpha is r: no hidden scale
        assert torch.allclose(found.responses[layer], response.probability(W[None])[0, 0], atol=1e-4)
        assert found.responses[layer].dtype == torch.float32 and found.lora[layer].A.dtype == torch.float32


def test_layers_are_found_by_name_in_whatever_order_the_file_has_them():
    net, base, given = parts()
    shuffled = BaseWeights.from_tensors(dict(reversed(base_tensors().items())))
    assert same(predict(net, base, given), predict(net, shuffled, given))


@pytest.mark.parametrize("size", [1, 3, 16, 100])
def test_the_batch_size_changes_nothing_but_the_steps_of_progress(size):
    net, base, given = parts()
    seen = []
    found = predict(
        net, base, given, batch_size=size, watch=Watch(lambda done, total: seen.append((done, total)))
    )
    assert same(found, predict(net, base, given))
    assert seen == [(min(start + size, 16), 16) for start in range(0, 16, size)]
    maps = predict_response(net, base, given, batch_size=size)
    assert all(torch.allclose(maps[name], found.responses[name], atol=1e-5) for name in found.lora)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_layers_does_not_become_an_empty_lora(size):
    net, base, given = parts()
    try:
        found = predict(net, base, given, batch_size=size)
    except ValueError as error:
        assert str(size) in str(error)
    else:
        assert len(found.lora) == 16


def test_stage_one_alone_gives_the_maps_that_prediction_gives():
    net, base, given = parts()
    maps, found = predict_response(net, base, given), predict(net, base, given)
    assert list(maps) == list(found.responses)
    assert all(torch.allclose(maps[name], found.responses[name], atol=1e-5) for name in maps)


@pytest.mark.parametrize("run", [predict, predict_response])
def test_cancelling_stops_before_the_next_weights_are_read(run):
    net, _, given = parts()
    base, read = watched_base()
    asked = []

    def check():
        asked.append(len(read))
        if asked.count(8) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(net, base, given, batch_size=4, watch=Watch(check_cancelled=check))
    assert set(asked) == set(range(9)) and len(read) == 8


def test_cancelling_within_a_batch_leaves_the_network_usable():
    net, base, given = parts()
    asked = []

    def check():
        asked.append(True)
        if len(asked) == 60:  # of 8 layers read, and some ten linear maps in each of four blocks
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(net, base, given, watch=Watch(check_cancelled=check))
    predict(net, base, given)
    assert len(asked) == 60  # nobody is asked any more


def test_padding_of_the_condition_does_not_matter():
    net, base, given = parts()
    padded = text(torch.cat([condition(), torch.zeros(1, 500, 6)], 1))
    assert same(predict(net, base, given), predict(net, base, padded))


def test_a_lower_precision_is_close_and_leaves_the_callers_network_exact():
    net, base, given = parts()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    exact, rough = predict(net, base, given), predict(net, base, given, dtype=torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in rough.responses.values())
    for name in exact.lora:
        gap = (exact.lora.delta(name) - rough.lora.delta(name)).norm() / exact.lora.delta(name).norm()
        assert 0.0 < gap < 0.1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_half_precision_base_weights_give_nearly_the_same_lora():
    net, base, given = parts()
    half = BaseWeights.from_tensors({key: value.bfloat16() for key, value in base_tensors().items()})
    assert same(predict(net, base, given), predict(net, half, given), 0.1)
    assert not same(predict(net, base, given), predict(net, half, given), 1e-7)


def test_it_runs_under_inference_mode_and_keeps_no_graph():
    net, base, given = parts()
    with torch.inference_mode():
        inside = predict(net, base, given)
    outside = predict(net, base, given)
    assert same(inside, outside) and not any(layer.A.requires_grad for layer in outside.lora.values())


def test_the_lora_says_what_it_is_for():
    net, base, given = parts()
    metadata = predict(net, base, given).lora.metadata
    assert metadata["lofa_condition"] == "text" and metadata["lofa_base"] == "WAN2.1 miniature"


def test_weights_other_than_those_trained_for_are_noted_and_used():
    base, given = BaseWeights.from_tensors(base_tensors()), text()
    own = network(base=describe(fingerprint=base.fingerprint()))
    other = BaseWeights.from_tensors(base_tensors(seed=2))
    fits, differs = (predict(own, weights, given).lora for weights in (base, other))
    noted = [differs.metadata[key] for key in differs.metadata if key not in fits.metadata]
    assert len(noted) == 1 and "other weights" in noted[0]


@pytest.mark.parametrize(
    ("tensors", "given", "wanted"),
    [
        (base_tensors(depths=1), r"8 layers of 16x16", r"16 layers of 16x16"),
        (base_tensors(depths=3), r"24 layers of 16x16", r"16 layers of 16x16"),
        (base_tensors(side=24), r"16 layers of 24x24", r"16 layers of 16x16"),
    ],
)
@pytest.mark.parametrize("run", [predict, predict_response])
def test_a_base_that_does_not_fit_is_refused_and_both_are_named(run, tensors, given, wanted):
    net, reads = network(base=describe(name="WAN2.1-T2V-1.3B")), []
    base = BaseWeights.from_tensors({k: v.shape for k, v in tensors.items()}, lambda key: reads.append(key))
    with pytest.raises(ValueError) as error:
        run(net, base, text())
    said = str(error.value)
    assert "WAN2.1-T2V-1.3B (" + wanted + ")" in said and "WAN2.1 miniature (" + given + ")" in said
    assert said.index(wanted) < said.index(given) and not reads


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 5, 6), (5, 6)])
def test_a_condition_of_another_shape_is_refused(shape):
    net, base, _ = parts()
    with pytest.raises(ValueError) as error:
        predict(net, base, text(torch.ones(shape)))
    assert (
        str(list(shape)) in str(error.value)
        and "[1, tokens, 6]" in str(error.value)
        and "text" in str(error.value)
    )


def test_a_condition_of_nothing_is_refused():
    net, base, _ = parts()
    with pytest.raises(ValueError, match="condition has no tokens"):
        predict(net, base, text(torch.zeros(1, 5, 6)))


def fails_above(monkeypatch, net, layers, error):
    """Stage II fails for batches of more layers than that; the sizes of all batches it was given."""
    seen, forward = [], type(net.stage2).forward

    def limited(self, looked_at, *others):
        seen.append(len(looked_at.index))
        if len(looked_at.index) > layers:
            raise error
        return forward(self, looked_at, *others)

    monkeypatch.setattr(type(net.stage2), "forward", limited)
    return seen


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved_and_the_lora_is_the_same(monkeypatch, caplog, error):
    net, base, given = parts()
    wanted, seen = predict(net, base, given), []
    tried = fails_above(monkeypatch, net, 3, error)
    found = predict(
        net, base, given, batch_size=16, watch=Watch(lambda done, total: seen.append((done, total)))
    )
    assert same(found, wanted)
    assert tried == [16, 8, 4, *8 * [2]]
    assert seen == [(done, 16) for done in range(2, 17, 2)]  # progress never goes back
    assert "2 layers at a time" in caplog.text


def test_memory_for_not_even_one_layer_is_an_error_that_says_what_to_do(monkeypatch):
    net, base, given = parts()
    fails_above(monkeypatch, net, 0, OUT_OF_MEMORY[0])
    with pytest.raises(MemoryError, match="one layer at a time.*bfloat16"):
        predict(net, base, given)


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    net, base, given = parts()
    tried = fails_above(monkeypatch, net, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        predict(net, base, given)
    assert tried == [16]


def test_the_text_is_projected_once_and_its_keys_and_values_once_a_block(monkeypatch):
    net, base, given = parts()
    calls = []
    for stage in (net.stage1, net.stage2):
        keys = (block.cross_attention.k_norm for block in stage.trunk.blocks)
        for part in (stage.trunk.condition_proj["text"], *keys):
            part.register_forward_hook(lambda module, *_: calls.append(module))
    predict(net, base, given, batch_size=1)
    assert len(calls) == len(set(calls)) == 2 * (1 + len(net.stage1.trunk.blocks))


def test_each_weight_is_read_once_and_the_maps_read_theirs_when_they_are_asked_for():
    net, _, given = parts()
    base, read = watched_base()
    tensors = base_tensors()
    found = predict(net, base, given)
    once = read[: len(tensors)]
    assert sorted(once) == sorted(tensors)
    before = len(read)
    assert found.responses["blocks.1.self_attn.o"].shape == (16, 16)
    assert read[before:] == ["blocks.1.self_attn.o.weight"]
