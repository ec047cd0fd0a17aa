"""Baselines: exact ranking with random ties, counts against brute force, SASRec on a world it can learn exactly."""

import json
import math
from collections import defaultdict

import datasets
import numpy as np
import pytest
import torch

from onerec_hf.baselines import CoOccurrence, Popularity, SASRec, rank_items
from onerec_hf.baselines.softmax_loss import FullSoftmaxLoss
from onerec_hf.evaluation import evaluate

from ..conftest import shared_data
from ..numeric import assert_close


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- ranking


def test_rank_items_orders_excludes_and_pads():
    scores = torch.tensor([[0.1, -3.0, 2.0, 0.5], [1.0, 2.0, 3.0, -math.inf]])
    assert rank_items(scores, 3).tolist() == [[2, 3, 0], [2, 1, 0]]
    assert rank_items(scores, 3, exclude=[[2], [0, 2]]).tolist() == [[3, 0, 1], [1, -1, -1]]
    assert rank_items(scores, 6).tolist() == [[2, 3, 0, 1, -1, -1], [2, 1, 0, -1, -1, -1]]
    assert scores[0, 2] == 2.0  # the caller's tensor is untouched


def test_rank_items_equals_a_full_sort():
    scores = torch.randn(20, 300, generator=generator())
    assert (rank_items(scores, 15) == scores.argsort(descending=True)[:, :15].numpy()).all()


def test_ties_are_uniform_over_items_slots_and_rows():
    # Item 0 is best; items 1..4 tie for the two other slots; item 5 is never reached.
    scores = torch.tensor([5.0, 1, 1, 1, 1, 0]).expand(6000, -1)
    ranked = rank_items(scores, 3, generator=generator())
    assert (ranked[:, 0] == 0).all()
    for slot in (1, 2):
        counts = np.bincount(ranked[:, slot], minlength=6)
        assert counts[[0, 5]].sum() == 0
        np.testing.assert_allclose(counts[1:5] / 6000, 0.25, atol=0.03)
    assert (ranked == rank_items(scores, 3, generator=generator())).all()
    assert (ranked != rank_items(scores, 3, generator=generator(1))).any()


def test_rank_items_rejects_what_it_cannot_rank():
    with pytest.raises(ValueError, match="NaN"):
        rank_items(torch.tensor([[0.0, math.nan, 1.0]]), 1)
    with pytest.raises(ValueError, match="floating point"):
        rank_items(torch.tensor([[1, 2]]), 1)


# -- popularity and co-occurrence


def test_popularity_counts_and_breaks_ties_by_seed():
    model = Popularity(6).fit([[3, 3, 1], [3, 1, 2], [2]])
    examples = {"history": [[3], [0]]}
    first = model.recommend(examples, 4, generator=generator())
    assert first[:, 0].tolist() == [3, 3]
    assert {frozenset(row) for row in first[:, 1:3].tolist()} == {frozenset({1, 2})}
    assert model.recommend(examples, 4, exclude_seen=True)[0, 0] in (1, 2)

    data = datasets.Dataset.from_dict({"user": range(8), "history": [[3]] * 8, "targets": [[1]] * 8})
    lists = [evaluate(model, data, num_items=6, seed=s, progress=False).predictions for s in (0, 0, 1)]
    assert (lists[0] == lists[1]).all()
    assert (lists[0] != lists[2]).any()


def test_unfitted_and_wrong_catalogue_are_errors():
    for model in (Popularity(3), CoOccurrence(3)):
        with pytest.raises(ValueError, match="call fit"):
            model.recommend({"history": [[0]]}, 1)
        with pytest.raises(ValueError, match="item index 3, but num_items is 3"):
            model.fit([[0, 3]])


def brute_force_scores(histories, history, num_items):
    """The definition, pair by pair."""
    matrix, popularity = defaultdict(float), defaultdict(int)
    for sequence in histories:
        for j, b in enumerate(sequence):
            popularity[b] += 1
            for i in range(max(0, j - 10), j):
                matrix[sequence[i], b] += 1 / (j - i)
                matrix[b, sequence[i]] += 0.5 / (j - i)
    scores = np.zeros(num_items)
    for age, a in enumerate(reversed(history[-20:])):
        for b in range(num_items):
            scores[b] += 0.7**age * matrix[a, b] / (max(popularity[a], 1) ** 0.5 * max(popularity[b], 1) ** 0.25)
    return scores


