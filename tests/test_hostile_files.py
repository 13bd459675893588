"""Files that are damaged, lie, or are something else: each is read, or refused by one error that names it.

tests/large_files.py has those that would take time or memory, tests/fuzz_files.py damages files at random.
"""

import io
import json

import pytest
import torch
from hostile_files import check_error, outcome, random_lora
from injuries import header_of, with_header
from safetensors.torch import load, save

from lofa_core.base_models import BaseWeights
from lofa_core.lora_files import load_lora
from lofa_core.lora_response import LoRAResponses
from lofa_core.safetensors_file import open_safetensors

NAMES = [
    *("h.safetensors", "h8.safetensors", "d.safetensors", "stage1.pth", "stage2.pth", "base.safetensors"),
    *("base.safetensors.index.json", "c.safetensors", "pose.json", "run.toml", "plan.toml"),
    *("lora_comfyui.safetensors", "lora_original.safetensors", "lora_diffusers.safetensors"),
    *("lora_kohya.safetensors", "lora_peft.safetensors", "lora_sdxl.safetensors"),
    *("manifest.jsonl", "tasks.jsonl", "metadata.json", "lora.pth", "tensors.pth", "cached.safetensors"),
    *("picture.png", "picture.jpg", "picture.jpeg", "picture.webp", "picture.bmp"),
    *("picture.tif", "picture.tiff", "clip.mp4"),
]
WEIGHTS = [name for name in NAMES if name.endswith((".safetensors", ".pth")) and name != "cached.safetensors"]
HEADERS = [name for name in WEIGHTS if name.endswith(".safetensors")]
ARCHIVES = [name for name in WEIGHTS if name.endswith(".pth")]
# A dataset without a manifest is one where nothing is made yet; a damaged cache is made anew. Lines and
# TOML's keys are whole wherever they end; FFmpeg and Pillow show what is there of some clips and pictures.
ABSENT_IS_NONE = {"manifest.jsonl", "cached.safetensors"}
ENDS_ANYWHERE = ABSENT_IS_NONE | {name for name in NAMES if name.endswith((".toml", ".jsonl"))} | {"clip.mp4"}


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_file_is_read(kinds, place, name):
    assert outcome(kinds[name], place / name) == "read"


