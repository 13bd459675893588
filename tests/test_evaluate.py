"""The judge: its measures by hand, the same noise for all methods, every factor set at its own task."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_tasks import ACTIONS, HELD_OUT, Tasks, loras, sized_network

from training import evaluate as module
from training import flow
from training.config import EvaluationConfig
from training.evaluate import (
    BASELINES,
    Judge,
    Method,
    evaluate,
    predicted_factors,
    response_figures,
    summarise,
)
from training.injection import target_modules
from training.lora_dataset import LoRADataset
from training.miniature import evaluator as evaluator_module
from training.miniature import world

SETTINGS = EvaluationConfig(clips_per_task=2, sampling_steps=2, seed=7)


class Decoder:
    """In place of the VAE: the first three latent channels as pixels."""

    def __init__(self, vae):
        self.model = vae

    def decode(self, latents):
        return torch.tanh(latents[:, :3])


class Reader:
    """In place of the evaluator: reads two factors from the mean colour, and gives the frames' means."""

    def read(self, clips):
        features = clips.reshape(len(clips), 2, -1, 3).mean(2).reshape(len(clips), 6)
        return np.stack([features[:, 0] > 127, features[:, 1] > 127], 1).astype(int), features / 50.0


@pytest.fixture
def data():
    return Tasks(ACTIONS, HELD_OUT)


@pytest.fixture
def judge(monkeypatch, data):
    config = SimpleNamespace(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    monkeypatch.setattr(module, "load_vae", lambda base: SimpleNamespace(config=config))
    monkeypatch.setattr(module, "WholeClipVAE", Decoder)
    return Judge(data, SETTINGS, Reader())


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def test_the_frechet_distance_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), 0.5 + 2.0 * rng.normal(size=(90, 6))
    A, B = np.cov(a.T), np.cov(b.T)
    inner = root(root(A) @ B @ root(A))  # the symmetric form, by eigenvectors of symmetric matrices alone
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2.0 * inner)
    found = evaluator_module.frechet_distance(a, b)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert evaluator_module.frechet_distance(b, a) == pytest.approx(found, rel=1e-6)
    assert evaluator_module.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert evaluator_module.frechet_distance(a, a + 3.0) == pytest.approx(6 * 9.0)


def test_the_frechet_distance_takes_fewer_clips_than_features():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 12)), rng.normal(size=(7, 12))
    A, B = np.cov(a.T), np.cov(b.T)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2.0 * root(root(A) @ B @ root(A)))
    assert evaluator_module.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-4)


def test_scores_by_hand(judge, monkeypatch):
    labels = judge.labels
    read, features = labels.copy(), np.random.default_rng(0).normal(size=(14, 3))
    read[0, 0] += 1
    read[5] += 1
    judge.reference = np.random.default_rng(1).normal(size=(30, 3))
    monkeypatch.setattr(judge, "read", lambda latents: (read, features))
    found = judge.score(torch.zeros(14, 1))
    assert found["joint"] == pytest.approx(12 / 14) and found["mean_accuracy"] == pytest.approx(25 / 28)
    spread = [abs(features[2 * t, f] - features[2 * t + 1, f]) / 2 for t in range(7) for f in range(3)]
    assert found["diversity"] == pytest.approx(sum(spread) / 21)
    assert found["frechet"] == evaluator_module.frechet_distance(features, judge.reference)


@torch.no_grad()
def merged(data, A, B):
    model = copy.deepcopy(data.model)
    names = [layer.name for layer in data.weights.model.layers]
    for number, module_ in enumerate(target_modules(model, names).values()):
        module_.weight += B[number] @ A[number]
    return model


@torch.no_grad()
def flow_matching_by_hand(judge, data, factors, sentences):
    torch.manual_seed(SETTINGS.seed)
    clean, errors = judge.real.latents.float(), []
    for time in (0.2, 0.4, 0.6, 0.8, 0.95):
        noise = torch.randn_like(clean)
        for task in range(7):
            model = merged(data, *(part[task] for part in factors)) if factors else data.model
            text = data.prompts([sentences[task]])
            for clip in (2 * task, 2 * task + 1):
                x = (1 - time) * clean[clip] + time * noise[clip]
                said = model(x[None], torch.tensor([1000.0 * time]), text, return_dict=False)[0][0]
                errors.append((said - (noise[clip] - clean[clip])).square().mean().item())
    return np.mean(errors)


