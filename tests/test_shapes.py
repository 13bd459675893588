"""Target layers of several shapes in one network: SDXL in small, and the sizes of the real base models."""

import re
from dataclasses import replace

import pytest
import torch
from tiny import CONFIG, STYLE, TEXT, condition, generator, network

from lofa_core.base_models import SDXL_SHAPES, WAN_IMAGE_KINDS, WAN_KINDS, BaseWeights, describe
from lofa_core.checkpoint import load_hypernetwork, save_hypernetwork
from lofa_core.conditions import Given
from lofa_core.descriptions import BaseDescription, ConditionDescription, HypernetworkConfig, LayerDescription
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.key_names import SDXL_PLACES, SDXL_TARGETS
from lofa_core.prediction import fitting_layers, predict, predict_response
from lofa_core.steps import Watch

SMALL = {640: 16, 1280: 32, 2048: 24}  # SDXL's widths, and those that stand for them
SHAPES = [(16, 16), (16, 24), (32, 32), (32, 24)]  # in order of appearance
KEYS = {f"{out}x{into}" for out, into in SHAPES}


def sdxl_shapes(blocks=None):
    """Weight name -> shape of SDXL's target layers; `blocks` at each place in place of its own number."""
    shapes = {}
    for place, _, own in SDXL_PLACES:
        width = 640 if place.startswith(("down_blocks.1", "up_blocks.1")) else 1280
        for block in range(blocks or own):
            for kind in SDXL_TARGETS:
                context = kind in ("attn2.to_k", "attn2.to_v")
                name = f"{place}.transformer_blocks.{block}.{kind}.weight"
                shapes[name] = (width, 2048 if context else width)
    return shapes


def described(model):
    """The base model as a hypernetwork describes it."""
    layers = tuple(LayerDescription(x.name, x.depth, x.kind, x.shape) for x in model.layers)
    return BaseDescription(model.name, layers)


@pytest.fixture(scope="module")
def tensors():
    """A small SDXL's target weights, in another order than its layers'."""
    draw, shapes = generator(1), sdxl_shapes(blocks=1)
    weights = {
        name: torch.randn(SMALL[out], SMALL[into], generator=draw) for name, (out, into) in shapes.items()
    }
    return dict(sorted(weights.items()))


@pytest.fixture(scope="module")
def base(tensors):
    return BaseWeights.from_tensors(tensors)


@pytest.fixture(scope="module")
def net(base):
    return network(base=described(base.model), conditions=(TEXT, STYLE))


CONDITIONS = {"text": Given(condition()), "style": Given(condition(width=STYLE.width))}


@pytest.fixture(scope="module")
def found(net, base):
    """In float64, where nothing is left of how a processor rounds batches of several sizes."""
    return predict(net, base, CONDITIONS, dtype=torch.float64)


def same(a, b, tolerance=1e-6):
    return list(a) == list(b) and all(
        torch.allclose(getattr(a[name], part), getattr(b[name], part), atol=tolerance, rtol=tolerance)
        for name in a
        for part in ("A", "B")
    )


def test_every_layer_gets_factors_of_its_own_shape_in_the_bases_order(base, net, found):
    layers = base.model.layers
    assert len(layers) == 88 and {layer.shape for layer in layers} == set(SHAPES)
    assert list(net.base.by_shape()) == SHAPES
    assert list(found.lora) == [layer.name for layer in layers] and set(found.responses) == set(found.lora)
    for layer in layers:
        assert found.lora[layer.name].A.shape == (3, layer.shape[1])
        assert found.lora[layer.name].B.shape == (layer.shape[0], 3)
    for name in ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", layers[0].name):
        assert found.responses[name].shape == found.lora[name].shape


def test_response_maps_come_in_the_bases_order(base, found):
    assert list(found.responses) == [layer.name for layer in base.model.layers]


@torch.no_grad()
def test_a_layer_gets_what_the_network_gives_it_alone(net, base, found):
    places = net.base.by_shape()
    for shape in SHAPES:
        for place in (places[shape][0], places[shape][-1]):
            layer = base.model.layers[place]
            weight, index = base.read(layer).unsqueeze(0), torch.tensor([place])
            A, B, response = net(weight, index, CONDITIONS)
            assert torch.allclose(found.lora[layer.name].A, A[0, 0], atol=1e-5)
            assert torch.allclose(found.lora[layer.name].B, B[0, 0], atol=1e-5)
            assert torch.allclose(found.responses[layer.name], response.probability(weight)[0, 0], atol=1e-3)


