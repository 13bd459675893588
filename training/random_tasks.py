"""Tasks of random clips and conditions over a base model of real size and random weights: for measuring."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import DDPMScheduler, UNet2DConditionModel, WanTransformer3DModel
from torch import Tensor

from lofa_core.base_models import BaseWeights
from lofa_core.conditions import Conditions, Given
from lofa_core.descriptions import BaseDescription, ConditionDescription, HypernetworkConfig, LayerDescription
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.released import PROMPT_TOKENS

from .backbones import fold_padding, use_folded_padding
from .denoisers import Denoiser, Prompts, SDXLDenoiser, WanDenoiser
from .factors import Factors
from .full_size import RELEASED, SDXL, TEXT_WIDTH, WAN_1_3B, WORDS, random_hypernetwork, random_parameters
from .lora_dataset import LoRADataset


@dataclass(frozen=True)
class RandomTask:
    id: str


TASKS = (RandomTask("task 0"), RandomTask("task 1"))


class RandomTasks(ABC):
    """Two tasks of one clip each: what the stages ask of their data."""

    coarse_prompt = ""
    condition_of: ConditionDescription
    rank: int

    def __init__(self, model: torch.nn.Module, latent: tuple[int, ...], layers: int, seed: int):
        """`latent`: shape of a clip's latents. `layers` target layers, evenly spread, take part; 0: all."""
        self.draw = torch.Generator().manual_seed(seed)
        self._latents = torch.randn(len(TASKS), *latent, generator=self.draw)
        self._model = model.requires_grad_(False).eval()
        base = BaseWeights.from_tensors(model.state_dict()).model
        every, kinds = len(base.layers), len({layer.kind for layer in base.layers})
        count = min(layers or every, every)
        # Of each block chosen the next kind: a few dozen layers have all kinds and shapes among them.
        places = (n * every // count // kinds * kinds + n % kinds for n in range(count))
        chosen = (base.layers[place] for place in places)
        described = tuple(LayerDescription(x.name, x.depth, x.kind, x.shape) for x in chosen)
        self.base = BaseDescription(base.name, described)

    @abstractmethod
    def load_denoiser(self) -> Denoiser:
        """The one base model there is."""

    @abstractmethod
    def prompts(self, sentences: list[str]) -> Prompts:
        """Random text states as the base reads them."""

    def network(self, width: int) -> Hypernetwork:
        """One of LoFA_v0's design; at a width of 768 of its size."""
        config: HypernetworkConfig = replace(RELEASED, rank=self.rank, width=width)
        return random_hypernetwork(config, self.base, self.condition_of)

    def family(self) -> list["RandomTasks"]:
        """There are no relatives."""
        return [self]

    def weights_by_shape(self) -> list[Tensor]:
        modules = self.load_denoiser().modules([layer.name for layer in self.base.layers])
        return [
            torch.stack([modules[self.base.layers[place].name].weight.float() for place in places])
            for places in self.base.by_shape().values()
        ]

    def loras(self) -> LoRADataset:
        """Per-task LoRAs to learn from, of the size that trained ones have."""
        A, B = [], []
        for (out, into), places in self.base.by_shape().items():
            A.append(torch.randn(len(TASKS), len(places), self.rank, into, generator=self.draw) * into**-0.5)
            B.append(0.01 * torch.randn(len(TASKS), len(places), out, self.rank, generator=self.draw))
        return LoRADataset(Factors(tuple(A), tuple(B)), list(TASKS))

    def draw_task(self, rng: np.random.Generator) -> RandomTask:
        return TASKS[rng.integers(len(TASKS))]

    def some_latents(self, task: RandomTask, count: int, rng: object) -> Tensor:
        return self._latents[TASKS.index(task)].expand(count, *self._latents.shape[1:])

    def loss_weights(self, task: RandomTask) -> Tensor:
        return torch.ones(self._latents.shape[1:])

    def condition(self, task: RandomTask, rng: object) -> dict[str, Any]:
        return {self.condition_of.kind: task.id}

    def plain_sentence(self, task: RandomTask, rng: object) -> str:
        return task.id

    def conditions(self, told: list[dict[str, Any]]) -> Conditions:
        return {self.condition_of.kind: Given(self.tokens(len(told)))}

    @abstractmethod
    def tokens(self, count: int) -> Tensor:
        """A condition's values [count, S, d]."""

    def coarse(self) -> Prompts:
        return self.prompts([self.coarse_prompt])


class RandomWan(RandomTasks):
    """WAN2.1-T2V-1.3B and text."""

    condition_of = ConditionDescription("text", TEXT_WIDTH, padded_to=PROMPT_TOKENS)
    rank = RELEASED.rank

    def __init__(self, size: tuple[int, int, int], layers: int, dtype: torch.dtype, seed: int = 0):
        """`size`: frames, height and width in pixels."""
        frames, height, width = size
        with init_empty_weights(include_buffers=False):  # the rotary tables are computed, not loaded
            model = WanTransformer3DModel(**WAN_1_3B)
        model.load_state_dict(random_parameters(model, dtype, seed), assign=True)
        use_folded_padding(model)
        super().__init__(model, (16, 1 + (frames - 1) // 4, height // 8, width // 8), layers, seed)

    def load_denoiser(self) -> Denoiser:
        return WanDenoiser(self._model)

    def prompts(self, sentences: list[str]) -> Prompts:
        return Prompts(fold_padding(self.tokens(len(sentences))))

    def tokens(self, count: int) -> Tensor:
        return torch.randn(count, WORDS, TEXT_WIDTH, generator=self.draw)


class RandomSDXL(RandomTasks):
    """SDXL and identity: the 257 states of a picture that CLIP-ViT-L gives."""

    condition_of = ConditionDescription("identity", 1024)
    rank = 16

    def __init__(self, size: tuple[int, int, int], layers: int, dtype: torch.dtype, seed: int = 0):
        """`size`: one frame, height and width in pixels."""
        with init_empty_weights(include_buffers=False):
            model = UNet2DConditionModel(**SDXL)
        model.load_state_dict(random_parameters(model, dtype, seed), assign=True)
        super().__init__(model, (4, size[1] // 8, size[2] // 8), layers, seed)

    def load_denoiser(self) -> Denoiser:
        schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        return SDXLDenoiser(self._model, schedule, 8)

    def prompts(self, sentences: list[str]) -> Prompts:
        count = len(sentences)
        states = torch.randn(count, 77, SDXL["cross_attention_dim"], generator=self.draw)
        return Prompts(states, torch.randn(count, 1280, generator=self.draw))

    def tokens(self, count: int) -> Tensor:
        return torch.randn(count, 257, self.condition_of.width, generator=self.draw)
