"""Item embeddings that stay on disk, and what the levels of a quantizer left of them."""

import json
import os
from collections.abc import Sequence

import numpy as np
import torch

from .distances import row_blocks

ROWS = 512  # scattered rows that are read from one map


class EmbeddingFiles:
    """Item embeddings (N, D) in `.npy` files, one after the other; a few rows are read at a time.

    Args:
        paths (sequence of `str` or `Path`): Matrices of any float type and of one width D, in the order of the items.

    Raises:
        ValueError: No file, a file that is no float matrix, or files of different widths.

    Example:
        >>> quantizer = ResidualKMeans(3, 8192).fit(EmbeddingFiles(sorted(Path("embeddings").glob("*.npy"))))
    """

    device = torch.device("cpu")

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = [os.fspath(path) for path in paths]
        if not self.paths:
            raise ValueError("EmbeddingFiles got no paths: give at least one .npy file.")
        shapes = []
        for path in self.paths:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            if rows.ndim != 2 or rows.dtype.kind != "f":
                raise ValueError(
                    f"{path} holds {rows.dtype} of shape {rows.shape}: a float matrix (rows, D) is needed."
                )
            shapes.append(rows.shape)
        if len(widths := {width for _, width in shapes}) > 1:
            raise ValueError(
                f"the files have rows of widths {sorted(widths)}: all must come from one embedding model."
            )
        self.starts = np.cumsum([0, *(length for length, _ in shapes)])
        self.shape = (int(self.starts[-1]), int(shapes[0][1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Rows (n, D) of a slice or of indices (n,), float32; index -1 is the last row."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else index.numpy() % len(self)
        found = np.empty((len(rows), self.shape[1]), dtype=np.float32)
        file = np.searchsorted(self.starts, rows, side="right") - 1
        in_order = isinstance(index, slice) and index.step in (None, 1)
        for number in np.unique(file):
            places = np.flatnonzero(file == number)
            own = rows[places] - self.starts[number]
            # scattered rows bring their neighbours into memory, too: a few at a time, in the order of the file
            parts = [slice(None)] if in_order else np.split(own.argsort(), range(ROWS, len(own), ROWS))
            for part in parts:
                # mapped anew each time: pages of a map that stays would count as memory of this process
                shard = np.load(self.paths[number], mmap_mode="r", allow_pickle=False)
                found[places[part]] = shard[own[0] : own[-1] + 1] if in_order else shard[own[part]]
        return torch.from_numpy(found)

    def mean(self) -> torch.Tensor:
        """Mean of all rows (D,), float32."""
        total = torch.zeros(self.shape[1], dtype=torch.float64)
        for block in row_blocks(len(self), self.shape[1], self.device):
            total += self[block].double().sum(dim=0)
        return (total / len(self)).float()

    def save_safetensors(self, path: str | os.PathLike, name: str) -> None:
        """Writes all rows as one float32 tensor (N, D), a block in memory at a time."""
        kind = {"dtype": "F32", "shape": list(self.shape), "data_offsets": [0, 4 * self.shape[0] * self.shape[1]]}
        header = json.dumps({name: kind}).encode()
        header += b" " * (-len(header) % 8)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for block in row_blocks(len(self), self.shape[1], self.device):
                file.write(self[block].numpy().astype("<f4", copy=False).tobytes())


class UnitFiles(EmbeddingFiles):
    """Rows of files less the mean of all rows, `center` (D,), and divided by their length: what `concat_embeddings`
    makes of one embedding. A row equal to the mean is zero.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        super().__init__(paths)
        self.center = EmbeddingFiles(paths).mean()

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(super().__getitem__(index) - self.center, dim=1)


class FileResiduals:
    """Rows of files less a center and the centroids of the levels so far: (N, D), read like a tensor."""

    def __init__(self, files: EmbeddingFiles):
        self.files, self.center, self.shape, self.device = files, files.mean(), files.shape, files.device
        self.levels: list[tuple[torch.Tensor, torch.Tensor]] = []  # centroids (K, D), codes (N,)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        rows = self.files[index] - self.center
        for centroids, codes in self.levels:
            rows -= centroids[codes[index]]
        return rows