def test_cooccurrence_equals_the_definition_on_three_users():
    histories = [[0, 1, 2, 0, 3], [2, 1], [4, 1, 5, *range(6, 18)]]  # item 0 meets itself; the third is longer than 10
    queries = [[0], [1, 2], [*range(17, 3, -1), *range(12)], [18], []]
    model = CoOccurrence(20).fit(histories)
    expected = np.stack([brute_force_scores(histories, query, 20) for query in queries])
    np.testing.assert_allclose(model._scores(queries).numpy(), expected, rtol=1e-5, atol=1e-7)

    by_hand = model._scores([[2]])[0]  # M[2, 1] = 0.5 (1 before 2) + 1 (2 before 1); pop(2) = 2, pop(1) = 3
    assert by_hand[1].item() == pytest.approx(1.5 / (2**0.5 * 3**0.25))


def test_cooccurrence_falls_back_to_popularity():
    model = CoOccurrence(6).fit([[0, 1], [2, 3], [3], [4, 3]])
    ranked = model.recommend({"history": [[0], [5]]}, 6)
    assert ranked[0, :2].tolist() == [1, 3]  # its neighbour, then the most popular
    assert ranked[1, 0] == 3
    assert model.recommend({"history": [[0, 3]]}, 6, exclude_seen=True)[0, -2:].tolist() == [-1, -1]


@pytest.mark.shared_data
def test_cooccurrence_on_beauty():
    folder = shared_data("amazon_beauty_2014")
    sequences = datasets.Dataset.from_parquet(str(folder / "sequences.parquet"))["item_ids"]
    rows = [[item - 1 for item in sequence] for sequence in sequences]
    model = CoOccurrence(12_101).fit([row[:-2] for row in rows])
    columns = {"user": range(len(rows)), "history": [row[:-1] for row in rows], "targets": [row[-1:] for row in rows]}
    data = datasets.Dataset.from_dict(columns)
    for exclude_seen, recall in ((False, 0.0756), (True, 0.0841)):
        result = evaluate(model, data, num_items=12_101, exclude_seen=exclude_seen, progress=False)
        assert result.metrics["recall@10"] == pytest.approx(recall, abs=0.0005)


# -- SASRec


def test_full_softmax_loss_equals_cross_entropy():
    hidden = torch.randn(7, 4, generator=generator(), dtype=torch.float64)
    weight = torch.randn(2**18, 4, generator=generator(1), dtype=torch.float64)  # 4 rows a pass
    targets = torch.tensor([0, 5, 5, 2**18 - 1, 77, 3, 5])
    results = []
    for loss_function in (
        FullSoftmaxLoss.apply,
        lambda h, w, t: torch.nn.functional.cross_entropy(h @ w.T, t, reduction="sum"),
    ):
        h, w = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
        loss = loss_function(h, w, targets)
        (loss / 3).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results):
        assert_close(ours, theirs)


@pytest.mark.parametrize(("num_negatives", "count_as"), [(5, 5.0), (6, 2.5), (40, 12.0)])
def test_sampled_softmax_equals_the_definition(num_negatives, count_as):
    model = tiny(temperature=None)
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
        "labels": torch.tensor([[2, 3, 3], [5, 11, -100]]),
    }
    torch.manual_seed(3)
    negatives = torch.randint(12, (num_negatives,)).tolist()
    torch.manual_seed(3)
    loss, count = model._sampled_softmax_loss(batch, num_negatives, count_as)
    hidden, items = model._score_vectors(model._hidden(batch["input_ids"]))
    expected = 0.0
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        target = int(batch["labels"][row, column])
        scores = (items @ hidden[row, column]).tolist()
        others = sum(math.exp(scores[i]) for i in negatives if i != target)
        own = math.exp(scores[target])
        expected -= math.log(own / (own + count_as / num_negatives * others))
    assert count == 5
    assert_close(loss.detach(), torch.tensor(expected))


def test_sampled_softmax_that_counts_as_all_items_comes_near_the_full_one():
    model = tiny(temperature=0.07)
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[2, 3, 4]])}
    torch.manual_seed(0)
    sampled, full = model._sampled_softmax_loss(batch, 200_000, 12)[0], model._softmax_loss(batch)[0]
    assert sampled.item() == pytest.approx(full.item(), rel=0.01)
    assert model._sampled_softmax_loss(batch, 200_000, 1)[0] < 0.8 * full  # uncorrected


def cycles(num_users=60, num_items=12, seed=0):
    """Histories that walk the cycle 0, 1, ..., 11, 0, ...; some are longer than the model's window."""
    rng = np.random.default_rng(seed)
    return [
        [int(i) % num_items for i in range(start, start + rng.integers(2, 15))]
        for start in rng.integers(0, num_items, num_users)
    ]


