"""The full-size stand-ins: WAN2.1-T2V-1.3B's real names and shapes, and files that the whole path takes."""

import torch
from test_benchmark import small_world

import lofa_core.__main__ as command_line
from lofa_core.base_models import describe
from lofa_core.descriptions import BaseDescription, ConditionDescription
from lofa_core.hypernetwork import Hypernetwork
from training import full_size


def test_the_base_has_the_real_models_tensors():
    shapes = full_size.base_shapes()
    assert len(shapes) == 825 and sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_418_996_800
    model = describe(shapes)
    assert model.name == "WAN2.1-T2V-1.3B" and model.summary() == "240 layers of 1536x1536"
    assert shapes["blocks.29.ffn.0.weight"] == (8960, 1536)
    assert shapes["text_embedding.0.weight"] == (1536, 4096)


def test_the_hypernetwork_has_the_published_number_of_parameters():
    layers = describe(full_size.base_shapes()).layers
    base = BaseDescription("WAN2.1-T2V-1.3B", layers)
    net = Hypernetwork.unfilled(full_size.RELEASED, base, (ConditionDescription("text", 4096),))
    stages = [sum(p.numel() for p in stage.parameters()) for stage in (net.stage1, net.stage2)]
    assert [round(count / 1e6, 1) for count in stages] == [199.3, 213.5]


def test_what_it_writes_converts_and_predicts(tmp_path, monkeypatch, capsys):
    small_world(monkeypatch)
    monkeypatch.setattr(full_size, "LAYERS", 16)
    monkeypatch.setattr(full_size.released_hypernetwork, "__defaults__", (0, torch.float32, "cpu", 16))
    monkeypatch.setattr("sys.argv", ["full_size", "--out", str(tmp_path / "new")])
    assert full_size.main() == 0
    assert capsys.readouterr().out.count("wrote") == 4
    made = {
        name: str(tmp_path / "new" / name) for name in (full_size.BASE, full_size.STAGE1, full_size.STAGE2)
    }
    network = str(tmp_path / "lofa_v0.safetensors")
    convert = [
        "convert",
        "--stage1",
        made[full_size.STAGE1],
        "--stage2",
        made[full_size.STAGE2],
        "--out",
        network,
    ]
    assert command_line.main(convert) == 0
    predict = ["predict", "--hypernetwork", network, "--base", made[full_size.BASE], "--condition"]
    predict += [str(tmp_path / "new" / full_size.CONDITION), "--out", str(tmp_path / "lora.safetensors")]
    assert command_line.main([*predict, "--dtype", "bfloat16"]) == 0
    assert "16 of 16 layers matched" in capsys.readouterr().out