@pytest.mark.parametrize("prompt", ["coarse", "fine", "plain fine"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_flow_matching_loss_is_measured_at_each_task_with_its_own_lora_and_prompt(
    judge, data, prompt, with_lora
):
    factors = loras(7) if with_lora else None
    sentences = {
        "coarse": [data.coarse_prompt] * 7,
        "fine": [f"please {action} now" for action in HELD_OUT],
        "plain fine": [f"a person can {action}" for action in HELD_OUT],
    }[prompt]
    found = judge.measure(Method("a", factors, prompt, 2.5))["flow_matching"]  # never under guidance
    assert found == pytest.approx(flow_matching_by_hand(judge, data, factors, sentences), rel=1e-4)


def test_clips_are_drawn_with_each_tasks_own_lora_from_noise_that_all_methods_share(judge, data, monkeypatch):
    (A, B), drawn = loras(7), {}
    for name, factors in {"base": None, "own": (A, B), "zero": (A, 0 * B), "again": (A, B)}.items():
        monkeypatch.setattr(judge, "score", lambda latents, name=name: drawn.update({name: latents}) or {})
        judge.measure(Method(name, factors))
    assert torch.allclose(drawn["zero"], drawn["base"], atol=1e-5)
    assert torch.allclose(drawn["again"], drawn["own"], atol=1e-5)
    assert not torch.allclose(drawn["own"], drawn["base"], atol=1e-2)
    torch.manual_seed(SETTINGS.seed)
    for _ in range(5):  # what the five times of the loss draw
        torch.randn(drawn["own"].shape)
    noise = torch.randn(drawn["own"].shape)
    for task in (0, 5):
        model, part = merged(data, A[task], B[task]), slice(2 * task, 2 * task + 2)
        text = data.coarse().expand(2, -1, -1)
        wanted = flow.sample(
            lambda x, t, model=model, text=text: model(x, t * 1000.0, text, return_dict=False)[0],
            noise[part],
            2,
            3.0,
        )
        assert torch.allclose(drawn["own"][part], wanted, atol=1e-4)


@torch.no_grad()
def test_guidance_moves_away_from_the_empty_prompt_with_the_lora_in_both(judge, data):
    A, B = loras(7)
    x, times = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.5, 0.7])
    found = judge._velocity(Method("a", (A, B), "fine", 2.5), slice(3, 4))(x, times)
    model = merged(data, A[3], B[3])
    fine, empty = (
        model(x, times * 1000.0, data.prompts([text]).expand(2, -1, -1), return_dict=False)[0]
        for text in (judge.sentences[3], "")
    )
    assert torch.allclose(found, empty + 2.5 * (fine - empty), atol=1e-4) and not torch.allclose(
        found, fine, atol=1e-2
    )


def test_predicted_factors_are_those_of_each_sentence_alone(data):
    net, sentences = sized_network(), ["please hop now", "a much longer sentence to lean on", "sit"]
    A, B = predicted_factors(net, data, sentences)
    for row, sentence in enumerate(sentences):
        with torch.no_grad():
            a, b, _ = net(data.stacked_weights(), torch.arange(8), data.conditions([sentence]))
        assert torch.allclose(A[row], a[0], atol=1e-5) and torch.allclose(B[row], b[0], atol=1e-5)


def test_response_figures_by_hand(data):
    net, sentences = sized_network(), [f"please {action} now" for action in HELD_OUT]
    known = LoRADataset(*loras(4, 1, 0.02), ACTIONS)
    wanted = LoRADataset(*loras(7, 2, 0.02), HELD_OUT)
    found = response_figures(net, data, sentences, known, wanted)
    W = data.stacked_weights().double().numpy()

    def maps(dataset):
        deltas = np.einsum("klor,klri->kloi", dataset.B.double().numpy(), dataset.A.double().numpy())
        return (np.abs(deltas / W) > 0.02).astype(float).reshape(len(deltas), -1)

    def cosine(a, b):
        return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())

    mean, real = maps(known).mean(0), maps(wanted)
    small = (np.abs(W) < np.median(np.abs(W))).astype(float).reshape(-1)
    guesses = []
    for sentence in sentences:
        with torch.no_grad():
            response = net(data.stacked_weights(), torch.arange(8), data.conditions([sentence]))[2]
        guesses.append(response.probability(data.stacked_weights())[0].double().numpy().reshape(-1))
    pairs = list(zip(guesses, real, strict=True))
    assert found == pytest.approx(
        {
            "stage1_cosine": np.mean([cosine(g, r) for g, r in pairs]),
            "mean_map_cosine": np.mean([cosine(mean, r) for r in real]),
            "small_weight_cosine": np.mean([cosine(small, r) for r in real]),
            "stage1_centred_cosine": np.mean([cosine(g - mean, r - mean) for g, r in pairs]),
            "responding_share": real.mean(),
        },
        abs=1e-3,
    )
    assert 0.1 < found["responding_share"] < 0.9


