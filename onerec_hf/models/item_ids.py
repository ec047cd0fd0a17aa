"""Ids by which the outside knows items: whole numbers or text, and nothing that turns one into the other on the way.

An id is a name. `1` and `"1"` are two names, `"007"` is not `7`, and what numpy would cast to fit is refused or
unknown.
"""

from typing import Any

import numpy as np
import torch

_INT64_MAX = np.iinfo(np.int64).max
_WHOLE_FLOATS = 2**53  # from here on neighbouring whole numbers are the same float


def is_text(ids: np.ndarray) -> bool:
    """Whether the ids of a catalogue are text; they are int64 otherwise."""
    return ids.dtype.kind == "U"


def id_array(ids: Any, name: str = "item_ids") -> np.ndarray:
    """
    Ids as one array: int64, or text.

    Args:
        ids: Array, tensor, Series or list, of any shape. Whole floats up to 2^53 (integers that met a missing value on
            their way) become integers.
        name: What they are called, for errors.

    Raises:
        ValueError: For integers beyond 64 bits, other floats, booleans, missing values, text beside numbers, and lists
            of unequal length.
    """
    array = _as_array(ids, name)
    if array.dtype.kind == "U" or array.dtype == np.int64:
        return array
    if array.dtype.kind == "i":
        return array.astype(np.int64)
    if array.dtype.kind == "u" and (array.size == 0 or array.max() <= _INT64_MAX):
        return array.astype(np.int64)
    flat = array.ravel().tolist()
    if all(isinstance(value, str) for value in flat):
        return np.array(flat, dtype=str).reshape(array.shape)
    numbers = [_whole(value) for value in flat]
    if None in numbers:
        first = flat[numbers.index(None)]
        raise ValueError(
            f"{name} hold {first!r} ({type(first).__name__}): ids are whole numbers of 64 bits, or text, all of one "
            "kind. Pass them as text (strings)."
        )
    return np.array(numbers, dtype=np.int64).reshape(array.shape)


def positions(known: np.ndarray, order: np.ndarray, ids: Any) -> np.ndarray:
    """
    Places of ids among the known ones; the one test of membership.

    Args:
        known (`np.ndarray` of shape (N,)): Sorted ids, int64 or text.
        order (`np.ndarray` of shape (N,)): What to return for each of them.
        ids: Of any shape. An id of another kind (text among numbers, null, a fraction, more than 64 bits) is not
            known.

    Returns:
        `np.ndarray` int64 of the same shape, -1 where an id is not known.
    """
    array = _as_array(ids, "ids")
    if array.dtype.kind == known.dtype.kind or (array.dtype.kind == "i" and not is_text(known)):
        wanted, fits = array, np.ones(array.shape, dtype=bool)
    else:
        flat: list = array.ravel().tolist()
        of_kind: list = [
            (value if isinstance(value, str) else None) if is_text(known) else _whole(value) for value in flat
        ]
        fits = np.array([value is not None for value in of_kind], dtype=bool).reshape(array.shape)
        filler = known[0].item()
        filled = [filler if value is None else value for value in of_kind]
        wanted = np.array(filled, dtype=str if is_text(known) else np.int64).reshape(array.shape)
    if not wanted.size:
        return np.zeros(wanted.shape, dtype=np.int64)
    place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(fits & (known[place] == wanted), order[place], -1)


def is_node_masks(allowed_items: Any) -> bool:
    """Whether these are the masks, one per level, that `catalogue.node_masks` makes of a mask of items."""
    listed = isinstance(allowed_items, (list, tuple)) and len(allowed_items) > 0
    return listed and all(
        isinstance(a, torch.Tensor) and a.dtype == torch.bool and a.dim() == 2 for a in allowed_items
    )


def allowed_mask(catalogue: Any, allowed_items: Any) -> torch.Tensor:
    """
    The items that may be recommended, as a mask.

    Args:
        catalogue ([`Catalogue`]): Whose items they are.
        allowed_items: A bool mask (B, N) or (1, N); or item ids: a list for all users, or one list per user.

    Returns:
        `torch.BoolTensor` of shape (B, N) or (1, N), on the catalogue's device.

    Raises:
        KeyError: For item ids that the catalogue does not have. ValueError: For a mask of numbers in place of
            booleans, and for what `catalogue.node_masks` made of a mask, from which the items cannot be read.
    """
    if is_node_masks(allowed_items):
        raise ValueError(
            "allowed_items is what `catalogue.node_masks` made of a mask: here the mask itself is needed."
        )
    if isinstance(allowed_items, str) or not (hasattr(allowed_items, "__len__") or hasattr(allowed_items, "__iter__")):
        raise ValueError(
            f"allowed_items={allowed_items!r}: a list of item ids, also for one item, or a bool mask (B, N)."
        )
    if isinstance(allowed_items, (torch.Tensor, np.ndarray)):
        array = (
            torch.as_tensor(allowed_items)
            if isinstance(allowed_items, torch.Tensor) or allowed_items.dtype.kind == "b"
            else None
        )
        if array is not None and array.dtype == torch.bool:
            return array.to(catalogue.device)
        shape, numbers = (
            tuple(allowed_items.shape),
            np.asarray(allowed_items.tolist() if array is not None else allowed_items),
        )
        if (
            numbers.dtype.kind in "iuf"
            and shape
            and shape[-1] == catalogue.num_items
            and np.isin(numbers, (0, 1)).all()
        ):
            raise ValueError(
                f"allowed_items of shape {shape} holds 0 and 1: a mask is boolean, `mask.bool()`; item ids are a list "
                "of them."
            )
        allowed_items = numbers.tolist()
    rows = list(allowed_items)
    per_user = bool(rows) and all(isinstance(row, (list, tuple, set, np.ndarray, torch.Tensor)) for row in rows)
    rows = rows if per_user else [rows]
    mask = torch.zeros(len(rows), catalogue.num_items, dtype=torch.bool)
    for own, ids in zip(mask, rows):
        own[torch.from_numpy(catalogue.index_of(ids.tolist() if hasattr(ids, "tolist") else ids))] = True
    return mask.to(catalogue.device)


def _as_array(ids: Any, name: str) -> np.ndarray:
    if isinstance(ids, (list, tuple, set, frozenset)):
        values = list(ids)
        if {type(value) for value in values} <= {
            int
        }:  # numpy would make text of numbers beside text, and floats of large ones
            try:
                return np.array(values, dtype=np.int64)
            except OverflowError:
                pass
        if values and {type(value) for value in values} == {str}:
            return np.array(values, dtype=str)
        try:
            array = np.array(values, dtype=object)
        except ValueError:
            array = np.array([None])
        if array.size and isinstance(array.flat[0], (list, tuple, np.ndarray)):
            raise ValueError(f"{name} are lists of unequal length: pass one list of ids at a time.")
        return array
    array = np.asarray(ids)
    return array if array.dtype.kind in "iufbOU" else array.astype(object)


def _whole(value: Any) -> int | None:
    """The value as an integer of 64 bits, None for anything else."""
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (float, np.floating)):
        return int(value) if float(value).is_integer() and abs(float(value)) <= _WHOLE_FLOATS else None
    if isinstance(value, (int, np.integer)):
        number = int(value)
        return number if -(2**63) <= number < 2**63 else None
    return None


__all__ = ["allowed_mask", "id_array", "is_node_masks", "is_text", "positions"]