def test_an_untrained_network_predicts_each_layers_own_mean(base):
    net = network(base=described(base.model), conditions=(TEXT, STYLE), randomised=False)
    for places, statistics in zip(net.base.by_shape().values(), net.statistics.values(), strict=True):
        own = torch.tensor(places).float().view(-1, 1, 1)
        statistics.A_mean.copy_(own.expand_as(statistics.A_mean))
        statistics.B_mean.copy_(-own.expand_as(statistics.B_mean))
    for place, layer in enumerate(predict(net, base, CONDITIONS).lora.values()):
        assert torch.allclose(layer.A, torch.tensor(float(place)))
        assert torch.allclose(layer.B, torch.tensor(-float(place)))


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_batch_size_changes_nothing_but_the_steps_of_progress(net, base, found, size):
    seen = []
    exact = {"batch_size": size, "dtype": torch.float64}
    again = predict(
        net, base, CONDITIONS, **exact, watch=Watch(lambda done, total: seen.append((done, total)))
    )
    assert same(again.lora, found.lora)
    counts = [len(places) for places in net.base.by_shape().values()]
    assert {total for _, total in seen} == {88} and len(seen) == sum(-(-count // size) for count in counts)
    done = [0, *(steps for steps, _ in seen)]
    assert done[-1] == 88 and all(0 < b - a <= size for a, b in zip(done, done[1:], strict=False))
    maps = predict_response(net, base, CONDITIONS, **exact)
    # A small deviation of dW makes much of the last digit.
    assert all(torch.allclose(maps[name], found.responses[name], atol=1e-3) for name in list(maps)[::9])


def test_memory_that_runs_out_with_one_shape_does_not_spoil_the_others(net, base, found, monkeypatch):
    tried, forward = [], type(net.stage2).forward

    def limited(self, layers, *others):
        tried.append((layers.shape, len(layers.index)))
        if layers.shape == (32, 32) and len(layers.index) > 4:
            raise MemoryError
        return forward(self, layers, *others)

    monkeypatch.setattr(type(net.stage2), "forward", limited)
    again = predict(net, base, CONDITIONS, batch_size=16, dtype=torch.float64)
    assert same(again.lora, found.lora)
    assert [size for shape, size in tried if shape == (32, 32)][:4] == [16, 8, 4, 4]


def test_such_a_network_comes_back_from_its_file(net, base, found, tmp_path):
    save_hypernetwork(net, tmp_path / "net.safetensors")
    again = load_hypernetwork(tmp_path / "net.safetensors")
    predicted = predict(again, base, CONDITIONS, dtype=torch.float64)
    assert again.base == net.base and same(predicted.lora, found.lora)


def test_a_base_of_other_shapes_is_refused_and_all_shapes_are_named(net, tensors):
    other = BaseWeights.from_tensors({name: value.new_zeros(48, 48) for name, value in tensors.items()})
    with pytest.raises(
        ValueError, match=r"88 layers of 16x16 and 16x24 and 32x24 and 32x32.*88 layers of 48x48"
    ):
        fitting_layers(net, other)


def test_each_shape_has_a_patch_embedding_heads_and_statistics_of_its_own_and_all_else_is_shared(net):
    owners = {}
    for name, _ in [*net.stage1.named_parameters(), *net.stage2.named_parameters()]:
        key = re.search(r"\d+x\d+", name)
        if key:
            owners.setdefault(name.replace(key[0], "*"), set()).add(key[0])
    modules = ["trunk.patch_embed.*", "heads.*.to_A", "heads.*.to_B"]
    modules += ["deviations.*.rows", "deviations.*.columns"]
    assert owners == {f"{name}.{part}": KEYS for name in modules for part in ("weight", "bias")}
    assert set(net.statistics) == KEYS
    for shape, places in net.base.by_shape().items():
        key = f"{shape[0]}x{shape[1]}"
        assert len(net.statistics[key].A_scale) == len(places)
        for stage in (net.stage1, net.stage2):
            assert stage.heads[key].statistics is net.statistics[key]
            assert stage.trunk.patch_embed[key].in_features == 2 * (shape[0] // 2) * (shape[1] // 2)


@pytest.mark.parametrize("part", ["trunk.patch_embed", "heads"])
def test_what_belongs_to_a_shape_moves_its_layers_alone(net, base, found, part):
    changed = network(base=net.base, conditions=(TEXT, STYLE))
    with torch.no_grad():
        for parameter in changed.stage2.get_submodule(f"{part}.32x24").parameters():
            parameter.mul_(1.5)
    lora = predict(changed, base, CONDITIONS).lora
    for name, layer in lora.items():
        moved = not torch.allclose(layer.A, found.lora[name].A, atol=1e-4)
        assert moved == (layer.shape == (32, 24)), name


def test_a_shape_that_the_grid_does_not_divide_is_refused_by_name(base):
    with pytest.raises(ValueError, match="a layer of 16x24 cannot be cut into 16x16 patches"):
        network(base=described(base.model), config=replace(CONFIG, grid=(16, 16)))


# ------------------------------------------------------------
# The real base models, on the meta device

REAL = HypernetworkConfig(rank=16, width=256, heads=8, blocks=4, feature_blocks=(1, 3))
WORDS = ConditionDescription("text", 4096)


def linear(into, out):
    return into * out + out


def expected(shapes, depths, kinds):
    """(parameters of Stage I, of Stage II) of `REAL` with one kind of condition, WORDS."""
    d, m, r, grid, queries = 256, 4, 16, 16, 8
    attention = linear(d, d) + linear(d, 2 * d) + 4 * (d // 8) + linear(d, d)
    mlp = linear(d, m * d) + linear(m * d, d)
    block = linear(d, 8 * d) + 2 * (attention + mlp)
    patches = [(out // grid, into // grid) for out, into in shapes]
    trunk = sum(linear(2 * high * wide, d) for high, wide in patches)
    trunk += 2 * grid * d + d + depths * d + kinds * d  # places, summary token, layer
    trunk += linear(4096, d) + linear(d, d) + queries * d + linear(queries * d, d)  # condition, FiLM
    trunk += 4 * block + 2 * d
    heads = sum(linear(d, r * high) + linear(d, r * wide) for high, wide in patches)
    deviations = sum(linear(d, high) + linear(d, wide) for high, wide in patches)
    return trunk + heads + deviations, trunk + heads + 2 * attention


def wan_shapes(kinds):
    return {f"blocks.{depth}.{kind}.weight": (5120, 5120) for depth in range(40) for kind in kinds}


@pytest.mark.parametrize(
    ("shapes", "name", "layers", "depths", "kinds"),
    [
        (sdxl_shapes(), "SDXL", 560, 70, 8),
        (wan_shapes(WAN_KINDS), "WAN2.1-T2V-14B", 320, 40, 8),
        (wan_shapes(WAN_KINDS + WAN_IMAGE_KINDS), "WAN2.1-I2V-14B", 400, 40, 10),
    ],
    ids=["SDXL", "T2V-14B", "I2V-14B"],
)
def test_networks_for_the_real_base_models_have_the_parameters_that_their_sizes_say(
    shapes, name, layers, depths, kinds
):
    base = described(describe(shapes))
    assert base.name == name and len(base.layers) == layers
    if name == "SDXL":
        assert {shape: len(places) for shape, places in base.by_shape().items()} == SDXL_SHAPES
    net = Hypernetwork.unfilled(REAL, base, (WORDS,))
    found = tuple(sum(p.numel() for p in stage.parameters()) for stage in (net.stage1, net.stage2))
    assert found == expected(base.by_shape(), depths, kinds)
    assert net.stage1.trunk.depth_embedding.num_embeddings == depths
    for shape, places in base.by_shape().items():
        statistics = net.statistics[f"{shape[0]}x{shape[1]}"]
        assert statistics.A_mean.shape == (len(places), 16, shape[1])
        assert net.row_of[places].tolist() == list(range(len(places)))
