"""The LoRA container: a low-rank change dW of each target layer, and the exact operations on it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .steps import UNWATCHED, Watch


@dataclass(frozen=True, eq=False)
class LoRALayer:
    """dW = alpha / r * B A of one target layer. A [r, in], B [out, r]."""

    A: Tensor
    B: Tensor
    alpha: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1] or not self.rank:
            raise ValueError(
                f"A is {list(self.A.shape)} and B is {list(self.B.shape)}; expected A [r, in] and B [out, r]."
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it changes."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """dW, float32 [out, in]."""
        return (self.alpha / self.rank) * (self.B.float() @ self.A.float())

    def is_finite(self) -> bool:
        """Whether every entry of A, B and dW is a number of float32: |dW| is at most |alpha| |A| |B|."""
        size = torch.linalg.vector_norm(self.A.float()) * torch.linalg.vector_norm(self.B.float())
        return math.isfinite(self.alpha * size.item())

    def truncated(self, rank: int) -> "LoRALayer":
        """The best layer of at most this rank in canonical form: B = U sqrt(S), A = sqrt(S) V^T, alpha = r.

        dW = U S V^T comes from the QR factors of B and A^T, so the SVD is of an r x r matrix. The largest
        entry of each column of U is positive: one dW (with distinct singular values) has one such form.
        """
        Q_B, R_B = torch.linalg.qr(self.B.float())
        Q_A, R_A = torch.linalg.qr(self.A.float().T)
        U, S, Vt = torch.linalg.svd((self.alpha / self.rank) * (R_B @ R_A.T), full_matrices=False)
        rank = min(rank, S.numel())
        U, S, Vt = Q_B @ U[:, :rank], S[:rank], Vt[:rank] @ Q_A.T
        largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0)  # [1, r]
        root = S.sqrt()
        return LoRALayer(A=root[:, None] * sign.T * Vt, B=U * sign * root, alpha=float(rank))


@dataclass(frozen=True, eq=False)
class LoRA(Mapping[str, LoRALayer]):
    """A LoRA: canonical target layer name -> LoRALayer. It reads like a dict of its layers."""

    layers: dict[str, LoRALayer]
    metadata: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LoRALayer:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def rank(self) -> int:
        """The largest rank of its layers (0 for a LoRA without layers)."""
        return max((layer.rank for layer in self.layers.values()), default=0)

    @property
    def parameter_count(self) -> int:
        """Number of values in all A and B."""
        return sum(layer.A.numel() + layer.B.numel() for layer in self.layers.values())

    def delta(self, name: str) -> Tensor:
        """dW of one target layer, float32 [out, in]."""
        return self.layers[name].delta()

    def merged(self, name: str, W: Tensor) -> Tensor:
        """W + dW for one target layer, in W's dtype and on its device; added in float32."""
        delta = self.delta(name)
        if delta.shape != W.shape:
            raise ValueError(
                f"{name}: the LoRA changes a weight of {list(delta.shape)}, W is {list(W.shape)}."
            )
        return (W.float() + delta.to(W.device)).to(W.dtype)

    def scaled(self, strength: float) -> "LoRA":
        """The LoRA whose every dW is `strength` times this one's."""
        layers = {n: LoRALayer(layer.A, layer.B, layer.alpha * strength) for n, layer in self.layers.items()}
        return LoRA(layers, self.metadata)

    def reduced(self, rank: int) -> "LoRA":
        """The closest LoRA (each dW in the Frobenius norm) of at most this rank, in canonical form."""
        if rank < 1:
            raise ValueError(f"rank {rank}: a LoRA has a rank of 1 or more.")
        return LoRA({name: layer.truncated(rank) for name, layer in self.items()}, self.metadata)

    def canonical(self) -> "LoRA":
        """The same dW in canonical (SVD) form: B = U sqrt(S), A = sqrt(S) V^T, signs fixed, alpha = r."""
        return LoRA({name: layer.truncated(layer.rank) for name, layer in self.layers.items()}, self.metadata)

    @staticmethod
    def blend(
        parts: Sequence[tuple["LoRA", float]], rank: int | None = None, watch: Watch = UNWATCHED
    ) -> "LoRA":
        """The LoRA whose every dW is the weighted sum of the parts', exactly: their ranks side by side; or
        the closest to it of at most `rank`, as `reduced`.

        A layer that some parts lack is the sum over the others. Raises ValueError when two parts give one
        layer different shapes.
        """
        names = dict.fromkeys(name for lora, _ in parts for name in lora)
        layers = {}
        for name in watch.each(names, len(names)):
            layer = _sum(name, [(lora[name], weight) for lora, weight in parts if name in lora])
            layers[name] = layer if rank is None else layer.truncated(rank)
        return LoRA(layers)


def _sum(name: str, parts: Sequence[tuple[LoRALayer, float]]) -> LoRALayer:
    shapes = {layer.shape for layer, _ in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"{name}: LoRAs of different base models do not blend, its shapes are {sorted(shapes)}."
        )
    A = torch.cat([layer.A.float() for layer, _ in parts])
    B = torch.cat([layer.B.float() * (weight * layer.alpha / layer.rank) for layer, weight in parts], dim=1)
    return LoRALayer(A, B, alpha=float(A.shape[0]))
