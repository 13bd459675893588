"""Identity tasks: a person's latents, captions and a reference that is none of them; figures of pictures."""

import numpy as np
import pytest
import torch

from training.faces import captions, figures, vae, world
from training.faces.data import cached_latents, identity_data
from training.faces.evaluator import Evaluator
from training.faces.portraits import draw_portraits

PEOPLE = world.all_identities()[100:30_000:14_000]


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return vae.build().eval()


def test_a_task_holds_one_person_s_latents_their_captions_and_a_reference(autoencoder):
    tasks = identity_data(autoencoder, PEOPLE, 3, seed=4)
    assert [task.identity for task in tasks] == PEOPLE
    drawn = draw_portraits(PEOPLE, 4, seed=4)
    for number, task in enumerate(tasks):
        assert task.latents.shape == (3, 4, 16, 16) and task.reference.shape == (64, 64, 3)
        assert (task.reference == drawn.pixels[4 * number].numpy()).all()
        for row, caption in enumerate(task.captions, start=4 * number + 1):
            shown = drawn.attributes_of(row)
            assert captions.says(caption, "hair", task.identity.hair)
            assert captions.says(caption, "place", shown.place) and captions.says(caption, "turn", shown.turn)


def test_latents_are_kept_in_a_file(autoencoder, tmp_path):
    portraits = draw_portraits(PEOPLE, 1, seed=0)
    first = cached_latents(autoencoder, portraits, tmp_path / "latents.pt")
    assert first.dtype == torch.float16 and first.shape == (3, 4, 16, 16)
    with torch.no_grad():
        autoencoder.quant_conv.bias.add_(1.0)
    assert torch.equal(cached_latents(autoencoder, portraits, tmp_path / "latents.pt"), first)


def test_figures_of_real_pictures_are_perfect_where_the_reader_is(monkeypatch):
    """People's own drawings, read by one who knows them, score 1 and are as diverse as real ones."""
    real = draw_portraits(PEOPLE, 4, seed=77)
    model = Evaluator().eval()
    known = model.read(real.pixels)
    known.factors, known.proportions = real.factors.numpy(), real.proportions.numpy()
    monkeypatch.setattr(model, "read", lambda pictures: known)
    made = figures.of_people(model, real.pixels.numpy(), PEOPLE, 4)
    assert made["factors_right_mean"] == made["all_factors_right"] == 1.0
    assert made["proportions_r2"] == pytest.approx(1.0) and made["identity_similarity"] > 0.9
    assert made["diversity"] == pytest.approx(made["diversity_real"]) and abs(made["frechet"]) < 1e-3


def test_the_linear_probe_finds_what_is_linear_and_nothing_in_noise():
    seen, unseen = (draw_portraits(world.all_identities()[start::187], 1, seed=0) for start in (0, 7))

    def states(portraits):
        shown = [torch.nn.functional.one_hot(c, 6) for c in portraits.factors.T]
        return torch.cat([*shown, portraits.proportions], 1).float() + 0.01

    right, error = figures._linear_probe(states(seen), seen, states(unseen), unseen)
    assert min(right) > 0.98 and error < 0.05
    noise = torch.randn(len(seen), 20, generator=torch.Generator().manual_seed(0))
    right, error = figures._linear_probe(noise, seen, noise.flip(0), unseen)
    assert np.mean(right) < 0.45 and error > 0.8
