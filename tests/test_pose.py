"""Pose conditions: any clip or document becomes the frames and the size that the encoder asks for."""

import numpy as np
import pytest
import torch

from lofa_core.conditions.pose import pose_from_keypoints, resample_frames
from lofa_core.conditions.pose_drawing import draw_pose
from lofa_core.conditions.pose_keypoints import parse_pose


def numbered(count, height=8, width=8):
    """Frame n of `count` is all n / 255."""
    frames = torch.arange(count, dtype=torch.float32) / 255
    return frames[:, None, None, None].expand(count, height, width, 3).clone()


def shown(condition):
    return (condition[0, 0, :, 4, 4] * 255).round().int().tolist()


def document(count, width=64, height=64):
    """A dot that moves from left to right."""
    frames = []
    for n in range(count):
        body = [0.0] * 54
        body[:3] = (n + 0.5) / count * width, height / 2, 1.0
        frames.append(
            {"people": [{"pose_keypoints_2d": body}], "canvas_width": width, "canvas_height": height}
        )
    return frames


@pytest.mark.parametrize(
    ("frames", "count", "wanted"),
    [
        (1, 5, [0, 0, 0, 0, 0]),
        (5, 5, [0, 1, 2, 3, 4]),
        (21, 5, [0, 5, 10, 15, 20]),
        (100, 3, [0, 50, 99]),
        (2, 4, [0, 0, 1, 1]),
        (7, 1, [0]),
        (7, 2, [0, 6]),
    ],
)
def test_frames_are_taken_evenly_and_first_and_last_are_kept(frames, count, wanted):
    got = resample_frames(numbered(frames), count, 8, 8)
    assert got.shape == (1, 3, count, 8, 8) and got.dtype == torch.float32 and got.is_contiguous()
    assert shown(got) == wanted


def test_keypoints_are_sampled_in_time_as_frames_are():
    drawn = draw_pose(parse_pose(document(21)), 64, 64)
    for count in (1, 5, 17, 21, 40):
        picks = shown(resample_frames(numbered(21), count, 8, 8))
        got = pose_from_keypoints(document(21), count, 64, 64)
        assert got.shape == (1, 3, count, 64, 64) and got.dtype == torch.float32 and 0.5 < got.max() <= 1
        assert np.array_equal((got[0].permute(1, 2, 3, 0) * 255).round().byte().numpy(), drawn[picks])


def test_bytes_and_floats_of_all_kinds_give_the_same():
    frames = np.random.default_rng(0).integers(256, size=(3, 16, 24, 3), dtype=np.uint8)
    wanted = resample_frames(frames, 2, 16, 16)
    shares = torch.from_numpy(frames) / 255
    for other in (
        torch.from_numpy(frames),
        shares,
        shares.double(),
        shares.numpy(),
        frames[:, :, ::-1][:, :, ::-1],
    ):
        assert torch.allclose(resample_frames(other, 2, 16, 16), wanted, atol=1e-6)
    assert torch.allclose(resample_frames(shares.half(), 2, 16, 16), wanted, atol=1e-3)
    assert torch.equal(resample_frames(frames, 3, 16, 24)[0].permute(1, 2, 3, 0), shares)


def test_pictures_are_fitted_whole_on_black():
    white = np.full((1, 32, 64, 3), 255, np.uint8)
    got = resample_frames(white, 1, 64, 64)[0, :, 0]
    assert not got[:, :16].any() and not got[:, 48:].any() and torch.allclose(got[:, 16:48], torch.ones(1))
    got = resample_frames(white.transpose(0, 2, 1, 3), 2, 128, 128)[0]
    assert (
        not got[..., :32].any() and not got[..., 96:].any() and torch.allclose(got[..., 32:96], torch.ones(1))
    )


@pytest.mark.parametrize("offset", range(0, 13, 3))
def test_thin_limbs_survive_shrinking(offset):
    """One white row of 832 is there after shrinking to 64, wherever it lies, as bright as its share."""
    frames = np.zeros((1, 832, 832, 3), np.uint8)
    frames[0, 400 + offset] = 255
    got = resample_frames(frames, 1, 64, 64)[0, 0, 0]
    assert torch.allclose(got.sum(0), torch.tensor(64 / 832), atol=0.02)
    assert got.amax() > 0.03 and (got.amax(0) > 0.03).all()


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (torch.zeros(4, 8, 8), r"shape \(4, 8, 8\)"),
        (torch.zeros(4, 3, 8, 8), r"shape \(4, 3, 8, 8\); expected \[T, H, W, 3\]"),
        (torch.zeros(4, 8, 8, 4), r"shape \(4, 8, 8, 4\)"),
        (torch.zeros(0, 8, 8, 3), r"shape \(0, 8, 8, 3\)"),
        (torch.zeros(1, 0, 8, 3), r"shape \(1, 0, 8, 3\)"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.int64), "is torch.int64; expected uint8, or floats"),
        (np.zeros((1, 8, 8, 3), object), "is object"),
        (
            torch.full((1, 8, 8, 3), 255.0),
            "Frame 0 of the pose clip has values from 255 to 255; expected 0 to 1",
        ),
        (torch.full((1, 8, 8, 3), -0.01), "values from -0.01"),
        (torch.full((1, 8, 8, 3), float("nan")), "values from nan"),
        (torch.full((1, 8, 8, 3), float("inf")), "to inf"),
    ],
)
def test_what_is_no_clip_of_pictures_is_refused(frames, said):
    with pytest.raises(ValueError, match=said):
        resample_frames(frames, 2, 8, 8)


def test_one_bad_value_is_found_and_rounding_is_forgiven():
    frames = numbered(3)
    frames[2, 1, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="Frame 2"):
        resample_frames(frames, 3, 8, 8)
    frames[2, 1, 1, 1], frames[0, 0, 0, 0] = 1.0005, -0.0005
    got = resample_frames(frames, 3, 8, 8)
    assert got.max() == 1 and got.min() == 0


@pytest.mark.parametrize(("count", "height", "width"), [(0, 8, 8), (10_001, 8, 8), (2, 0, 8), (2, 8, 16_385)])
@pytest.mark.parametrize("make", [lambda *size: resample_frames(numbered(2), *size),
                                  lambda *size: pose_from_keypoints(document(2), *size)])  # fmt: skip
def test_sizes_and_counts_out_of_range_are_refused(make, count, height, width):
    with pytest.raises(ValueError, match="expected 1 to 1"):
        make(count, height, width)


def test_a_bad_document_is_refused():
    with pytest.raises(ValueError, match="canvas_width is missing"):
        pose_from_keypoints([{"people": []}], 2, 8, 8)
