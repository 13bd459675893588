"""Safetensors files as LoFA writes them: the format's own library reads them, and writing can be stopped."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import save_lora, write_safetensors
from lofa_core.safetensors_file import DTYPE_NAMES
from lofa_core.steps import Watch


def test_the_library_reads_every_dtype_as_it_was_written(tmp_path):
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"one number": torch.tensor(2.5), "none": torch.empty(0, 4), "half": torch.ones(3).half()}
    write_safetensors(tensors, tmp_path / "it.safetensors", {"b": '"\u00e9\n', "a": ""})
    read = load_file(tmp_path / "it.safetensors")
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        assert torch.equal(read[key].to(wide), tensor.to(wide))
    with safe_open(tmp_path / "it.safetensors", "pt") as file:
        assert file.metadata() == {"b": '"\u00e9\n', "a": ""}
    with pytest.raises(ValueError, match="it is torch.complex128, which safetensors files do not hold"):
        write_safetensors({"it": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "no.safetensors", {})


def test_a_save_is_stopped_between_pieces_and_leaves_the_old_file(tmp_path, monkeypatch):
    names = [f"blocks.0.self_attn.{part}" for part in "qkvo"]
    old = LoRA({name: LoRALayer(torch.randn(4, 8), torch.randn(8, 4), 4.0) for name in names})
    changed = old.scaled(2.0)
    save_lora(old, tmp_path / "it.safetensors")
    before, asked = (tmp_path / "it.safetensors").read_bytes(), []
    monkeypatch.setattr("lofa_core.lora_files._PIECE", 64)

    def check():
        asked.append(len(os.listdir(tmp_path)))
        if asked.count(2) == 10:  # while the new file is beside the old one
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_lora(changed, tmp_path / "it.safetensors", watch=Watch(check_cancelled=check))
    assert os.listdir(tmp_path) == ["it.safetensors"]
    assert (tmp_path / "it.safetensors").read_bytes() == before
