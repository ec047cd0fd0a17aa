"""Collision policies and the quality report, against numbers worked out by hand."""

import math

import pytest
import torch

from onerec_hf.semantic_ids import (
    ResidualKMeans,
    append_codes,
    plot_codebook_usage,
    quality_report,
    resolve_collisions,
)


def literal_quantizer() -> ResidualKMeans:
    """One-dimensional: level 1 has centroids 0 and 100, level 2 has -1, 0, 1 and 10."""
    quantizer = ResidualKMeans(num_levels=2, codebook_size=4)
    quantizer.codebooks = torch.tensor([[[0.0], [100.0], [200.0], [300.0]], [[-1.0], [0.0], [1.0], [10.0]]])
    return quantizer


EMBEDDINGS = torch.tensor([[0.2], [0.1], [100.9], [1.4], [0.3], [100.8]])
CODES = torch.tensor([[0, 1], [0, 1], [1, 2], [0, 2], [0, 1], [1, 2]])


def test_next_free_by_hand():
    """Under prefix 0, item 1 is nearest to code 1 and keeps it; then 0 takes the nearest free code -1 (code 2 belongs
    to item 3), and 4 the only one left. Under prefix 1, item 2 keeps code 2 and item 5 takes code 1 at distance
    0.8."""
    codes = resolve_collisions(CODES, literal_quantizer(), EMBEDDINGS, policy="next_free")
    assert codes.tolist() == [[0, 0], [0, 1], [1, 2], [0, 2], [0, 3], [1, 1]]


def test_extra_level_numbers_the_items():
    codes = resolve_collisions(CODES, literal_quantizer(), EMBEDDINGS, policy="extra_level")
    assert codes.tolist() == [[0, 1, 0], [0, 1, 1], [1, 2, 0], [0, 2, 0], [0, 1, 2], [1, 2, 1]]


def test_keep_changes_nothing():
    assert torch.equal(resolve_collisions(CODES, literal_quantizer(), EMBEDDINGS, policy="keep"), CODES)


def test_next_free_moves_only_what_collides():
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(500, 8, generator=generator)
    quantizer = ResidualKMeans(3, 16, balanced=False, num_iterations=3, num_full_iterations=1).fit(items)
    before = quantizer.train_codes
    after = resolve_collisions(before, quantizer, items, policy="next_free")
    assert len(torch.unique(after, dim=0)) == 500
    assert torch.equal(after[:, :2], before[:, :2])
    moved = (after != before).any(1)
    assert int(moved.sum()) == 500 - len(torch.unique(before, dim=0))  # one item of each semantic ID stays


def test_a_crowded_prefix_gives_to_the_nearest_one_with_room(caplog):
    """By hand: 0 and 100 have four places each. Of six items at 0, the two farthest from their own codes, 30 and 60,
    move to 100. Both are nearest to 99 there: 60 is nearer and gets it, 30 takes the last free one, 110.
    """
    embeddings = torch.tensor([[30.0], [0.0], [60.0], [1.0], [-1.0], [10.0], [101.0], [100.0], [210.0]])
    codes = torch.tensor([[0, 3], [0, 1], [0, 3], [0, 2], [0, 0], [0, 3], [1, 2], [1, 1], [2, 3]])
    resolved = resolve_collisions(codes, literal_quantizer(), embeddings, policy="next_free")
    expected = codes.clone()
    expected[0], expected[2] = torch.tensor([1, 3]), torch.tensor([1, 0])
    assert resolved.tolist() == expected.tolist()
    assert "2 items had more company under their first codes than there are codes behind these" in caplog.text


def test_any_number_of_equal_items_finds_places():
    """Items of which nothing is known have one vector: 14 of 16 places are taken, and all differ."""
    quantizer = literal_quantizer()
    codes = resolve_collisions(torch.zeros(14, 2, dtype=torch.long), quantizer, torch.zeros(14, 1), policy="next_free")
    assert len(torch.unique(codes, dim=0)) == 14
    assert torch.bincount(codes[:, 0]).tolist() == [4, 4, 4, 2]  # the nearest are full first
    deep = ResidualKMeans(num_levels=3, codebook_size=4)
    deep.codebooks = torch.cat([quantizer.codebooks * 10, quantizer.codebooks[1:]])[[0, 1, 2]]
    codes = resolve_collisions(torch.zeros(14, 3, dtype=torch.long), deep, torch.zeros(14, 1), policy="next_free")
    assert len(torch.unique(codes, dim=0)) == 14 and (codes[:, 0] == 0).all()
    # more than all codes behind the first one: 16 stay under it, those of the next nearest code are full next
    codes = resolve_collisions(torch.zeros(60, 3, dtype=torch.long), deep, torch.zeros(60, 1), policy="next_free")
    assert len(torch.unique(codes, dim=0)) == 60
    assert torch.bincount(codes[:, 0]).tolist() == [16, 16, 16, 12]
    prefixes = torch.unique(codes[:, :2], dim=0, return_counts=True)[1]
    assert prefixes.max() <= 4


