"""The judge: its measures by hand, the same noise for all methods, every factor set at its own task."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_tasks import ACTIONS, HELD_OUT, Tasks, loras, sized_network

from lofa_core.metrics.distances import frechet_distance
from training import flow
from training import judge as module
from training.baselines.simple import ridge
from training.config import EvaluationConfig
from training.denoisers import WanDenoiser
from training.evaluate import BASELINES, Sharing, added, evaluate, summarise
from training.judge import Judge, Method, agreement, predicted_factors, response_figures
from training.lora_dataset import LoRADataset

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
    return Judge(data, HELD_OUT, SETTINGS, Reader())


def test_scores_by_hand(judge, monkeypatch):
    labels = judge.labels
    read, features = labels.copy(), np.random.default_rng(0).normal(size=(14, 3))
    read[0, 0] += 1
    read[5] += 1
    judge.reference = np.random.default_rng(1).normal(size=(30, 3))
    clips = np.zeros((14, 3, 2, 2, 3), np.uint8)
    clips[0, 1] = 255  # one of 14 clips flashes: two of its two changes are whole
    monkeypatch.setattr(module, "decode_clips", lambda decoder, latents: clips)
    judge.readers = [lambda shown: (read, features) if shown is clips else None]
    found = judge.score(torch.zeros(14, 1))
    assert found["motion"] == pytest.approx(1 / 14)
    assert found["joint"] == pytest.approx(12 / 14) and found["mean_accuracy"] == pytest.approx(25 / 28)
    assert found["right: half"] == pytest.approx(12 / 14)
    assert found["right: parity"] == pytest.approx(13 / 14)
    spread = [abs(features[2 * t, f] - features[2 * t + 1, f]) / 2 for t in range(7) for f in range(3)]
    assert found["diversity"] == pytest.approx(sum(spread) / 21)
    assert found["frechet"] == frechet_distance(features, judge.reference)


@torch.no_grad()
def merged(data, A, B):
    model = copy.deepcopy(data.model)
    names = [layer.name for layer in data.weights.model.layers]
    for number, module_ in enumerate(WanDenoiser(model).modules(names).values()):
        module_.weight += B[number] @ A[number]
    return model


@torch.no_grad()
def flow_matching_by_hand(judge, data, factors, sentences):
    torch.manual_seed(SETTINGS.seed)
    clean, errors = judge.real.latents.float(), []
    for time in (0.2, 0.4, 0.6, 0.8, 0.95):
        noise = torch.randn_like(clean)
        for task in range(7):
            model = merged(data, factors.A[0][task], factors.B[0][task]) if factors else data.model
            text = data.prompts([sentences[task]]).states
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
    own, drawn = loras(7), {}
    for name, factors in {"base": None, "own": own, "zero": own.scaled(0.0), "again": own}.items():
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
        model, part = merged(data, own.A[0][task], own.B[0][task]), slice(2 * task, 2 * task + 2)
        text = data.coarse().states.expand(2, -1, -1)
        wanted = flow.sample(
            lambda x, t, model=model, text=text: model(x, t * 1000.0, text, return_dict=False)[0],
            noise[part],
            2,
            3.0,
        )
        assert torch.allclose(drawn["own"][part], wanted, atol=1e-4)


@torch.no_grad()
def test_guidance_moves_away_from_the_empty_prompt_with_the_lora_in_both(judge, data):
    own, noise = loras(7)[3:4], torch.randn(2, 16, 2, 4, 4)
    model = merged(data, own.A[0][0], own.B[0][0])
    fine, empty = (data.prompts([text]).expanded(2) for text in (judge.sentences[3], ""))

    def by_hand(guidance):
        def velocity(x, times):
            said, unsaid = (
                model(x, times * 1000.0, text.states, return_dict=False)[0] for text in (fine, empty)
            )
            return unsaid + guidance * (said - unsaid)

        return flow.sample(velocity, noise, 2, 3.0)

    for guidance in (1.0, 2.5):
        found = judge._sampled(Method("a", own, "fine", guidance), noise, fine, own)
        assert torch.allclose(found, by_hand(guidance), atol=1e-4)
    assert not torch.allclose(by_hand(2.5), by_hand(1.0), atol=1e-2)


def test_predicted_factors_are_those_of_each_sentence_alone(data):
    net, sentences = sized_network(), ["please hop now", "a much longer sentence to lean on", "sit"]
    (W,), told = data.weights_by_shape(), [{"text": sentence} for sentence in sentences]
    found = predicted_factors(net, data, told)
    for row, one in enumerate(told):
        with torch.no_grad():
            a, b, _ = net(W, torch.arange(8), data.conditions([one]))
        assert torch.allclose(found.A[0][row], a[0], atol=1e-5)
        assert torch.allclose(found.B[0][row], b[0], atol=1e-5)


def test_response_figures_by_hand(data):
    net, told = sized_network(), [{"text": f"please {action} now"} for action in HELD_OUT]
    known = LoRADataset(loras(4, 1, 0.02), ACTIONS)
    wanted = LoRADataset(loras(7, 2, 0.02), HELD_OUT)
    again = [loras(7, 3, 0.02), loras(7, 4, 0.02)]
    found = response_figures(net, data, told, known, wanted, again=again)
    (weights,) = data.weights_by_shape()
    W = weights.double().numpy()

    def maps(factors):
        A, B = (part[0].double().numpy() for part in (factors.A, factors.B))
        deltas = np.einsum("klor,klri->kloi", B, A)
        return (np.abs(deltas / W) > 0.02).astype(float).reshape(len(deltas), -1)

    def cosine(a, b):
        return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())

    def between(a, b):
        a, b = a - np.mean(a, axis=0), b - np.mean(b, axis=0)
        return np.mean([cosine(x, y) for x, y in zip(a, b, strict=True)])

    mean, real = maps(known.loras).mean(0), maps(wanted.loras)
    small = (np.abs(W) < np.median(np.abs(W))).astype(float).reshape(-1)
    guesses, predicted = [], []
    for one in told:
        with torch.no_grad():
            A, B, response = net(weights, torch.arange(8), data.conditions([one]))
            predicted.append(np.einsum("lor,lri->loi", B[0].double().numpy(), A[0].double().numpy()))
        guesses.append(response.probability(weights)[0].double().numpy().reshape(-1))
    own = [(np.abs(delta / W) > 0.02).astype(float).reshape(-1) for delta in predicted]
    factors = [torch.tensor([task.indices() for task in tasks]) for tasks in (ACTIONS, HELD_OUT)]
    fitted = ridge(torch.from_numpy(maps(known.loras)).float(), *factors).double().numpy()
    pairs = list(zip(guesses, real, strict=True))
    assert found == pytest.approx(
        {
            "stage1_cosine": np.mean([cosine(g, r) for g, r in pairs]),
            "mean_map_cosine": np.mean([cosine(mean, r) for r in real]),
            "small_weight_cosine": np.mean([cosine(small, r) for r in real]),
            "stage1_centred_cosine": np.mean([cosine(g - mean, r - mean) for g, r in pairs]),
            "stage2_cosine": np.mean([cosine(s, r) for s, r in zip(own, real, strict=True)]),
            "stage2_centred_cosine": np.mean(
                [cosine(s - mean, r - mean) for s, r in zip(own, real, strict=True)]
            ),
            "stage2_to_stage1_cosine": np.mean([cosine(s, g) for s, g in zip(own, guesses, strict=True)]),
            "stage2_to_stage1_centred_cosine": np.mean(
                [cosine(s - mean, g - mean) for s, g in zip(own, guesses, strict=True)]
            ),
            "responding_share": real.mean(),
            "ridge_map_centred_cosine": np.mean(
                [cosine(f - mean, r - mean) for f, r in zip(fitted, real, strict=True)]
            ),
            "stage1_task_cosine": between(guesses, real),
            "stage2_task_cosine": between(own, real),
            "stage2_to_stage1_task_cosine": between(own, guesses),
            "ridge_map_task_cosine": between(fitted, real),
            "trainings": 3,
            "stage1_often_task_cosine": between(guesses, real + maps(again[0]) + maps(again[1])),
        },
        abs=1e-3,
    )
    assert 0.1 < found["responding_share"] < 0.9
    once = response_figures(net, data, told, known, wanted)
    assert once == {name: value for name, value in found.items() if name in once}
    assert found.keys() - once.keys() == {"trainings", "stage1_often_task_cosine"}


def test_how_far_loras_agree_by_hand(data):
    known, wanted = LoRADataset(loras(4, 1, 0.02), ACTIONS), LoRADataset(loras(7, 2, 0.02), HELD_OUT)
    same = agreement(data, wanted.loras, known, wanted)
    assert list(same.values()) == pytest.approx([1.0] * 6)
    other = loras(7, 3, 0.02)
    found = agreement(data, other, known, wanted)
    W = data.weights_by_shape()[0].double()
    deltas = [one.deltas()[0].double() for one in (other, wanted.loras, known.loras)]
    maps = [((delta / W).abs() > 0.02).double() for delta in deltas]
    for (first, second, training), name in ((maps, ""), (deltas, "delta_")):
        plain, centred = [], []
        for a, b in zip(first.flatten(1), second.flatten(1), strict=True):
            mean = training.mean(0).flatten()
            plain.append(torch.cosine_similarity(a, b, 0).item())
            centred.append(torch.cosine_similarity(a - mean, b - mean, 0).item())
        assert found[f"repeat_{name}cosine"] == pytest.approx(np.mean(plain), abs=1e-4)
        assert found[f"repeat_centred_{name}cosine"] == pytest.approx(np.mean(centred), abs=1e-4)
        own = [part.flatten(1) - part.flatten(1).mean(0) for part in (first, second)]
        between = torch.cosine_similarity(*own, 1).mean().item()
        assert found[f"repeat_task_{name}cosine"] == pytest.approx(between, abs=1e-4)


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
    known, wanted = LoRADataset(loras(4, 1), ACTIONS), LoRADataset(loras(7, 2, 0.5), HELD_OUT)
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
    assert found["condition"] == "text"
    own = judge.measure(Method("own", wanted.loras))
    assert found["rows"]["per-task LoRA"] == pytest.approx(own, rel=1e-3, abs=1e-6)
    told = [{"text": sentence} for sentence in judge.sentences]
    predicted = predicted_factors(sized_network(), data, told)
    assert found["rows"]["LoFA"] == pytest.approx(
        judge.measure(Method("ours", predicted)), rel=1e-3, abs=1e-6
    )


def test_processes_share_the_rows_and_each_gets_the_whole_table(judge, data, monkeypatch):
    known, wanted = LoRADataset(loras(4, 1), ACTIONS), LoRADataset(loras(7, 2, 0.5), HELD_OUT)
    whole = evaluate(sized_network(), data, SETTINGS, known, wanted, Reader())["rows"]
    said = []

    def gathered(mine):
        said.extend(mine[0])
        return [{name: row for name, row in whole.items() if name not in mine[0]}, *mine]

    monkeypatch.setattr("training.evaluate.gather_object", gathered)
    shared = evaluate(sized_network(), data, SETTINGS, known, wanted, Reader(), sharing=Sharing(1, 2))
    found = shared["rows"]
    assert said == [name for name in whole if name != "real clips"][1::2]
    assert list(found) == list(whole)
    for name, row in whole.items():
        assert found[name] == pytest.approx(row, rel=1e-5), name


def test_loras_of_other_actions_are_refused(judge, data):
    known = LoRADataset(loras(4, 1), ACTIONS)
    for actions in (HELD_OUT[:6], HELD_OUT[::-1]):
        wanted = LoRADataset(loras(len(actions), 2), actions)
        with pytest.raises(ValueError, match="held-out"):
            evaluate(sized_network(), data, SETTINGS, known, wanted, Reader())


def test_loras_added_up_change_the_weights_by_the_sum_of_both_changes():
    first, second = loras(3, 1), loras(3, 2)
    both = added(first, second)
    assert both.A[0].shape[2] == 4
    (found,), (one,), (other,) = (some.deltas() for some in (both, first, second))
    assert torch.allclose(found, one + other, atol=1e-6) and not torch.allclose(found, one, atol=1e-2)
