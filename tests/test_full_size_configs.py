"""The full-size configurations of pose, style and identity: held against the paper and the code."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lofa_core.base_models import SDXL_SHAPES, describe
from lofa_core.descriptions import BaseDescription, ConditionDescription, HypernetworkConfig
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.response_map import THRESHOLD
from training import full_size
from training.config import load_config

CONFIGS = Path(__file__).parents[1] / "training" / "configs"
KINDS = {"wan_pose": ("pose",), "wan_style": ("style",), "sdxl_identity": ("identity",)}
CLIP_WIDTH = 1024  # of CLIP-ViT-L's vision tower


@pytest.mark.parametrize("name", KINDS)
def test_the_paper_trains_all_its_tasks_alike(name):
    config = load_config(CONFIGS / f"{name}.toml")
    assert config.data.conditions == KINDS[name] and config.data.folder and THRESHOLD == 0.02
    stages = config.stage1, config.stage2
    assert [(s.steps, s.learning_rate, s.tasks, s.warm_up, s.optimiser) for s in stages] == [
        (4000, 1e-4, 4, 1000, "adamw"), (7000, 4e-5, 4, 1000, "adamw"),
    ]  # fmt: skip
    losses = config.stage2.reconstruction, config.stage2.reconstruction_weight, config.stage2.diffusion_weight
    assert losses == ("factors", 5.0, 1.0) and config.stage2.distillation_weight == 0.0
    lora = config.lora
    assert (lora.steps, lora.batch, lora.learning_rate) == (1000, 4, 1e-4)
    tasks = {"wan_pose": 2630, "wan_style": 1400, "sdxl_identity": 3000}
    assert config.data.lora_tasks == tasks[name] and config.stage2.with_lora == 1.0
    assert config.network.blocks == 8 and config.network.feature_blocks == (3, 7)


@pytest.mark.parametrize("name", KINDS)
def test_the_network_has_the_published_sizes_without_padding(name):
    config = load_config(CONFIGS / f"{name}.toml")
    network = HypernetworkConfig(rank=config.lora.rank, **dataclasses.asdict(config.network))
    rank = 16 if name == "sdxl_identity" else 32
    assert network == dataclasses.replace(full_size.RELEASED, rank=rank, mask_padding=True)


def test_clips_are_those_of_the_base():
    for name in ("wan_pose", "wan_style"):
        data = load_config(CONFIGS / f"{name}.toml").data
        assert (data.frames, data.height, data.width, data.fps) == (81, 480, 832, 16.0)
    data = load_config(CONFIGS / "sdxl_identity.toml").data
    assert (data.frames, data.height, data.width) == (1, 1024, 1024)


def test_every_network_can_be_built_for_its_base():
    for name, kinds in KINDS.items():
        config = load_config(CONFIGS / f"{name}.toml")
        if name == "sdxl_identity":
            with torch.device("meta"):
                unet = UNet2DConditionModel(**full_size.SDXL)
            layers = describe({key: tuple(value.shape) for key, value in unet.state_dict().items()}).layers
        else:
            layers = describe(full_size.base_shapes()).layers
        base = BaseDescription(name, layers)
        size = config.data.pose_frames, config.data.pose_size, config.data.pose_size
        known = (
            ConditionDescription("pose", 3, size=size)
            if kinds == ("pose",)
            else ConditionDescription(kinds[0], CLIP_WIDTH)
        )
        network = Hypernetwork.unfilled(
            HypernetworkConfig(rank=config.lora.rank, **dataclasses.asdict(config.network)), base, (known,)
        )
        assert len(network.base.by_shape()) == (len(SDXL_SHAPES) if name == "sdxl_identity" else 1)
        assert config.stage1.layers <= len(layers)


@pytest.mark.parametrize("name", KINDS)
def test_every_key_is_explained_once(name):
    lines = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    assert all(len(line) <= 110 for line in lines)
    explained = {found[1] for line in lines if (found := re.match(r"(\w+) = .*#", line))}
    sections = {line.split("]")[0].strip("[") for line in lines if line.startswith("[")}
    assert sections == {"data", "lora", "network", "stage1", "stage2"}
    kind_keys = {"wan_pose": {"pose_frames", "pose_size", "pose_models"}}
    assert kind_keys.get(name, {"image_encoder"}) <= explained
    assert len(explained) > 25
