import json

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import UMT5Config, UMT5EncoderModel

from lofa_core.conditions.text import TextEncoder, base_folder, check_prompt

WORDS = ("a", "person", "swings", "waves", "the", "left", "right", "arm", "leg", "widely", "quickly")
PROMPT = "a person swings the left arm widely"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base folder: a tiny UMT5 encoder, a SentencePiece model and a tokenizer.json of the same pieces."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "tokenizer").mkdir()
    corpus = [" ".join(WORDS), PROMPT, "a person waves the right leg quickly"] * 50
    with (folder / "tokenizer" / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=file, vocab_size=60, hard_vocab_limit=False,
            normalization_rule_name="identity", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    scores = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    spaces = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    tokenizer.decoder = decoders.Metaspace(**spaces)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "extra_ids": 0, "additional_special_tokens": [], "model_max_length": 512,
    }  # fmt: skip
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = UMT5EncoderModel(
        UMT5Config(vocab_size=pieces.get_piece_size(), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    model.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def copy(base, tmp_path):
    """A copy of the base folder to damage."""
    for source in base.rglob("*"):
        if source.is_file():
            target = tmp_path / source.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
    return tmp_path


def test_states_are_the_encoders_own_and_end_with_the_end_token(base):
    states = TextEncoder.open(base).encode(PROMPT)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer" / "spiece.model"))
    ids = [*pieces.encode(PROMPT), 1]
    assert states.shape == (1, len(ids), 16)
    model = UMT5EncoderModel.from_pretrained(base / "text_encoder").eval()
    padded = torch.tensor([ids + [0] * 5])  # as WAN's pipeline pads: the rows of the prompt stay the same
    with torch.no_grad():
        expected = model(padded, attention_mask=(padded != 0).long()).last_hidden_state[:, : len(ids)]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)


def test_line_breaks_and_double_spaces_do_not_matter(base):
    encoder = TextEncoder.open(base)
    torch.testing.assert_close(encoder.encode("  a person\n waves\t"), encoder.encode("a person waves"))


def test_a_folder_with_only_the_sentencepiece_model_reads_the_same(copy, base):
    expected = TextEncoder.open(base).encode(PROMPT)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    torch.testing.assert_close(TextEncoder.open(copy).encode(PROMPT), expected)


def test_the_folder_is_found_from_the_weights_in_it(base, tmp_path):
    assert base_folder(base) == base
    assert base_folder(base / "transformer") == base
    assert base_folder(base / "transformer" / "weights.safetensors") == base
    with pytest.raises(ValueError, match="text_encoder/ and tokenizer/"):
        base_folder(tmp_path / "alone.safetensors")


def test_bad_folders_are_named(copy):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    model = copy / "tokenizer" / "spiece.model"
    model.write_bytes(b"\x01 not a model")
    with pytest.raises(ValueError, match="spiece.model"):
        TextEncoder.open(copy)
    model.unlink()
    with pytest.raises(ValueError, match="neither tokenizer.json nor spiece.model"):
        TextEncoder.open(copy)


def test_incomplete_and_unfitting_weights_are_refused(copy):
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    dropped = next(key for key in tensors if "SelfAttention.q" in key)
    save_file({key: t for key, t in tensors.items() if key != dropped}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="not a complete UMT5 encoder"):
        TextEncoder.open(copy)
    save_file(tensors | {dropped: torch.zeros(3, 3)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit each other"):
        TextEncoder.open(copy)


def test_too_long_empty_and_foreign_prompts(base):
    encoder = TextEncoder.open(base)
    with pytest.raises(ValueError, match="WAN2.1 reads 512"):
        encoder.encode("a person " * 600)
    with pytest.raises(ValueError, match="empty"):
        encoder.encode(" \n ")
    encoder._model.config.vocab_size = 3
    with pytest.raises(ValueError, match="different models"):
        encoder.encode(PROMPT)


def test_check_prompt_accepts_known_words_in_any_writing():
    check_prompt("A person's left ARM swings, widely!", WORDS)
    check_prompt("an entirely free sentence", ())


@pytest.mark.parametrize("prompt", ["", "  \n", "12 ... !"])
def test_check_prompt_refuses_an_empty_prompt(prompt):
    with pytest.raises(ValueError, match="empty"):
        check_prompt(prompt, WORDS)


def test_check_prompt_names_unknown_words_and_the_nearest_known_ones():
    with pytest.raises(ValueError) as caught:
        check_prompt("a person swimgs the zebra quikly", WORDS)
    message = str(caught.value)
    assert '"swimgs" (did you mean swings?)' in message and '"zebra"' in message and "quickly" in message
    assert '"person"' not in message and "The words it knows: arm, left" in message
    assert "\n" not in message


def test_check_prompt_keeps_a_long_list_short():
    with pytest.raises(ValueError, match="and 4 more"):
        check_prompt("ba be bi bo bu da de di do du fa fe", WORDS)
