"""LoFA_v0: reference vectors, other sizes against a slow second implementation, files that are not it."""

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import base_tensors, describe, text
from v0_reference import delta_and_logit

import lofa_core.__main__ as command_line
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import load_hypernetwork, save_hypernetwork
from lofa_core.descriptions import ConditionDescription, HypernetworkConfig
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.key_names import wan_to_diffusers
from lofa_core.lora_files import load_lora
from lofa_core.prediction import predict
from lofa_core.released import RELEASED_DESIGN, load_released, published_state

REFERENCE = Path(__file__).parent / "fixtures/lofa_v0_tiny"
STAGES = REFERENCE / "stage1.pth", REFERENCE / "stage2.pth"
PARITY = 1e-4
SMALL = HypernetworkConfig(
    rank=3, grid=(2, 2), width=12, heads=3, blocks=3, mlp_ratio=2, feature_blocks=(0, 2), **RELEASED_DESIGN,
)  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    return load_file(REFERENCE / "expected.safetensors")


def released(config=SMALL, seed=0, depths=2, shape=(16, 16), words=6):
    """A small network of LoFA_v0's design in which nothing is zero."""
    torch.manual_seed(seed)
    known = ConditionDescription("text", words, padded_to=512)
    net = Hypernetwork(config, describe(depths, shape), (known,))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def published_files(folder, net):
    paths = folder / "stage1_preview.pth", folder / "stage2_preview.pth"
    for path, state in zip(paths, published_state(net), strict=True):
        torch.save(state, path)
    return paths


@torch.no_grad()
def test_every_tensor_of_the_reference_vectors_is_reproduced(expected):
    net, base = load_released(*STAGES), BaseWeights.open(REFERENCE / "base.safetensors")
    order = json.loads((REFERENCE / "config.json").read_text())["order"]
    assert [layer.name for layer in net.base.layers] == order
    layers = {layer.name: layer for layer in base.model.layers}
    W = torch.stack([base.read(layers[name]) for name in order])
    looked_at, given = net.look_at(W, torch.arange(len(order))), text(expected["text_emb"])
    response = net.stage1(looked_at, net.stage1.trunk.project(given))
    tokens = net.stage2.trunk(looked_at, net.stage2.trunk.project(given), response.features)
    pooled, heads = net.stage2.trunk.pooled(tokens), net.stage2.heads["32x32"]
    A, B = heads(pooled)
    found = {
        "features": response.features[0], "score": response.score()[0], "logit": response.logit()[0],
        "lora_A": A[0], "lora_B": B[0], "alpha": heads.alpha(pooled)[0].unsqueeze(-1),
    }  # fmt: skip
    assert found.keys() == expected.keys() - {"text_emb"}
    for name, value in found.items():
        assert (value - expected[name]).abs().max() < PARITY, name


def test_the_command_line_gives_the_published_delta_and_response(tmp_path, expected):
    hypernetwork, lora, maps = (tmp_path / f"{n}.safetensors" for n in ("lofa_v0", "lora", "maps"))
    condition = tmp_path / "condition.safetensors"
    save_file({"text_emb": expected["text_emb"]}, condition)
    convert = ["convert", "--stage1", str(STAGES[0]), "--stage2", str(STAGES[1]), "--out", str(hypernetwork)]
    assert command_line.main(convert) == 0
    order = json.loads((REFERENCE / "config.json").read_text())["order"]
    base = load_file(REFERENCE / "base.safetensors")
    files = {
        "original": base,
        "comfyui": {f"model.diffusion_model.{key}": value for key, value in base.items()},
        "diffusers": {wan_to_diffusers(key): value for key, value in base.items()},
    }
    for layout, tensors in files.items():
        save_file(tensors, tmp_path / f"{layout}.safetensors")
        arguments = [
            "predict", "--hypernetwork", str(hypernetwork), "--base", str(tmp_path / f"{layout}.safetensors"),
            "--condition", str(condition), "--out", str(lora), "--response-out", str(maps), "--device", "cpu",
        ]  # fmt: skip
        assert command_line.main(arguments) == 0
        state, probability = load_file(lora), load_file(maps)
        assert len(state) == 2 * len(order) and len(probability) == len(order)
        for row, name in enumerate(order):
            A, B = (state[f"diffusion_model.{name}.lora_{part}.weight"] for part in "AB")
            wanted = expected["alpha"][row] * (expected["lora_B"][row] @ expected["lora_A"][row])
            assert (B @ A - wanted).abs().max() < PARITY
            assert (probability[name] - expected["logit"][row].sigmoid()).abs().max() < PARITY
    metadata = load_lora(lora).metadata
    assert metadata["lofa_condition"] == "text" and "lofa_note" not in metadata
    assert metadata["lofa_base_fingerprint"] == BaseWeights.open(REFERENCE / "base.safetensors").fingerprint()


