"""A folder dataset of faces over a toy SDXL: cached, told to a network, and trained on end to end."""

from dataclasses import replace

import pytest
import torch
from folder_runs import SMALL, check_stages, picture, run_over, write_lines
from PIL import Image
from tiny_sdxl import IMAGE_WIDTH, PIXELS, POOLED, STATES, TOKENS, WIDTHS, write_sdxl

from lofa_core.checkpoint import load_hypernetwork
from lofa_core.lora_files import load_lora, read_safetensors
from training.data.folder_tasks import TaskName
from training.loop import Run

SDXL_DATA = {"frames": 1, "height": 32, "width": 16, "conditions": ("identity",)}


def write_faces(folder):
    folder.mkdir()
    lines = []
    for n in range(4):
        for m in range(3):
            Image.fromarray(picture(10 * n + m, (40, 24))).save(folder / f"{n}_{m}.png")
        clips = [{"file": f"{n}_{m}.png", "caption": "a face of " + "xy"[m]} for m in range(2)]
        split = "held_out" if n == 3 else "training"
        line = {"id": f"p{n}", "identity": [f"{n}_2.png", f"{n}_1.png"], "clips": clips, "split": split}
        lines.append(line if n else line | {"prompt": "a person with a hat"})
    write_lines(folder, lines)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    root = tmp_path_factory.mktemp("sdxl")
    write_faces(root / "data")
    stage2 = {"distillation_weight": 0.0}
    run = run_over(root / "data", write_sdxl(root / "base"), root / "run", data=SDXL_DATA, stage2=stage2)
    run.summary = run.cache()
    return run


def test_sdxls_cache_holds_pictures_as_latents_and_both_encoders_states(sdxl):
    assert sdxl.summary.training == ("p0", "p1", "p2") and sdxl.summary.clips == 8
    tensors, _ = read_safetensors(sdxl.folder / "cache" / "p0.safetensors")
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    states = (TOKENS, sum(WIDTHS))
    assert shapes == {  # no captions: text is not asked for
        "latents": (2, 4, 32 // PIXELS, 16 // PIXELS), "identity": (2, STATES, IMAGE_WIDTH), "prompt": states,
        "prompt.pooled": (POOLED,), "coarse_prompt": states, "coarse_prompt.pooled": (POOLED,),
    }  # fmt: skip
    assert {tensors[key].dtype for key in tensors} == {torch.float16}
    prompts = sdxl.data.prompts(["a person with a hat", "a thing"])
    assert prompts.states.shape == (2, *states) and prompts.pooled.shape == (2, POOLED)
    assert torch.equal(prompts.pooled[0], tensors["prompt.pooled"].float())


def test_all_stages_train_on_sdxl_and_identity(sdxl):
    held_out, training = sdxl.lora_dataset()
    assert (held_out.done, training.done) == (("p3",), ("p0", "p1", "p2"))
    lora = load_lora(sdxl.folder / "loras_training" / "p1.safetensors")
    assert len(lora) == 88 and lora["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"].B.any()
    check_stages(sdxl, ("stage1", "stage2", "end_to_end"))
    network = load_hypernetwork(sdxl.folder / "hypernetwork.safetensors")
    assert network.base.name == "SDXL miniature" and len(network.base.by_shape()) == 4
    assert network.conditions["identity"].width == IMAGE_WIDTH
    assert {path.name for path in (sdxl.folder / "samples").iterdir()} == {"p3.png", "p3_response.png"}


def test_sdxls_text_condition_is_its_padded_states(sdxl, tmp_path):
    data = SDXL_DATA | {"conditions": ("text", "identity")}
    run = run_over(sdxl.config.data.folder, sdxl.config.base, tmp_path, data=data, stage2={"with_lora": 1.0})
    assert run.cache().conditions == {"text": 1, "identity": 3}
    told = [{"text": "a face of x"}, {"identity": (TaskName("p1"), [0])}]
    given = run.data.conditions(told)
    assert given["text"].values.shape == (2, TOKENS, sum(WIDTHS)) and given["text"].strength.tolist() == [
        1,
        0,
    ]
    assert torch.equal(given["text"].values[0], run.data.prompts(["a face of x"]).states[0])
    network = run.new_network()
    assert network.conditions["text"].padded_to == 0
    unmasked = replace(run.config, network=replace(SMALL, mask_padding=False))
    assert Run(unmasked, run.console).new_network().conditions["text"].padded_to == 0