def tiny(**kwargs):
    return SASRec(12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_length=8, dropout=0.0, **kwargs)


def next_in_cycle():
    histories = cycles(seed=1)
    targets = [[(row[-1] + 1) % 12] for row in histories]
    return datasets.Dataset.from_dict({"user": range(len(targets)), "history": histories, "targets": targets})


@pytest.mark.parametrize(
    ("loss", "temperature", "post_norm"),
    [
        ("softmax", 0.07, False),
        ("bce", None, False),
        ("bce", None, True),
        ("sampled_softmax", None, False),
        ("sampled_softmax", 0.07, True),
    ],
)
def test_sasrec_learns_a_cycle(loss, temperature, post_norm, tmp_path):
    model = tiny(temperature=temperature, post_norm=post_norm)
    model.fit(cycles(), loss=loss, num_epochs=20, batch_size=10, learning_rate=0.03, warmup_steps=0, progress=False)
    result = evaluate(model, next_in_cycle(), num_items=12, ks=(1, 3), progress=False)
    assert result.metrics["recall@1"] == 1.0
    assert result.metrics["invalid_rate"] == 0.0

    model.save_pretrained(tmp_path)
    again = SASRec.from_pretrained(tmp_path)
    assert (again.num_items, again.max_length) == (12, 8)
    assert (again.recommend({"history": cycles()}, 12) == model.recommend({"history": cycles()}, 12)).all()


def test_sasrec_is_repeatable_by_seed():
    fits = [tiny(seed=s).fit(cycles(20), num_epochs=1, seed=s, progress=False) for s in (0, 0, 1)]
    weights = [model.model.wte.weight for model in fits]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_sasrec_keeps_the_epoch_with_the_best_validation():
    values, seen = iter([0.1, 0.9, 0.3]), []

    def validate(model):
        assert not model.model.training
        seen.append(model.model.wte.weight.detach().clone())
        return next(values)

    model = tiny().fit(cycles(20), validate=validate, num_epochs=3, progress=False)
    assert torch.equal(model.model.wte.weight, seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert [(r["epoch"], r["validation"]) for r in model.training_log] == [(1, 0.1), (2, 0.9), (3, 0.3)]


def test_sasrec_validates_every_second_epoch_and_the_last():
    values = iter([0.3, 0.2, 0.1])
    model = tiny().fit(cycles(20), validate=lambda _: next(values), validate_every=2, num_epochs=5, progress=False)
    assert [record.get("validation") for record in model.training_log] == [None, 0.3, None, 0.2, 0.1]
    with pytest.raises(ValueError, match="validate_every is 0"):
        tiny().fit(cycles(20), validate_every=0)


def test_sasrec_validates_and_keeps_the_average_of_its_weights():
    raw, average, seen = [], None, []

    def record(batch):
        raw.append(model.model.wte.weight.detach().clone())  # before the step: after the one before
        return SASRec._softmax_loss(model, batch)

    def validate(sasrec):
        seen.append(sasrec.model.wte.weight.detach().clone())
        return float(len(seen))

    model = tiny()
    model._softmax_loss = record
    settings = {"batch_size": 20, "warmup_steps": 0, "learning_rate": 0.1, "weight_average_decay": 0.25}
    short = [history[:8] for history in cycles(20)]  # one window each: one step per epoch
    model.fit(short, num_epochs=4, validate=validate, progress=False, **settings)
    for step, weight in enumerate(raw[1:], start=1):  # what the steps 1, 2, 3 left
        keep = min(0.25, (1 + step) / (10 + step))
        average = weight if average is None else keep * average + (1 - keep) * weight
        assert_close(seen[step - 1], average)
    assert torch.equal(model.model.wte.weight, seen[3])


def test_sasrec_trains_every_transition_of_a_long_history_once():
    model, seen = tiny(), []

    def record(batch):
        seen.append(batch["labels"])
        return model.model.wte.weight.sum() * 0.0, 1

    model._softmax_loss = record
    model.fit([list(range(12)) + list(range(11))], num_epochs=1, progress=False)  # 22 transitions, windows of 8
    labels = torch.cat([batch[batch != -100] for batch in seen])
    assert sorted(labels.tolist()) == sorted([*range(1, 12), *range(11)])


@pytest.mark.parametrize("post_norm", [False, True])
def test_sasrec_does_not_depend_on_the_batch_or_on_padding(post_norm):
    model = tiny(post_norm=post_norm)
    histories = [[1], [2, 3, 4, 5, 6, 7], [1, 2], list(range(12))]
    together = model.recommend({"history": histories}, 12)
    alone = np.concatenate([model.recommend({"history": [history]}, 12) for history in histories])
    assert (together == alone).all()
    masked = model.recommend({"history": histories}, 12, exclude_seen=True)
    assert (masked[3] == -1).all()  # it has seen everything
    assert sorted(masked[1].tolist()) == [-1] * 6 + [0, 1, 8, 9, 10, 11]


def test_sasrec_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="one of softmax, sampled_softmax, bce; got 'hinge'"):
        tiny().fit(cycles(), loss="hinge")
    for wrong in ({"num_negatives": 0}, {"negatives_count_as": 0.0}):
        with pytest.raises(ValueError, match="a sampled softmax draws at least one item"):
            tiny().fit(cycles(), loss="sampled_softmax", **wrong)
    with pytest.raises(ValueError, match="two items"):
        tiny().fit([[1], []])
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        tiny().recommend({"history": [[1], []]}, 1)


