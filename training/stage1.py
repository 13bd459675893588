"""Stage I (LoFA section 3.2-3.3): the response maps of per-task LoRAs. trainer.py runs it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lofa_core.conditions import Conditions
from lofa_core.hypernetwork import GaussianResponse, Hypernetwork, Response
from lofa_core.response_map import THRESHOLD, response_map
from lofa_core.trunk import Layers, shape_key

from .config import Stage1Config
from .data.folder_tasks import Tasks
from .looks import looks_at, on, some_of
from .lora_dataset import LoRADataset
from .losses import factors
from .over_base import padded
from .trainer import draw
from .validation import response_cosines


def stage1_losses(
    response: Response, weights: Tensor, A: Tensor, B: Tensor, threshold: float = THRESHOLD
) -> dict[str, Tensor]:
    """Binary cross-entropy of the response map (eq. 4) and the size of Stage I's factors (as the published
    training has it); where Stage I predicts dW as a Gaussian, its negative log-likelihood.

    weights [N, out, in]; targets A [K, N, r, in], B [K, N, out, r].
    """
    # In bfloat16 a probability of 1 - 1e-6 would be 1, and cost a hundred where it is wrong.
    with torch.autocast(A.device.type, enabled=False):
        delta = B @ A
        wanted = response_map(weights.expand_as(delta), delta, threshold).float()
        probability = response.probability(weights, threshold).clamp(1e-6, 1.0 - 1e-6)
        losses = {
            "cross_entropy": F.binary_cross_entropy(probability, wanted),
            "size": response.A.float().square().mean() + response.B.float().square().mean(),
        }
        if isinstance(response, GaussianResponse):
            log_deviation = response.row_log_deviation.float().unsqueeze(
                -1
            ) + response.column_log_deviation.float().unsqueeze(-2)
            error = (delta - response.B.float() @ response.A.float()) * (-log_deviation).exp()
            typical = log_deviation.detach().mean()  # so that the term does not depend on the unit of dW
            losses["likelihood"] = (0.5 * error.pow(2) + log_deviation - typical).mean()
        return losses


class Stage1:
    """Fits the hypernetwork's Stage I to the response maps of per-task LoRAs; or to these LoRAs themselves,
    which the paper calls lightweight (section 4.4).
    """

    name = "stage1"

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        data: Tasks,
        known: LoRADataset,
        held_out: LoRADataset | None,
        settings: Stage1Config,
        device: torch.device,
    ):
        self.hypernetwork, self.data, self.known, self.held_out = hypernetwork, data, known, held_out
        self.settings, self.device = settings, device
        self.module = _Stage1(hypernetwork.to(device))
        self.base = [weights.to(device) for weights in data.weights_by_shape()]
        self.looks = looks_at(hypernetwork, self.base)
        self.weights = {
            "cross_entropy": 1.0, "likelihood": settings.likelihood_weight, "size": settings.size_weight,
            "reconstruction": 1.0 if settings.target == "lora" else settings.reconstruction_weight,
        }  # fmt: skip

    def tasks(self, step: int, items: Sequence[int]) -> list[str]:
        return [self.known.tasks[pick].id for pick, _ in self._drawn(step, items)]

    def _drawn(self, step: int, items: Sequence[int]) -> list[tuple[int, np.random.Generator]]:
        draws = [draw(self.settings.seed, step, item) for item in items]
        return [(int(rng.integers(len(self.known.tasks))), rng) for rng in draws]

    def losses(self, model: nn.Module, step: int, items: Sequence[int]) -> dict[str, Tensor]:
        drawn = self._drawn(step, items)
        told = [self.data.condition(self.known.tasks[pick], rng) for pick, rng in drawn]
        conditions = on(padded(self.data.conditions(told), self.hypernetwork), self.device)
        rows = self._rows(step)
        some = [some_of(layers, own) for layers, own in zip(self.looks, rows, strict=True) if len(own)]
        weights = [weights[own] for weights, own in zip(self.base, rows, strict=True) if len(own)]
        responses = model(some, conditions)
        picks = torch.tensor([pick for pick, _ in drawn])
        targets = self.known.loras[picks].to(self.device)
        wanted = [
            (A[:, own], B[:, own]) for (A, B), own in zip(targets.pairs(), rows, strict=True) if len(own)
        ]
        total: dict[str, Tensor] = {}
        layers = sum(map(len, rows))
        for look, response, W, (A, B) in zip(some, responses, weights, wanted, strict=True):
            for name, value in self._of_a_shape(look, response, W, A, B).items():
                total[name] = total.get(name, 0.0) + value * (len(W) / layers)
        return total

    def _of_a_shape(
        self, look: Layers, response: Response, W: Tensor, A: Tensor, B: Tensor
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if self.settings.target == "response":
            losses = stage1_losses(response, W, A, B, self.settings.threshold)
        if self.weights["reconstruction"]:
            pairs, statistics = [(response.A, response.B), (A, B)], self.hypernetwork.statistics
            if statistics is not None:
                own = statistics[shape_key(look.shape)]
                pairs = [own.normalise(*pair, look.row) for pair in pairs]
            losses["reconstruction"] = factors(*pairs, None).mean()
        return losses

    def _rows(self, step: int) -> list[Tensor]:
        """Some layers drawn for this step: their rows among those of each shape."""
        counts = [len(weights) for weights in self.base]
        drawn = draw(self.settings.seed, step).permutation(sum(counts))[: self.settings.layers]
        rows, first = [], 0
        for count in counts:
            own = drawn[(drawn >= first) & (drawn < first + count)] - first
            rows.append(torch.from_numpy(own).to(self.device))
            first += count
        return rows

    def after_step(self, step: int) -> None:
        pass

    def state(self) -> list[nn.Module]:
        return []

    def validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        threshold = self.settings.threshold
        return response_cosines(self.hypernetwork, self.data, self.known, self.held_out, threshold)


class _Stage1(nn.Module):
    """One forward pass of Stage I for data-parallel training."""

    def __init__(self, hypernetwork: Hypernetwork):
        super().__init__()
        self.stage1 = hypernetwork.stage1

    def forward(self, looks: list[Layers], conditions: Conditions) -> list[Response]:
        condition = self.stage1.trunk.project(conditions)
        return [self.stage1(layers, condition) for layers in looks]