def test_converting_is_lossless_and_predicts_the_same_lora_bit_for_bit(tmp_path, expected):
    converted = tmp_path / "lofa_v0.safetensors"
    save_hypernetwork(load_released(*STAGES, dtype=None), converted)
    direct, loaded = load_released(*STAGES), load_hypernetwork(converted)
    base = BaseWeights.open(REFERENCE / "base.safetensors")
    one, two = (predict(net, base, text(expected["text_emb"])).lora for net in (direct, loaded))
    assert list(one) == list(two) and len(one) == 24
    for name in one:
        assert torch.equal(one[name].A, two[name].A) and torch.equal(one[name].B, two[name].B)
    for path, state in zip(STAGES, published_state(loaded), strict=True):
        original = torch.load(path, weights_only=True)
        assert original.keys() == state.keys()
        assert all(torch.equal(original[key], state[key]) for key in original)


def test_converting_to_eight_bits_keeps_the_lora_near(tmp_path, expected):
    whole, small = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    stages = ["--stage1", str(STAGES[0]), "--stage2", str(STAGES[1])]
    for path, more in ((whole, []), (small, ["--int8"])):
        assert command_line.main(["convert", *stages, "--out", str(path), *more]) == 0
    assert small.stat().st_size < 0.35 * whole.stat().st_size
    base = BaseWeights.open(REFERENCE / "base.safetensors")
    one, two = (
        predict(load_hypernetwork(path), base, text(expected["text_emb"])).lora for path in (whole, small)
    )
    for name in one:
        difference = one[name].delta() - two[name].delta()
        assert 0 < difference.norm() < 0.1 * one[name].delta().norm()


@pytest.mark.parametrize(
    ("changes", "side", "words"),
    [
        ({}, 16, 6),
        ({"cls_token": False}, 16, 6),
        ({"heads": 2, "rank": 1, "feature_blocks": (1,)}, 16, 6),
        ({"grid": (3, 3), "mlp_ratio": 4, "blocks": 4, "feature_blocks": (1, 3)}, 24, 6),
        ({"cls_token": False, "heads": 1, "grid": (4, 4), "feature_blocks": ()}, 16, 9),
    ],
)
def test_other_sizes_are_inferred_and_agree_with_a_slow_second_implementation(tmp_path, changes, side, words):
    config = replace(SMALL, **changes)
    made = released(config, shape=(side, side), words=words)
    net = load_released(*published_files(tmp_path, made))
    assert replace(net.config, pooling_queries=8) == config and len(net.base.layers) == 16
    draw = torch.Generator().manual_seed(5)
    states = torch.randn(1, 9, words, generator=draw)
    states[:, 4:] = 0.0  # five rows of padding, which take part
    W = {layer.name: torch.randn(layer.shape, generator=draw) for layer in net.base.layers}
    base = BaseWeights.from_tensors({f"{name}.weight": value for name, value in W.items()})
    found = predict(net, base, text(states), batch_size=3)
    first, second = published_state(made)
    with torch.no_grad():
        for number, (name, weight) in enumerate(W.items()):
            delta, logit = delta_and_logit(first, second, weight, number // 8, number % 8, states[0])
            assert torch.allclose(found.lora.delta(name), delta, atol=PARITY, rtol=1e-4)
            assert torch.allclose(found.responses[name], logit.sigmoid(), atol=PARITY)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_gpu_gives_the_cpus_lora(expected, dtype, tolerance):
    net, base = load_released(*STAGES), BaseWeights.open(REFERENCE / "base.safetensors")
    wanted = predict(net, base, text(expected["text_emb"])).lora
    found = predict(net, base, text(expected["text_emb"]), device="cuda", dtype=dtype)
    for name in wanted:
        gap = found.lora.delta(name) - wanted.delta(name)
        assert gap.norm() < tolerance * wanted.delta(name).norm()
        assert found.responses[name].device.type == "cpu"


def test_bfloat16_is_near_float32(expected):
    net, base = load_released(*STAGES), BaseWeights.open(REFERENCE / "base.safetensors")
    wanted = predict(net, base, text(expected["text_emb"])).lora
    found = predict(net, base, text(expected["text_emb"]), dtype=torch.bfloat16).lora
    gaps = [((found.delta(n) - wanted.delta(n)).norm() / wanted.delta(n).norm()).item() for n in wanted]
    assert 0.0 < sum(gaps) / len(gaps) < 0.1


def test_padding_takes_part_and_its_amount_matters():
    net, base = released(), BaseWeights.from_tensors(base_tensors())
    states = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    deltas = []
    for padding in (0, 3, 508):
        lora = predict(net, base, text(torch.cat([states, torch.zeros(1, padding, 6)], 1))).lora
        deltas.append(lora.delta("blocks.1.cross_attn.k"))
    assert (deltas[0] - deltas[1]).abs().max() > 1e-3 and (deltas[1] - deltas[2]).abs().max() > 1e-3


def test_a_fine_layer_count_is_read_from_the_file_and_a_prompt_is_padded_as_in_training(tmp_path):
    net = load_released(*published_files(tmp_path, released(depths=3)))
    assert len(net.base.layers) == 24 and net.base.layers[-1].name == "blocks.2.cross_attn.o"
    known = ConditionDescription("text", 6, padded_to=512)
    assert net.conditions == {"text": known} and net.base.fingerprint == ""


class Attack:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path):
    trace = tmp_path / "was_run"
    torch.save({"patch_embed.proj.weight": Attack(trace)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Attack(trace), protocol=2))
    for name, said in (("zip.pth", "not run"), ("plain.pth", "no whole PyTorch archive")):
        with pytest.raises(ValueError, match=rf"{name}.*{said}"):
            load_released(tmp_path / name, STAGES[1])
    assert not trace.exists()