def test_a_codebook_that_collapsed_on_two_levels_leaves_no_item_out():
    """Half of the items have nothing of their own: they fill the tree, and the others stay where they are."""
    generator = torch.Generator().manual_seed(0)
    items = torch.cat([torch.randn(200, 8, generator=generator), torch.zeros(200, 8)])
    quantizer = ResidualKMeans(3, 8, balanced=False, num_iterations=3, num_full_iterations=1).fit(items)
    codes = resolve_collisions(quantizer.train_codes, quantizer, items, policy="next_free")
    assert len(torch.unique(codes, dim=0)) == 400
    assert (quantizer.train_codes[:200, 0] == codes[:200, 0]).float().mean() > 0.5
    # new ones of the same kind, after the codebooks were fitted: the first 400 keep their semantic IDs
    new = append_codes(codes, [8, 8, 8], quantizer, torch.zeros(100, 8), policy="next_free")
    assert len(torch.unique(torch.cat([codes, new]), dim=0)) == 500


def test_too_many_items():
    codes = torch.zeros(17, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"17 items, but 2 levels of 4 codes name only 16: use `policy="):
        resolve_collisions(codes, literal_quantizer(), torch.zeros(17, 1), policy="next_free")
    with pytest.raises(ValueError, match="'sinkhorn'; choose one of 'extra_level', 'next_free', 'keep'"):
        resolve_collisions(codes, literal_quantizer(), torch.zeros(17, 1), policy="sinkhorn")


def test_quality_report_by_hand():
    report = quality_report(CODES, EMBEDDINGS, literal_quantizer())
    # errors: .2 .1 (101 - 100.9 = .1) .4 .3 .2; squares: .04 .01 .01 .16 .09 .04
    assert report["reconstruction_mse"] == pytest.approx(0.35 / 6, rel=1e-4)
    assert report["reconstruction_relative"] == pytest.approx(0.35 / 6 / EMBEDDINGS.var(correction=0).item(), rel=1e-4)
    assert report["utilisation"] == [0.5, 0.5]
    assert report["entropy"] == pytest.approx([math.log(3) - math.log(2) * 2 / 3, math.log(2)])
    assert report["entropy_percent"][1] == pytest.approx(50)
    assert report["collision_rate"] == pytest.approx(5 / 6)
    assert report["distinct_share"] == pytest.approx(3 / 6)
    assert report["largest_group"] == 3


def test_the_picture_is_a_png(tmp_path):
    plot_codebook_usage(CODES, 4, tmp_path / "usage.png")
    assert (tmp_path / "usage.png").read_bytes()[:4] == b"\x89PNG"


def line_quantizer() -> ResidualKMeans:
    """Codes of numbers: the first is the ten, the second the digit 0 to 3."""
    quantizer = ResidualKMeans(num_levels=2, codebook_size=4)
    quantizer.codebooks = torch.tensor([[[0.0], [10.0], [20.0], [30.0]], [[0.0], [1.0], [2.0], [3.0]]])
    return quantizer


def test_appended_items_take_the_nearest_code_that_is_free():
    """By hand: 11 is taken, so 11.1 goes to 12 and 10.8 to 10; 2 is free under its own ten."""
    known = torch.tensor([[1, 1], [3, 0]])
    new = torch.tensor([[11.1], [10.8], [2.0]])
    codes = append_codes(known, [4, 4], line_quantizer(), new, policy="next_free")
    assert codes.tolist() == [[1, 2], [1, 0], [0, 2]]
    assert append_codes(known, [4, 4], line_quantizer(), new, policy="keep").tolist() == [[1, 1], [1, 1], [0, 2]]
    numbered = torch.tensor([[1, 1, 0], [3, 0, 0]])
    found = append_codes(numbered, [4, 4, 4], line_quantizer(), new, policy="extra_level")
    assert found.tolist() == [[1, 1, 1], [1, 1, 2], [0, 2, 0]]
    assert append_codes(known, [4, 4], line_quantizer(), new[:0], policy="next_free").shape == (0, 2)


def test_items_that_are_there_never_move():
    """Known items that share a code, as under `keep`, stay where they are. A new one whose prefix is full takes the
    nearest that has room.
    """
    known = torch.tensor([[2, 0], [2, 0], [2, 1]])
    codes = append_codes(known, [4, 4], line_quantizer(), torch.tensor([[20.0]]), policy="next_free")
    assert codes.tolist() == [[2, 2]]
    full = torch.tensor([[2, code] for code in range(4)])
    new = torch.tensor([[21.0], [16.0]])
    codes = append_codes(full, [4, 4], line_quantizer(), new, policy="next_free")
    assert codes.tolist() == [[3, 0], [1, 3]]
    every = torch.tensor([[first, last] for first in range(4) for last in range(4)])
    with pytest.raises(ValueError, match=r"17 items.*full for new items must be fitted anew"):
        append_codes(every, [4, 4], line_quantizer(), new[:1], policy="next_free")
