"""Folders that transformers reads: each file of them missing, damaged or something else is one error."""

import shutil

import pytest

from lofa_core import miniature
from lofa_core.conditions.image import CLIPImageEncoder
from lofa_core.conditions.text import TextEncoder

WAYS = {
    "missing": lambda sound: None,
    "empty": lambda sound: b"",
    "noise": lambda sound: b"\x93\xff" * 999,
    "cut": lambda sound: sound[: len(sound) // 2],
    "a list": lambda sound: b"[]",
    "a word": lambda sound: b'"x"',
    "huge": lambda sound: b'{"hidden_size": 1000000000000, "d_model": 1000000000000, "image_mean": [1e999]}',
    "text for numbers": lambda sound: b'{"hidden_size": "x", "d_model": "x", "image_mean": "x", "model": 3}',
}
# Without it the usual values hold; and what else it says is transformers' own business.
OPTIONAL = {("preprocessor_config.json", "missing"), ("tokenizer_config.json", "missing")}
OPTIONAL |= {("tokenizer_config.json", "huge"), ("tokenizer_config.json", "text for numbers")}
TOKENIZER = "tokenizer/tokenizer.json"  # where it is missing, spiece.model is read


@pytest.fixture
def folder(tmp_path):
    for part in ("text_encoder", "tokenizer", "image_encoder"):
        shutil.copytree(miniature.FOLDER / part, tmp_path / part)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        *("text_encoder/config.json", "text_encoder/model.safetensors", TOKENIZER),
        *("tokenizer/tokenizer_config.json", "tokenizer/spiece.model"),
        *("image_encoder/config.json", "image_encoder/model.safetensors"),
        "image_encoder/preprocessor_config.json",
    ],
)
def test_a_damaged_file_is_named_with_its_folder(folder, name):
    file, encoder = folder / name, CLIPImageEncoder if name.startswith("image") else TextEncoder
    encoder.open(folder)
    sound = file.read_bytes()
    if file.name == "spiece.model":
        (folder / TOKENIZER).unlink()
    for way, change in WAYS.items():
        file.unlink(missing_ok=True)
        content = change(sound)
        if content is not None:
            file.write_bytes(content)
        if (file.name, way) in OPTIONAL or (name, way) == (TOKENIZER, "missing"):
            encoder.open(folder)
            continue
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            encoder.open(folder)
        said = str(error.value)
        assert str(folder) in said and file.parent.name in said and len(said) < 600 and said.isprintable(), (
            way,
            said,
        )


def test_a_pickle_beside_the_configuration_is_not_read(folder):
    weights = folder / "text_encoder/model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"text_encoder: not a UMT5 encoder.*model\.safetensors"):
        TextEncoder.open(folder)
