"""The world of faces: what is drawn follows the factors, words say it, and the split keeps people apart."""

import dataclasses

import numpy as np
import pytest

from training.faces import captions, world
from training.faces.portraits import draw_portraits, to_pictures, to_pixels
from training.faces.world import ATTRIBUTES, FACTORS, Attributes, Identity

PERSON = Identity("round", "tan", "short", "blond", "blue", "small", "none", "none")
SHOWN = Attributes("calm", "ahead", "red", "studio", "bright")
NAMES = {**FACTORS, **ATTRIBUTES}


def draw(person=PERSON, shown=SHOWN, seed=0):
    return world.draw(person, shown, np.random.default_rng(seed)).astype(int)


def with_value(name, value):
    if name in FACTORS:
        return draw(dataclasses.replace(PERSON, **{name: value}))
    return draw(shown=dataclasses.replace(SHOWN, **{name: value}))


def changed(a, b, by=40):
    """Pixels [64, 64] that differ plainly in some channel."""
    return np.abs(a - b).max(-1) > by


def near(picture, colour, tolerance=30):
    return (np.abs(picture - colour).max(-1) <= tolerance).sum()


def test_a_portrait_is_64_by_64_rgb_bytes_and_follows_its_seed():
    portrait = world.draw(PERSON, SHOWN, np.random.default_rng(0))
    assert portrait.shape == (64, 64, 3) and portrait.dtype == np.uint8 and portrait.std() > 20
    assert (draw() == draw()).all() and (draw() != draw(seed=1)).any()


@pytest.mark.parametrize("name", NAMES)
def test_every_two_values_of_a_trait_look_different(name):
    portraits = {value: with_value(name, value) for value in NAMES[name]}
    for a in portraits:
        for b in portraits:
            if a < b:
                assert changed(portraits[a], portraits[b], 25).sum() >= 15, (a, b)


@pytest.mark.parametrize("marks", ["moustache", "beard", "freckles"])
def test_marks_show_on_every_skin_under_every_hair(marks):
    for skin in FACTORS["skin"]:
        for colour in FACTORS["hair_colour"]:
            person = dataclasses.replace(PERSON, skin=skin, hair_colour=colour)
            marked = draw(dataclasses.replace(person, marks=marks))
            # Darker or lighter: by less on dark skin, as nothing there is much darker.
            assert changed(marked, draw(person), 18).sum() >= 12, (skin, colour)


@pytest.mark.parametrize("which", range(len(world.PROPORTIONS)))
def test_proportions_move_what_they_name(which):
    ends = [[0.0] * 3, [0.0] * 3]
    ends[0][which], ends[1][which] = -1.0, 1.0
    low, high = (draw(dataclasses.replace(PERSON, proportions=tuple(end))) for end in ends)
    rows = np.nonzero(changed(low, high).any(1))[0]
    if world.PROPORTIONS[which] == "mouth_width":
        assert rows.min() >= 42  # below the nose only
    else:
        assert 15 < rows.min() and rows.max() < 42


def test_light_and_clothes_and_turn_show_where_they_should():
    bright, dim = draw(), with_value("light", "dim")
    assert dim.mean() < 0.9 * bright.mean()
    red, blue = draw(), with_value("clothes", "blue")
    assert np.nonzero(changed(red, blue).any(1))[0].min() > 48
    left, right = with_value("turn", "left"), with_value("turn", "right")
    iris = [np.nonzero((np.abs(p - (36, 104, 232)).max(-1) < 60).any(0))[0].mean() for p in (left, right)]
    assert iris[0] + 6 < iris[1]


def test_skin_and_hair_have_their_colours():
    assert near(draw(), (226, 172, 122)) > 300 and near(draw(), (240, 204, 92)) > 120
    assert near(with_value("skin", "dark"), (104, 66, 48)) > 300


def test_everyone_is_one_combination_with_proportions_of_their_own():
    people = world.all_identities()
    assert len(people) == len({p.indices() for p in people}) == np.prod([len(v) for v in FACTORS.values()])
    proportions = np.array([p.proportions for p in people])
    assert np.abs(proportions).max() <= 1.0 and (np.abs(proportions.mean(0)) < 0.02).all()
    assert world.all_identities()[1234] == people[1234]


def test_the_split_keeps_people_apart_and_every_value_on_both_sides():
    training, held_out = world.split_identities(48, seed=3)
    assert len(held_out) == 48 and not set(training) & set(held_out)
    assert len(training) + 48 == len(world.all_identities())
    for part in (training, held_out):
        assert all({getattr(p, name) for p in part} == set(values) for name, values in FACTORS.items())
    assert world.split_identities(48, seed=3)[1] == held_out != world.split_identities(48, seed=4)[1]
    with pytest.raises(ValueError, match="held_out = 3"):
        world.split_identities(3, seed=0)


def test_a_whole_caption_says_every_trait_and_no_other():
    rng = np.random.default_rng(0)
    people = world.all_identities()
    for _ in range(200):
        person, shown = people[int(rng.integers(len(people)))], world.random_attributes(rng)
        sentence = captions.fine_caption(person, shown, rng)
        for name, values in NAMES.items():
            said = [value for value in values if captions.says(sentence, name, value)]
            assert said == [getattr(person if name in FACTORS else shown, name)], (name, sentence)


def test_dropped_parts_leave_no_trace():
    rng = np.random.default_rng(0)
    assert captions.fine_caption(PERSON, SHOWN, rng, keep=0.0) in captions.SUBJECTS
    alone = captions.fine_caption(PERSON, None, rng)
    assert not any(captions.says(alone, name, v) for name, values in ATTRIBUTES.items() for v in values)
    for _ in range(100):
        sentence = captions.fine_caption(PERSON, SHOWN, rng, keep=0.3)
        assert "{" not in sentence and "  " not in sentence and ", ," not in sentence


def test_the_coarse_prompt_says_nothing():
    assert not any(captions.says(captions.COARSE, n, v) for n, values in NAMES.items() for v in values)


def test_wordings_cover_every_value_and_are_unambiguous():
    assert {name: set(words) for name, words in captions.WORDINGS.items()} == {
        name: set(values) for name, values in NAMES.items()
    }
    phrases = [
        p
        for name, words in captions.WORDINGS.items()
        if name != "hair_colour"
        for w in words.values()
        for p in w
    ]
    assert len(phrases) == len(set(phrases))


def test_portraits_know_whom_and_what_they_show():
    people = world.all_identities()[:2]
    portraits = draw_portraits(people, 2, seed=5)
    assert [portraits.identity(i).indices() for i in range(4)] == [p.indices() for p in people for _ in "ab"]
    assert portraits.identity(3).proportions == pytest.approx(people[1].proportions)
    assert (portraits.pixels[0] != portraits.pixels[1]).any()
    again = draw_portraits(people, 2, seed=5)
    assert (again.pixels == portraits.pixels).all() and (again.attributes == portraits.attributes).all()
    assert portraits.attributes_of(1).indices() == tuple(portraits.attributes[1].tolist())


def test_pixels_and_pictures_are_each_others_inverse():
    portraits = draw_portraits([PERSON], 2, seed=1).pixels
    pixels = to_pixels(portraits)
    assert pixels.shape == (2, 3, 64, 64) and pixels.min() >= -1.0 and pixels.max() <= 1.0
    assert (to_pictures(pixels) == portraits.numpy()).all()
