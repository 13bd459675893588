"""LoRAs as tensors in a running diffusers model: many tasks in one batch, gradients to the factors, no weight
touched.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def injected(
    modules: Mapping[str, nn.Linear], A: Mapping[str, Tensor], B: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within the context every module adds B A x to its output (eq. 1).

    A[name] is [K, r, in] and B[name] [K, out, r] for K tasks; the model's batch must then be K equal parts,
    one a task.
    """
    handles = []
    try:
        for name in A:
            handles.append(modules[name].register_forward_hook(_hook(A[name], B[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(A: Tensor, B: Tensor):
    def add(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        tasks = len(A)
        x = inputs[0].reshape(tasks, -1, A.shape[-1])
        return output + torch.bmm(torch.bmm(x, A.transpose(1, 2)), B.transpose(1, 2)).view_as(output)

    return add
