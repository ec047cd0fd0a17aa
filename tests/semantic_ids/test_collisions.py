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


def test_too_many_items_under_a_prefix():
    codes = torch.zeros(5, 2, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"5 items have a semantic ID that starts with \[0\], but the last level has only 4 codes"
    ):
        resolve_collisions(codes, literal_quantizer(), torch.zeros(5, 1), policy="next_free")
    with pytest.raises(ValueError, match="'sinkhorn'; choose one of 'extra_level', 'next_free', 'keep'"):
        resolve_collisions(codes, literal_quantizer(), torch.zeros(5, 1), policy="sinkhorn")


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


def test_items_that_are_there_never_move_and_a_full_prefix_is_an_error():
    """Known items that share a code, as under `keep`, stay where they are."""
    known = torch.tensor([[2, 0], [2, 0], [2, 1]])
    codes = append_codes(known, [4, 4], line_quantizer(), torch.tensor([[20.0]]), policy="next_free")
    assert codes.tolist() == [[2, 2]]
    full = torch.tensor([[2, code] for code in range(4)])
    with pytest.raises(ValueError, match=r"start.* with \[2\].*full for new items must be fitted anew"):
        append_codes(full, [4, 4], line_quantizer(), torch.tensor([[20.0]]), policy="next_free")
