"""What every reward function is told of a completion, by IPA and by RL alike: its text, and the ids of the items that
it spells.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from ..models.catalogue import Catalogue
from ..models.tokenization_semantic_id import SemanticIdTokenizer
from .functions import completion_leaves

ITEM_IDS = "item_ids"


def spelled_items(completion_ids: Sequence[Sequence[int]], catalogue: Catalogue) -> list[list | None]:
    """
    The catalogue's own ids of the items that each completion spells, in order; None where it spells something else.

    Where items share a semantic ID, the most popular one stands for all of them.

    Args:
        completion_ids (`Sequence[Sequence[int]]`): R lists of token ids, of any lengths: L for each item; special
            tokens are skipped.
        catalogue (`Catalogue`): The existing items.

    Returns:
        R entries: a list of ids (one, or those of a session), or None.
    """
    leaves, owner = completion_leaves(completion_ids, catalogue)
    items = catalogue.item_of_each(leaves.clamp(min=0).unsqueeze(0).to(catalogue.device))[0].cpu()
    found: list[list | None] = [[] for _ in completion_ids]
    for place, leaf, item_id in zip(owner.tolist(), leaves.tolist(), catalogue.item_ids[items.numpy()].tolist()):
        ids = found[place]
        found[place] = None if leaf < 0 or ids is None else [*ids, item_id]
    return found


def completion_columns(
    completion_ids: Sequence[Sequence[int]], catalogue: Catalogue, columns: Collection[str]
) -> dict[str, list[Any]]:
    """
    `item_ids` (see [`spelled_items`]) and `completions`, the text, of completions whose rows have `columns`.

    Raises:
        ValueError: Rows with a column `item_ids` of their own.
    """
    check_columns(columns)
    tokenizer = _tokenizer(tuple(catalogue.codebook_sizes))
    texts = tokenizer.batch_decode([list(ids) for ids in completion_ids], skip_special_tokens=True)
    return {"completions": texts, ITEM_IDS: spelled_items(completion_ids, catalogue)}


def check_columns(columns: Collection[str]) -> None:
    """Raises `ValueError` where rows have a column that reward functions are given by the trainer."""
    if ITEM_IDS in columns:
        raise ValueError(
            f"the rows have a column {ITEM_IDS!r}, under which reward functions get the ids of the items that a "
            "completion spells: rename it, `dataset.rename_column('item_ids', ...)`."
        )


@lru_cache(maxsize=4)
def _tokenizer(codebook_sizes: tuple[int, ...]) -> SemanticIdTokenizer:
    return SemanticIdTokenizer(codebook_sizes=codebook_sizes)


__all__ = ["ITEM_IDS", "check_columns", "completion_columns", "spelled_items"]
