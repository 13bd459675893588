"""LoRAs of many tasks as tensors: what the stages predict and are compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """LoRAs of K tasks, dW = B A: for each shape of the base's target layers (in the order of
    `BaseDescription.by_shape`) A [K, L, r, in] and B [K, L, out, r].
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.A[0])

    def __getitem__(self, tasks: Tensor | slice) -> "Factors":
        """Those of some tasks."""
        return self.map(lambda factor: factor[tasks])

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(A, B) of each shape."""
        return zip(self.A, self.B, strict=True)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Factors":
        """The function of each factor."""
        return Factors(tuple(map(function, self.A)), tuple(map(function, self.B)))

    def scaled(self, strength: float) -> "Factors":
        """The same LoRAs at another strength."""
        return Factors(self.A, tuple(strength * factor for factor in self.B))

    def to(self, device: torch.device | str) -> "Factors":
        return self.map(lambda factor: factor.to(device))

    def deltas(self) -> list[Tensor]:
        """dW [K, L, out, in] of each shape."""
        return [B @ A for A, B in self.pairs()]

    def flat(self) -> Tensor:
        """All numbers of a task in a row, [K, n]; `unflat` of another K is the way back."""
        return torch.cat([factor.flatten(1) for factor in (*self.A, *self.B)], 1)

    def unflat(self, rows: Tensor) -> "Factors":
        """Rows [M, n] in the shapes of these factors."""
        parts = rows.split([factor[0].numel() for factor in (*self.A, *self.B)], 1)
        shaped = [
            part.reshape(-1, *factor.shape[1:])
            for part, factor in zip(parts, (*self.A, *self.B), strict=True)
        ]
        return Factors(tuple(shaped[: len(self.A)]), tuple(shaped[len(self.A) :]))

    @classmethod
    def cat(cls, parts: Sequence["Factors"]) -> "Factors":
        """The tasks of all parts."""
        return cls(
            *(
                tuple(torch.cat(of_a_shape) for of_a_shape in zip(*factors, strict=True))
                for factors in ([part.A for part in parts], [part.B for part in parts])
            )
        )


def by_name(groups: Sequence[Sequence[str]], factors: Factors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A [K, r, in] and B [K, out, r] of each layer by name; `groups`: the names of each shape's layers."""
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for names, (all_A, all_B) in zip(groups, factors.pairs(), strict=True):
        A |= zip(names, all_A.unbind(1), strict=True)
        B |= zip(names, all_B.unbind(1), strict=True)
    return A, B