def truncated(path):
    path.write_bytes(STAGES[0].read_bytes()[:5000])


def words(path):
    path.write_text("what a download page said instead")


def a_list(path):
    torch.save([torch.zeros(1)], path)


def another_model(path):
    torch.save({"encoder.weight": torch.zeros(2, 2)}, path)


def without_a_key(path):
    state = torch.load(STAGES[0], weights_only=True)
    del state["blocks.5.norm2.bias"]
    torch.save(state, path)


def of_another_width(path):
    state = torch.load(STAGES[0], weights_only=True)
    state["blocks.5.norm2.bias"] = torch.zeros(47)
    torch.save(state, path)


def of_whole_numbers(path):
    state = torch.load(STAGES[0], weights_only=True)
    state["blocks.5.norm2.bias"] = torch.zeros(48, dtype=torch.int64)
    torch.save(state, path)


def an_archive_of_something_else(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (truncated, r"broken\.pth: is no whole PyTorch archive"),
        (words, r"broken\.pth: is no whole PyTorch archive"),
        (a_list, r"broken\.pth: is not a state dict of tensors"),
        (another_model, r"broken\.pth: is not a stage of LoFA_v0 .*'encoder\.weight'.*Stage I"),
        (without_a_key, r"broken\.pth: .*1 tensors missing, first \['blocks\.5\.norm2\.bias'\]"),
        (of_another_width, r"broken\.pth: blocks\.5\.norm2\.bias is \[47\], expected \[48\]"),
        (of_whole_numbers, r"broken\.pth: blocks\.5\.norm2\.bias is torch\.int64, expected floating"),
        (an_archive_of_something_else, r"broken\.pth: is no whole PyTorch archive \(it has no data\.pkl"),
    ],
)
def test_a_file_that_is_not_stage_one_is_named_with_what_was_expected(tmp_path, write, named):
    write(tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=named):
        load_released(tmp_path / "broken.pth", STAGES[1])


def test_files_in_the_wrong_order_of_two_models_or_absent_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stage1\.pth: holds Stage I, expected Stage II.*other way round"):
        load_released(STAGES[1], STAGES[0])
    other, _ = published_files(tmp_path, released())
    with pytest.raises(ValueError, match=r"stage1_preview\.pth.*two files of one model|architecture"):
        load_released(other, STAGES[1])
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_released(tmp_path / "absent.pth", STAGES[1])


def test_layers_that_no_wan_has_are_refused(tmp_path):
    paths = published_files(tmp_path, released(replace(SMALL, grid=(2, 3)), shape=(16, 24)))
    with pytest.raises(ValueError, match=r"stage2_preview\.pth: is for layers of 16x24"):
        load_released(*paths)


def test_only_a_network_of_the_published_design_has_published_names():
    with pytest.raises(ValueError, match="design"):
        published_state(released(replace(SMALL, mask_padding=True)))


def test_inspect_and_predict_say_what_one_of_the_two_files_is(tmp_path, capsys):
    for path, number, other in zip(STAGES, ("I", "II"), ("stage2", "stage1"), strict=True):
        assert command_line.main(["inspect", str(path)]) == 0
        words = capsys.readouterr().out
        for part in (
            f"Stage {number} of LoFA_v0",
            "24 layers of 32x32",
            "64 numbers per token",
            other,
            "float32",
        ):
            assert part in words
    arguments = ["predict", "--hypernetwork", str(STAGES[0]), "--out", str(tmp_path / "l.safetensors")]
    assert command_line.main([*arguments, "--prompt", "a person"]) == 2
    assert "python -m lofa_core convert" in capsys.readouterr().err
