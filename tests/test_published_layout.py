"""The published layout, as its description has it: what is read, and what is said where it is otherwise."""

import io
import json
import pickle

import pytest
import torch
from rich.console import Console
from tiny import generator

from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import to_state_dict
from training.config import DataConfig, LoRAConfig, TrainingConfig
from training.data.base_encoders import SDXLEncoders, WanEncoders
from training.data.folder_tasks import TaskName
from training.data.published import published_tasks, read_lora, read_published, read_tensors
from training.data.task_encoder import TaskEncoder
from training.loop import Run

ENTRY = {"prompt": "a person waves", "lora_path": "l.pth", "path": "t.pth"}


def write(folder, values):
    for name in ("l.pth", "t.pth"):
        (folder / name).touch()
    (folder / "metadata.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ([ENTRY, ENTRY], ["000000", "000001"]),
        ([ENTRY | {"id": "wave"}, ENTRY | {"id": 7}], ["wave", "7"]),
        ({"wave": ENTRY, "jump": ENTRY}, ["wave", "jump"]),
        ({"version": 1, "samples": [ENTRY | {"id": "wave"}]}, ["wave"]),
        ([{"text": "a person waves", "lora": "l.pth", "tensors": "t.pth"}], ["000000"]),
    ],
)
def test_metadata_is_a_list_or_an_object_of_samples(tmp_path, values, ids):
    samples, problems = read_published(write(tmp_path, values))
    assert [str(sample) for sample in samples] == ids and problems == ()
    first = samples[0]
    assert (first.prompt, first.lora, first.tensors) == ("a person waves", "l.pth", "t.pth")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("l.pth", "is a str; expected an object"),
        (
            {"prompt": "x", "lora": "l.pth"},
            "has the keys prompt, lora; expected tensors under one of tensors,",
        ),
        (ENTRY | {"prompt": 3}, "prompt is 3; expected text"),
        (ENTRY | {"lora_path": "../l.pth"}, "../l.pth: leads out of the dataset's folder"),
        (ENTRY | {"path": "gone.pth"}, "gone.pth: no such file"),
        (ENTRY | {"id": "a/b"}, "its id 'a/b' cannot be a file's name"),
        (ENTRY | {"id": "GOOD"}, "another entry has this id"),
    ],
)
def test_an_entry_that_is_otherwise_is_reported(tmp_path, entry, reason):
    samples, (problem,) = read_published(write(tmp_path, [ENTRY | {"id": "good"}, entry]))
    assert [sample.id for sample in samples] == ["good"]
    assert problem.what.startswith("metadata.json entry") and reason in problem.reason
    if "GOOD" not in str(entry):
        with pytest.raises(ValueError, match=r"metadata\.json: none of its 1 entries can be used\. metadata"):
            read_published(write(tmp_path, [entry]))


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "not JSON"), ("3", "holds a int; expected a list or an object"), ("[]", "none of its 0 entries")],
)
def test_metadata_that_is_something_else_is_an_error(tmp_path, text, named):
    with pytest.raises(ValueError, match=r"no metadata\.json here"):
        read_published(tmp_path)
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match=rf"metadata\.json: {named}"):
        read_published(tmp_path)


def saved(folder, values):
    torch.save(values, folder / "x.pth")
    return folder / "x.pth"


def test_tensors_come_without_padding_and_with_a_clips_dimension(tmp_path):
    states, latents = torch.randn(3, 8), torch.randn(16, 2, 4, 4)
    padded = torch.cat([states, torch.zeros(5, 8)])
    for prompt_emb in (padded, padded[None], {"context": padded[None]}):
        found = read_tensors(saved(tmp_path, {"prompt_emb": prompt_emb, "latents": latents}))
        assert torch.equal(found[0], states) and torch.equal(found[1], latents[None])
    both = torch.stack([latents, latents + 1])
    assert torch.equal(read_tensors(saved(tmp_path, {"prompt_emb": states, "latents": both}))[1], both)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([1], "holds a list; expected a dict"),
        ({"latent": torch.zeros(1)}, "has the keys latent; expected prompt_emb, latents"),
        ({"prompt_emb": {"mask": 1}, "latents": 1}, "prompt_emb is a dict of mask; expected context"),
        ({"prompt_emb": 3, "latents": 1}, "prompt_emb is a int; expected a tensor"),
        ({"prompt_emb": torch.ones(8), "latents": 1}, r"\[8\]; expected \[S, d\]"),
        ({"prompt_emb": torch.ones(2, 3, 8), "latents": 1}, r"is \[2, 3, 8\]; expected"),
        ({"prompt_emb": torch.zeros(3, 8), "latents": 1}, "prompt_emb is zero everywhere"),
        ({"prompt_emb": torch.ones(3, 8), "latents": torch.ones(3, 4)}, r"\[3, 4\]; expected \[C, T, H, W\]"),
        (
            {"prompt_emb": torch.ones(3, 8), "latents": torch.full((1, 1, 1, 1), torch.nan)},
            "latents has values that are not finite",
        ),
    ],
)
def test_tensors_that_are_otherwise_are_named(tmp_path, values, named):
    with pytest.raises(ValueError, match=rf"x\.pth: .*{named}"):
        read_tensors(saved(tmp_path, values))


