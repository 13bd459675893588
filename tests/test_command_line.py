import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lofa_core.__main__ as command_line
from lofa_core import __version__, inspection, miniature
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import save_hypernetwork
from lofa_core.descriptions import (
    BaseDescription,
    ConditionDescription,
    HypernetworkConfig,
    LayerDescription,
)
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.key_names import layout_name
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import load_lora, save_lora

DIM, BLOCKS, RANK, WIDTH = 16, 2, 2, 8
ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    f"blocks.{n}.{part}_attn.{letter}"
    for n in range(BLOCKS)
    for part in ("self", "cross")
    for letter in "qkvo"
]


def tiny_lora(names=NAMES):
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LoRALayer(
            torch.randn(RANK, DIM, generator=generator),
            torch.randn(DIM, RANK, generator=generator),
            float(RANK),
        )
        for name in names
    }
    return LoRA(layers, {"made_by": "a test"})


class Maps(dict):
    """Response maps of a prediction that had memory enough."""

    short_of_memory = 0


@pytest.fixture
def files(tmp_path):
    """A base of 16 layers, a condition and a stand-in hypernetwork file, with paths to write to."""
    base = {f"{name}.weight": torch.randn(DIM, DIM) for name in NAMES}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"text_emb": torch.randn(1, 5, WIDTH)}, tmp_path / "condition.safetensors")
    save_file({"anything": torch.zeros(1)}, tmp_path / "hypernetwork.safetensors")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The hypernetwork replaced by one that gives `tiny_lora`; what `predict` was called with."""
    seen = []
    known = {"text": ConditionDescription("text", WIDTH, ("a", "person", "waves"), "a person")}

    def predict(hypernetwork, base, conditions, **options):
        seen.append({"conditions": conditions, **options})
        options["watch"].after(1, 2)
        responses = Maps((layer.name, torch.full(layer.shape, 0.25)) for layer in base.model.layers)
        return SimpleNamespace(lora=tiny_lora(), responses=responses, seconds=0.5)

    monkeypatch.setattr(command_line, "load_generator", lambda path, dtype: SimpleNamespace(conditions=known))
    monkeypatch.setattr(command_line, "predict", predict)
    return seen


def untrained_hypernetwork():
    """A real one for the base in `files`."""
    base = BaseWeights.from_tensors({f"{name}.weight": torch.zeros(DIM, DIM) for name in NAMES}).model
    layers = tuple(
        LayerDescription(layer.name, layer.depth, layer.kind, layer.shape) for layer in base.layers
    )
    config = HypernetworkConfig(rank=RANK, grid=(2, 2), width=16, heads=2, blocks=1, feature_blocks=(0,))
    condition = ConditionDescription("text", WIDTH, ("a", "person"), "a person")
    torch.manual_seed(0)
    return Hypernetwork(config, BaseDescription(base.name, layers, "0123456789abcdef"), (condition,))


def arguments(files, *more, condition="condition.safetensors", out="lora.safetensors"):
    return [
        "predict", "--hypernetwork", str(files / "hypernetwork.safetensors"),
        "--base", str(files / "base.safetensors"), "--condition", str(files / condition),
        "--out", str(files / out), "--device", "cpu", *more,
    ]  # fmt: skip


def fails(capsys, arguments, *parts):
    """The command ends with 2; all that is printed is one error, on standard error, that says `parts`."""
    try:
        code = command_line.main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    for part in parts:
        assert part in printed.err
    return printed.err


def test_predict_writes_the_lora_with_strength_in_b_and_its_history(files, calls, capsys):
    assert command_line.main(arguments(files, "--strength", "0.5")) == 0
    state = load_file(files / "lora.safetensors")
    expected = tiny_lora()
    for name in NAMES:
        A, B = (state[f"diffusion_model.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(A, expected[name].A)
        torch.testing.assert_close(B, 0.5 * expected[name].B)
    assert len(state) == 2 * len(NAMES)
    with safe_open(files / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["made_by"] == "a test" and metadata["lofa_version"] == __version__
    assert metadata["lofa_strength"] == "0.5"
    assert len(metadata["lofa_hypernetwork_sha256"]) == 64 and "lofa_prompt" not in metadata
    printed = capsys.readouterr()
    assert "16 of 16 layers matched" in printed.out and "0.50 s" in printed.out


def test_predict_and_inspect_with_a_real_hypernetwork(files, capsys):
    path = files / "hypernetwork.safetensors"
    save_hypernetwork(untrained_hypernetwork(), path, dtype=torch.bfloat16, notes="untrained")
    assert command_line.main(arguments(files, "--heatmap", str(files / "map.png"))) == 0
    assert "16 of 16 layers matched" in capsys.readouterr().out
    metadata = load_lora(files / "lora.safetensors").metadata
    assert metadata["lofa_condition"] == "text" and metadata["lofa_base"] == "WAN2.1 miniature"
    assert metadata["lofa_base_fingerprint"] == BaseWeights.open(files / "base.safetensors").fingerprint()
    assert command_line.main(["inspect", str(path)]) == 0
    words = capsys.readouterr().out
    for part in (
        "a hypernetwork: it predicts LoRAs for WAN2.1 miniature", "16 layers of 16x16", "2 words", "bfloat16",
        "text, 8 numbers per token", "fingerprint 0123456789abcdef", "untrained",
    ):  # fmt: skip
        assert part in words


def test_a_base_that_the_hypernetwork_does_not_fit_is_refused(files, capsys):
    save_hypernetwork(untrained_hypernetwork(), files / "hypernetwork.safetensors")
    save_file({f"{name}.weight": torch.zeros(24, 24) for name in NAMES}, files / "base.safetensors")
    fails(capsys, arguments(files), "16 layers of 16x16", "16 layers of 24x24")
    assert not (files / "lora.safetensors").exists()


def test_predict_passes_its_options_on(files, calls):
    command_line.main(arguments(files, "--dtype", "bfloat16"))
    assert calls[0]["dtype"] is torch.bfloat16 and calls[0]["device"] == torch.device("cpu")
    ((kind, given),) = calls[0]["conditions"].items()
    assert kind == "text" and given.values.shape == (1, 5, WIDTH) and given.strength is None


def test_predict_writes_response_maps_and_their_picture(files, calls):
    responses, picture = files / "responses.safetensors", files / "map.png"
    assert (
        command_line.main(arguments(files, "--response-out", str(responses), "--heatmap", str(picture))) == 0
    )
    assert set(load_file(responses)) == set(NAMES)
    assert Image.open(picture).mode == "RGB"
    assert sorted(path.name for path in files.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--prompt", "a person"], ["condition.safetensors", "holds text", "its own option too"]),
        (["--strength", "nan"], ["not a finite number"]),
        (["--strength", "much"], ["--strength"]),
        (["--device", "cuda:77"], ["cuda:77", "no such device"]),
        (["--device", "abacus"], ["abacus", "unknown"]),
        (["--dtype", "int8"], ["--dtype", "float32"]),
        (["--heatmap", "map.jpg"], ["map.jpg", ".png"]),
        (["--heatmap", "nowhere/map.png"], ["nowhere", "does not exist"]),
    ],
)
def test_bad_options(files, calls, capsys, more, parts):
    fails(capsys, arguments(files, *more), *parts)
    assert not (files / "lora.safetensors").exists()


def test_bad_output_names_are_refused_before_any_work(files, calls, capsys):
    fails(capsys, arguments(files, out="lora.pt"), "lora.pt", ".safetensors")
    fails(capsys, arguments(files, out="base.safetensors"), "base.safetensors", "another file")
    fails(capsys, arguments(files, out="none/lora.safetensors"), "does not exist")
    (files / "folder.safetensors").mkdir()
    fails(capsys, arguments(files, out="folder.safetensors"), "is a folder")
    assert calls == []


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"other": torch.zeros(1, 5, WIDTH)}, ["text_emb", "other"]),
        ({"text_emb": torch.zeros(5, WIDTH)}, ["[1, S, d]", "[5, 8]"]),
        ({"text_emb": torch.zeros(1, 5, WIDTH, dtype=torch.int64)}, ["floating point"]),
        ({"text_emb": torch.zeros(1, 5, WIDTH + 1)}, ["9 numbers per token", "takes 8"]),
        ({"text_emb": torch.full((1, 5, WIDTH), float("nan"))}, ["not finite"]),
    ],
)
def test_bad_conditions(files, calls, capsys, tensors, parts):
    save_file(tensors, files / "bad.safetensors")
    fails(capsys, arguments(files, condition="bad.safetensors"), "bad.safetensors", *parts)


def test_missing_damaged_and_wrong_files_are_named(files, calls, capsys):
    fails(capsys, arguments(files, condition="none.safetensors"), "none.safetensors")
    (files / "cut.safetensors").write_bytes((files / "base.safetensors").read_bytes()[:500])
    fails(capsys, arguments(files, condition="cut.safetensors"), "cut.safetensors")
    broken = arguments(files)
    broken[4] = str(files / "cut.safetensors")
    fails(capsys, broken, "cut.safetensors")
    fails(capsys, ["inspect", str(files / "cut.safetensors")], "cut.safetensors")
    fails(capsys, ["inspect", str(files / "none.safetensors")], "none.safetensors")
    (files / "text.txt").write_text("hello")
    fails(capsys, ["inspect", str(files / "text.txt")], "text.txt")
    fails(capsys, ["inspect", str(files / "hypernetwork.safetensors")], "not a hypernetwork", "anything")


def test_prompts_are_checked_before_the_text_encoder_is_opened(files, calls, capsys):
    command = arguments(files)
    place = command.index("--condition")
    command[place : place + 2] = ["--prompt", "a persom waves"]
    fails(capsys, command, '"persom"', "person")
    command[place + 1] = ""
    fails(capsys, command, "empty")
    command[place + 1] = "a person waves"  # this base is a lone file
    fails(capsys, command, "text_encoder/ and tokenizer/")


def test_inspect_a_base_model(files, capsys):
    assert command_line.main(["inspect", str(files / "base.safetensors")]) == 0
    words = capsys.readouterr().out
    for part in (
        "a base model, WAN2.1 miniature",
        "16 layers of 16x16",
        "float32",
        "original names",
        "each with self_attn (q, k, v, o)",
    ):
        assert part in words


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        (None, ["ComfyUI's names: ComfyUI and diffusers both load it"]),
        ("kohya", ["Kohya's names", "not every tool loads it"]),
        ("peft", ["PEFT's names", "not every tool loads it"]),
    ],
)
def test_inspect_a_lora_in_any_layout(files, capsys, layout, parts):
    save_lora(tiny_lora(), files / "lora.safetensors", layout=layout)
    assert command_line.main(["inspect", str(files / "lora.safetensors")]) == 0
    words = capsys.readouterr().out
    for part in [
        "a LoRA",
        "16 layers of 16x16",
        "1,024",
        "WAN2.1 miniature, all 16 target layers",
        "a test",
        *parts,
    ]:
        assert part in words


def test_inspect_a_partial_lora_and_the_small_files(files, capsys):
    save_lora(tiny_lora(NAMES[:3]), files / "lora.safetensors")
    assert "only some of the target layers" in str(inspection.inspect(files / "lora.safetensors"))
    assert inspection.inspect(files / "condition.safetensors").kind == "a text condition"
    save_file({name: torch.ones(DIM, DIM) for name in NAMES}, files / "responses.safetensors")
    found = inspection.inspect(files / "responses.safetensors")
    assert (
        found.kind == "a set of response maps" and ("mean response", "100.0% of the weights") in found.facts
    )


def test_inspect_a_whole_checkpoint(files):
    tensors = {f"model.diffusion_model.{name}.weight": torch.zeros(DIM, DIM).bfloat16() for name in NAMES}
    save_file(tensors, files / "checkpoint.safetensors")
    facts = dict(inspection.inspect(files / "checkpoint.safetensors").facts)
    assert facts["layout"] == "a whole checkpoint's names" and facts["dtype"] == "bfloat16"


def test_help_and_version(capsys):
    for command in ([], ["predict"], ["inspect"]):
        with pytest.raises(SystemExit) as stop:
            command_line.main([*command, "--help"])
        assert stop.value.code == 0
    assert "--response-out" in capsys.readouterr().out
    fails(capsys, [], "COMMAND")


def test_an_interrupt_is_no_traceback(files, calls, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "predict", interrupted)
    assert command_line.main(arguments(files)) == 130
    assert "Traceback" not in capsys.readouterr().err


def with_path():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_without_options_the_miniature_answers_from_any_folder(tmp_path, capsys):
    prompt = command_line.EXAMPLE
    command = [sys.executable, "-m", "lofa_core", "predict", "--prompt", prompt, "--out", "lora.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, env=with_path(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "32 of 32 layers matched" in done.stdout
    lora = load_lora(tmp_path / "lora.safetensors")
    assert lora.metadata["lofa_prompt"] == prompt and len(lora) == 32
    assert layout_name(next(iter(lora)), "comfyui").startswith("diffusion_model.")
    other = ["predict", "--prompt", "a person jumps up", "--out", str(tmp_path / "other.safetensors")]
    assert command_line.main(other) == 0
    changed = load_lora(tmp_path / "other.safetensors")
    assert any(not torch.equal(changed.delta(name), lora.delta(name)) for name in lora)


def test_the_miniatures_own_files_are_described():
    kind = inspection.inspect(miniature.HYPERNETWORK).kind
    assert kind == "a hypernetwork: it predicts LoRAs for WAN2.1 miniature"
    facts = dict(inspection.inspect(miniature.FOLDER).facts)
    assert facts["target layers"] == "32 layers of 96x96"


def test_the_miniature_refuses_words_it_does_not_know(capsys, tmp_path):
    command = ["predict", "--prompt", "a zebra jumps up", "--out", str(tmp_path / "lora.safetensors")]
    fails(capsys, command, '"zebra"')
