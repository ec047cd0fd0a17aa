"""Metrics against hand-worked numbers; evaluate() against recommenders that misbehave; ICLRec's published numbers."""

import math

import datasets
import numpy as np
import pytest
import torch

from onerec_hf.evaluation import bootstrap_lift, evaluate, paired_bootstrap
from onerec_hf.evaluation.metrics import coverage_at_k, diversity_at_k, match_targets, ndcg_at_k, recall_at_k

from ..conftest import shared_data


class Fixed:
    """Recommends `lists[user]`, remembers what it was shown."""

    def __init__(self, lists):
        self.lists, self.calls = np.asarray(lists), []

    def recommend(self, examples, k, exclude_seen):
        self.calls.append((examples, k, exclude_seen))
        return self.lists[examples["user"], :k]


def split(targets, history=None):
    history = history or [[0]] * len(targets)
    return datasets.Dataset.from_dict({"user": list(range(len(targets))), "history": history, "targets": targets})


def score(lists, targets, **kwargs):
    kwargs = {"num_items": 10, "ks": (len(lists[0]),), "progress": False, **kwargs}
    return evaluate(Fixed(lists), split(targets), **kwargs)


def test_single_target_gains_one_over_log2_of_rank_plus_one():
    result = score([[7, 3, 1], [3, 7, 1], [3, 1, 7], [4, 5, 6]], [[7]] * 4, ks=(1, 2, 3))
    assert result.per_user["ndcg@3"].tolist() == pytest.approx([1, 1 / math.log2(3), 0.5, 0])
    assert result.per_user["recall@2"].tolist() == [1, 1, 0, 0]
    assert result.metrics["hit@1"] == 0.25
    assert result.metrics["recall@3"] == result.metrics["hit@3"] == 0.75


def test_several_targets():
    # Targets {1, 2, 3}, ranks 1 and 3 hit: DCG@3 = 1 + 1/2, ideal@3 = 1 + 1/log2(3) + 1/2. At k = 2 the ideal has two.
    result = score([[1, 9, 2]], [[3, 2, 1]], ks=(2, 3))
    assert result.metrics["recall@2"] == pytest.approx(1 / 3)
    assert result.metrics["recall@3"] == pytest.approx(2 / 3)
    assert result.metrics["hit@2"] == 1
    assert result.metrics["ndcg@2"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert result.metrics["ndcg@3"] == pytest.approx(1.5 / (1.5 + 1 / math.log2(3)))


def test_a_target_that_occurs_twice_counts_once():
    assert score([[5, 1, 2]], [[5, 5, 6]]).metrics["recall@3"] == 0.5


def test_metrics_equal_brute_force_on_random_lists():
    rng = np.random.default_rng(0)
    lists = np.stack([rng.permutation(30)[:10] for _ in range(50)])
    targets = [rng.permutation(30)[: rng.integers(1, 15)].tolist() for _ in range(50)]
    hits, num_targets = match_targets(lists, targets, 30)
    for k in (1, 4, 10):
        for user, (row, wanted) in enumerate(zip(lists[:, :k].tolist(), targets)):
            dcg = sum(1 / math.log2(rank + 2) for rank, item in enumerate(row) if item in wanted)
            ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(wanted))))
            assert ndcg_at_k(hits, num_targets, k)[user] == pytest.approx(dcg / ideal)
            assert recall_at_k(hits, num_targets, k)[user] == pytest.approx(len(set(row) & set(wanted)) / len(wanted))


def test_empty_slots_keep_their_rank_and_are_counted():
    result = score([[-1, 4, -1, -1], [1, 2, 3, 4]], [[4], [4]], ks=(2, 4))
    assert result.metrics["invalid_rate"] == 3 / 8
    assert result.per_user["ndcg@4"].tolist() == pytest.approx([1 / math.log2(3), 1 / math.log2(5)])
    assert result.metrics["coverage@2"] == 3 / 10  # items 4, 1, 2; -1 is no item
    assert result.metrics["coverage@4"] == 4 / 10


def test_diversity_is_the_mean_pairwise_cosine_distance():
    embeddings = np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    lists = np.array([[0, 1, 2], [0, 3, -1], [0, -1, -1], [0, 4, 1]])
    # {0, 1, 2}: distances 1, 2, 1. {0, 3}: 1 - cos 45 degrees. One item: undefined. A zero vector has cosine 0.
    expected = [4 / 3, 1 - math.sqrt(0.5), np.nan, 1.0]
    np.testing.assert_allclose(diversity_at_k(lists, 3, embeddings), expected)
    result = score(lists, [[0]] * 4, num_items=5, item_embeddings=embeddings)
    assert result.metrics["diversity@3"] == pytest.approx((4 / 3 + 1 - math.sqrt(0.5) + 1) / 3)
    assert "diversity@3" not in score(lists, [[0]] * 4, num_items=5).metrics


def test_k_beyond_the_list_is_an_error():
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
        coverage_at_k(np.array([[1, 2, 3]]), 4, 10)


def test_a_cheater_never_sees_the_targets():
    class Cheater:
        def recommend(self, examples, k, exclude_seen):
            assert sorted(examples) == ["history", "user"]
            return np.array([(target + [-1] * k)[:k] for target in examples["targets"]])

    with pytest.raises(KeyError, match="targets"):
        evaluate(Cheater(), split([[3]]), num_items=10, progress=False)


def test_batches_cover_every_user_once_and_in_order():
    lists = [[user, 9] for user in range(5)]
    recommender = Fixed(lists)
    result = evaluate(
        recommender, split([[u] for u in range(5)]), num_items=10, ks=(1, 2), batch_size=2, progress=False
    )
    assert [call[0]["user"] for call in recommender.calls] == [[0, 1], [2, 3], [4]]
    assert {call[1:] for call in recommender.calls} == {(2, False)}
    assert result.predictions.dtype == np.int64
    assert result.predictions.tolist() == lists
    assert result.user.tolist() == [0, 1, 2, 3, 4]
    assert result.metrics["recall@1"] == 1