class Harm:
    """What a pickle could do if it were run."""

    def __reduce__(self):
        return (open, ("harm.txt", "w"))


def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"prompt_emb": Harm()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: holds something else than tensors .*not run"):
        read_tensors(tmp_path / "x.pth")
    whole = saved(tmp_path, {"latents": torch.zeros(100)}).read_bytes()
    for content in (b"", b"text", whole[:-200], pickle.dumps(Harm())):
        (tmp_path / "y.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"y\.pth: is no whole PyTorch archive"):
            read_tensors(tmp_path / "y.pth")
    assert not (tmp_path / "harm.txt").exists()


def test_a_lora_is_read_in_any_known_layout(tmp_path):
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    name = "blocks.0.self_attn.q"
    found = read_lora(
        saved(tmp_path, {f"{name}.lora_A.default.weight": A, f"{name}.lora_B.default.weight": B})
    )
    assert torch.equal(found[name].A, A) and torch.equal(found[name].B, B)
    with pytest.raises(ValueError, match=r"x\.pth: .*ffn\.0.* changes a layer that LoFA does not know"):
        read_lora(saved(tmp_path, {"blocks.0.ffn.0.lora_A.weight": A, "blocks.0.ffn.0.lora_B.weight": B}))
    with pytest.raises(ValueError, match=r"x\.pth: 'step' holds a int; expected a state dict of tensors"):
        read_lora(saved(tmp_path, {"step": 1}))


def test_a_published_folder_is_cached_and_brings_its_loras(tmp_path):
    folder, draw = tmp_path / "data", generator(0)
    folder.mkdir()
    config = TrainingConfig(
        "miniature",
        str(tmp_path / "run"),
        data=DataConfig(folder=str(folder)),
        lora=LoRAConfig(rank=2, steps=1, batch=1),
    )
    run = Run(config, Console(file=io.StringIO(), width=200))
    layers = run.data.weights.model.layers
    entries = {}
    for name, width, rank in (("a", 64, 2), ("b", 64, 3), ("c", 4096, 2)):
        lora = LoRA(
            {
                layer.name: LoRALayer(
                    torch.randn(rank, 96, generator=draw), torch.randn(96, rank, generator=draw), alpha=1.0
                )
                for layer in layers
            }
        )
        torch.save(to_state_dict(lora), folder / f"{name}_lora.pth")
        prompt_emb = torch.zeros(1, 512, width)
        prompt_emb[:, :7] = torch.randn(7, width, generator=draw)
        latents = torch.randn(16, 5, 8, 8, generator=draw)
        torch.save({"prompt_emb": {"context": prompt_emb}, "latents": latents}, folder / f"{name}.pth")
        entries[name] = {"prompt": f"prompt {name}", "lora": f"{name}_lora.pth", "tensors": f"{name}.pth"}
        if name == "a":
            wanted = lora[layers[0].name].delta(), prompt_emb[0, :7], latents
    (folder / "metadata.json").write_text(json.dumps(entries))
    found = run.cache()
    assert found.training == ("a", "b")
    assert [(problem.what, problem.reason) for problem in found.problems] == [
        ("c.pth of task c", "prompt_emb has 4096 numbers a token, this base's text encoder 64.")
    ]
    assert torch.equal(run.data.conditions([{"text": "prompt a"}])["text"].values[0], wanted[1])
    assert torch.equal(run.data.latents_of(TaskName("a")), wanted[2][None].half())
    _, training = run.lora_dataset()
    assert (training.skipped, training.done) == (("a",), ("b",))
    said = run.console.file.getvalue()
    assert "2 LoRAs taken over, 1 left out" in said and "of rank 3; expected (96, 96) of rank 2" in said
    (delta,) = run._dataset("training").loras.deltas()
    assert torch.allclose(delta[0, 0], wanted[0], atol=0.02)


def test_it_holds_texts_alone_and_of_wan(tmp_path):
    write(tmp_path, [ENTRY])
    with pytest.raises(ValueError, match="this layout holds prompts, .* asks for text, pose"):
        published_tasks(tmp_path, DataConfig(conditions=("text", "pose")))
    config = DataConfig(folder=str(tmp_path), frames=1)
    sdxl = TaskEncoder(config, tmp_path, SDXLEncoders(tmp_path, torch.device("cpu")))
    (task,) = published_tasks(tmp_path, config).tasks
    with pytest.raises(ValueError, match=r"metadata\.json lists latents of WAN2.1"):
        sdxl.encode(task, lambda what, reason: None)
    wan = TaskEncoder(config, tmp_path, WanEncoders(tmp_path, torch.device("cpu")))
    with pytest.raises(ValueError, match=r"no text_encoder/ and tokenizer/"):  # not this task's problem
        wan.encode(task, lambda what, reason: None)
