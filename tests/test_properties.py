"""What holds for any input of the parsers: hypothesis makes the inputs up, the same ones every time."""

import json
import string
import struct
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from lofa_core.archives import load_archive
from lofa_core.conditions.pose_keypoints import MAX_SIDE, parse_pose
from lofa_core.documents import shown
from lofa_core.key_names import LAYOUTS, SDXL_PLACES, SDXL_TARGETS, WAN_TARGETS, canonical_name, layout_name
from lofa_core.lora_files import from_state_dict, to_state_dict, write_safetensors
from lofa_core.safetensors_file import open_safetensors
from training.config import TrainingConfig, load_config
from training.lora_dataset import Record, Status

quick = settings(
    derandomize=True,
    max_examples=60,
    deadline=None,  # machines that tests share are sometimes slow
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

WORDS = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=15,
)
SIDES = st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**62, 2**63, 10**30, 0.5, True])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "BOOL", "U64", "F8_E4M3", "F4", "X"]) | JSON,
        "shape": st.lists(SIDES, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | JSON,
    }
)
HEADERS = st.dictionaries(WORDS | st.just("__metadata__"), ENTRIES | JSON, max_size=3) | JSON
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool]
TENSORS = st.builds(
    lambda shape, dtype, seed: torch.randint(
        0, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    ).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
STATES = st.dictionaries(WORDS, TENSORS, min_size=1, max_size=4)


# ------------------------------------------------------------
# safetensors


@quick
@given(header=HEADERS, data=st.binary(max_size=40))
def test_what_we_read_of_a_safetensors_file_the_library_reads_the_same(tmp_path, header, data):
    path, text = tmp_path / "x.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    try:
        found = open_safetensors(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and str(error).isprintable()
        return
    with safe_open(path, "pt") as theirs:
        assert sorted(theirs.keys()) == sorted(found) and (theirs.metadata() or {}) == found.metadata
        for key in found:
            assert found.shape(key) == tuple(theirs.get_slice(key).get_shape())


@quick
@given(state=STATES, metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3))
def test_what_is_written_is_read_again_by_us_and_by_the_library(tmp_path, state, metadata):
    path = tmp_path / "x.safetensors"
    write_safetensors(state, path, metadata)
    file, theirs = open_safetensors(path), load_file(path)
    assert file.metadata == metadata and file.keys() and set(file) == set(state)
    for key, tensor in state.items():
        assert file.tensor(key).dtype == tensor.dtype and torch.equal(file.tensor(key), tensor)
        assert torch.equal(theirs[key], tensor)
        if tensor.ndim and len(tensor) and tensor.dtype != torch.bool:
            assert torch.equal(file.rows(key, 1, 2), tensor[1:2])


# ------------------------------------------------------------
# .pth


@quick
@given(state=STATES, more=JSON.filter(lambda value: not isinstance(value, float | dict)))
def test_what_torch_saves_is_read_as_torch_loads_it(tmp_path, state, more):
    path = tmp_path / "x.pth"
    torch.save(state | {"more": more, "view": next(iter(state.values())).flatten()[1:]}, path)
    try:
        found = load_archive(path)
    except ValueError as error:  # of names and texts that a state dict has not
        assert str(error).startswith(str(path)) and "more" not in str(error).removeprefix(str(path))
        return
    expected = torch.load(path, weights_only=True)
    assert found.keys() == expected.keys() and json.dumps(found["more"]) == json.dumps(expected["more"])
    for key, tensor in expected.items():
        if key != "more":
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


@quick
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_archive_are_refused(tmp_path, data):
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.pth: is no whole PyTorch archive"):
        load_archive(path)


# ------------------------------------------------------------
# POSE_KEYPOINT

NUMBERS = st.floats(-300, 300, width=32) | st.integers(-300, 300)
PEOPLE = st.lists(
    st.fixed_dictionaries({"pose_keypoints_2d": st.lists(NUMBERS, min_size=54, max_size=54)}), max_size=2
)
SIZES = st.integers(1, 128)
FRAMES = st.lists(
    st.fixed_dictionaries({"people": PEOPLE, "canvas_width": SIZES, "canvas_height": SIZES}),
    min_size=1,
    max_size=3,
)


@quick
@given(document=FRAMES)
def test_a_pose_is_read_the_same_from_its_text_and_lies_near_its_canvas(document):
    frames, again = parse_pose(document), parse_pose(json.dumps(document))
    assert len(frames) == len(again) == len(document)
    for frame, other, given_frame in zip(frames, again, document, strict=True):
        assert len(frame.people) == len(other.people) == len(given_frame["people"])
        assert 1 <= frame.width <= MAX_SIDE and 1 <= frame.height <= MAX_SIDE
        for person, same in zip(frame.people, other.people, strict=True):
            body = torch.from_numpy(person.body)
            assert body.isfinite().all() and torch.equal(body, torch.from_numpy(same.body))
            assert ((body[:, 2] >= 0) & (body[:, 2] <= 1)).all()
            assert (body[:, :2].abs() <= 2 * max(frame.width, frame.height)).all()


@quick
@given(document=JSON | FRAMES.map(lambda frames: [*frames, {"people": [{"pose_keypoints_2d": [1]}]}]))
def test_a_document_that_is_no_pose_is_refused_in_a_few_words(document):
    for given_document in (document, json.dumps(document)):
        try:
            parse_pose(given_document)
        except ValueError as error:
            assert "pose" in str(error) and len(str(error)) < 500 and str(error).isprintable()


# ------------------------------------------------------------
# Names of layers

NAMES = st.builds(
    "blocks.{}.{}".format, st.integers(0, 9999), st.sampled_from(list(WAN_TARGETS))
) | st.builds(
    "{}.transformer_blocks.{}.{}".format,
    st.sampled_from([place for place, _, _ in SDXL_PLACES]),
    st.integers(0, 9999),
    st.sampled_from(SDXL_TARGETS),
)


@quick
@given(name=NAMES)
def test_every_layout_s_name_of_a_layer_is_read_as_its_canonical_one(name):
    assert canonical_name(name) == name
    for layout in LAYOUTS:
        assert canonical_name(layout_name(name, layout)) == name


@quick
@given(
    name=st.text(max_size=60)
    | st.builds("blocks.{}.self_attn.q".format, st.text("0123456789٣३", max_size=30))
)
def test_any_other_name_is_none_or_a_canonical_one(name):
    found = canonical_name(name)
    assert found is None or (name.isascii() and canonical_name(found) == found)


@quick
@given(
    names=st.lists(NAMES, min_size=1, max_size=3, unique=True),
    layout=st.sampled_from(list(LAYOUTS)),
    rank=st.integers(1, 3),
)
def test_a_lora_comes_back_from_every_layout(names, layout, rank):
    shapes = {"A": (rank, 4), "B": (4, rank)}
    state = {f"{name}.lora_{part}.weight": torch.randn(shapes[part]) for name in names for part in "AB"}
    lora = from_state_dict(state)
    again = from_state_dict(to_state_dict(lora, layout))
    assert set(again) == set(names)
    assert all(torch.allclose(again[name].delta(), lora[name].delta()) for name in names)


# ------------------------------------------------------------
# Configurations and manifests


@quick
@given(text=st.text(max_size=80) | st.builds("{} = {}".format, WORDS, JSON.map(json.dumps)))
def test_a_configuration_is_read_or_refused_by_name(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    try:
        assert isinstance(load_config(path), TrainingConfig)
    except ValueError as error:
        assert str(error).startswith(str(path))


RECORDS = st.builds(
    Record,
    task=st.text(max_size=9),
    status=st.sampled_from(get_args(Status)),
    file=st.none() | WORDS,
    sha256=st.none() | WORDS,
    loss=st.none() | st.floats(allow_nan=False),
    reason=st.none() | st.text(max_size=20),
    settings=st.dictionaries(WORDS.map("x_{}".format), JSON.filter(lambda x: x == x), max_size=2),
)


@quick
@given(record=RECORDS)
def test_a_line_of_the_manifest_is_read_as_it_was_written(record):
    again = Record.read(record.line())
    assert again is not None and again.line() == record.line()


@quick
@given(value=JSON, cut=st.integers(0, 60), record=RECORDS)
def test_any_other_line_is_passed_over(value, cut, record):
    line = record.line().rstrip()
    assert Record.read(json.dumps(value)) is None
    assert Record.read(line[: min(cut, len(line) - 1)]) is None


@quick
@given(text=st.text(max_size=600))
def test_a_stranger_s_words_can_be_shown(text):
    assert shown(text).isprintable()
    assert shown(text) == text or not text.isprintable() or len(text) > 500
