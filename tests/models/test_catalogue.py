"""Catalogue and tokenizer: the index against plain sets, item ids, collisions, subsets, files, bad input."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from onerec_hf import Catalogue, SemanticIdTokenizer

from ..tiny import SIZES, tiny_catalogue

# items 0..5; 0 and 3 share a semantic ID, 3 is more popular
CODES = [[1, 0, 2], [0, 1, 1], [1, 0, 0], [1, 0, 2], [1, 2, 2], [0, 1, 0]]
POPULARITY = [1, 5, 2, 9, 0, 3]


def literal_catalogue(item_ids=None):
    return Catalogue(CODES, [3, 3, 3], item_ids, POPULARITY)


def test_index_of_six_items():
    catalogue = literal_catalogue()
    assert [codes.tolist() for codes in catalogue.codes] == [[0, 1], [1, 0, 2], [0, 1, 0, 2, 2]]
    first = [catalogue.first_child(torch.arange(len(codes) + 1), level) for level, codes in enumerate(catalogue.codes)]
    assert [children.tolist() for children in first] == [[0, 1, 3], [0, 2, 4, 5], [0, 1, 2, 3, 5, 6]]
    assert [surplus.tolist() for surplus in catalogue.surplus] == [[0, 0, 1], [0, 1, 2, 2], [0, 0, 0, 0, 1, 1]]
    assert catalogue.item_order.tolist() == [5, 1, 2, 3, 0, 4]  # the popular one of 0 and 3 comes first
    assert catalogue.leaves_of(CODES).tolist() == [3, 1, 2, 3, 4, 0]
    assert (catalogue.num_items, catalogue.num_semantic_ids, catalogue.max_children) == (6, 5, [2, 2, 2])
    assert catalogue.max_items == 2


def test_accepted_set_equals_the_catalogue():
    """Peers build the constraint from level sets or from the test file; ours accepts the catalogue and nothing
    else.
    """
    catalogue = tiny_catalogue()
    existing = {tuple(row) for row in catalogue.semantic_ids.tolist()}
    every = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    accepted = {tuple(row) for row in every[catalogue.leaves_of(every) >= 0].tolist()}
    assert accepted == existing


def test_items_with_expands_collisions():
    found = literal_catalogue().items_with([[1, 0, 2], [0, 1, 1], [2, 2, 2]])
    assert [items.tolist() for items in found] == [[3, 0], [1], []]


def test_items_of_ranks_items_not_semantic_ids():
    catalogue = literal_catalogue()
    leaves = torch.tensor([[3, 0, -1], [4, 2, 3]])
    assert catalogue.items_of(leaves, 4).tolist() == [[3, 0, 5, -1], [4, 2, 3, 0]]
    allowed = torch.ones(2, 6, dtype=torch.bool)
    allowed[0, 3] = False
    assert catalogue.items_of(leaves, 2, allowed).tolist() == [[0, 5], [4, 2]]


def test_alive_equals_an_index_rebuilt_from_the_subset():
    catalogue = tiny_catalogue()
    generator = torch.Generator().manual_seed(3)
    allowed = torch.rand(4, catalogue.num_items, generator=generator) < torch.tensor([[0.5], [0.1], [0.9], [0.0]])
    masks = catalogue.node_masks(allowed)
    for row in range(4):
        kept = {tuple(codes) for codes in catalogue.semantic_ids[allowed[row]].tolist()}
        for level in range(3):
            count = len({codes[: level + 1] for codes in kept})
            assert int(masks[level][row].sum()) == count
    first_item = catalogue.first_child(torch.arange(catalogue.num_semantic_ids), 2)
    leaf_codes = catalogue.semantic_ids[catalogue.item_order[first_item]]
    alive_codes = {tuple(codes) for codes in leaf_codes[masks[2][0]].tolist()}
    assert alive_codes == {tuple(codes) for codes in catalogue.semantic_ids[allowed[0]].tolist()}


@pytest.mark.parametrize("item_ids", [[50, 40, 30, 20, 10, 0], ["f", "é", "d", "c", "B0001", ""]])
def test_files_keep_integer_and_string_ids(tmp_path, item_ids):
    literal_catalogue(item_ids).save_pretrained(tmp_path)
    catalogue = Catalogue.from_pretrained(tmp_path)
    assert catalogue.item_ids.tolist() == item_ids
    assert catalogue.semantic_ids.tolist() == CODES
    assert catalogue.item_order.tolist() == [5, 1, 2, 3, 0, 4]
    assert catalogue.index_of(item_ids[::-1]).tolist() == [5, 4, 3, 2, 1, 0]


def test_unknown_items_are_named():
    with pytest.raises(KeyError, match=r"2 of 3 item ids are not in the catalogue of 6 items; the first is .*77"):
        literal_catalogue([10, 20, 30, 40, 50, 60]).index_of([20, 77, 88])
    assert literal_catalogue().index_of([]).shape == (0,)


@pytest.mark.parametrize(
    "codes, sizes, message",
    [
        ([[0, 1]], [4, 4, 4], r"shape \(1, 2\): expected \(num_items, 3\)"),
        (np.zeros((0, 3)), [4, 4, 4], "at least one item"),
        ([[0, 1, 3], [0, 9, 3]], [4, 4, 4], "first is item index 1: level 2 holds 9, allowed is 0 to 3"),
        ([[0] * 5], [8192] * 5, "65 bits per semantic ID"),
    ],
)
def test_bad_semantic_ids(codes, sizes, message):
    with pytest.raises(ValueError, match=message):
        Catalogue(codes, sizes)


def test_text_round_trip_in_openonerecs_spelling(tmp_path):
    tokenizer = SemanticIdTokenizer(codebook_sizes=[16, 8, 300])
    text = "<|sid_begin|><s_a_12><s_b_7><s_c_255><|sid_end|>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, 4 + 12, 4 + 16 + 7, 4 + 24 + 255, 2]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 4 + 324
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, SemanticIdTokenizer)
    assert again(text)["input_ids"] == ids and again.codebook_sizes == [16, 8, 300]
    assert again("<s_a_99>")["input_ids"] == [3]


def test_items_to_tokens_and_back(tmp_path):
    tokenizer = SemanticIdTokenizer(codebook_sizes=[3, 3, 3], catalogue=literal_catalogue(list("uvwxyz")))
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode_items([["u", "v"], ["w", "z"]])
    assert ids.tolist() == [[[5, 7, 12], [4, 8, 11]], [[5, 7, 10], [4, 8, 10]]]
    assert tokenizer.decode_items(ids[0]) == [["x", "u"], ["v"]]
    assert tokenizer.decode_items([[0, 0, 0]]) == [[]]
    with pytest.raises(ValueError, match="has no catalogue"):
        SemanticIdTokenizer(codebook_sizes=[3]).encode_items([1])


def test_a_million_items():
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 8192, (1_000_000, 3))
    tokenizer = SemanticIdTokenizer(codebook_sizes=[8192] * 3, catalogue=Catalogue(codes, [8192] * 3))
    ids = tokenizer.encode_items(np.arange(1_000_000)[::-1])
    assert (ids == codes[::-1] + tokenizer.level_offsets).all()


def test_a_new_version_beside_the_old_one():
    old = Catalogue(CODES[:4], [3, 3, 3], [10, 20, 30, 40], POPULARITY[:4])
    new = old.with_items(CODES[4:], [50, 60], POPULARITY[4:])
    whole = literal_catalogue([10, 20, 30, 40, 50, 60])
    assert new.item_ids.tolist() == whole.item_ids.tolist() and torch.equal(new.item_order, whole.item_order)
    assert all(torch.equal(a, b) for a, b in zip(new.codes + new.surplus, whole.codes + whole.surplus))
    assert old.num_items == 4 and old.leaves_of([[1, 2, 2]]).tolist() == [-1]
    with pytest.raises(ValueError, match="not all different"):
        old.with_items(CODES[4:], [50, 10], POPULARITY[4:])
    with pytest.raises(ValueError, match="has popularity: give the new items theirs"):
        old.with_items(CODES[4:], [50, 60])
    with pytest.raises(ValueError, match="catalogue are integers, the new ones text: pass integers"):
        old.with_items(CODES[4:], ["a", "b"], POPULARITY[4:])


@pytest.mark.parametrize("sizes", [[8192] * 3, [2**20] * 3, [300, 5, 40000]])
def test_index_of_large_codebooks_equals_plain_sets(sizes):
    """Codes of 8, 16 and 32 bits; sorted as one number with the item, or (60 bits) by argsort."""
    generator = np.random.default_rng(0)
    rows = np.stack([generator.choice(generator.integers(0, size, 9), 400) for size in sizes], axis=1)
    rows[0] = np.array(sizes) - 1
    catalogue = Catalogue(rows, sizes)
    for level in range(3):
        prefixes = sorted({tuple(row[: level + 1]) for row in rows.tolist()})
        assert catalogue.codes[level].tolist() == [prefix[-1] for prefix in prefixes]
        if level:
            above = sorted({tuple(row[:level]) for row in rows.tolist()})
            first = catalogue.first_child(torch.arange(len(above)), level - 1).tolist()
            assert [prefixes[child][:level] for child in first] == above
    leaves = sorted({tuple(row) for row in rows.tolist()})
    assert [leaves[leaf] for leaf in catalogue.leaves_of(rows).tolist()] == [tuple(row) for row in rows.tolist()]
    groups = [[i for i, row in enumerate(rows.tolist()) if tuple(row) == leaf] for leaf in leaves]
    assert [items.tolist() for items in catalogue.items_with(leaves)] == groups


def test_the_fingerprint_is_of_items_and_semantic_ids():
    codes, sizes = [[0, 1], [2, 3], [2, 2]], [4, 4]
    fingerprint = Catalogue(codes, sizes, [5, 6, 7]).fingerprint()
    assert fingerprint == "4ca3591b739160f7"
    assert (
        Catalogue(torch.tensor(codes), sizes, np.array([5, 6, 7], dtype=np.int32), [3, 1, 2]).fingerprint()
        == fingerprint
    )
    others = [
        Catalogue(codes[::-1], sizes, [5, 6, 7]),
        Catalogue(codes, [4, 5], [5, 6, 7]),
        Catalogue(codes, sizes, [5, 6, 8]),
        Catalogue(codes, sizes, ["5", "6", "7"]),
        Catalogue(codes, sizes, ["56", "", "7"]),
        Catalogue(codes[:2], sizes, [5, 6]),
    ]
    assert len({fingerprint, *(other.fingerprint() for other in others)}) == 7


def test_in_what_two_catalogues_differ():
    codes, ids = [[0, 0], [1, 3], [3, 2]], np.array([5, 7, 9])
    own = Catalogue(codes, [4, 4], ids)
    assert own.difference(Catalogue(codes, [4, 4], ids, popularity=[1, 2, 3])) is None
    assert "2 items are in the first alone, 1 in the second alone" in own.difference(
        Catalogue(codes[:2], [4, 4], [9, 11])
    )
    assert "the same items in another order" in own.difference(Catalogue(codes[::-1], [4, 4], ids[::-1].copy()))
    assert "have other semantic IDs" in own.difference(Catalogue(codes[::-1], [4, 4], ids))
    assert "3 items are in the first alone" in own.difference(Catalogue(codes, [4, 4], ids.astype(str)))
