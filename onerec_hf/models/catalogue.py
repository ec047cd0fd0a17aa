"""The items that may be generated: their ids, their semantic IDs and an index over them.

None of the papers says how decoding is kept to existing items (OneRec Technical Report, section 2.4, only counts
illegal semantic IDs).
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils.hub import cached_file

from .item_ids import id_array, is_text, positions
from .prefix_index import PrefixIndex

CATALOGUE_NAME = "catalogue.safetensors"


class Catalogue(PrefixIndex):
    r"""
    N items and their semantic IDs, indexed for constrained generation.

    An *item index* is a row 0..N-1 of `semantic_ids` and `item_ids`. Several items may share a semantic ID (a
    collision); they are then one leaf of the index, and are listed in it by falling `popularity`.

    Args:
        semantic_ids (array or tensor of shape (N, L)): Code of every item on every level, 0 to `codebook_sizes[l] -
            1`.
        codebook_sizes (`list[int]`): Codes per level.
        item_ids (array of shape (N,), *optional*): The ids by which the outside knows the items, integers of 64 bits
            or strings, all different. Defaults to 0..N-1.
        popularity (array of shape (N,), *optional*): Larger is more popular; orders the items that share a semantic
            ID.

    Raises:
        ValueError: On shapes that do not fit, codes outside their codebook, repeated item ids, ids that are neither
            integers nor strings, or an empty catalogue.
    """

    def __init__(
        self,
        semantic_ids: ArrayLike,
        codebook_sizes: Sequence[int],
        item_ids: ArrayLike | None = None,
        popularity: ArrayLike | None = None,
    ):
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        self.semantic_ids = self._checked(torch.as_tensor(np.asarray(semantic_ids)))  # (N, L)
        self.item_ids = np.arange(self.num_items) if item_ids is None else id_array(item_ids)
        if self.item_ids.shape != (self.num_items,):
            raise ValueError(f"item_ids has shape {self.item_ids.shape}, semantic_ids has {self.num_items} rows.")
        self._sorted_item_ids: tuple[np.ndarray, np.ndarray] | None = None  # built on the first look-up
        if item_ids is not None and self._number_of_ids() < self.num_items:
            raise ValueError("item_ids are not all different: an id names one item. Remove the repeated rows.")
        self.popularity = None if popularity is None else np.asarray(popularity, dtype=np.float64)
        if popularity is not None and self.popularity.shape != (self.num_items,):
            raise ValueError(f"popularity has shape {self.popularity.shape}, semantic_ids has {self.num_items} rows.")
        self._index_items()

    def _number_of_ids(self) -> int:
        if is_text(self.item_ids):  # sorting strings is slow
            return len(set(self.item_ids.tolist()))
        ordered = np.sort(self.item_ids)
        return 1 + int((ordered[1:] != ordered[:-1]).sum())

    def _checked(self, semantic_ids: torch.Tensor) -> torch.Tensor:
        shape, levels = tuple(semantic_ids.shape), len(self.codebook_sizes)
        if len(shape) != 2 or shape[1] != levels or shape[0] == 0:
            raise ValueError(
                f"semantic_ids has shape {shape}: expected (num_items, {levels}) with at least one item, because "
                f"codebook_sizes={self.codebook_sizes} has {levels} levels."
            )
        if bool((semantic_ids.amin(0) < 0).any() | (semantic_ids.amax(0) >= torch.tensor(self.codebook_sizes)).any()):
            outside = (semantic_ids < 0) | (semantic_ids >= torch.tensor(self.codebook_sizes))
            row, level = outside.nonzero()[0].tolist()
            raise ValueError(
                f"{int(outside.any(1).sum())} items have a code outside their codebook; the first is item index "
                f"{row}: level {level + 1} holds {int(semantic_ids[row, level])}, allowed is 0 to "
                f"{self.codebook_sizes[level] - 1}."
            )
        bits = sum((size - 1).bit_length() for size in self.codebook_sizes)
        if bits > 62:
            raise ValueError(f"codebook_sizes={self.codebook_sizes} need {bits} bits per semantic ID; 62 is the most.")
        return semantic_ids.to(torch.int16 if max(self.codebook_sizes) <= 2**15 else torch.int32)

    def _index_items(self):
        bits = [(size - 1).bit_length() for size in self.codebook_sizes]
        codes, key = self.semantic_ids.numpy(), np.zeros(self.num_items, dtype=np.int64)
        for level, width in enumerate(bits):
            key = (key << width) | codes[:, level]
        order = None if self.popularity is None else np.argsort(-self.popularity, kind="stable")
        key = key if order is None else key[order]
        place_bits = self.num_items.bit_length()
        if sum(bits) + place_bits <= 63:  # sorting numbers is many times faster than sorting positions
            key = np.sort((key << place_bits) | np.arange(self.num_items))
            place, key = key & ((1 << place_bits) - 1), key >> place_bits
        else:
            place = np.argsort(key, kind="stable")
            key = key[place]
        place = place if order is None else order[place]
        self.item_order = torch.from_numpy(
            place.astype(np.int32)
        )  # (N,) items, leaf by leaf, popular ones first in a leaf
        self._build_index(key, self.codebook_sizes)

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
    def device(self) -> torch.device:
        return self.semantic_ids.device

    def to(self, device: str | torch.device) -> "Catalogue":
        """The catalogue with its index on `device`; moves in place, costs nothing when it is already there."""
        if torch.device(device) != self.device:
            for name in ("semantic_ids", "item_order"):
                setattr(self, name, getattr(self, name).to(device))
            self.codes = [codes.to(device) for codes in self.codes]
            self.surplus = [surplus.to(device) for surplus in self.surplus]
        return self

    def with_items(
        self, semantic_ids: ArrayLike, item_ids: ArrayLike, popularity: ArrayLike | None = None
    ) -> "Catalogue":
        """
        A new catalogue with more items behind the old ones, whose item indices stay what they are.

        This one is not touched, so a running process builds the next version beside it and swaps with
        `model.catalogue = catalogue.with_items(...)`: one assignment; a `generate` that is under way ends on the old
        version. Items leave by `allowed_items` masks until a version without them is built (`without_items`).

        Args:
            semantic_ids (array of shape (M, L)), item_ids (array of shape (M,)): As at construction, of the new items
                alone.
            popularity (array of shape (M,), *optional*): Demanded if, and only if, this catalogue has it.
        """
        if (popularity is None) != (self.popularity is None):
            raise ValueError(
                f"this catalogue has {'no ' * (self.popularity is None)}popularity: give the new items "
                f"{'none' if self.popularity is None else 'theirs'}, the items of one semantic ID are ordered by it."
            )
        item_ids = id_array(item_ids)
        if is_text(item_ids) != is_text(self.item_ids):
            own, new = ("text" if is_text(ids) else "integers" for ids in (self.item_ids, item_ids))
            raise ValueError(f"the item ids of this catalogue are {own}, the new ones {new}: pass {own}.")
        semantic_ids = self._checked(torch.as_tensor(np.asarray(semantic_ids)))
        return Catalogue(
            torch.cat([self.semantic_ids.cpu(), semantic_ids]),
            self.codebook_sizes,
            np.concatenate([self.item_ids, item_ids]),
            None if popularity is None else np.concatenate([self.popularity, popularity]),
        ).to(self.device)

    def without_items(self, item_ids: ArrayLike) -> "Catalogue":
        """A new catalogue without these items, whose item indices close up. KeyError: unknown ids; ValueError: nothing
        is left.
        """
        keep = np.ones(self.num_items, dtype=bool)
        keep[self.index_of(item_ids)] = False
        popularity = None if self.popularity is None else self.popularity[keep]
        codes = self.semantic_ids.cpu()[torch.from_numpy(keep)]
        return Catalogue(codes, self.codebook_sizes, self.item_ids[keep], popularity).to(self.device)

    def index_of(self, item_ids: Any, unknown: Literal["error", "ignore"] = "error") -> np.ndarray:
        """
        Item indices of original item ids: the one test of whether the catalogue has an item.

        Args:
            item_ids (array or list of any shape): Ids as given at construction. An id of another kind is unknown:
                `"1"` where the ids are integers, None, a fraction, a number beyond 64 bits.
            unknown: `"error"` raises for ids that the catalogue does not have, `"ignore"` gives -1 for them.

        Returns:
            `np.ndarray` int64 of the same shape.

        Raises:
            KeyError: Naming how many ids are unknown, and the first of them. ValueError: Lists of unequal length.
        """
        if unknown not in ("error", "ignore"):
            raise ValueError(f"unknown={unknown!r}: allowed are 'error' and 'ignore'.")
        if self._sorted_item_ids is None:
            order = np.argsort(self.item_ids, kind="stable")
            self._sorted_item_ids = (self.item_ids[order], order)
        known, order = self._sorted_item_ids
        found = positions(known, order, item_ids)
        if unknown == "error" and (absent := found < 0).any():
            values = np.array(item_ids, dtype=object) if isinstance(item_ids, (list, tuple)) else np.asarray(item_ids)
            first = values[absent].flat[0]
            first = first.item() if isinstance(first, np.generic) else first
            own = "text" if is_text(self.item_ids) else "integers"
            kind = "" if isinstance(first, str) == is_text(self.item_ids) else f", and the catalogue's ids are {own}"
            raise KeyError(
                f"{int(absent.sum())} of {found.size} item ids are not in the catalogue of {self.num_items} items; "
                f"the first is {first!r}{kind}. Remove them from the histories, or add the items first."
            )
        return found

    def items_of(self, leaves: torch.Tensor, k: int, allowed_items: torch.Tensor | None = None) -> torch.Tensor:
        """
        The first `k` items of ranked semantic IDs, collisions expanded (popular items first inside a semantic ID).

        Args:
            leaves (`torch.LongTensor` of shape (B, S)): Ranked leaves, best first, -1 for none.
            k (`int`): Items wanted per row.
            allowed_items (`torch.BoolTensor` of shape (B, N), *optional*): Items each row may get; the others of a
                leaf are skipped.

        Returns:
            `torch.LongTensor` of shape (B, k): item indices, -1 where the leaves hold fewer than `k` items.
        """
        return self._ranked_items(leaves, k, allowed_items)[0]

    def _ranked_items(self, leaves, k, allowed_items):
        """`items_of`, and the column of `leaves` that each item came from, (B, k) both."""
        items, real = (part.flatten(1) for part in self._items_in(leaves, allowed_items))
        origin = torch.arange(items.shape[1], device=leaves.device).expand_as(items) // self.max_items
        rank = torch.where(real, real.cumsum(1) - 1, k).clamp(max=k)  # unwanted and surplus ones go to a spare column
        result = torch.full((2, len(leaves), k + 1), -1, dtype=torch.long, device=leaves.device)
        values = torch.stack([torch.where(rank < k, items, -1), origin])
        return result.scatter_(2, rank.expand_as(values), values)[:, :, :k]

    def _items_in(self, leaves, allowed_items):
        """Items of each leaf (B, S, largest collision), popular ones first, and which of these places hold an allowed
        one.
        """
        start, end = (self.first_child(leaves.clamp(min=0) + more, self.num_levels - 1) for more in (0, 1))
        place = start.unsqueeze(2) + torch.arange(self.max_items, device=leaves.device)
        real = (place < end.unsqueeze(2)) & (leaves >= 0).unsqueeze(2)
        items = self.item_order[place.clamp(max=self.num_items - 1)].long()
        if allowed_items is not None:
            own = allowed_items.to(self.device).expand(len(leaves), -1)
            real = real & own.gather(1, items.flatten(1)).view(items.shape)
        return items, real

    def item_of_each(self, leaves: torch.Tensor, allowed_items: torch.Tensor | None = None) -> torch.Tensor:
        """The first (most popular) item of each leaf (B, S), among the allowed ones; -1 where there is none."""
        items, real = self._items_in(leaves, allowed_items)
        first = real.int().argmax(2, keepdim=True)
        return items.gather(2, first).squeeze(2).masked_fill(~real.any(2), -1)

    def leaves_of(self, codes: torch.Tensor | ArrayLike) -> torch.Tensor:
        """Leaves of semantic IDs (S, L) -> (S,); -1 where no item carries the codes."""
        codes = torch.as_tensor(codes if isinstance(codes, torch.Tensor) else np.asarray(codes), device=self.device)
        node = None
        for level in range(self.num_levels):
            node = self.step(node, level, codes[:, level])
        return node

    def items_with(self, codes: torch.Tensor | ArrayLike) -> list[np.ndarray]:
        """Item indices that carry each of the semantic IDs (S, L), popular ones first; an empty array where there is
        none.
        """
        leaves, order = self.leaves_of(codes), self.item_order.cpu().numpy()
        first, end = (self.first_child(leaves.clamp(min=0) + more, self.num_levels - 1) for more in (0, 1))
        end = torch.where(leaves >= 0, end, first)
        return [order[low:high] for low, high in zip(first.tolist(), end.tolist())]

    def node_masks(self, allowed_items: torch.Tensor) -> list[torch.Tensor]:
        """
        Per level, the nodes that still lead to an allowed item: a subset of the catalogue, without rebuilding it.

        Args:
            allowed_items (`torch.BoolTensor` of shape (B, N)): Items that may be generated, one row per request.

        Returns:
            `list[torch.BoolTensor]`: One (B, nodes of the level) mask per level. `generate` and `beam_search` take it
            in place of `allowed_items`, so that a filter that many requests share is worked out once.
        """
        if allowed_items.dtype != torch.bool or allowed_items.dim() != 2 or allowed_items.shape[1] != self.num_items:
            raise ValueError(
                f"allowed_items is {allowed_items.dtype} of shape {tuple(allowed_items.shape)}: expected a bool mask "
                f"(batch, {self.num_items}), one row per request and one column per item of the catalogue."
            )
        return self._node_masks(allowed_items.to(self.device).index_select(1, self.item_order))

    def fingerprint(self) -> str:
        """What tells catalogues of equal sizes apart: 16 hexadecimal digits of the item ids and semantic IDs, in their
        order.
        """
        digest = hashlib.sha256(repr((self.codebook_sizes, self.num_items)).encode())
        digest.update(self.semantic_ids.cpu().to(torch.int32).numpy().tobytes())
        digest.update("\n".join(self.item_ids).encode() if is_text(self.item_ids) else self.item_ids.tobytes())
        return digest.hexdigest()[:16]

    def difference(self, other: "Catalogue") -> str | None:
        """In what two catalogues are not the same, in words: item ids, their order or semantic IDs. `None` where they
        are equal.
        """
        if self.fingerprint() == other.fingerprint():
            return None
        own, theirs = set(self.item_ids.tolist()), set(other.item_ids.tolist())
        if own != theirs:
            what = f"{len(own - theirs)} items are in the first alone, {len(theirs - own)} in the second alone"
        elif self.item_ids.tolist() != other.item_ids.tolist():
            what = "they have the same items in another order"
        else:
            what = "their items are the same and have other semantic IDs"
        return f"the first has {self}, the second {other}; {what}"

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `catalogue.safetensors` into the folder (made if it does not exist)."""
        os.makedirs(save_directory, exist_ok=True)
        tensors = {
            "semantic_ids": self.semantic_ids.cpu().to(torch.int32),
            "codebook_sizes": torch.tensor(self.codebook_sizes),
        }
        if self.popularity is not None:
            tensors["popularity"] = torch.tensor(self.popularity)
        if is_text(self.item_ids):
            encoded = [str(item).encode() for item in self.item_ids.tolist()]
            tensors["item_id_ends"] = torch.tensor([len(item) for item in encoded]).cumsum(0)
            tensors["item_id_bytes"] = torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy())
        else:
            tensors["item_ids"] = torch.tensor(self.item_ids)  # a copy: the array may not be writable
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
            sizes, semantic_ids = (tensors[name] for name in ("codebook_sizes", "semantic_ids"))
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable catalogue ({error}). Download or save it again; the file may be cut off."
            ) from error
        if "item_ids" in tensors:
            item_ids = tensors["item_ids"].numpy()
        else:
            raw, ends = tensors["item_id_bytes"].numpy().tobytes(), tensors["item_id_ends"].tolist()
            item_ids = np.array([raw[a:b].decode() for a, b in zip([0, *ends], ends)])
        popularity = tensors["popularity"].numpy() if "popularity" in tensors else None
        return cls(semantic_ids, sizes.tolist(), item_ids, popularity)


__all__ = ["CATALOGUE_NAME", "Catalogue"]