def test_seed_makes_a_sampling_recommender_repeatable_and_leaves_the_callers_generator_alone():
    class Sampler:
        def recommend(self, examples, k, exclude_seen):
            return torch.stack([torch.randperm(100)[:k] for _ in examples["user"]])

    data = split([[1], [2], [3]])
    state = torch.get_rng_state()
    lists = [evaluate(Sampler(), data, num_items=100, seed=s, progress=False).predictions for s in (0, 0, 1)]
    assert (lists[0] == lists[1]).all()
    assert (lists[0] != lists[2]).any()
    assert (torch.get_rng_state() == state).all()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[1, 2]], r"integers of shape \(1, 3\)"),
        ([[1.0, 2.0, 3.0]], "float64"),
        ([[1, 2, 10]], r"0\.\.9"),
        ([[1, 2, -2]], r"0\.\.9"),
        ([[1, 2, 1]], "twice"),
        ([[1, 2, 0]], r"history: \[0\]"),
    ],
)
def test_what_a_recommender_may_not_return(answer, message):
    class Answers:
        def recommend(self, examples, k, exclude_seen):
            return answer

    with pytest.raises(ValueError, match=message):
        evaluate(Answers(), split([[3]]), num_items=10, ks=(3,), exclude_seen=True, progress=False)


def test_seen_items_are_allowed_unless_excluded():
    assert score([[0, 1, 2]], [[0]]).metrics["recall@3"] == 1


def test_splits_that_cannot_be_scored():
    with pytest.raises(ValueError, match="train split has no targets"):
        evaluate(Fixed([[1]]), split([[1]]).remove_columns("targets"), num_items=10)
    with pytest.raises(ValueError, match="1 of them empty"):
        score([[1], [2]], [[1], []])
    with pytest.raises(ValueError, match=r"targets must be item indices in 0\.\.9"):
        score([[1]], [[10]])


def test_save_writes_one_row_per_user(tmp_path):
    result = score([[1, 2], [3, 4]], [[2], [5]])
    result.save(tmp_path / "predictions.parquet")
    table = datasets.Dataset.from_parquet(str(tmp_path / "predictions.parquet"), cache_dir=str(tmp_path))
    assert table["predictions"][:] == [[1, 2], [3, 4]]
    assert table["recall@2"][:] == [1, 0]
    assert table["user"][:] == [0, 1]
    assert result.to_dict() == {"num_users": 2, **result.metrics}


def test_paired_bootstrap_separates_a_real_difference_from_noise():
    rng = np.random.default_rng(0)
    base, noise = rng.random(400), rng.normal(0, 0.01, 400)
    low, high = paired_bootstrap(base + 0.005 + noise, base, seed=1)  # paired: far smaller than the spread of base
    assert 0 < low < (0.005 + noise).mean() < high < 0.01
    assert paired_bootstrap(base + 0.005 + noise, base, seed=1) == (low, high)
    low, high = paired_bootstrap(base, rng.permutation(base))
    assert low < 0 < high
    with pytest.raises(ValueError, match="same users"):
        paired_bootstrap(base, base[1:])


def test_the_bootstraps_equal_their_definition():
    """Users drawn with replacement, one draw after the other from one generator; also where a draw has nothing in the
    control.
    """
    rng = np.random.default_rng(0)
    for users in (2, 7, 120):  # of 120, more than one batch of resamples would be cut wrongly if it mattered
        a, b = rng.random(users), rng.random(users) * (rng.random(users) < 0.7)
        b[0] = 1.0
        draw = np.random.default_rng(4)
        drawn = [draw.integers(users, size=users) for _ in range(1000)]
        expected = np.quantile([(a - b)[rows].mean() for rows in drawn], [0.05, 0.95])
        np.testing.assert_allclose(paired_bootstrap(a, b, seed=4, confidence=0.9), expected, rtol=1e-12)
        lifts = [a[rows].sum() / b[rows].sum() - 1 if b[rows].sum() else np.nan for rows in drawn]
        found = bootstrap_lift(b, a, level=0.9, num_samples=1000, seed=4)
        np.testing.assert_allclose(found[1:], np.nanquantile(lifts, [0.05, 0.95]), rtol=1e-12)
    assert paired_bootstrap(np.array([0.5]), np.array([0.25])) == (0.25, 0.25)  # one user is always drawn
    a, b = np.arange(8) / 8, np.array([3, 1, 4, 1, 5, 9, 2, 6]) / 9
    np.testing.assert_allclose(paired_bootstrap(a, b, seed=4), (-0.190972222, 0.203298611), rtol=1e-8)


@pytest.mark.shared_data
def test_oracle_the_published_numbers_of_iclrec():
    folder = shared_data("amazon_beauty_2014")
    lists = datasets.Dataset.from_parquet(str(folder / "iclrec_top20.parquet")).with_format("numpy")["top20"][:]
    items = datasets.Dataset.from_parquet(str(folder / "sequences.parquet"))["item_ids"]
    data = split([[row[-1] - 1] for row in items], [[i - 1 for i in row[:-1]] for row in items])
    metrics = evaluate(Fixed(np.stack(lists) - 1), data, num_items=12_101, progress=False).metrics
    published = {5: (0.0500, 0.0326), 10: (0.0744, 0.0403), 20: (0.1058, 0.0483)}
    for k, (hit, ndcg) in published.items():
        assert round(metrics[f"hit@{k}"], 4) == hit
        assert round(metrics[f"ndcg@{k}"], 4) == ndcg