def table(**changes):
    rows = {name: {"frechet": 10.0, "flow_matching": 1.0, "joint": 0.1} for name in BASELINES}
    rows["LoFA"] = {"frechet": 4.0, "flow_matching": 0.8, "joint": 0.4}
    rows["per-task LoRA"] = {"frechet": 2.0, "flow_matching": 0.7, "joint": 0.6}
    return {name: row | changes.get(name, {}) for name, row in rows.items()}


def test_the_summary_by_hand():
    found = summarise(table())
    assert found == {
        "frechet_gap_closed": pytest.approx(0.75),
        "joint_gap_closed": pytest.approx(0.6),
        "beaten": list(BASELINES),
    }
    assert len(BASELINES) == 4


def test_where_a_lora_gains_nothing_there_is_no_share_of_it():
    nothing = {"base": {"joint": 0.0}, "per-task LoRA": {"joint": 0.0}}
    found = summarise(table(**nothing))
    assert found["joint_gap_closed"] is None and found["frechet_gap_closed"] == pytest.approx(0.75)


@pytest.mark.parametrize("measure", ["frechet", "flow_matching", "joint"])
def test_a_baseline_is_beaten_only_where_it_is_on_all_three_measures(measure):
    level = table()["LoFA"][measure]
    assert "mean LoRA" not in summarise(table(**{"mean LoRA": {measure: level}}))["beaten"]


def test_the_whole_table_has_every_row_and_the_figures_of_its_summary(judge, data):
    known, wanted = LoRADataset(*loras(4, 1), ACTIONS), LoRADataset(*loras(7, 2, 0.5), HELD_OUT)
    said = []
    found = evaluate(
        sized_network(), data, SETTINGS, known, wanted, Reader(), lambda name, _: said.append(name), more=True
    )
    assert said == list(found["rows"]) and {*BASELINES, "LoFA", "per-task LoRA", "real clips"} <= set(said)
    assert {"base, fine prompt", "LoFA, fine prompt"} <= set(said)
    assert {"base, fine prompt in training's words", "base, fine prompt, guidance 2.5", "LoFA x 1.3"} <= set(
        said
    )
    assert {"frechet_gap_closed", "joint_gap_closed", "stage1_centred_cosine", "beaten"} <= set(found)
    assert found["beaten"] == summarise(found["rows"])["beaten"]
    own = judge.measure(Method("own", (wanted.A, wanted.B)))
    assert found["rows"]["per-task LoRA"] == pytest.approx(own, rel=1e-3, abs=1e-6)
    predicted = predicted_factors(sized_network(), data, judge.sentences)
    assert found["rows"]["LoFA"] == pytest.approx(
        judge.measure(Method("ours", predicted)), rel=1e-3, abs=1e-6
    )


def test_processes_share_the_rows_and_each_gets_the_whole_table(judge, data, monkeypatch):
    known, wanted = LoRADataset(*loras(4, 1), ACTIONS), LoRADataset(*loras(7, 2, 0.5), HELD_OUT)
    whole = evaluate(sized_network(), data, SETTINGS, known, wanted, Reader())["rows"]
    said = []

    def gathered(mine):
        said.extend(mine[0])
        return [{name: row for name, row in whole.items() if name not in mine[0]}, *mine]

    monkeypatch.setattr("training.evaluate.gather_object", gathered)
    found = evaluate(sized_network(), data, SETTINGS, known, wanted, Reader(), process=1, processes=2)["rows"]
    assert said == [name for name in whole if name != "real clips"][1::2]
    assert list(found) == list(whole)
    for name, row in whole.items():
        assert found[name] == pytest.approx(row, rel=1e-5), name


def test_loras_of_other_actions_are_refused(judge, data):
    known = LoRADataset(*loras(4, 1), ACTIONS)
    for actions in (HELD_OUT[:6], HELD_OUT[::-1]):
        wanted = LoRADataset(*loras(len(actions), 2), actions)
        with pytest.raises(ValueError, match="held-out"):
            evaluate(sized_network(), data, SETTINGS, known, wanted, Reader())


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
