"""The evaluator: what it reads and how it is trained."""

import numpy as np
import torch

from training.miniature import evaluator as evaluator_module
from training.miniature import world


def test_the_evaluator_reads_each_clip_by_itself_and_comes_back_from_its_file(tmp_path):
    torch.manual_seed(0)
    model = evaluator_module.Evaluator().eval()
    clips = np.random.default_rng(0).integers(0, 256, (66, 17, 64, 64, 3), np.uint8)  # more than one part
    indices, features = model.read(clips)
    assert indices.shape == (66, 6) and features.shape == (66, evaluator_module.FEATURES)
    assert [len(head.bias) for head in model.heads] == [len(values) for values in world.FACTORS.values()]
    for row in (0, 65):
        alone, its_features = model.read(clips[row : row + 1])
        assert np.allclose(features[row], its_features[0], atol=1e-5) and (alone[0] == indices[row]).all()
        logits = [head(torch.from_numpy(features[row]).float()) for head in model.heads]
        assert [int(part.argmax()) for part in logits] == list(indices[row])
    evaluator_module.save(model, tmp_path / "evaluator.safetensors")
    again = evaluator_module.load(tmp_path / "evaluator.safetensors")
    assert not again.training and np.allclose(again.read(clips[:4])[1], features[:4], atol=0.02)


def test_the_evaluators_training_repeats_by_seed():
    clips = np.random.default_rng(0).integers(0, 256, (4, 17, 64, 64, 3), np.uint8)
    labels = np.zeros((4, 6), int)
    first, again, other = (
        evaluator_module.train(evaluator_module.halved(clips), labels, 3, batch=2, seed=seed).features.weight
        for seed in (0, 0, 1)
    )
    assert torch.allclose(first, again, atol=1e-6) and not torch.allclose(first, other, atol=1e-3)


def test_halving_is_the_mean_of_four_pixels():
    clips = np.random.default_rng(1).integers(0, 256, (2, 17, 64, 64, 3), np.uint8)
    small = evaluator_module.halved(clips)
    assert small.shape == (2, 17, 32, 32, 3) and small.dtype == np.uint8
    corner = clips[1, 5, 10:12, 20:22].astype(float).mean((0, 1))
    assert np.allclose(small[1, 5, 5, 10], corner, atol=0.5)


def test_a_mirrored_clip_has_left_and_right_exchanged_and_nothing_else():
    exchanged = {"left": "right", "left_arm": "right_arm", "left_leg": "right_leg"}
    exchanged |= {right: left for left, right in exchanged.items()}
    for row, values in enumerate(world.FACTORS.values()):
        for index, value in enumerate(values):
            assert values[evaluator_module._MIRRORED[row, index]] == exchanged.get(value, value)


def test_the_shipped_evaluator_reads_drawn_held_out_clips():
    _, held_out = world.split_actions(32, 0)
    rng = np.random.default_rng(17)
    clips = np.stack([world.draw_clip(action, world.random_look(rng), rng) for action in held_out])
    read, _ = evaluator_module.load().read(clips)
    assert (read == [action.indices() for action in held_out]).all(1).mean() > 0.9