# -- recipe


@pytest.mark.parametrize("name", ["popularity", "sasrec"])
def test_recipe_writes_numbers_and_predictions(name, tmp_path):
    from onerec_hf.scripts.baseline import BaselineArguments, main

    columns = {"user_id": range(5), "item_ids": [[1, 2, 3, 4], [2, 3, 4, 1], [3, 4, 1], [4, 1, 2], [1, 2, 3]]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "sequences.parquet"))
    items = {"item_id": [1, 2, 3, 4], "title": ["a", "b", "c", "d"]}
    datasets.Dataset.from_dict(items).to_parquet(str(tmp_path / "items.parquet"))
    output = tmp_path / "output"
    fit = {"num_epochs": 2} if name == "sasrec" else {}
    arguments = BaselineArguments(name, str(tmp_path), str(output), layout="amazon", fit=fit)
    report = main(arguments)
    assert json.loads((output / "metrics.json").read_text()) == report
    assert report["test"]["num_users"] == report["test_exclude_seen"]["num_users"] == 5
    assert report["test"]["recall@5"] == 1  # four items
    assert report["test"]["invalid_rate"] == 0.8  # 16 of 20 slots
    for file in ("predictions", "predictions_exclude_seen"):
        assert (output / f"{file}.parquet").is_file()
    assert (output / "model").is_dir() == ("best_epoch" in report) == (name == "sasrec")


def test_session_rows_become_sequences_of_what_was_watched():
    from onerec_hf.scripts.baseline import sequences

    def row(user, start, history, long_view, targets):
        return {"user": user, "session_start": start, "history": history, "long_view": long_view, "targets": targets}

    later, first = row(0, 9, [1, 2, 3], [0, 1, 1], [4]), row(0, 5, [1, 2], [0, 1], [3])
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list([later, first, row(1, 7, [5], [-1], [6])]),
        test=datasets.Dataset.from_list([row(0, 20, [1, 2, 3, 4, 9], [0, 1, 1, 1, 0], [7])]),
    )
    found = sequences(splits, {"long_view": 1})
    assert dict(zip(found["train"]["user"], found["train"]["history"])) == {0: [2, 3, 4], 1: [5, 6]}
    assert found["test"][:] == {"user": [0], "history": [[2, 3, 4]], "targets": [[7]]}
    assert sequences(splits, {})["test"]["history"][:] == [[1, 2, 3, 4, 9]]
    with pytest.raises(ValueError, match=r"the thresholds of \['long_view'\] must be above 0"):
        sequences(splits, {"long_view": 0})
    with pytest.raises(
        ValueError, match=r"for --watched, has no columns \['is_like'\]; it has \['user', 'session_start'"
    ):
        sequences(splits, {"is_like": 1})


def test_of_several_behaviours_one_is_enough():
    """As `prepare` and the reward of `grpo` read thresholds: liked, or played for long."""
    from onerec_hf.data import reaches
    from onerec_hf.scripts.baseline import sequences

    columns = {"is_like": [1, 0, 0, 1, -1], "play_time_ms": [100, 9000, 200, 8000, 7000]}
    row = {"user": 0, "session_start": 1, "history": [5, 6, 7, 8, 9], "targets": [3], **columns}
    rows = datasets.Dataset.from_list([row])
    watched = {"is_like": 1, "play_time_ms": 7000}
    found = sequences(datasets.DatasetDict(train=rows, test=rows), watched)
    assert found["test"]["history"][:] == [[5, 6, 8, 9]] and found["train"]["history"][:] == [[5, 6, 8, 9, 3]]
    assert reaches(columns, watched).tolist() == [True, True, False, True, True]
