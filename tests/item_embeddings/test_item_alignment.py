"""Item pairs against the definitions, the contrastive loss in closed form, and a projection that finds a hidden
signal.
"""

import math

import numpy as np
import pytest
import torch

from onerec_hf.item_embeddings import (
    ItemAlignment,
    item_contrastive_loss,
    item_to_item_pairs,
    swing_neighbors,
    user_to_item_pairs,
)


def brute_force_swing(histories, num_items, alpha):
    sets = [set(history) for history in histories]
    result = np.zeros((num_items, num_items))
    for i in range(num_items):
        for j in range(num_items):
            for u, mine in enumerate(sets):
                for v, theirs in enumerate(sets):
                    if i != j and u != v and {i, j} <= mine & theirs:
                        result[i, j] += 1 / math.sqrt(len(mine) * len(theirs)) / (alpha + len(mine & theirs))
    return result


def test_swing_equals_the_definition():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 9, rng.integers(0, 8)).tolist() for _ in range(15)]
    expected = brute_force_swing(histories, 10, 0.7)  # item 9 is in no history
    items, scores = swing_neighbors(histories, 10, k=12, alpha=0.7)
    found = np.zeros((10, 10))
    for i, (row, values) in enumerate(zip(items, scores)):
        assert (np.diff(values) <= 0).all()
        found[i, row[row >= 0]] = values[row >= 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    best, _ = swing_neighbors(histories, 10, k=2, alpha=0.7)
    assert best.shape == (10, 2) and (best == items[:, :2]).all()


def test_swing_draws_users_of_popular_items():
    histories = [[0, 1 + user % 3] for user in range(30)]
    for seed in (0, 1):
        items, scores = swing_neighbors(histories, 4, k=3, max_users=5, seed=seed)
        repeated = swing_neighbors(histories, 4, k=3, max_users=5, seed=seed)
        assert (repeated[0] == items).all() and (repeated[1] == scores).all()
        assert scores[0].sum() <= 5 * 4 / 2 / 3 + 1e-6  # of 5 users at most 20 ordered pairs, each 1/2 / (1 + 2)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        swing_neighbors([[4]], 4)


def test_pairs_by_hand():
    neighbors = np.array([[1, 2], [0, -1], [0, 1], [-1, -1]])
    scores = np.array([[0.5, 0.9], [0.5, 0.0], [0.9, 0.1], [0.0, 0.0]])
    assert item_to_item_pairs(neighbors).tolist() == [[0, 1], [0, 2], [1, 0], [2, 0], [2, 1]]
    pairs = user_to_item_pairs([[1, 2, 0, 3], [0], [], [0, 0, 1]], neighbors, scores)
    # 2 after 1: 1; 0 after 1, 2: 2 (.9 over .5); 3 knows nobody; 0 after itself: nothing; 1 after 0: 0
    assert pairs.tolist() == [[2, 1], [0, 2], [1, 0]]
    assert user_to_item_pairs([[2, 1, 0]], neighbors, scores, max_history=1).tolist() == [[0, 1]]
    assert user_to_item_pairs([[3]], neighbors, scores).shape == (0, 2)


def test_contrastive_loss_in_closed_form():
    first = torch.tensor([[2.0, 0.0], [0.0, 3.0]], requires_grad=True)
    second = torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    loss = item_contrastive_loss(first, second, 0.5)
    r = math.sqrt(0.5)  # cosines: (1, r) and (0, r)
    expected = (math.log(math.exp(2) + math.exp(2 * r)) - 2 + math.log(1 + math.exp(2 * r)) - 2 * r) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert first.grad.abs().sum() > 0


def hidden_signal(num_items=240, seed=0):
    """24 groups show in 8 of 32 dimensions, under noise four times as strong in the others."""
    rng = np.random.default_rng(seed)
    group = np.arange(num_items) % 24
    content = 4.0 * rng.normal(size=(num_items, 32))
    content[:, :8] = rng.normal(size=(24, 8))[group] + 0.2 * rng.normal(size=(num_items, 8))
    return content.astype(np.float32), group


def same_group_share(embeddings, group, rows):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = unit[rows] @ unit.T
    cosine[np.arange(len(rows)), rows] = -2
    return (group[cosine.argmax(1)] == group[rows]).mean()


def test_alignment_finds_what_the_pairs_have_in_common_and_carries_over_to_new_items(tmp_path):
    content, group = hidden_signal()
    known, new = np.arange(160), np.arange(160, 240)
    pairs = np.array([(i, j) for i in known for j in known if i != j and group[i] == group[j]])
    alignment = ItemAlignment(32, output_dim=8, hidden_size=16, dropout=0.0)
    alignment.fit(content[known], pairs, num_epochs=15, batch_size=64, learning_rate=1e-2, progress=False)
    aligned = alignment.embed(content)
    assert aligned.shape == (240, 8) and np.allclose(np.linalg.norm(aligned, axis=1), 1, atol=1e-5)
    before, after = (same_group_share(e, group, new) for e in (content, aligned))
    assert before < 0.3 and after > 0.8

    alignment.save_pretrained(tmp_path)
    assert (ItemAlignment.from_pretrained(tmp_path).embed(content) == aligned).all()


def test_alignment_is_repeatable_and_refuses_what_it_cannot_use():
    content, _ = hidden_signal(30)
    pairs = np.array([[0, 1], [2, 3], [4, 5]])
    fits = [ItemAlignment(32, 4, 8).fit(content, pairs, num_epochs=2, progress=False).embed(content) for _ in (0, 1)]
    assert (fits[0] == fits[1]).all()
    for wrong in ([[0, 30], [1, 2]], [[0, 1]], np.zeros((0, 2), int)):
        with pytest.raises(ValueError, match="at least two pairs"):
            ItemAlignment(32).fit(content, np.array(wrong), progress=False)
