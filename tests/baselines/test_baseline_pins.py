"""What a few steps of training leave behind, as literal numbers: no change of the training loop may pass unseen.

Every model trains three epochs on the same 30 histories; the second epoch is the best one on validation and must be
kept, but where a row says that the last one is. A loss is in nats per target, of the training histories without
dropout.
"""

import numpy as np
import pytest
import torch

from onerec_hf.baselines import CoOccurrence, ItemKNN, Popularity, SASRec

from ..numeric import TERMS, assert_close
from .test_more_baselines import TINY, bert, fdsa, tiger

STEPS = 9
SIZES = TINY | {"max_length": 8, "dropout": 0.1}
FIT = {"num_epochs": 3, "batch_size": 10, "warmup_steps": 2, "progress": False, "seed": 3}


def histories() -> list[list[int]]:
    """30 users, 12 items; the next item is mostly the one two further on."""
    rng = np.random.default_rng(0)
    steps = rng.choice([1, 2, 2, 2, 5], (30, 7))
    return [((start + np.cumsum(row)) % 12).tolist() for start, row in zip(rng.integers(0, 12, 30), steps)]


def trained(model, validate: bool = True, **settings):
    values = iter([0.1, 0.9, 0.3])
    chosen = {"validate": lambda _: next(values)} if validate else {}
    users = {"users": range(30)} if hasattr(model, "catalogue") else {}
    return model.fit(histories(), **users, **chosen, **FIT | settings)


@torch.no_grad()
def training_loss(model) -> torch.Tensor:
    rows = histories()
    if hasattr(model, "catalogue"):
        batch = model._collate([{"user": u, "input_ids": row[:4], "targets": row[4:5]} for u, row in enumerate(rows)])
        total, count = model._loss(batch)
    else:
        inputs = torch.tensor(rows)
        total, count = model._softmax_loss({"input_ids": inputs[:, :-1], "labels": inputs[:, 1:]})
    return total / count


CASES = {
    "SASRec": (
        lambda: trained(SASRec(12, **SIZES), learning_rate=0.01),
        2.757583,
        [[1, 2, 8, 5], [2, 1, 5, 9]],
    ),
    "SASRec, average": (
        lambda: trained(SASRec(12, **SIZES), learning_rate=0.01, weight_average_decay=0.9),
        2.623707,
        [[8, 5, 1, 0], [5, 1, 2, 8]],
    ),
    "SASRec, average, last epoch": (
        lambda: trained(SASRec(12, **SIZES), validate=False, learning_rate=0.01, weight_average_decay=0.9),
        2.458770,
        [[6, 3, 8, 4], [6, 3, 5, 11]],
    ),
    "SASRec, last epoch": (
        lambda: trained(SASRec(12, **SIZES), validate=False, learning_rate=0.01),
        2.496677,
        [[6, 10, 3, 8], [3, 6, 5, 10]],
    ),
    "SASRec, one negative": (
        lambda: trained(SASRec(12, **SIZES), loss="bce", learning_rate=0.01),
        3.624048,
        [[8, 4, 5, 2], [5, 7, 8, 3]],
    ),
    "BERT4Rec": (
        lambda: trained(bert(dropout=0.1), learning_rate=0.01),
        2.476768,
        [[10, 6, 5, 0], [10, 6, 5, 8]],
    ),
    "FDSA": (
        lambda: trained(fdsa(dropout=0.1), learning_rate=0.01),
        2.333940,
        [[6, 3, 0, 1], [5, 2, 10, 8]],
    ),
    "TIGER": (
        lambda: trained(tiger(dropout=0.1)),
        1.741432,
        [[0, 2, 6, 3], [0, 6, 2, 4]],
    ),
    "TIGER, causal items": (
        lambda: trained(tiger(dropout=0.1, causal_items=True)),
        2.227905,
        [[2, 0, 6, 10], [2, 6, 0, 7]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_trained_baselines(name):
    make, loss, ranking = CASES[name]
    model = make()
    assert_close(training_loss(model), torch.tensor(loss), terms=STEPS * TERMS)
    found = model.recommend({"history": [[0, 2, 4], [7, 9]], "user": [0, 1]}, 4)
    assert found.tolist() == ranking
    assert [record["epoch"] for record in model.training_log] == [1, 2, 3]


def test_counters():
    queries = {"history": [[0, 2, 4], [7, 9]]}
    found = {
        type(model).__name__: model.fit(histories()).recommend(queries, 4).tolist()
        for model in (Popularity(12), CoOccurrence(12), ItemKNN(12, decay=0.6))
    }
    assert found == {
        "Popularity": [[0, 3, 8, 1], [0, 8, 3, 10]],
        "CoOccurrence": [[6, 2, 4, 8], [11, 1, 5, 0]],
        "ItemKNN": [[6, 8, 10, 1], [3, 5, 1, 11]],
    }
