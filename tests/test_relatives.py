"""Relatives of a base: the swapped ones are the same function, the merged ones the base with a LoRA in it;
and training over several of them.
"""

from types import SimpleNamespace

import pytest
import torch
from test_end_to_end import run
from test_stages import dataset
from tiny_tasks import ACTIONS, DIM, RANK, Tasks, loras, sized_network, tiny_model

from lofa_core import miniature
from lofa_core.base_models import BaseWeights
from lofa_core.lora_files import read_safetensors
from training.backbones import load_transformer
from training.config import DataConfig, EndToEndConfig, Stage2Config
from training.denoisers import WanDenoiser
from training.end_to_end import EndToEnd
from training.injection import injected
from training.lora_dataset import LoRADataset
from training.miniature import relatives
from training.miniature.tasks import MiniatureTasks
from training.over_base import OverBase
from training.stages import Stage2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return relatives.make(tmp_path_factory.mktemp("relatives"), count=2)


@pytest.fixture(scope="module")
def said():
    """What a base model answers to one noisy clip."""
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 16, 5, 8, 8, generator=draw), torch.randn(1, 7, 64, generator=draw)

    @torch.no_grad()
    def answer(folder, lora=None):
        model = load_transformer(folder)
        denoiser = WanDenoiser(model)
        if lora is None:
            return model(x, torch.tensor([300.0]), text, return_dict=False)[0]
        names = [layer.name for layer in BaseWeights.open(folder).model.layers]
        A, B = (dict(zip(names, factor.unbind(1), strict=True)) for factor in (lora.A[0], lora.B[0]))
        with injected(denoiser.modules(names), A, B):
            return model(x, torch.tensor([300.0]), text, return_dict=False)[0]

    return answer


def known():
    return LoRADataset.load(relatives._LORAS)


def test_swapped_heads_leave_the_function_as_it_is_and_change_half_the_layers(folders, said):
    own = said(miniature.FOLDER)
    layers = [f"{layer.name}.weight" for layer in BaseWeights.open(miniature.FOLDER).model.layers]
    first, _ = read_safetensors(miniature.DIFFUSION_MODEL)
    changed = []
    for folder in (folder for folder in folders if folder.name.startswith("swapped")):
        assert torch.allclose(said(folder), own, atol=1e-4)
        other, metadata = read_safetensors(folder / "transformer" / miniature.DIFFUSION_MODEL.name)
        assert "num_heads" in metadata["config"]
        changed.append({key for key in layers if not torch.equal(first[key], other[key])})
        assert 4 <= len(changed[-1]) <= len(layers) - 4 and len(changed[-1]) % 4 == 0
    assert changed[0] != changed[1]


def test_a_lora_of_the_base_is_none_for_a_swapped_relative(folders, said):
    lora = known().loras[:1]
    moved = (said(miniature.FOLDER, lora) - said(miniature.FOLDER)).norm()
    apart = (said(folders[0], lora) - said(miniature.FOLDER, lora)).norm()
    assert folders[0].name == "swapped_00" and apart > 0.3 * moved


def test_a_style_is_the_base_with_a_looks_lora_merged(folders, said):
    dataset = known()
    looks = [row for row, task in enumerate(dataset.tasks) if task.action is None]
    for number, folder in enumerate(folder for folder in folders if folder.name.startswith("styles")):
        row = looks[number]
        lora = dataset.loras[row : row + 1]
        assert torch.allclose(said(folder), said(miniature.FOLDER, lora), atol=1e-4)
        assert not torch.allclose(said(folder), said(miniature.FOLDER), atol=1e-2)


def test_a_relative_is_a_base_folder_like_the_miniatures_own(folders, tmp_path):
    data = MiniatureTasks(DataConfig(clips_per_task=1), tmp_path, folders[0])
    assert data.base_description().layers == OverBase(miniature.FOLDER).base_description().layers
    assert data.base_description().fingerprint != OverBase(miniature.FOLDER).base_description().fingerprint
    assert data.coarse().states.shape[-1] == 64


def test_patterns_name_relatives_and_others_are_refused(folders, tmp_path):
    out = folders[0].parent
    base = OverBase(miniature.FOLDER, (f"{out}/swapped_*", f"{out}/styles_01"))
    assert [one.base.name for one in base.family()[1:]] == ["swapped_00", "swapped_01", "styles_01"]
    with pytest.raises(ValueError, match="data.more_bases: there is no folder .*nothing_"):
        OverBase(miniature.FOLDER, (f"{tmp_path}/nothing_*",)).family()
    faces = relatives.Path(relatives.__file__).parents[1] / "faces" / "base"
    if faces.exists():
        with pytest.raises(ValueError, match="more_bases are to have the layers of"):
            OverBase(miniature.FOLDER, (str(faces),)).family()


class Family(Tasks):
    """Two bases: the tiny one, and another of other weights."""

    def family(self):
        other = SimpleNamespace(
            load_denoiser=lambda: WanDenoiser(self.other),
            weights_by_shape=lambda: [
                torch.stack(
                    [
                        BaseWeights.from_tensors(self.other.state_dict()).read(x)
                        for x in self.weights.model.layers
                    ]
                )
            ],
        )
        return [self, other]

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.other = tiny_model(seed=9)


def stage(known=None, **changes):
    net = sized_network(randomised=known is not None)
    net.statistics["48x48"].start(0.1 * torch.randn(8, RANK, DIM), scale=0.05)
    settings = EndToEndConfig(steps=12, tasks=2, clips=1, warm_up=1, validate_every=0, **changes)
    return EndToEnd(net, Family(ACTIONS[:2], clips=1), settings, torch.device("cpu"))


def test_each_step_trains_through_one_of_the_bases_and_looks_at_its_weights(tmp_path):
    training, used = stage(), []
    for place, base in enumerate(training.bases):
        base.denoiser.model.register_forward_pre_hook(lambda *_, place=place: used.append(place))
    first, second = (base.looks[0].patches for base in training.bases)
    assert not torch.allclose(first, second, atol=1e-2)
    assert len(run(training, tmp_path)) == 12
    assert set(used) == {0, 1} and len(used) == 12
    again = stage()
    losses = [again.losses(again.module, step, [0, 1])["diffusion"].item() for step in range(2)]
    other = stage()
    assert losses[1] == pytest.approx(other.losses(other.module, 1, [0, 1])["diffusion"].item(), rel=1e-5)


def test_loras_of_one_base_are_not_taught_to_others():
    arguments = sized_network(), Family(), dataset(ACTIONS[:2], loras(2)), None
    with pytest.raises(ValueError, match=r"\[stage2\] with_lora = 0.25: the LoRAs are of .* alone"):
        Stage2(*arguments, Stage2Config(tasks=2), torch.device("cpu"))
    Stage2(*arguments, Stage2Config(tasks=2, with_lora=0.0), torch.device("cpu"))
