"""`evaluate` of whatever recommends: a function, what serves, a ranker."""

import datasets
import numpy as np
import pytest
from transformers import pipeline

from onerec_hf import OneRec
from onerec_hf.evaluation import evaluate

from .test_recommender import recommender_of


@pytest.fixture(scope="module")
def split():
    rows = {
        "user": list(range(30)),
        "history": [[u % 60, (u + 1) % 60] for u in range(30)],
        "targets": [[u] for u in range(30)],
    }
    return datasets.Dataset.from_dict(rows)


def test_a_served_recommender_and_its_ranker_are_the_same(split, tmp_path):
    recommender = recommender_of()
    expected = evaluate(recommender.ranker, split, num_items=65, ks=(5, 10), progress=False)
    wrapped = OneRec()
    wrapped._recommender = recommender
    recommender.save_pretrained(tmp_path)
    for served in (recommender, wrapped, pipeline("onerec-recommendation", model=str(tmp_path), num_beams=20)):
        found = evaluate(served, split, ks=(5, 10), progress=False)
        assert (found.predictions == expected.predictions).all() and found.metrics == expected.metrics
    assert expected.metrics["coverage@10"] > 0


def test_a_function(split):
    """With and without the argument that it may leave out."""

    def next_ones(examples, k):
        assert "targets" not in examples
        return np.array([[(history[0] + i) % 65 for i in range(k)] for history in examples["history"]])

    class Callable:
        def __call__(self, examples, k, exclude_seen):
            return np.array(
                [[(h[0] + i) % 65 for i in range(2 * exclude_seen, k + 2 * exclude_seen)] for h in examples["history"]]
            )

    found = evaluate(next_ones, split, num_items=65, ks=(5,), progress=False)
    assert found.metrics["recall@5"] == 1  # the target is the first item of the history
    assert evaluate(Callable(), split, num_items=65, ks=(5,), progress=False).metrics == found.metrics
    unseen = evaluate(Callable(), split, num_items=65, ks=(5,), exclude_seen=True, progress=False)
    assert unseen.metrics["recall@5"] == 0
    with pytest.raises(ValueError, match="exclude_seen=True but returned items of the user's history"):
        evaluate(next_ones, split, num_items=65, ks=(5,), exclude_seen=True, progress=False)


def test_what_cannot_be_evaluated_is_said(split):
    recommender = recommender_of()
    with pytest.raises(TypeError, match=r"OneRecV2ForCausalLM has no `recommend.*ItemRanker\(model, collator\)"):
        evaluate(recommender.model, split, num_items=65)
    with pytest.raises(TypeError, match=r"str has no `recommend"):
        evaluate("popularity", split, num_items=65)
    with pytest.raises(ValueError, match="num_items is missing"):
        evaluate(lambda examples, k: None, split)
