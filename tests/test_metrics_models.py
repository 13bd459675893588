"""CLIP, DINO and CSD: the loading paths with tiny random models, checked against those called by hand."""

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_videos import square
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTModel,
)

from lofa_core.metrics.distances import cosine
from lofa_core.metrics.embedders import CLIP, open_dino
from lofa_core.metrics.style import open_csd
from lofa_core.metrics.weights import Weights, read_state

CPU = torch.device("cpu")
CLIP_NUMBERS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(frames, statistics):
    mean, deviation = (np.array(values) for values in statistics)
    return torch.from_numpy((frames / 255.0 - mean) / deviation).permute(0, 3, 1, 2).float()


def save_clip(folder, seed=0, size=32):
    torch.manual_seed(seed)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = {word: number for number, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=words, merges=[]).save_pretrained(folder)
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 12}
    text |= {"bos_token_id": words["<|startoftext|>"], "eos_token_id": words["<|endoftext|>"]}
    text |= {"pad_token_id": words["<|endoftext|>"]}
    vision = tower | {"image_size": size, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def save_dino(folder, seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=28,
        patch_size=14,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_clip_embeds_frames_and_sentences_into_one_space(tmp_path):
    model, frames = save_clip(tmp_path), square(40, side=32, size=12, step=1)  # more than one batch
    clip = CLIP.open(tmp_path, CPU)
    wanted = model.visual_projection(
        model.vision_model(pixel_values=normalised(frames, CLIP_NUMBERS)).pooler_output
    )
    assert clip.frames(frames) == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-4)
    sentences = ["a cat", "a dog runs"]
    for sentence, found in zip(sentences, clip.sentences(sentences), strict=True):  # padding changes nothing
        tokens = CLIPTokenizer.from_pretrained(tmp_path)(sentence, return_tensors="pt")
        wanted = model.text_projection(model.text_model(**tokens).pooler_output)[0]
        assert found == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-4)
    long = clip.sentences(["a b c d e f g h i j k l m n o p q"])  # cut, not an error
    assert long == pytest.approx(clip.sentences(["a b c d e f g h i j"]), abs=1e-5)


def test_pictures_of_any_shape_are_cut_to_their_middle(tmp_path):
    save_clip(tmp_path)
    clip, frame = CLIP.open(tmp_path, CPU), square(1, side=64)
    wide = np.concatenate([np.zeros_like(frame), frame, np.full_like(frame, 255)], 2)
    assert cosine(clip.frames(wide), clip.frames(frame))[0] > 0.999
    assert cosine(clip.frames(wide[:, :, :64]), clip.frames(frame))[0] < 0.99


@torch.no_grad()
def test_dino_is_the_class_token_of_the_middle_of_the_picture(tmp_path):
    model, frames = save_dino(tmp_path), square(2, side=32, size=12)
    wanted = model(pixel_values=normalised(frames[:, 2:30, 2:30], IMAGENET)).last_hidden_state[:, 0]
    assert open_dino(tmp_path, CPU).frames(frames) == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-4)


def csd_state(model):
    """A vision tower of transformers under OpenAI's names, as CSD's checkpoint has them."""
    own = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
    state = {
        "backbone.class_embedding": own["embeddings.class_embedding"],
        "backbone.conv1.weight": own["embeddings.patch_embedding.weight"],
        "backbone.positional_embedding": own["embeddings.position_embedding.weight"],
        "last_layer_style": own["visual_projection.weight"].T.contiguous(),
        "last_layer_content": torch.zeros(3, 3),
    }
    norms = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for layer in range(model.config.num_hidden_layers):
        theirs, ours = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        norms |= {f"{theirs}.ln_{n}": f"{ours}.layer_norm{n}" for n in (1, 2)}
        norms |= {f"{theirs}.attn.out_proj": f"{ours}.self_attn.out_proj"}
        norms |= {f"{theirs}.mlp.c_fc": f"{ours}.mlp.fc1", f"{theirs}.mlp.c_proj": f"{ours}.mlp.fc2"}
        for part in ("weight", "bias"):
            three = [own[f"{ours}.self_attn.{which}_proj.{part}"] for which in "qkv"]
            state[f"backbone.{theirs}.attn.in_proj_{part}"] = torch.cat(three)
    for theirs, ours in norms.items():
        state |= {f"backbone.{theirs}.{part}": own[f"{ours}.{part}"] for part in ("weight", "bias")}
    return state


def save_csd(path, seed=0):
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=512, image_size=32,
        patch_size=16, projection_dim=20, hidden_act="quick_gelu",
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {f"module.{name}": value.clone() for name, value in csd_state(model).items()}
    torch.save({"model_state_dict": state, "iter": 7, "args": argparse.Namespace(lr=0.1)}, path)
    return model


@torch.no_grad()
def test_csd_is_the_style_projection_of_clips_tower(tmp_path):
    model, frames = save_csd(tmp_path / "checkpoint.pth"), square(2, side=32, size=12)
    wanted = model(pixel_values=normalised(frames, CLIP_NUMBERS)).image_embeds.numpy()
    assert open_csd(tmp_path / "checkpoint.pth", CPU).frames(frames) == pytest.approx(
        wanted, rel=1e-4, abs=1e-4
    )
    save_file(read_state(tmp_path / "checkpoint.pth"), tmp_path / "csd.safetensors")
    assert open_csd(tmp_path / "csd.safetensors", CPU).frames(frames) == pytest.approx(
        wanted, rel=1e-4, abs=1e-4
    )


def test_weights_that_are_something_else_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer"):
        CLIP.open(tmp_path, CPU)
    with pytest.raises(ValueError, match="no config.json"):
        open_dino(tmp_path, CPU)
    save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="ViTModel"):
        open_dino(tmp_path / "clip", CPU)
    state = {"conv1.weight": torch.zeros(64, 3, 16, 16), "last_layer_style": torch.zeros(64, 8)}
    state |= {"positional_embedding": torch.zeros(5, 64)}
    torch.save(state, tmp_path / "some.pth")
    with pytest.raises(ValueError, match=r"some.pth: is not CSD's checkpoint: it has no class_embedding"):
        open_csd(tmp_path / "some.pth", CPU)
    torch.save({"class_embedding": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="has no conv1.weight"):
        open_csd(tmp_path / "other.pth", CPU)
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match=name):
            read_state(tmp_path / name)
    torch.save({"model": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="holds more than tensors; it was not run"):
        read_state(tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no tensors by name"):
        read_state(tmp_path / "list.pth")


def test_weights_are_opened_once_and_missing_ones_are_named(tmp_path):
    weights = Weights({"clip": tmp_path, "dino": tmp_path / "gone"})
    opened = []
    for _ in range(2):
        weights.opened(("clip",), lambda path, device: opened.append((path, device)) or "model")
    assert opened == [(tmp_path, CPU)]
    assert weights.missing(("clip",)) is None
    assert "no such file or folder" in weights.missing(("clip", "dino"))
    assert "--weights raft=PATH" in weights.missing(("raft",))
