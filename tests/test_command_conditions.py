"""The command line's conditions: skeletons, pictures and encoded ones become what the network is given."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import POSE, TEXT, base_tensors, condition, generator, network
from tiny_sdxl import IMAGE_WIDTH, STATES, build_image_encoder

import lofa_core.__main__ as command_line
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import save_hypernetwork
from lofa_core.command_conditions import add_arguments, input_files, read_conditions
from lofa_core.conditions import Given
from lofa_core.conditions.image import CLIPImageEncoder
from lofa_core.conditions.pose import pose_from_keypoints
from lofa_core.descriptions import ConditionDescription
from lofa_core.lora_files import load_lora
from lofa_core.prediction import predict

STYLE, IDENTITY = (ConditionDescription(kind, IMAGE_WIDTH) for kind in ("style", "identity"))
KNOWN = {known.kind: known for known in (TEXT, POSE, STYLE, IDENTITY)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base in a folder with an image encoder, a hypernetwork of all kinds, pictures, skeletons."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "base").mkdir()
    save_file(base_tensors(), folder / "base" / "model.safetensors")
    torch.manual_seed(0)
    build_image_encoder().save_pretrained(folder / "base" / "image_encoder")
    save_hypernetwork(network(conditions=tuple(KNOWN.values())), folder / "net.safetensors")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(256, size=(20, 30, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    points = [number for x, y in rng.uniform(0, 64, (18, 2)).tolist() for number in (x, y, 1.0)]
    frame = {"people": [{"pose_keypoints_2d": points}], "canvas_width": 64, "canvas_height": 64}
    (folder / "pose.json").write_text(json.dumps([frame, frame]))
    (folder / "text.txt").write_text("once upon a time")
    style = torch.randn(1, 4, IMAGE_WIDTH, generator=generator(1))
    save_file({"text_emb": condition(), "style": style}, folder / "encoded.safetensors")
    return folder


def read(files, *arguments, known=KNOWN):
    """The conditions of a command line in which names of files stand for their paths."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [str(files / word) if "." in word and "=" not in word else word for word in arguments]
    return read_conditions(parser.parse_args(words), known, files / "base")


def test_each_option_is_encoded_as_the_library_does(files):
    found = read(files, "--pose", "pose.json", "--style", "a.png", "b.png", "--identity", "b.png")
    document = json.loads((files / "pose.json").read_text())
    pictures = [np.array(Image.open(files / f"{name}.png")) for name in ("a", "b")]
    encoder = CLIPImageEncoder.open(files / "base")
    wanted = {
        "pose": pose_from_keypoints(document, *POSE.size),
        "style": encoder.encode(pictures),
        "identity": encoder.encode(pictures[1:]),
    }
    assert set(found) == set(wanted) and all(given.strength is None for given in found.values())
    assert all(torch.equal(found[kind].values, wanted[kind]) for kind in wanted)
    assert found["style"].values.shape == (1, 2 * STATES, IMAGE_WIDTH)


def test_pictures_of_any_mode_are_read_and_another_encoder_can_be_named(files, tmp_path):
    wanted = read(files, "--style", "a.png")["style"].values
    Image.open(files / "a.png").convert("RGBA").save(files / "clear.png")
    assert torch.equal(read(files, "--style", "clear.png")["style"].values, wanted)
    torch.manual_seed(1)
    build_image_encoder().save_pretrained(tmp_path / "other")
    other = read(files, "--style", "a.png", "--image-encoder", str(tmp_path / "other"))["style"].values
    assert other.shape == wanted.shape and not torch.allclose(other, wanted, atol=1e-2)


def test_an_encoded_file_holds_several_kinds_and_stands_beside_options(files):
    found = read(files, "--condition", "encoded.safetensors", "--identity", "a.png")
    assert set(found) == {"text", "style", "identity"} and torch.equal(found["text"].values, condition())


def test_weights_become_strengths(files):
    options = ["--condition", "encoded.safetensors", "--weight", "style=0.25", "--weight", "text=2"]
    found = read(files, *options)
    assert {kind: given.strength.tolist() for kind, given in found.items()} == {
        "text": [2.0],
        "style": [0.25],
    }


