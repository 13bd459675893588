"""Clips and pictures from files: which frames, which part of them, and what is said of broken files."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from training.data import media


def write_video(path, frames, fps=16, codec="ffv1", rotation=0):
    """uint8 [T, H, W, 3] -> a video; FFV1 keeps every pixel."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"ffv1": "bgr0", "mpeg4": "yuv420p", "libx264": "yuv444p"}[codec]
        stream.time_base = Fraction(1, fps)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(count, height=32, width=32):
    """Frame n is the colour (8 n, 0, 255)."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = (8 * np.arange(count))[:, None, None]
    frames[..., 2] = 255
    return frames


def shown(clip):
    return (clip[:, 8, 8, 0] // 8).tolist()


def test_frames_are_taken_evenly_or_at_a_rate_from_the_start(tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered(21))
    assert shown(media.read_video(path, 5, 16, 16, 0)) == [0, 5, 10, 15, 20]
    assert shown(media.read_video(path, 21, 16, 16, 0)) == list(range(21))
    assert shown(media.read_video(path, 1, 16, 16, 0)) == [0]
    assert shown(media.read_video(path, 5, 16, 16, 16)) == [0, 1, 2, 3, 4]
    assert shown(media.read_video(path, 5, 16, 16, 4)) == [0, 4, 8, 12, 16]
    assert shown(media.read_video(path, 5, 16, 16, 32)) in ([0, 0, 1, 1, 2], [0, 1, 1, 2, 2])


def test_pixels_of_a_lossless_video_are_kept(tmp_path):
    frames = np.random.default_rng(0).integers(256, size=(5, 16, 32, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mkv", frames)
    assert np.array_equal(media.read_clip(path, 5, 16, 32, 0), frames)


def test_the_centre_is_cut_out_whole_and_resized(tmp_path):
    frames = np.zeros((1, 32, 96, 3), np.uint8)
    frames[:, :, 32:64] = (0, 200, 0)  # the middle third is green
    frames[:, :16, 32:64] = (200, 0, 0)  # and red above
    clip = media.read_video(write_video(tmp_path / "a.mkv", frames), 1, 16, 16, 0)
    assert clip.shape == (1, 16, 16, 3) and clip.dtype == np.uint8
    inner = clip[0, :, 3:-3].astype(int)  # the filter looks a little past the cut
    assert np.abs(inner[:5] - (200, 0, 0)).max() < 5 and np.abs(inner[11:] - (0, 200, 0)).max() < 5
    tall = media.read_video(tmp_path / "a.mkv", 1, 64, 16, 0)
    assert (tall[0, :24] == (200, 0, 0)).all() and (tall[0, 40:] == (0, 200, 0)).all()


@pytest.mark.parametrize(("rotation", "where"), [(90, (40, 8)), (-90, (24, 24)), (180, (24, 40))])
def test_a_phones_rotation_is_applied_counter_clockwise(tmp_path, rotation, where):
    frames = np.zeros((2, 32, 64, 3), np.uint8)
    frames[:, :16, 16:32] = 255  # what is bright lies up and to the left
    path = write_video(tmp_path / "a.mp4", frames, codec="libx264", rotation=rotation)
    size = (32, 64) if rotation == 180 else (64, 32)
    clip = media.read_video(path, 1, *size, 0)[0].astype(int)
    bright = np.argwhere(clip.sum(-1) > 400).mean(0)
    assert np.abs(bright - where).max() < 3


def test_images_are_one_frame_and_turned_as_exif_says(tmp_path):
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :20] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    clip = media.read_clip(tmp_path / "a.png", 1, 20, 40, 0)
    assert np.array_equal(clip[0], picture)
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    Image.fromarray(picture).save(tmp_path / "b.jpg", exif=exif, quality=95)
    turned = media.read_image(tmp_path / "b.jpg", 40, 20)[0]
    assert turned[:16].min() > 200 and turned[24:].max() < 50
    with pytest.raises(ValueError, match=r"a\.png: an image among clips of 5 frames"):
        media.read_clip(tmp_path / "a.png", 5, 16, 16, 0)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    Image.new("L", (16, 16), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (16, 16), (1, 2, 3, 255)).save(tmp_path / "a.webp", lossless=True)
    assert (media.read_image(tmp_path / "grey.png", 16, 16) == 7).all()
    assert (media.read_image(tmp_path / "a.webp", 16, 16) == (1, 2, 3)).all()


def test_a_video_that_is_too_short_says_how_long_it_is(tmp_path):
    path = write_video(tmp_path / "short.mkv", numbered(4))
    with pytest.raises(ValueError, match=r"short\.mkv: has 4 frames that can be decoded, 5 are wanted"):
        media.read_video(path, 5, 16, 16, 0)
    with pytest.raises(
        ValueError, match=r"short\.mkv: its last frame is at 0\.19 s, 5 frames at 16 a second"
    ):
        media.read_video(path, 5, 16, 16, 16)


def test_a_video_is_read_whole_without_cutting(tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered(21, 16, 48))
    clip = media.read_whole(path, 5)
    assert clip.shape == (5, 16, 48, 3) and shown(clip) == [0, 5, 10, 15, 20]
    assert shown(media.read_whole(path, 30)) == list(range(21)) and shown(media.read_whole(path, 1)) == [0]
    picture = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert np.array_equal(media.read_whole(tmp_path / "a.png", 5), picture[None])


def broken(folder):
    """File name -> what is wrong with it."""
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("once upon a time\n" * 200)
    whole = write_video(folder / "whole.mp4", numbered(30, 64, 64), codec="mpeg4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("once upon a time")
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "cut.png").write_bytes((folder / "noise.png").read_bytes()[:2000])
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "empty.mp4": "cannot be decoded as a video",
        "text.mp4": "cannot be decoded as a video",
        "cut.mp4": "cannot be decoded as a video",
        "sound.mp4": "has no video stream",
        "gone.mp4": "cannot be decoded as a video",
        "text.png": "cannot be decoded as an image",
        "cut.png": "cannot be decoded as an image",
        "gone.png": "no such file",
    }


def test_a_file_that_is_damaged_or_something_else_is_named(tmp_path):
    for name, reason in broken(tmp_path).items():
        for read in (
            media.check,
            lambda path: media.read_clip(path, 1, 16, 16, 0),
            lambda path: media.read_whole(path, 1),
        ):
            with pytest.raises(ValueError) as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value) and reason in str(error.value), name
    media.check(tmp_path / "whole.mp4")
    media.check(tmp_path / "noise.png")


def test_a_list_of_further_files_is_no_video(tmp_path):
    """FFmpeg would open what a playlist names, another file or an address."""
    write_video(tmp_path / "other.mp4", numbered(4), codec="mpeg4")
    for text in (
        "ffconcat version 1.0\nfile other.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 26\n",
    ):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(ValueError, match=r"list\.mp4: cannot be decoded as a video"):
            media.check(tmp_path / "list.mp4")


def test_a_document_is_no_picture(tmp_path):
    """Pillow would start another program for PostScript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded as an image \(cannot identify"):
        media.check(tmp_path / "a.png")


def test_a_picture_or_a_frame_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (9000, 6000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: .*9000x6000 pixels, 45 million"):
        media.read_image(tmp_path / "a.png", 8, 8)
    write_video(tmp_path / "a.mp4", numbered(4), codec="mpeg4")
    monkeypatch.setattr(media, "_MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a\.mp4: its frames have 32x32 pixels"):
        media.check(tmp_path / "a.mp4")
