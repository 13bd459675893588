"""The dry run at toy size: two steps of each stage over random weights and clips, for both bases."""

import json
from dataclasses import replace

import pytest
import torch

from training import dry_run, full_size, random_tasks

# Divisible by LoFA_v0's grid of 16 x 16.
WAN = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 24, "text_dim": 4096}
SDXL = full_size.SDXL | {
    "block_out_channels": (16, 32, 48), "transformer_layers_per_block": (1, 1, 1), "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 3), "cross_attention_dim": 64, "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 1280 + 6 * 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(random_tasks, "WAN_1_3B", WAN)
    monkeypatch.setattr(random_tasks, "SDXL", SDXL)
    monkeypatch.setattr(random_tasks, "RELEASED", replace(full_size.RELEASED, blocks=2, feature_blocks=(1,)))


def run(monkeypatch, capsys, *options):
    monkeypatch.setattr(
        "sys.argv", ["dry_run", "--json", "--network-width", "24", "--device", "cpu", *options]
    )
    assert dry_run.main() == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "base", "layers"),
    [
        (["--precision", "float32"], "WAN2.1 miniature", 16),
        (["--base", "sdxl", "--layers", "11"], "SDXL miniature", 11),
    ],
)
def test_two_steps_of_each_stage_are_measured(monkeypatch, capsys, options, base, layers):
    found = run(monkeypatch, capsys, *options)
    assert (found["base"], found["layers"], found["network_width"]) == (base, layers, 24)
    assert [stage["stage"] for stage in found["stages"]] == ["stage1", "stage2"]
    assert all(stage["seconds_per_step"] > 0 for stage in found["stages"])


@pytest.mark.parametrize("layers", [24, 50, 0])
def test_sdxls_layers_of_all_shapes_take_part(layers):
    data = random_tasks.RandomSDXL((1, 32, 16), layers, torch.float32)
    names = [layer.name for layer in data.base.layers]
    assert len(set(names)) == len(names) == (layers or 88)
    shapes = list(data.base.by_shape())
    assert set(shapes) == {(32, 32), (32, 64), (48, 48), (48, 64)}
    assert [tuple(weights.shape[1:]) for weights in data.weights_by_shape()] == shapes
    assert [A.shape[2:] for A in data.loras().loras.A] == [(16, into) for _, into in shapes]
    assert data.some_latents(random_tasks.TASKS[0], 3, None).shape == (3, 4, 4, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base", "sdxl", "--frames", "5"], "--frames is 1 for SDXL"),
        (["--height", "60"], "--height and --width are multiples of 16"),
        (["--network-width", "25"], "--network-width is a multiple of 12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(monkeypatch, capsys, options, said):
    monkeypatch.setattr("sys.argv", ["dry_run", *options])
    with pytest.raises(SystemExit):
        dry_run.main()
    assert said in capsys.readouterr().err