@pytest.mark.parametrize(
    ("arguments", "known", "said"),
    [
        ([], KNOWN, "say what the LoRA shall bring out: --prompt, --pose"),
        (["--style", "a.png"], {"text": TEXT, "pose": POSE}, "conditioned on text and pose, not on style"),
        (["--style", "a.png", "--condition", "encoded.safetensors"], KNOWN, "holds style, .* own option"),
        (["--style", "a.png", "--weight", "text=0.5"], KNOWN, "--weight text: no such condition"),
        (["--style", "text.txt"], KNOWN, r"text\.txt: cannot be decoded as an image"),
        (["--pose", "text.txt"], KNOWN, r"text\.txt: "),
        (["--condition", "base/model.safetensors"], KNOWN, r"model\.safetensors: holds blocks.*named pose"),
        (["--style", "a.png", "--image-encoder", "."], KNOWN, r"no config\.json of an image encoder"),
        (
            ["--style", "a.png"],
            {"style": ConditionDescription("style", 9)},
            f"the style condition: {IMAGE_WIDTH} numbers per token; this hypernetwork takes 9",
        ),
        (
            ["--condition", "encoded.safetensors"],
            {"text": TEXT, "style": ConditionDescription("style", 9)},
            r"encoded\.safetensors: style: 8 numbers per token",
        ),
    ],
)
def test_what_does_not_fit_is_named(files, arguments, known, said):
    with pytest.raises(ValueError, match=said):
        read(files, *arguments, known=known)


@pytest.mark.parametrize("shape", [(1, 3, 4, 32, 16), (3, 5, 32, 16), (1, 5, 3, 32, 16)])
def test_an_encoded_pose_of_another_size_is_refused_with_both(files, tmp_path, shape):
    save_file({"pose": torch.zeros(shape)}, tmp_path / "pose.safetensors")
    with pytest.raises(ValueError) as error:
        read(files, "--condition", str(tmp_path / "pose.safetensors"))
    assert str(list(shape)) in str(error.value) and "[1, 3, 5, 32, 16]" in str(error.value)


@pytest.mark.parametrize("weight", ["style", "style=", "style=-1", "style=nan", "style=inf", "smell=1"])
def test_a_weight_that_is_none_is_refused(files, weight, capsys):
    with pytest.raises(SystemExit):
        read(files, "--style", "a.png", "--weight", weight)
    assert "expected a kind (text, pose, style, identity)" in capsys.readouterr().err


def test_inputs_are_not_overwritten(files):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    names = ["pose.json", "encoded.safetensors", "a.png", "b.png"]
    pose, encoded, style, identity = (str(files / name) for name in names)
    options = ["--pose", pose, "--condition", encoded, "--style", style, "--identity", identity]
    assert {path.name for path in input_files(parser.parse_args(options))} == set(names)


def test_the_command_predicts_from_several_kinds_and_their_weights(files, tmp_path, capsys):
    def made(*more):
        command = ["predict", "--hypernetwork", str(files / "net.safetensors"), "--base", str(files / "base")]
        command += ["--pose", str(files / "pose.json"), "--device", "cpu"]
        command += ["--out", str(tmp_path / "lora.safetensors")]
        assert command_line.main([*command, *more]) == 0
        return load_lora(tmp_path / "lora.safetensors")

    style = ["--style", str(files / "a.png")]
    both, half, none, alone = (
        made(*some)
        for some in (style, [*style, "--weight", "style=0.5"], [*style, "--weight", "style=0"], [])
    )
    assert set(both.metadata["lofa_condition"].split(" + ")) == {"pose", "style"}
    assert alone.metadata["lofa_condition"] == "pose" and len(both) == 16
    given = read(files, "--pose", "pose.json", "--style", "a.png")
    given["style"] = Given(given["style"].values, torch.tensor([0.5]))
    wanted = predict(network(conditions=tuple(KNOWN.values())), BaseWeights.open(files / "base"), given).lora
    name = "blocks.1.cross_attn.v"
    assert torch.allclose(half.delta(name), wanted.delta(name), atol=1e-5)
    assert torch.allclose(none.delta(name), alone.delta(name), atol=1e-5)
    assert not torch.allclose(both.delta(name), half.delta(name), atol=1e-3)
    assert not torch.allclose(half.delta(name), alone.delta(name), atol=1e-3)
