"""Ids are names: what becomes an integer, what stays text, what is refused, and one test of membership."""

import numpy as np
import pandas as pd
import pytest
import torch

from onerec_hf import Catalogue
from onerec_hf.models.item_ids import id_array

ANY = {
    "int8": np.array([1, 2], dtype=np.int8),
    "uint64": np.array([1, 2], dtype=np.uint64),
    "float": np.array([1.0, 2.0]),
    "float16": np.array([1.0, 2.0], dtype=np.float16),
    "objects": np.array([1, np.int32(2)], dtype=object),
    "list": [1, np.uint8(2)],
    "range": range(1, 3),
    "tensor": torch.tensor([1, 2], dtype=torch.int32),
    "series": pd.Series([1, 2]),
    "category": pd.Series([1, 2]).astype("category"),
    "nullable": pd.Series([1, 2], dtype="Int64"),
}


@pytest.mark.parametrize("kind", ANY)
def test_whole_numbers_of_any_type_are_int64(kind):
    found = id_array(ANY[kind])
    assert found.dtype == np.int64 and found.tolist() == [1, 2]
    catalogue = Catalogue([[0, 0], [0, 1], [1, 0]], [4, 4], [1, 2, 3])
    assert catalogue.index_of(ANY[kind]).tolist() == [0, 1]
    assert Catalogue([[0, 0], [0, 1]], [4, 4], ANY[kind]).item_ids.tolist() == [1, 2]


def test_text_of_any_type_stays_text(tmp_path):
    for ids in (["007", "7"], np.array(["007", "7"], dtype=object), pd.Series(["007", "7"], dtype="category")):
        catalogue = Catalogue([[0, 0], [0, 1]], [4, 4], ids)
        assert catalogue.item_ids.tolist() == ["007", "7"]
        catalogue.save_pretrained(tmp_path)
        assert Catalogue.from_pretrained(tmp_path).index_of(ids).tolist() == [0, 1]


NO_IDS = [
    [2**63, 1],
    np.array([2**63 + 5], dtype=np.uint64),
    [1.5, 2],
    [2.0**54, 1],
    [True, False],
    [1, "a"],
    ["a", None],
]


@pytest.mark.parametrize("ids", [*NO_IDS, [float("nan"), 1]])
def test_what_is_no_id_is_refused(ids):
    with pytest.raises(ValueError, match=r"item_ids hold .*Pass them as text"):
        id_array(ids)


@pytest.mark.parametrize(
    "own, wanted, found",
    [
        (["item0", "item1"], ["item1", "item10", "item", 1, None, float("nan"), ""], [1, -1, -1, -1, -1, -1, -1]),
        (["item0", "item1"], np.array(["item10", "item1"]), [-1, 1]),
        (
            [10, 11],
            [11, "11", None, 2**64, -(2**70), 11.0, 11.5, float("inf"), True],
            [1, -1, -1, -1, -1, 1, -1, -1, -1],
        ),
        ([10, 11], np.array([2**64 - 1, 10], dtype=np.uint64), [-1, 0]),
        ([10, 11], np.array(["10", "x"]), [-1, -1]),
        ([10, 11], np.array([[10, 9], [11, 12]]), [[0, -1], [1, -1]]),
        ([10, 11], [], []),
        ([2**53, 2**53 + 1], [2**53 + 1, float(2**53 + 2)], [1, -1]),  # floats beyond 2^53 are no names any more
    ],
)
def test_membership(own, wanted, found):
    catalogue = Catalogue([[0, 0], [0, 1]], [4, 4], own)
    assert catalogue.index_of(wanted, unknown="ignore").tolist() == found
    if np.size(found) and np.min(found) < 0:
        with pytest.raises(KeyError, match="item ids are not in the catalogue of 2 items; the first is"):
            catalogue.index_of(wanted)


def test_errors_name_the_kind():
    catalogue = Catalogue([[0, 0], [0, 1]], [4, 4], [10, 11])
    with pytest.raises(KeyError, match=r"2 of 2 .* the first is '10', and the catalogue's ids are integers"):
        catalogue.index_of(["10", "11"])
    with pytest.raises(ValueError, match="lists of unequal length"):
        catalogue.index_of([[10], [10, 11]])
    with pytest.raises(ValueError, match="unknown='skip': allowed are 'error' and 'ignore'"):
        catalogue.index_of([10], unknown="skip")


def test_a_random_catalogue_finds_its_own_and_nothing_else():
    generator = np.random.default_rng(0)
    for text in (False, True):
        ids = generator.choice(10_000, 300, replace=False)
        names = [str(i) for i in ids] if text else ids
        catalogue = Catalogue(np.stack([np.arange(300) // 20, np.arange(300) % 20], 1), [15, 20], names)
        wanted = generator.integers(0, 10_000, 1000)
        place = {name: i for i, name in enumerate(ids.tolist())}
        expected = [place.get(i, -1) for i in wanted.tolist()]
        assert catalogue.index_of([str(i) for i in wanted] if text else wanted, unknown="ignore").tolist() == expected
