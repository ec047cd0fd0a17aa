"""Searches in buffers of fixed sizes are the searches themselves. There is no GPU here: a function that is called
again and fills its first result stands for the CUDA graph, which does the same.
"""

import pytest
import torch

from onerec_hf.collators import OneRecCollator
from onerec_hf.models import CapturedSearch, captured_search
from onerec_hf.recommender import Recommender

from ..numeric import assert_close
from ..tiny import ARCHITECTURES, tiny_catalogue, tiny_context, tiny_model

recorded = []


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """`record` without a GPU; what was recorded is listed."""

    def record(way, pool=None):
        result = way()
        recorded.append(way)

        def replay():
            for name, values in way().items():
                result[name].copy_(values)

        return replay, result

    recorded.clear()
    monkeypatch.setattr(captured_search, "record", record)


def captured(model, **sizes) -> CapturedSearch:
    model.captured_search = CapturedSearch(model, **{"batch_sizes": (2, 4), "context_lengths": (4, 8), **sizes})
    return model.captured_search


def same(model, context, **arguments):
    """`recommend_items` by graphs and without them."""
    found = model.recommend_items(**arguments, **context)
    search, model.captured_search = model.captured_search, None
    expected = model.recommend_items(**arguments, **context)
    model.captured_search = search
    assert torch.equal(found.items, expected.items)
    assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_replay_is_the_search(architecture):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture=architecture)
    captured(model)
    context = tiny_context(catalogue, model)
    same(model, context, k=5, num_beams=6)
    same(model, {name: values[:1] for name, values in context.items()}, k=5, num_beams=6)  # a smaller buffer
    allowed = torch.zeros(3, 65, dtype=torch.bool)
    allowed[:, ::3] = True
    allowed[1, :40] = False
    same(model, context, k=5, num_beams=6, allowed_items=allowed)
    same(model, context, k=5, num_beams=6, allowed_items=allowed[:1])
    assert len(recorded) == 3  # two batch sizes, and one of them with a mask


def test_what_a_shorter_history_left_behind_is_gone():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    captured(model)
    long, short = tiny_context(catalogue, model, length=8), tiny_context(catalogue, model, length=5, seed=2)
    first = model.recommend_items(5, num_beams=6, **long)
    kept = first.items.clone()
    same(model, short, k=5, num_beams=6)
    without_mask = {"context_ids": short["context_ids"] * short["context_mask"][:, :, None]}
    same(model, without_mask, k=5, num_beams=6)
    assert torch.equal(first.items, kept)  # a later replay does not write into it
    assert len(recorded) == 1


def test_graphs_are_of_one_catalogue_and_of_the_weights_in_their_place():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    search = captured(model, max_graphs=2)
    context = tiny_context(catalogue, model)
    for width in (6, 7, 8):
        same(model, context, k=5, num_beams=width)
    assert len(recorded) == 3 and [key[0][2] for key in search.graphs] == [(7, 7, 7), (8, 8, 8)]  # the oldest went
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(1.1)
    same(model, context, k=5, num_beams=8)
    assert len(recorded) == 3  # weights that change in place are read anew
    model.double()
    same(model, context, k=5, num_beams=8)
    model.catalogue = catalogue.without_items([1003])
    same(model, context, k=5, num_beams=8)
    assert len(recorded) == 5 and len(search.graphs) == 1


def test_too_much_for_the_graphs_is_searched_without():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    captured(model, batch_sizes=(2,))
    same(model, tiny_context(catalogue, model), k=5, num_beams=6)
    assert not recorded
    with pytest.raises(ValueError, match="rows"):
        model.recommend_items(5, allowed_items=torch.ones(2, 65, dtype=torch.bool), **tiny_context(catalogue, model))


def test_without_a_gpu_it_says_so(tmp_path):
    model = tiny_model(tiny_catalogue())
    with pytest.raises(ValueError, match=r"batch_sizes=\[\]: whole numbers of at least 1"):
        model.capture(batch_sizes=[])
    model.capture(batch_sizes=[2])
    assert model.captured_search is None
    model.save_pretrained(tmp_path)
    tokens = model.catalogue.semantic_ids + torch.tensor(model.config.level_offsets)
    OneRecCollator(tokens.numpy(), 5).save_pretrained(tmp_path)
    served = Recommender.from_pretrained(tmp_path, num_beams=6, cuda_graphs={"batch_sizes": [2]})
    assert len(served.recommend([[1000, 1001]], k=3)[0]) == 3
