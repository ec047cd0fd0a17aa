"""The items that may be generated: their ids, their semantic IDs and an index over them.

None of the papers says how decoding is kept to existing items (OneRec Technical Report, section 2.4, only counts illegal
semantic IDs).
"""

import os

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils.hub import cached_file

from .prefix_index import PrefixIndex

CATALOGUE_NAME = "catalogue.safetensors"


class Catalogue(PrefixIndex):
    r"""
    N items and their semantic IDs, indexed for constrained generation.

    An *item index* is a row 0..N-1 of `semantic_ids` and `item_ids`. Several items may share a semantic ID (a collision); they
    are then one leaf of the index, and are listed in it by falling `popularity`.

    Args:
        semantic_ids (array or tensor of shape (N, L)): Code of every item on every level, 0 to `codebook_sizes[l] - 1`.
        codebook_sizes (`list[int]`): Codes per level.
        item_ids (array of shape (N,), *optional*): The ids by which the outside knows the items, integers or strings, all
            different. Defaults to 0..N-1.
        popularity (array of shape (N,), *optional*): Larger is more popular; orders the items that share a semantic ID.

    Raises:
        ValueError: On shapes that do not fit, codes outside their codebook, repeated item ids, or an empty catalogue.
    """

    def __init__(self, semantic_ids, codebook_sizes, item_ids=None, popularity=None):
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        self.semantic_ids = self._checked(torch.as_tensor(np.asarray(semantic_ids)))  # (N, L)
        self.item_ids = np.arange(self.num_items) if item_ids is None else np.asarray(item_ids)
        if self.item_ids.shape != (self.num_items,):
            raise ValueError(f"item_ids has shape {self.item_ids.shape}, semantic_ids has {self.num_items} rows.")
        if self.item_ids.dtype.kind not in "iuU":
            self.item_ids = self.item_ids.astype(str)
        popularity = np.zeros(self.num_items) if popularity is None else np.asarray(popularity, dtype=np.float64)
        if popularity.shape != (self.num_items,):
            raise ValueError(f"popularity has shape {popularity.shape}, semantic_ids has {self.num_items} rows.")
        self.popularity = popularity
        self._sorted_item_ids = None  # built on the first look-up
        self._index_items()

    def _checked(self, semantic_ids: torch.Tensor) -> torch.Tensor:
        shape, levels = tuple(semantic_ids.shape), len(self.codebook_sizes)
        if len(shape) != 2 or shape[1] != levels or shape[0] == 0:
            raise ValueError(
                f"semantic_ids has shape {shape}: expected (num_items, {levels}) with at least one item, because "
                f"codebook_sizes={self.codebook_sizes} has {levels} levels."
            )
        outside = (semantic_ids < 0) | (semantic_ids >= torch.tensor(self.codebook_sizes))
        if outside.any():
            row, level = outside.nonzero()[0].tolist()
            raise ValueError(
                f"{int(outside.any(1).sum())} items have a code outside their codebook; the first is item index {row}: level "
                f"{level + 1} holds {int(semantic_ids[row, level])}, allowed is 0 to {self.codebook_sizes[level] - 1}."
            )
        bits = sum((size - 1).bit_length() for size in self.codebook_sizes)
        if bits > 62:
            raise ValueError(f"codebook_sizes={self.codebook_sizes} need {bits} bits per semantic ID; 62 is the most.")
        return semantic_ids.to(torch.int16 if max(self.codebook_sizes) <= 2**15 else torch.int32)

    def _index_items(self):
        key = torch.zeros(self.num_items, dtype=torch.long)
        for level, size in enumerate(self.codebook_sizes):
            key = key * size + self.semantic_ids[:, level]
        by_popularity = np.argsort(-self.popularity, kind="stable")
        order = torch.from_numpy(by_popularity)
        key, place = key[order].sort(stable=True)  # by semantic ID, popular items first inside one
        self.item_order = order[place].int()  # (N,) items, leaf by leaf
        self._build_index(key, self.codebook_sizes, self.semantic_ids.dtype)

    def __len__(self) -> int:
        return self.num_items

    def __repr__(self) -> str:
        return (
            f"Catalogue({self.num_items} items, {self.num_semantic_ids} semantic IDs, "
            f"codebook_sizes={self.codebook_sizes})"
        )

    @property
    def num_items(self) -> int:
        return self.semantic_ids.shape[0]

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def device(self) -> torch.device:
        return self.semantic_ids.device

    def to(self, device) -> "Catalogue":
        """The catalogue with its index on `device`; moves in place, costs nothing when it is already there."""
        if torch.device(device) != self.device:
            for name in ("semantic_ids", "item_order"):
                setattr(self, name, getattr(self, name).to(device))
            self.codes = [codes.to(device) for codes in self.codes]
            self.first_child = [first.to(device) for first in self.first_child]
        return self

    def index_of(self, item_ids) -> np.ndarray:
        """
        Item indices of original item ids.

        Args:
            item_ids (array of any shape): Ids as given at construction.

        Returns:
            `np.ndarray` int64 of the same shape.

        Raises:
            KeyError: Naming how many ids are unknown, and the first of them.
        """
        if self._sorted_item_ids is None:
            order = np.argsort(self.item_ids, kind="stable")
            self._sorted_item_ids = (self.item_ids[order], order)
        known, order = self._sorted_item_ids
        wanted = np.asarray(item_ids)
        if wanted.size == 0:
            return np.zeros(wanted.shape, dtype=np.int64)
        if known.dtype.kind == "U" and wanted.dtype.kind != "U":
            wanted = wanted.astype(str)
        if known.dtype.kind != "U" and wanted.dtype.kind not in "iu":
            raise KeyError(f"the item ids of this catalogue are integers, given were {wanted.dtype} values.")
        place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        unknown = known[place] != wanted
        if unknown.any():
            raise KeyError(
                f"{int(unknown.sum())} of {wanted.size} item ids are not in the catalogue of {self.num_items} items; the "
                f"first is {wanted[unknown].flat[0]!r}. Remove them from the histories, or add the items first."
            )
        return order[place]

    def items_of(self, leaves: torch.LongTensor, k: int, allowed: torch.BoolTensor | None = None) -> torch.LongTensor:
        """
        The first `k` items of ranked semantic IDs, collisions expanded (popular items first inside a semantic ID).

        Args:
            leaves (`torch.LongTensor` of shape (B, S)): Ranked leaves, best first, -1 for none.
            k (`int`): Items wanted per row.
            allowed (`torch.BoolTensor` of shape (B, N), *optional*): Items each row may get; the others of a leaf are skipped.

        Returns:
            `torch.LongTensor` of shape (B, k): item indices, -1 where the leaves hold fewer than `k` items.
        """
        first = self.first_child[-1].long()
        start, end = first[leaves.clamp(min=0)], first[leaves.clamp(min=0) + 1]
        place = start.unsqueeze(2) + torch.arange(self.max_items, device=leaves.device)  # (B, S, largest collision)
        real = (place < end.unsqueeze(2)) & (leaves >= 0).unsqueeze(2)
        items = self.item_order[place.clamp(max=self.num_items - 1)].flatten(1).long()
        real = real.flatten(1)
        if allowed is not None:
            real = real & allowed.to(self.device).expand(len(leaves), -1).gather(1, items)
        rank = torch.where(real, real.cumsum(1) - 1, k).clamp(
            max=k
        )  # unwanted and surplus items go to one spare column
        result = torch.full((len(leaves), k + 1), -1, dtype=torch.long, device=leaves.device)
        return result.scatter_(1, rank, torch.where(rank < k, items, -1))[:, :k]

    def leaves_of(self, codes) -> torch.LongTensor:
        """Leaves of semantic IDs (S, L) -> (S,); -1 where no item carries the codes."""
        codes, node = torch.as_tensor(np.asarray(codes), device=self.device), None
        for level in range(self.num_levels):
            node = self.step(node, level, codes[:, level])
        return node

    def items_with(self, codes) -> list[np.ndarray]:
        """Item indices that carry each of the semantic IDs (S, L), popular ones first; an empty array where there is none."""
        first, order = self.first_child[-1].cpu().numpy(), self.item_order.cpu().numpy()
        leaves = self.leaves_of(codes).tolist()
        return [order[first[leaf] : first[leaf + 1]] if leaf >= 0 else order[:0] for leaf in leaves]

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `catalogue.safetensors` into the folder (made if it does not exist)."""
        os.makedirs(save_directory, exist_ok=True)
        tensors = {
            "semantic_ids": self.semantic_ids.cpu().to(torch.int32),
            "popularity": torch.from_numpy(self.popularity),
            "codebook_sizes": torch.tensor(self.codebook_sizes),
        }
        if self.item_ids.dtype.kind == "U":
            encoded = [item.encode() for item in self.item_ids.tolist()]
            tensors["item_id_ends"] = torch.tensor([len(item) for item in encoded]).cumsum(0)
            tensors["item_id_bytes"] = torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy())
        else:
            tensors["item_ids"] = torch.from_numpy(self.item_ids.astype(np.int64))
        save_file(tensors, os.path.join(save_directory, CATALOGUE_NAME), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "Catalogue":
        """
        Load the catalogue of a folder or a Hub repository.

        Raises:
            OSError: When there is no `catalogue.safetensors`.
            ValueError: When the file cannot be read as a catalogue.
        """
        path = cached_file(str(pretrained_model_name_or_path), CATALOGUE_NAME, **kwargs)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            sizes, semantic_ids, popularity = (tensors[n] for n in ("codebook_sizes", "semantic_ids", "popularity"))
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable catalogue ({error}). Download or save it again; the file may be cut off."
            ) from error
        if "item_ids" in tensors:
            item_ids = tensors["item_ids"].numpy()
        else:
            raw, ends = tensors["item_id_bytes"].numpy().tobytes(), tensors["item_id_ends"].tolist()
            item_ids = np.array([raw[a:b].decode() for a, b in zip([0, *ends], ends)])
        return cls(semantic_ids, sizes.tolist(), item_ids, popularity.numpy())


__all__ = ["CATALOGUE_NAME", "Catalogue"]