def test_no_kind_of_file_is_left_out(kinds):
    assert sorted(kinds) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_empty_a_folder_or_noise_is_refused(kinds, place, name):
    path, kind = place / name, kinds[name]
    refused = "read" if name in ABSENT_IS_NONE else "refused"
    path.unlink()
    assert outcome(kind, path) == refused
    path.touch()
    assert outcome(kind, path) == refused or name == "run.toml"  # all keys have defaults
    for seed in range(5):
        noise = torch.randint(256, (3000,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        path.write_bytes(noise.numpy().tobytes())
        assert outcome(kind, path) == refused
    path.unlink()
    path.mkdir()
    if name not in ABSENT_IS_NONE:
        assert outcome(kind, path) == "refused"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_at_every_kilobyte_or_before_its_last_byte_is_refused(kinds, place, name):
    kind, path = kinds[name], place / name
    for length in (*range(0, len(kind.sound), 1024), len(kind.sound) - 1):
        path.write_bytes(kind.sound[:length])
        assert outcome(kind, path) == "refused" or name in ENDS_ANYWHERE or name.startswith("picture"), length


# ------------------------------------------------------------
# Headers that lie

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    # Those of the safetensors project's own list.
    "header_beyond_the_end": lambda data: (2**40).to_bytes(8, "little") + data[8:],
    "header_of_all_numbers": lambda data: b"\xff" * 8 + data[8:],
    "no_header": lambda data: b"\0" * 8,
    "header_not_json": lambda data: with_header(data, b"{]"),
    "header_begins_with_a_space": lambda data: with_header(data, b" " + json.dumps(header_of(data)).encode()),
    "header_is_a_list": lambda data: with_header(data, b"[]"),
    "header_is_utf16": lambda data: with_header(data, json.dumps(header_of(data)).encode("utf-16")),
    "metadata_is_a_list": lambda data: of(data, __metadata__=[]),
    "metadata_of_numbers": lambda data: of(data, __metadata__={"format": 1}),
    "negative_offsets": lambda data: of(data, x=ENTRY | {"data_offsets": [-8, 0]}),
    "offsets_the_wrong_way": lambda data: of(data, x=ENTRY | {"data_offsets": [8, 0]}),
    "offsets_past_the_end": lambda data: of(data, x=ENTRY | {"data_offsets": [2**30, 2**30 + 8]}),
    "offsets_of_a_float": lambda data: of(data, x=ENTRY | {"data_offsets": [0.0, 8.0]}),
    "offsets_of_three": lambda data: of(data, x=ENTRY | {"data_offsets": [0, 8, 8]}),
    "overlapping": lambda data: of(data, x=ENTRY),
    "size_of_another_shape": lambda data: of(data, x=ENTRY | {"shape": [3]}),
    "size_of_another_dtype": lambda data: of(data, x=ENTRY | {"dtype": "F16"}),
    "unknown_dtype": lambda data: of(data, x=ENTRY | {"dtype": "F12"}),
    "shape_beyond_64_bits": lambda data: of(data, x=ENTRY | {"shape": [2**33, 2**33]}),
    "shape_that_wraps_around": lambda data: of(data, x=ENTRY | {"shape": [2**62, 4, 2]}),
    "shape_with_a_negative": lambda data: of(data, x=ENTRY | {"shape": [-1, -2]}),
    "shape_with_a_truth": lambda data: of(data, x=ENTRY | {"shape": [True, 2]}),
    "shape_with_nan": lambda data: with_header(
        data, json.dumps({"x": ENTRY | {"shape": [float("nan")]}}).encode()),
    "entry_without_dtype": lambda data: of(data, x={"shape": [0], "data_offsets": [0, 0]}),
    "entry_of_a_number": lambda data: of(data, x=1),
    "a_gap_in_the_data": lambda data: data + bytes(8),
    "a_name_twice": lambda data: with_header(data, twice(header_of(data))),
    "metadata_twice": lambda data: with_header(data, b'{"__metadata__":{},"__metadata__":{}}'),
    "a_name_that_cannot_be_shown": lambda data: of(data, **{"\x1b[2J": ENTRY}),
    "a_name_of_a_page": lambda data: of(data, **{"x" * 2000: ENTRY}),
    "half_a_character": lambda data: of(data, __metadata__={"notes": "\ud800"}),
    "a_thousand_levels": lambda data: with_header(data, b'{"x":' + b"[" * 100_000),
}  # fmt: skip


def of(data, **entries):
    return with_header(data, json.dumps(header_of(data) | entries).encode())


def twice(header):
    name = next(key for key in header if key != "__metadata__")
    return (json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode()


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(kinds, place, lie):
    for name in HEADERS:
        (place / name).write_bytes(LIES[lie](kinds[name].sound))
        with pytest.raises(ValueError, match=f"{name} is not a whole safetensors file"):
            open_safetensors(place / name)
        assert outcome(kinds[name], place / name) == "refused"


# ------------------------------------------------------------
# Tensors


def changed(kind, change):
    """The file with every tensor of more than one number changed."""
    if kind.name.endswith(".safetensors"):
        metadata = header_of(kind.sound).get("__metadata__")
        return save({key: change(value) for key, value in load(kind.sound).items()}, metadata)
    return stored({key: change(value) for key, value in load_stored(kind).items()})


def load_stored(kind):
    return torch.load(io.BytesIO(kind.sound), weights_only=True)


def stored(state):
    found = io.BytesIO()
    torch.save(state, found)
    return found.getvalue()


def spoilt(value):
    def change(tensor):
        if tensor.is_floating_point() and tensor.numel() > 1:
            tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_refused(kinds, place, name, value):
    (place / name).write_bytes(changed(kinds[name], spoilt(value)))
    with pytest.raises(ValueError, match="not finite") as error:
        kinds[name].read(place / name)
    check_error(error.value, place / name)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:-1] if x.ndim else x,
        lambda x: x.flatten(),
        lambda x: x[None],
        lambda x: x.to(torch.int64),
        lambda x: x.to(torch.bool),
        lambda x: x.to(torch.complex64),
        lambda x: torch.zeros(0, *x.shape[1:]),
        lambda x: torch.zeros(()),
    ],
    ids=["cut", "flat", "deeper", "whole", "truth", "complex", "empty", "single"],
)
def test_wrong_shapes_and_dtypes_are_refused_or_read(kinds, place, name, change):
    (place / name).write_bytes(changed(kinds[name], change))
    outcome(kinds[name], place / name)


@pytest.mark.parametrize("name", HEADERS)
def test_wrong_names_are_refused(kinds, place, name):
    metadata = header_of(kinds[name].sound).get("__metadata__")
    for rename in (
        lambda key: f"{key}x",
        lambda key: key[1:],
        lambda key: key.replace("0", "999999999999999"),
    ):
        state = {rename(key): value for key, value in load(kinds[name].sound).items()}
        (place / name).write_bytes(save(state, metadata))
        if state.keys() != load(kinds[name].sound).keys():
            assert outcome(kinds[name], place / name) == "refused"


@pytest.mark.parametrize("name", NAMES)
def test_any_other_kind_of_file_in_its_place_is_refused(kinds, place, name):
    """A hypernetwork for a LoRA, a LoRA for a base model, a picture for weights ... : 900 pairs."""
    alike = [{"h", "h8", "d"}, {name.partition(".")[0] for name in NAMES if name.startswith("lora_")}]
    for other in kinds.values():
        one, two = name.partition(".")[0], other.name.partition(".")[0]
        same = one == two or any({one, two} <= group for group in alike)
        if same or (name, other.name) == ("run.toml", "plan.toml"):
            continue
        (place / name).write_bytes(other.sound)
        expected = {"refused", "read"} if name in ENDS_ANYWHERE | {"stage2.pth"} else {"refused"}
        assert outcome(kinds[name], place / name) in expected, other.name


def test_a_lora_for_another_base_is_refused(kinds, place):
    base = BaseWeights.open(place / "base.safetensors")
    for name in ("lora_sdxl.safetensors", "wider.safetensors"):
        if name == "wider.safetensors":
            lora = random_lora({"blocks.0.self_attn.q": (8, 8)})
        else:
            lora = load_lora(place / name)
        with pytest.raises(
            ValueError, match="No layer of this LoRA fits the base model.*Choose a LoRA made for"
        ):
            LoRAResponses(base, lora)
