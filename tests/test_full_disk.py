"""A disk that is really full: one clear error, and what was there before is as it was."""

from pathlib import Path

import pytest
import torch
from small_disk import disk, fill
from test_released import SMALL, published_files, released

from lofa_core import __main__ as command_line
from training.miniature.latents import LatentClips

SENTENCE = "a person swings the left arm widely and quickly, moves to the right, leaning left, feet together"


def state(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir() if path.name != "ballast"}


# ------------------------------------------------------------
# The command line


@pytest.mark.parametrize("free", [0, 40_960])
@pytest.mark.parametrize("options", ["--out", "--response-out", "--heatmap"])
def test_predict_leaves_the_old_file_and_names_the_new_one(tmp_path, capsys, options, free):
    names = {"--out": "lora.safetensors", "--response-out": "maps.safetensors", "--heatmap": "map.png"}
    with disk(tmp_path / "disk", 2**22) as place:
        files = {option: place / name for option, name in names.items()}
        if options != "--out":
            files["--out"] = tmp_path / "lora.safetensors"
        arguments = ["predict", "--prompt", SENTENCE]
        for option in dict.fromkeys(("--out", options)):
            arguments += [option, str(files[option])]
        assert command_line.main(arguments) == 0
        before = state(place)
        assert list(before) == [files[options]]
        ballast = fill(place, min(free, len(before[files[options]]) // 2))
        capsys.readouterr()
        assert command_line.main(arguments) == 2
        said = capsys.readouterr()
        (line,) = said.err.strip().splitlines()
        assert str(files[options]) in line and ".map" not in line and "No space left on device" in line
        assert state(place) == before
        ballast.unlink()
        assert command_line.main(arguments) == 0
        assert state(place) == before


@pytest.mark.parametrize("int8", [False, True])
def test_convert_leaves_the_old_file(tmp_path, capsys, int8):
    stages = published_files(tmp_path, released(SMALL))
    with disk(tmp_path / "disk", 2**22) as place:
        out = place / "lofa_v0.safetensors"
        arguments = ["convert", "--stage1", str(stages[0]), "--stage2", str(stages[1]), "--out", str(out)]
        arguments += ["--int8"] if int8 else []
        assert command_line.main(arguments) == 0
        before = state(place)
        fill(place, len(before[out]) // 2)
        assert command_line.main(arguments) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
        assert str(out) in line and "No space left on device" in line
        assert state(place) == before


def test_torch_save_names_the_file_too(tmp_path):
    clips = LatentClips(
        torch.zeros(40, 16, 5, 8, 8, dtype=torch.float16),
        torch.zeros(40, 6, dtype=torch.uint8),
        torch.zeros(40, 3, dtype=torch.uint8),
    )
    with disk(tmp_path / "disk", 2**20) as place:
        clips.save(place / "latents.pt")
        before = state(place)
        fill(place, 100_000)
        with pytest.raises(OSError, match=r"latents\.pt could not be written .* MB free.*unchanged"):
            clips.save(place / "latents.pt")
        assert state(place) == before
