"""Both stages of the hypernetwork: equations against slow references, what matters to it and what may not."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import CONFIG, WORDS_WIDE, condition, describe, generator, network, text, weights
from torch.nn import functional as F

from lofa_core.blocks import Attention
from lofa_core.checkpoint import load_hypernetwork, save_hypernetwork
from lofa_core.hypernetwork import GaussianResponse


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def some_response(seed=0, out=5, into=7, rank=2, conditions=2, layers=3):
    draw = generator(seed)
    return GaussianResponse(
        torch.randn(conditions, layers, rank, into, generator=draw),
        0.1 * torch.randn(conditions, layers, out, rank, generator=draw),
        torch.zeros(0),
        torch.randn(conditions, layers, out, generator=draw) - 2.0,
        0.3 * torch.randn(conditions, layers, into, generator=draw),
    )


def normal_cdf(x):
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def test_the_response_probability_is_that_of_a_gaussian_entry_by_entry():
    response, W = some_response(), 5.0 * torch.randn(3, 5, 7, generator=generator(9))
    found = response.probability(W)
    assert found.shape == (2, 3, 5, 7) and found.dtype == torch.float32
    for b, n, i, j in [(b, n, i, j) for b in range(2) for n in range(3) for i in range(5) for j in range(7)]:
        mean = sum(response.B[b, n, i, k].item() * response.A[b, n, k, j].item() for k in range(2))
        deviation = math.exp(
            response.row_log_deviation[b, n, i].item() + response.column_log_deviation[b, n, j].item()
        )
        edge = 0.02 * abs(W[n, i, j].item())
        inside = normal_cdf((edge - mean) / deviation) - normal_cdf((-edge - mean) / deviation)
        assert found[b, n, i, j].item() == pytest.approx(1.0 - inside, abs=2e-6)


def test_the_response_probability_is_how_often_samples_of_dw_respond():
    response, W = some_response(3), 5.0 * torch.randn(3, 5, 7, generator=generator(4))
    deviation = (response.row_log_deviation[..., None] + response.column_log_deviation[..., None, :]).exp()
    noise = torch.randn(4000, *deviation.shape, generator=generator(5))
    samples = response.B @ response.A + deviation * noise
    share = (samples.abs() > 0.02 * W.abs()).float().mean(0)
    assert (share - response.probability(W)).abs().max() < 0.04  # five standard errors


def test_a_tiny_probability_is_neither_zero_nor_rounded_and_a_threshold_of_zero_always_passes():
    zero = torch.zeros(1, 1, 1, 1)
    response = GaussianResponse(zero, zero, zero, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    W = torch.full((1, 1, 1), 6.0 / 0.02)  # the edge lies six deviations out
    assert response.probability(W).item() == pytest.approx(math.erfc(6.0 / math.sqrt(2.0)), rel=1e-3)
    assert response.probability(W, threshold=0.0).item() == pytest.approx(1.0)
    assert response.probability(W, threshold=0.01).item() == pytest.approx(
        math.erfc(3.0 / math.sqrt(2.0)), rel=1e-4
    )


def test_attention_is_softmax_of_normalised_queries_and_keys_head_by_head():
    torch.manual_seed(0)
    attention, x, context = Attention(8, 2), torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    bias = torch.zeros(2, 1, 1, 4).masked_fill(~mask[:, None, None], -math.inf)
    found = attention(x, attention.keys_values(context), bias)
    for b in range(2):
        rows = [j for j in range(4) if mask[b, j]]
        q, kv = attention.q(x[b]), attention.kv(context[b])
        for t in range(3):
            heads = []
            for h in range(2):
                part = slice(4 * h, 4 * h + 4)
                query = attention.q_norm(q[t, part])
                scores = torch.stack([query @ attention.k_norm(kv[j, :8][part]) / 2.0 for j in rows])
                share = scores.softmax(0)
                heads.append(sum(s * kv[j, 8:][part] for s, j in zip(share, rows, strict=True)))
            assert close(found[b, t], attention.proj(torch.cat(heads)))


def test_patches_hold_the_scaled_weights_and_their_log_magnitudes_in_place():
    net, W = network(), weights()
    W[3, 2, 5] = 0.0
    found = net.patches(W, torch.arange(len(W))).unflatten(-1, (2, 8, 8))
    assert found.shape == (16, 4, 2, 8, 8)
    for n, i, j in [(0, 0, 0), (3, 2, 5), (3, 2, 13), (7, 9, 1), (15, 15, 15)]:
        values = W[n].flatten().tolist()
        mean = sum(values) / 256
        scaled = W[n, i, j].item() / math.sqrt(sum((v - mean) ** 2 for v in values) / 255)
        patch = (i // 8) * 2 + j // 8
        assert found[n, patch, 0, i % 8, j % 8].item() == pytest.approx(scaled, abs=1e-5)
        logarithm = math.log(max(abs(scaled), 1e-3)) + 1.0
        assert found[n, patch, 1, i % 8, j % 8].item() == pytest.approx(logarithm, abs=1e-4)


def test_rows_and_columns_are_means_over_the_other_axis_plus_the_summary():
    trunk = network(config=replace(CONFIG, grid=(2, 3)), base=describe(shape=(16, 24))).stage1.trunk
    tokens = torch.randn(2, 3, 1 + 2 * 3, 16, generator=generator(0))
    rows, columns = trunk.by_row_and_column(tokens)
    assert rows.shape == (2, 3, 2, 16) and columns.shape == (2, 3, 3, 16)
    grid = lambda i, j: tokens[:, :, 1 + 3 * i + j]  # noqa: E731
    for i in range(2):
        assert close(rows[:, :, i], tokens[:, :, 0] + (grid(i, 0) + grid(i, 1) + grid(i, 2)) / 3)
    for j in range(3):
        assert close(columns[:, :, j], tokens[:, :, 0] + (grid(0, j) + grid(1, j)) / 2)


def test_factor_heads_read_each_row_and_column_from_its_own_token():
    net, index = network(), torch.tensor([4, 9])
    heads, s = net.stage1.heads["16x16"], net.statistics["16x16"]
    rows, columns = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 2, 16)
    A, B = heads(rows, columns, index)
    assert A.shape == (1, 2, 3, 16) and B.shape == (1, 2, 16, 3)
    for n, layer in enumerate(index.tolist()):
        for t in range(2):
            raw_B, raw_A = heads.to_B(rows[0, n, t]), heads.to_A(columns[0, n, t])
            for p in range(8):
                for k in range(3):
                    b = s.B_mean[layer, 8 * t + p, k] + s.B_scale[layer] * raw_B[3 * p + k]
                    a = s.A_mean[layer, k, 8 * t + p] + s.A_scale[layer] * raw_A[3 * p + k]
                    assert B[0, n, 8 * t + p, k].item() == pytest.approx(b.item(), abs=1e-5)
                    assert A[0, n, k, 8 * t + p].item() == pytest.approx(a.item(), abs=1e-5)


def test_the_condition_is_pooled_by_learned_queries_over_its_tokens():
    trunk, given = network().stage1.trunk, condition(tokens=3)
    padded = torch.cat([given, torch.zeros(1, 2, WORDS_WIDE)], 1)
    found = trunk.project(text(padded))
    tokens = [trunk.condition_proj["text"](row) for row in given[0]]
    pooled = []
    for query in trunk.pooling_queries:
        weight = [math.exp((query @ token).item()) for token in tokens]
        pooled.append(sum(w / sum(weight) * token for w, token in zip(weight, tokens, strict=True)))
    assert close(found.summary[0], trunk.summary["text"](torch.cat(pooled)))
    assert found.bias is None  # the padding is left out altogether
    for block, (keys, values) in zip(trunk.blocks, found.keys_values, strict=True):
        attention, rows = block.cross_attention, torch.stack(tokens)
        wanted = attention.kv(rows)[:, 16:].unflatten(1, (2, 8)).transpose(0, 1)
        assert keys.shape == values.shape == (1, 2, 3, 8) and close(values[0], wanted)


def test_an_untrained_network_predicts_the_mean_lora_and_its_spread():
    net = network(randomised=False)
    (statistics,) = net.statistics.values()
    statistics.fit(torch.randn(4, 16, 3, 16), torch.randn(4, 16, 16, 3))
    index = torch.tensor([2, 11])
    A, B, response = net(weights()[index], index, text(count=2))
    for a, b in ((A, B), (response.A, response.B)):
        assert close(a, statistics.A_mean[index].expand(2, -1, -1, -1))
        assert close(b, statistics.B_mean[index].expand(2, -1, -1, -1))
    spread = response.row_log_deviation[..., None] + response.column_log_deviation[..., None, :]
    assert close(spread, statistics.delta_log_deviation[index].view(1, 2, 1, 1).expand(2, 2, 16, 16))


def outputs(net, W, index, given):
    A, B, response = net(W, index, text(given))
    return [A, B, response.A, response.B, response.row_log_deviation, response.column_log_deviation]


@torch.no_grad()
def test_padding_rows_of_the_condition_do_not_matter_and_its_own_rows_do():
    net, W, index, given = network(), weights(), torch.arange(16), condition()
    wanted = outputs(net, W, index, given)
    padded = torch.cat([given, torch.zeros(1, 7, WORDS_WIDE)], 1)
    assert all(close(a, b) for a, b in zip(wanted, outputs(net, W, index, padded), strict=True))
    for row in range(5):
        changed = given.clone()
        changed[0, row] += 1.0
        assert not any(
            close(a, b, 1e-4) for a, b in zip(wanted, outputs(net, W, index, changed), strict=True)
        )


@torch.no_grad()
def test_conditions_and_layers_do_not_see_each_other():
    net, W = network(), weights()
    long, short = condition(tokens=6, seed=1), condition(tokens=3, seed=2)
    both = torch.cat([long, F.pad(short, (0, 0, 0, 3))])
    together = outputs(net, W, torch.arange(16), both)
    for row, given in enumerate((long, short)):
        for chosen in (torch.arange(16), torch.tensor([7]), torch.tensor([12, 3, 5])):
            alone = outputs(net, W[chosen], chosen, given)
            assert all(close(a[row][chosen], b[0]) for a, b in zip(together, alone, strict=True))


@torch.no_grad()
def test_the_weights_and_the_layer_both_matter():
    net, W, given = network(), weights(), text()
    A, B, _ = net(W[:1], torch.tensor([0]), given)
    (statistics,) = net.statistics.values()
    changed_weights = net(W[:1].roll(1, 2), torch.tensor([0]), given)
    assert not close(A, changed_weights[0], 1e-4) and not close(B, changed_weights[1], 1e-4)
    normalised = statistics.normalise(A, B, torch.tensor([0]))
    for layer in (1, 8):  # another kind in the same block; the same kind in another block
        index = torch.tensor([layer])
        other = statistics.normalise(*net(W[:1], index, given)[:2], index)
        assert not close(normalised[0], other[0], 1e-4) and not close(normalised[1], other[1], 1e-4)


@torch.no_grad()
def test_the_unit_of_the_weights_moves_the_map_and_not_the_lora():
    net, W, index, given = network(), weights(), torch.arange(16), text()
    A, B, response = net(W, index, given)
    scaled_A, scaled_B, scaled = net(256.0 * W, index, given)
    assert close(A, scaled_A, 1e-4) and close(B, scaled_B, 1e-4)
    assert (scaled.probability(256.0 * W) <= response.probability(W) + 1e-4).all()
    assert scaled.probability(256.0 * W).mean() < 0.9 * response.probability(W).mean()


@torch.no_grad()
def test_stage_two_started_from_stage_one_gives_its_a_and_b():
    net, W, index, given = network(), weights(), torch.arange(16), text(count=3)
    before = net(W, index, given)
    assert not close(before[0], before[2].A, 1e-2)
    net.stage2.start_from(net.stage1)
    A, B, response = net(W, index, given)
    assert close(A, response.A) and close(B, response.B)
    assert close(response.A, before[2].A)  # Stage I itself stays as it was


@torch.no_grad()
def test_stage_two_attends_to_the_features_in_its_feature_blocks_alone():
    net = network()
    layers, given = net.look_at(weights(), torch.arange(16)), net.stage2.trunk.project(text())
    features = torch.randn(1, 16, 5, 16, generator=generator(0))
    A, B = net.stage2(layers, given, features)
    other_A, other_B = net.stage2(layers, given, features.flip(-1))
    assert not close(A, other_A, 1e-4) and not close(B, other_B, 1e-4)
    assert [block.feature_attention is not None for block in net.stage2.trunk.blocks] == [False, True]
    assert all(block.feature_attention is None for block in net.stage1.trunk.blocks)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"cls_token": False},
        {"mask_padding": False},
        {"weight_input": "column_rms"},
        {"modulation": "layer_scale"},
        {"readout": "pooled"},
    ],
)
def test_each_choice_of_the_design_works_alone_and_is_kept_in_the_file(tmp_path, changes):
    net, W, index = network(config=replace(CONFIG, **changes)), weights(), torch.arange(16)
    given = text(torch.cat([condition(), torch.zeros(1, 3, WORDS_WIDE)], 1))
    A, B, response = net(W, index, given)
    maps = response.probability(W)
    assert A.shape == (1, 16, 3, 16) and B.shape == (1, 16, 16, 3) and maps.shape == (1, 16, 16, 16)
    assert all(torch.isfinite(value).all() for value in (A, B, maps)) and 0 <= maps.min() <= maps.max() <= 1
    save_hypernetwork(net, tmp_path / "net.safetensors")
    loaded = load_hypernetwork(tmp_path / "net.safetensors")
    assert loaded.config == net.config != CONFIG
    assert close(loaded(W, index, given)[0], A)


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_rows_of_padding_are_left_out_or_weigh_as_many_as_they_are(masked):
    trunk = network(config=replace(CONFIG, mask_padding=masked)).stage1.trunk
    given = torch.cat([condition(tokens=6, seed=3), condition(tokens=6, seed=4)])
    given[0, 2:], given[1, 4:], given[1, 1] = 0.0, 0.0, 0.0
    attention, x = trunk.blocks[0].cross_attention, torch.randn(2, 5, 16, generator=generator(0))
    found = trunk.project(text(given))
    assert found.keys_values[0][0].shape[2] == (4 if masked else 5)  # the longest prompt, one row for padding
    for b in range(2):
        rows = given[b][(given[b] != 0).any(-1)] if masked else given[b]
        wanted = attention(
            x[b : b + 1], attention.keys_values(trunk.condition_proj["text"](rows).unsqueeze(0))
        )
        pair = tuple(part[b : b + 1] for part in found.keys_values[0])
        assert close(attention(x[b : b + 1], pair, found.bias[b : b + 1]), wanted)


@torch.no_grad()
def test_weights_need_not_be_square():
    net = network(base=describe(shape=(16, 24)))
    W, index = weights(16, 16, 24), torch.arange(16)
    A, B, response = net(W, index, text(count=2))
    assert A.shape == (2, 16, 3, 24) and B.shape == (2, 16, 16, 3)
    assert response.probability(W).shape == (2, 16, 16, 24)


def test_a_condition_without_tokens_is_refused_also_beside_others():
    net, W, index = network(), weights(), torch.arange(16)
    for given in (
        torch.zeros(1, 4, WORDS_WIDE),
        torch.cat([condition(tokens=4), torch.zeros(1, 4, WORDS_WIDE)]),
    ):
        with pytest.raises(ValueError, match="condition has no tokens"):
            net(W, index, text(given))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"grid": (2,)}, r"grid = \(2,\).*rows and columns"),
        ({"grid": (0, 2)}, r"grid = \(0, 2\)"),
        ({"heads": 3}, r"width = 16 .*heads = 3"),
        ({"feature_blocks": (0, 2)}, r"feature_blocks = \(0, 2\).*0\.\.1"),
        ({"feature_blocks": (-1,)}, r"feature_blocks"),
        ({"readout": "average"}, r"readout = 'average'.*local.*pooled"),
        ({"modulation": ""}, r"modulation = ''.*film"),
        ({"weight_input": "raw"}, r"weight_input = 'raw'.*column_rms"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        replace(CONFIG, **change)


@pytest.mark.parametrize("shape", [(20, 16), (16, 12)])
def test_a_layer_that_the_grid_does_not_divide_is_refused_by_its_shape(shape):
    named = rf"a layer of {shape[0]}x{shape[1]} cannot be cut into 8x8 patches"
    with pytest.raises(ValueError, match=named):
        network(config=replace(CONFIG, grid=(8, 8)), base=describe(shape=shape))
