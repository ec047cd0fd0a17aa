"""Residual k-means: item embeddings to semantic IDs, level by level (OneRec, arXiv:2502.18965; report
arXiv:2506.13695).
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .distances import row_blocks
from .embedding_files import EmbeddingFiles, FileResiduals
from .kmeans import nearest_centroids, train_codebook

logger = logging.getLogger(__name__)

CONFIG_NAME = "quantizer_config.json"
WEIGHTS_NAME = "quantizer.safetensors"


class ResidualKMeans:
    """Residual k-means quantizer, with clusters of equal size by default.

    Level l has a codebook of K centroids for what the levels before it left over: `r_1 = e`,
    `s_l = argmin_k ||r_l - c_k^l||^2`, `r_{l+1} = r_l - c^l_{s_l}`. Codebooks are trained one after the other.

    With `balanced=True` (the sizes of OneRec's Algorithm 1 by another procedure, optimal transport) and
    `balanced="greedy"` (Algorithm 1 as printed) every code of every level is given to exactly `N / K` *training* items
    (the first `N mod K` codes to one more), and the residuals of the next level are those of these codes. New items
    can only take the nearest centroid, which is not balanced; the papers do not say which of the two they deploy for
    training items. Here `train_codes` (and `fit_encode`) are the balanced codes and `encode` is the nearest centroid
    at every level: choose one for the catalogue and say so.

    Args:
        num_levels (`int`, *optional*, defaults to 3): L.
        codebook_size (`int`, *optional*, defaults to 256): K, the same at every level, at least 2. The papers use 8192
            for hundreds of millions of items.
        balanced (`bool` or `"greedy"`, *optional*, defaults to `True`): clusters of equal size, or plain k-means.
            `"greedy"` is OneRec's Algorithm 1 as printed: K passes over all items per iteration, and the last clusters
            get what is left.
        num_iterations (`int`, *optional*, defaults to 20): Lloyd iterations per level on a random sample of 64 items
            per code (all items where there are fewer, and with `"greedy"`, and where N K is at most 2^18). OpenOneRec
            runs 20; the papers are silent.
        num_full_iterations (`int`, *optional*, defaults to 4): iterations per level over all items that follow, at
            least 1.
        seed (`int`, *optional*, defaults to 0): same seed, same data, same codebooks on the CPU.

    Attributes:
        codebooks (`torch.FloatTensor` of shape `(num_levels, codebook_size, embedding_dim)`): `None` before `fit`.
        train_codes (`torch.LongTensor` of shape `(num_items, num_levels)`): codes of the training items, on their
            device; `None` before `fit` and after `from_pretrained` (they belong to the catalogue, not to the
            quantizer).
        embedding_mean (`torch.FloatTensor` of shape `(embedding_dim,)`, *optional*): What whoever made the embeddings
            subtracted from them (`concat_embeddings`), for new items. Kept here, and not read.

    Example:
        >>> quantizer = ResidualKMeans(num_levels=3, codebook_size=256).fit(item_embeddings)
        >>> semantic_ids = quantizer.train_codes  # (N, 3)
        >>> new_ids = quantizer.encode(new_embeddings)  # (M, 3)
    """

    def __init__(
        self,
        num_levels: int = 3,
        codebook_size: int = 256,
        balanced: bool | Literal["greedy"] = True,
        num_iterations: int = 20,
        num_full_iterations: int = 4,
        seed: int = 0,
    ):
        for name, value, least in (
            ("num_levels", num_levels, 1),
            ("codebook_size", codebook_size, 2),
            ("num_iterations", num_iterations, 0),
            ("num_full_iterations", num_full_iterations, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
        if not (isinstance(balanced, bool) or balanced == "greedy"):
            raise ValueError(f"`balanced` is {balanced!r}; it must be True, False or 'greedy'.")
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.balanced = balanced
        self.num_iterations = num_iterations
        self.num_full_iterations = num_full_iterations
        self.seed = seed
        self.codebooks: torch.Tensor | None = None
        self.train_codes: torch.Tensor | None = None
        self.embedding_mean: torch.Tensor | None = None

    def fit(
        self, item_embeddings: torch.Tensor | np.ndarray | EmbeddingFiles, folder: str | os.PathLike | None = None
    ) -> "ResidualKMeans":
        """Trains the codebooks on all rows, on the device of `item_embeddings`.

        Memory: one float32 copy of the embeddings (the residuals), about 300 bytes per item and less than 3 GiB of
            work space. `EmbeddingFiles` are not copied: they are read again, twice or more in each iteration over all
            items, of which one is often enough (`num_full_iterations=1`).

        Args:
            item_embeddings (`torch.FloatTensor`, `numpy.ndarray` or `EmbeddingFiles` of shape `(num_items,
                embedding_dim)`): any float type, every value finite, `num_items >= codebook_size`. Not changed, not
                normalised.
            folder (`str` or `Path`, *optional*): Where a level is written when it is trained. Levels that are there
                are taken as they are, so that a fit of the same items that was stopped goes on; give another folder
                for other items or settings.

        Returns:
            The quantizer itself.

        Raises:
            ValueError: As `checked`; fewer items than codes; `EmbeddingFiles` with `balanced="greedy"`.
        """
        item_embeddings = self.checked(item_embeddings)
        if isinstance(item_embeddings, EmbeddingFiles) and self.balanced == "greedy":
            raise ValueError("balanced='greedy' needs all items in memory: give a tensor, or balanced=True.")
        if len(item_embeddings) < self.codebook_size:
            raise ValueError(
                f"{len(item_embeddings)} items cannot fill {self.codebook_size} codes per level; "
                f"set `codebook_size` to at most {len(item_embeddings)} or fit on more items."
            )
        generator = torch.Generator().manual_seed(self.seed)
        # distances lose their last digits where all items are far from the origin
        residuals: torch.Tensor | FileResiduals
        if isinstance(item_embeddings, EmbeddingFiles):
            residuals = FileResiduals(item_embeddings)
            center = residuals.center
        else:
            residuals = item_embeddings.to(torch.float32, copy=True)
            center = residuals.mean(dim=0)
            residuals -= center
        codebooks, codes = [], torch.empty(len(residuals), self.num_levels, dtype=torch.long, device=residuals.device)
        for level in range(self.num_levels):
            start = time.perf_counter()
            path = None if folder is None else Path(folder) / f"level-{level}.safetensors"
            centroids, codes[:, level] = self._level(residuals, generator, path)
            if isinstance(residuals, FileResiduals):
                residuals.levels.append((centroids, codes[:, level]))
            else:
                for block in row_blocks(len(residuals), residuals.shape[1], residuals.device):
                    residuals[block] -= centroids[codes[block, level]]
            codebooks.append(centroids + center if level == 0 else centroids)
            logger.info("level %d of %d: %.1f s", level + 1, self.num_levels, time.perf_counter() - start)
        self.codebooks, self.train_codes = torch.stack(codebooks), codes
        return self

    def _level(
        self, residuals: torch.Tensor | FileResiduals, generator: torch.Generator, path: Path | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Centroids (K, D) and codes (N,) of the next level, from `path` where they are there."""
        if path is not None and path.is_file():
            known = load_file(path)
            generator.set_state(known["generator"])
            return known["centroids"].to(residuals.device), known["codes"].to(residuals.device)
        centroids, codes = train_codebook(
            residuals,
            self.codebook_size,
            balanced=self.balanced,
            num_iterations=self.num_iterations,
            num_full_iterations=self.num_full_iterations,
            generator=generator,
        )
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            found = {"centroids": centroids.cpu().contiguous(), "codes": codes.cpu().contiguous()}
            save_file(found | {"generator": generator.get_state()}, partial)
            partial.replace(path)
        return centroids, codes

    def fit_encode(self, item_embeddings: torch.Tensor | np.ndarray | EmbeddingFiles) -> torch.Tensor:
        """`fit`, then `train_codes` (num_items, num_levels): the balanced codes where `balanced=True`."""
        self.fit(item_embeddings)
        assert self.train_codes is not None
        return self.train_codes

    def encode(self, item_embeddings: torch.Tensor | np.ndarray | EmbeddingFiles) -> torch.Tensor:
        """Codes of any items by the nearest centroid of each level (the papers' rule).

        Args:
            item_embeddings (`torch.FloatTensor`, `numpy.ndarray` or `EmbeddingFiles` of shape `(num_items,
                embedding_dim)`): any float type.

        Returns:
            `torch.LongTensor` of shape `(num_items, num_levels)`, values in `[0, codebook_size)`, on the items'
            device.

        Raises:
            RuntimeError: Before `fit`. ValueError: As `checked`, with the width that the codebooks were trained on.
        """
        codebooks = self._fitted()
        item_embeddings = self.checked(item_embeddings, width=codebooks.shape[2])
        codebooks = codebooks.to(item_embeddings.device)
        codes = torch.empty(len(item_embeddings), self.num_levels, dtype=torch.long, device=item_embeddings.device)
        center = codebooks[0].mean(dim=0)
        levels = [codebooks[0] - center, *codebooks[1:]]
        for block in row_blocks(len(item_embeddings), item_embeddings.shape[1], item_embeddings.device):
            residuals = item_embeddings[block].float() - center
            for level, centroids in enumerate(levels):
                codes[block, level] = nearest_centroids(residuals, centroids)
                residuals -= centroids[codes[block, level]]
        return codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Sum of the codes' centroids.

        Args:
            codes (`torch.LongTensor` of shape `(num_items, num_levels)`): values in `[0, codebook_size)`.

        Returns:
            `torch.FloatTensor` of shape `(num_items, embedding_dim)`, float32, on the device of `codes`.
        """
        codebooks = self._fitted().to(codes.device)
        if codes.ndim != 2 or codes.shape[1] != self.num_levels:
            raise ValueError(
                f"`codes` has shape {tuple(codes.shape)}; this quantizer decodes (num_items, {self.num_levels}). "
                f"Cut a level that a collision policy appended: codes[:, :{self.num_levels}]."
            )
        if len(codes) > 0 and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"`codes` holds values from {int(codes.min())} to {int(codes.max())}; "
                f"they must be in [0, {self.codebook_size})."
            )
        decoded = codebooks[0][codes[:, 0]]
        for level in range(1, self.num_levels):
            decoded += codebooks[level][codes[:, level]]
        return decoded

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `quantizer_config.json` and `quantizer.safetensors`; the folder may be a model's folder."""
        codebooks = self._fitted()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "quantizer_type": "residual_kmeans",
            "num_levels": self.num_levels,
            "codebook_size": self.codebook_size,
            "embedding_dim": codebooks.shape[2],
            "balanced": self.balanced,
            "num_iterations": self.num_iterations,
            "num_full_iterations": self.num_full_iterations,
            "seed": self.seed,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        mean = {} if self.embedding_mean is None else {"embedding_mean": self.embedding_mean}
        save_file({"codebooks": codebooks.cpu().contiguous(), **mean}, folder / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "ResidualKMeans":
        """Reads what `save_pretrained` wrote into a local folder; the codebooks come on the CPU."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"No {CONFIG_NAME} in {folder}: give the local folder that `save_pretrained` wrote "
                "(download a Hub repository first, with `huggingface_hub.snapshot_download`)."
            )
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("quantizer_type") != "residual_kmeans":
            raise ValueError(f"{path} describes another quantizer than residual k-means.")
        embedding_dim = config.pop("embedding_dim")
        quantizer = cls(**config)
        tensors = load_file(Path(folder) / WEIGHTS_NAME)
        quantizer.codebooks, quantizer.embedding_mean = tensors["codebooks"], tensors.get("embedding_mean")
        expected = (quantizer.num_levels, quantizer.codebook_size, embedding_dim)
        if tuple(quantizer.codebooks.shape) != expected:
            raise ValueError(
                f"{WEIGHTS_NAME} in {folder} holds codebooks of shape {tuple(quantizer.codebooks.shape)}, but "
                f"{CONFIG_NAME} says {expected}: the two files are not of one quantizer, save it again."
            )
        return quantizer

    def _fitted(self) -> torch.Tensor:
        if self.codebooks is None:
            raise RuntimeError(
                "This ResidualKMeans has no codebooks yet: call `fit`, or load one with `from_pretrained`."
            )
        return self.codebooks

    def checked(
        self, item_embeddings: torch.Tensor | np.ndarray | EmbeddingFiles, width: int | None = None
    ) -> torch.Tensor | EmbeddingFiles:
        """
        The embeddings, if `fit` and `encode` can take them.

        Args:
            item_embeddings (`torch.FloatTensor`, `numpy.ndarray` or `EmbeddingFiles` of shape `(num_items,
                embedding_dim)`): Any float type.
            width (`int`, *optional*): The `embedding_dim` they must have; default any.

        Returns:
            An array as a tensor that shares its memory, a tensor without its gradient, `EmbeddingFiles` as they are.

        Raises:
            ValueError: Anything but a float matrix, another width, or rows with NaN or infinite values.
        """
        if not isinstance(item_embeddings, EmbeddingFiles):
            item_embeddings = torch.as_tensor(item_embeddings).detach()
            if item_embeddings.ndim != 2 or not item_embeddings.is_floating_point():
                raise ValueError(
                    f"`item_embeddings` has shape {tuple(item_embeddings.shape)} and type {item_embeddings.dtype}; "
                    "it must be a float matrix (num_items, embedding_dim)."
                )
        if width is not None and item_embeddings.shape[1] != width:
            raise ValueError(
                f"`item_embeddings` has width {item_embeddings.shape[1]}, but the codebooks were trained on width "
                f"{width}: encode with the embedding model that the quantizer was fitted on."
            )
        broken = 0
        for block in row_blocks(len(item_embeddings), item_embeddings.shape[1], item_embeddings.device):
            broken += int((~item_embeddings[block].isfinite()).any(dim=1).sum())
        if broken > 0:
            raise ValueError(
                f"{broken} of {len(item_embeddings)} rows of `item_embeddings` hold NaN or infinity: drop these items "
                "or repair their embeddings first (`numpy.isfinite(x).all(axis=1)` finds the rows)."
            )
        return item_embeddings
