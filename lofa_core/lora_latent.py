"""LoRAs as short vectors: their numbers in one form, normalised, and a VAE over all layers at once.

After LoRA Diffusion (arXiv 2412.02352): singular vectors and values in a fixed order and sign, of unit
variance, through a VAE to one latent. Sizes, and a map for each layer, are ours.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import MLP
from .descriptions import BaseDescription, Form
from .lora import LoRA, LoRALayer
from .normalisation import TargetStatistics
from .trunk import shape_key

Numbers = list[Tensor]  # of K LoRAs: [K, L, r (in + out)] for each shape of layers


class LoRACodec(nn.Module):
    """LoRAs of one base model <-> numbers of zero mean and, in each layer's A and B, unit variance."""

    def __init__(self, base: BaseDescription, rank: int, form: Form):
        super().__init__()
        self.base, self.rank, self.form = base, rank, form
        self.statistics = nn.ModuleDict(
            {
                shape_key(shape): TargetStatistics(len(places), rank, *shape)
                for shape, places in base.by_shape().items()
            }
        )

    def fit(self, loras: Sequence[LoRA]) -> None:
        """Take mean and spread of these LoRAs."""
        for statistics, (A, B) in zip(self._each(), self._factors(loras), strict=True):
            statistics.fit(A, B)

    def numbers(self, loras: Sequence[LoRA]) -> Numbers:
        """K LoRAs as float32 numbers. ValueError where one has other layers, or a rank that the form has no
        place for.
        """
        found = []
        for statistics, pair in zip(self._each(), self._factors(loras), strict=True):
            index = torch.arange(pair[0].shape[1], device=pair[0].device)
            A, B = statistics.normalise(*pair, index)
            found.append(torch.cat([A.flatten(2), B.flatten(2)], -1))
        return found

    def loras(self, numbers: Numbers) -> list[LoRA]:
        """The way back, on the CPU, alpha = r."""
        layers: list[dict[str, LoRALayer]] = [{} for _ in numbers[0]]
        for statistics, (shape, places), own in zip(
            self._each(), self.base.by_shape().items(), numbers, strict=True
        ):
            out, into = shape
            A, B = own.split([self.rank * into, out * self.rank], -1)
            A, B = statistics.denormalise(
                A.unflatten(-1, (self.rank, into)), B.unflatten(-1, (out, self.rank)),
                torch.arange(len(places), device=own.device),
            )  # fmt: skip
            A, B = A.float().cpu(), B.float().cpu()
            for row, place in enumerate(places):
                for task, found in enumerate(layers):
                    name = self.base.layers[place].name
                    found[name] = LoRALayer(A[task, row], B[task, row], float(self.rank))
        names = [layer.name for layer in self.base.layers]
        return [LoRA({name: found[name] for name in names}) for found in layers]

    def _each(self) -> Iterator[TargetStatistics]:
        return (own for own in self.statistics.values() if isinstance(own, TargetStatistics))

    def _factors(self, loras: Sequence[LoRA]) -> list[tuple[Tensor, Tensor]]:
        """A [K, L, r, in] and B [K, L, out, r] of each shape, dW = B A."""
        formed, device = [self._formed(lora) for lora in loras], next(self._each()).A_mean.device
        found = []
        for places in self.base.by_shape().values():
            names = [self.base.layers[place].name for place in places]
            A, B = zip(*(zip(*(lora[name] for name in names), strict=True) for lora in formed), strict=True)
            found.append((_stacked(A).to(device), _stacked(B).to(device)))
        return found

    def _formed(self, lora: LoRA) -> dict[str, tuple[Tensor, Tensor]]:
        """A [r, in] and B [out, r] of each layer in this codec's form; what a smaller rank lacks is zero."""
        shapes = {layer.name: tuple(layer.shape) for layer in self.base.layers}
        if shapes != {name: layer.shape for name, layer in lora.items()}:
            raise ValueError(
                f"a LoRA of {len(lora)} layers: expected the {len(shapes)} target layers of "
                f"{self.base.name}, each in its shape. Use LoRAs of one base model, all of them whole."
            )
        if self.form == "canonical":
            lora = lora.reduced(self.rank)
        elif lora.rank > self.rank:
            raise ValueError(
                f"a LoRA of rank {lora.rank}: expected at most {self.rank}. Raise the rank, or use the "
                'form "canonical", which keeps the largest singular values.'
            )
        return {name: self._padded(layer) for name, layer in lora.items()}

    def _padded(self, layer: LoRALayer) -> tuple[Tensor, Tensor]:
        missing = self.rank - layer.rank
        B = layer.B.float() * (layer.alpha / layer.rank)
        return F.pad(layer.A.float(), (0, 0, 0, missing)), F.pad(B, (0, missing))


