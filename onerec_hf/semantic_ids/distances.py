"""Blocks of rows and the distances inside one block: what keeps memory independent of N x K."""

from collections.abc import Iterator
from typing import Protocol

import torch

# Float32 elements of one block: 16 MB stay near the CPU's cache; a GPU wants larger kernels (256 MB).
_CPU_ELEMENTS = 2**22
_GPU_ELEMENTS = 2**26


class Rows(Protocol):
    """Vectors (N, D) that are read a few rows at a time: a tensor, or files."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | torch.Tensor, /) -> torch.Tensor: ...


def row_blocks(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `num_rows` rows such that a block of `num_columns` columns has a bounded size."""
    elements = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, elements // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def squared_distances(
    items: torch.Tensor, centroids: torch.Tensor, prices: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`||x - c_k||^2 - ||x||^2 + p_k` (n, K): squared distances up to a constant per item, plus a price per
    centroid.
    """
    offsets = centroids.square().sum(dim=1)
    if prices is not None:
        offsets = offsets + prices
    return torch.addmm(offsets, items.to(centroids.dtype), centroids.T, alpha=-2, out=out)
