"""HSTU and the neighbours by embeddings, each against a loop over its definition."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from onerec_hf.baselines import HSTU, CoOccurrence, EmbeddingKNN
from onerec_hf.evaluation import evaluate

from ..numeric import assert_close
from .test_baselines import cycles, next_in_cycle
from .test_more_baselines import TINY, fit, queries

# -- neighbours by embeddings


@pytest.mark.parametrize("counter_weight", [0.0, 0.7])
def test_embedding_knn_equals_the_definition(counter_weight):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(12, 5))
    histories = cycles(20)
    model = EmbeddingKNN(embeddings, num_recent=2, decay=0.4, counter_weight=counter_weight).fit(histories)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = np.stack([unit @ (unit[7] + 0.4 * unit[2]), unit @ unit[5]])
    if counter_weight:
        counts = CoOccurrence(12).fit(histories)._scores([[9, 2, 7], [5]]).numpy()
        expected += counter_weight * counts / counts.max(1, keepdims=True)
    np.testing.assert_allclose(model._scores([[9, 2, 7], [5]]).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert model.recommend({"history": [[9, 2, 7]]}, 1, exclude_seen=True)[0, 0] not in (9, 2, 7)


def test_embedding_knn_says_what_it_needs():
    for wrong in ({"embeddings": np.ones(3)}, {"embeddings": np.ones((3, 2)), "num_recent": 0}):
        with pytest.raises(ValueError, match=r"needs embeddings of shape \(N, D\) and num_recent >= 1"):
            EmbeddingKNN(**wrong)


# -- HSTU


def hstu(**kwargs):
    return HSTU(12, **(TINY | {"max_length": 8, "dropout": 0.0} | kwargs))


def test_an_hstu_block_equals_the_definition():
    torch.manual_seed(0)
    block = hstu().model.blocks[0].double()
    torch.nn.init.normal_(block.position_bias)
    states = torch.randn(5, 16, dtype=torch.float64)
    normed = torch.nn.functional.layer_norm(states, (16,))
    gate, value, query, key = torch.nn.functional.silu(normed @ block.input.weight.T).split(16, dim=1)
    expected = []
    for t in range(5):
        mixed = torch.zeros(16, dtype=torch.float64)
        for s in range(t + 1):
            for head in (slice(0, 8), slice(8, 16)):
                score = query[t, head] @ key[s, head] + block.position_bias[t - s, head.start // 8]
                mixed[head] += score * torch.sigmoid(score) / 8 * value[s, head]
        gated = torch.nn.functional.layer_norm(mixed, (16,)) * gate[t]
        expected.append(states[t] + gated @ block.output.weight.T + block.output.bias)
    assert_close(block(states[None])[0], torch.stack(expected))


def test_hstu_does_not_look_ahead_and_ignores_padding():
    model = hstu()
    hidden = model._hidden(torch.tensor([[1, 2, 3, 4], [1, 2, 9, 9]]))
    assert_close(hidden[0, :2], hidden[1, :2])
    assert not torch.allclose(hidden[0, 2:], hidden[1, 2:])
    assert_close(model._hidden(torch.tensor([[1, 2]]))[0], hidden[0, :2])


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax"])
def test_hstu_learns_a_cycle_and_is_loaded_again(loss, tmp_path):
    model = fit(hstu(), cycles(), num_epochs=20, learning_rate=0.03, loss=loss)
    assert evaluate(model, next_in_cycle(), num_items=12, ks=(1,), progress=False).metrics["recall@1"] == 1.0
    model.save_pretrained(tmp_path)
    again = HSTU.from_pretrained(tmp_path)
    assert (again.num_items, again.max_length) == (12, 8)
    assert (again.recommend(queries(cycles()), 12) == model.recommend(queries(cycles()), 12)).all()


def test_neighbours_as_a_scorer(tmp_path):
    """Log-probabilities in the order of the similarities, the same after a reload; the counter is saved by itself."""
    embeddings = np.random.default_rng(0).normal(size=(12, 4))
    model = EmbeddingKNN(embeddings, num_recent=2, decay=0.4)
    found = model.score_items({"history": [[1, 2, 3], []]})
    similar = normalize(torch.as_tensor(embeddings, dtype=torch.float32), dim=1)
    expected = (10 * (similar @ similar[3] + 0.4 * similar @ similar[2])).log_softmax(0)
    assert_close(found[0], expected)
    assert torch.isinf(found[1]).all()
    model.save_pretrained(tmp_path)
    again = EmbeddingKNN.from_pretrained(tmp_path)
    assert_close(again.score_items({"history": [[1, 2, 3]]})[0], expected)
    both = EmbeddingKNN(embeddings, counter_weight=0.5).fit([[1, 2, 3], [3, 5]])
    both.save_pretrained(tmp_path)
    history = {"history": [[1, 2, 3], [3]]}
    assert np.array_equal(EmbeddingKNN.from_pretrained(tmp_path).recommend(history, 12), both.recommend(history, 12))