def _stacked(rows: Iterable[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(list(row)) for row in rows])


_LOG_VARIANCE = -6.0  # of a new VAE: nearly no noise, which would drown what it has to learn first


class PerLayer(nn.Module):
    """A linear map of its own for each of L layers: [K, L, into] -> [K, L, out]."""

    def __init__(self, layers: int, into: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(layers, into, out) / into**0.5)
        self.bias = nn.Parameter(torch.zeros(layers, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("kli,lio->klo", x, self.weight) + self.bias


class Residual(nn.Module):
    """x + MLP(norm(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), MLP(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class LoRAVAE(nn.Module):
    """A LoRA's numbers <-> a latent, as a Gaussian.

    Each layer's numbers come to `layer_width` by a matrix of their own, all layers together to the latent:
    the largest matrices grow with the LoRA, not with its square.
    """

    def __init__(
        self, base: BaseDescription, rank: int, layer_width: int, width: int, blocks: int, latent: int
    ):
        super().__init__()
        groups = base.by_shape()
        self.layer_width, self.counts = layer_width, [len(places) for places in groups.values()]
        sizes = {shape_key(shape): (len(places), rank * sum(shape)) for shape, places in groups.items()}
        self.down = nn.ModuleDict({key: PerLayer(n, size, layer_width) for key, (n, size) in sizes.items()})
        self.up = nn.ModuleDict({key: PerLayer(n, layer_width, size) for key, (n, size) in sizes.items()})
        together = layer_width * sum(self.counts)
        gaussian = nn.Linear(width, 2 * latent)
        nn.init.constant_(gaussian.bias[latent:], _LOG_VARIANCE)
        self.encoder = nn.Sequential(
            nn.Linear(together, width), *(Residual(width) for _ in range(blocks)), gaussian
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), *(Residual(width) for _ in range(blocks)), nn.Linear(width, together)
        )

    @torch.no_grad()
    def start(self, numbers: Numbers) -> None:
        """Give each layer's maps the principal directions of these K LoRAs' numbers, in units in which they
        have unit variance: a start from which what all layers share is soon learned.
        """
        for down, up, own in zip(_maps(self.down), _maps(self.up), numbers, strict=True):
            _, size, directions = torch.linalg.svd(own.transpose(0, 1), full_matrices=False)  # [L, K, in]
            kept = min(self.layer_width, directions.shape[1])
            unit = (size[:, :kept].square().mean(1) / len(own)).sqrt().clamp_min(1e-8)[:, None, None]
            directions = directions[:, :kept]
            down.weight.zero_()[..., :kept] = directions.mT / unit
            up.weight.zero_()[:, :kept] = directions * unit

    def encode(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """(mean, log variance) of the latent, [K, latent] each."""
        down = [own(x).flatten(1) for own, x in zip(self.down.values(), numbers, strict=True)]
        mean, log_variance = self.encoder(torch.cat(down, 1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-20.0, 10.0)

    def decode(self, latent: Tensor) -> Numbers:
        """Numbers of latents [K, latent]."""
        parts = self.decoder(latent).split([count * self.layer_width for count in self.counts], 1)
        return [
            own(part.unflatten(1, (-1, self.layer_width)))
            for own, part in zip(self.up.values(), parts, strict=True)
        ]

    def forward(self, numbers: Numbers, noise: Tensor) -> tuple[Numbers, Tensor, Tensor]:
        """(numbers of a latent drawn with noise [K, latent], its mean, its log variance)."""
        mean, log_variance = self.encode(numbers)
        return self.decode(drawn(mean, log_variance, noise)), mean, log_variance


def _maps(modules: nn.ModuleDict) -> list[PerLayer]:
    return [own for own in modules.values() if isinstance(own, PerLayer)]


def drawn(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """mean + deviation * noise: a draw that keeps the gradient (arXiv 1312.6114, sec. 2.4)."""
    return mean + (0.5 * log_variance).exp() * noise


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(Normal(mean, variance) || Normal(0, 1)) of each entry (arXiv 1312.6114, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
