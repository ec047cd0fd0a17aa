"""One beam width for each level: exact where the early ones leave nothing out, and a beam search by hand elsewhere."""

import numpy as np
import pytest
import torch

from onerec_hf import beam_search
from onerec_hf.collators import OneRecCollator
from onerec_hf.item_ranker import ItemRanker
from onerec_hf.recommender import Recommender

from ..numeric import assert_close
from ..tiny import tiny_catalogue, tiny_context, tiny_model


def by_hand(model, catalogue, context, widths):
    """Scores (K,) of one user: at each level the best existing prefixes, each scored by itself."""
    items = {tuple(codes) for codes in catalogue.semantic_ids.tolist()}
    offsets, kept = model.config.level_offsets, [((), 0.0)]
    for level, width in enumerate(widths):
        grown = []
        for prefix, score in kept:
            row = torch.tensor([[1, *(code + offset for code, offset in zip(prefix, offsets))]])
            log_probs = model(input_ids=row, **context).logits[0, -1].log_softmax(0)
            following = {codes[level] for codes in items if codes[:level] == prefix}
            grown += [((*prefix, c), score + log_probs[c + offsets[level]].item()) for c in following]
        kept = sorted(grown, key=lambda pair: -pair[1])[:width]
    return torch.tensor([score for _, score in kept])


@pytest.mark.parametrize("widths", [[2, 5, 4], [1, 8, 3], [8, 64, 60]])
def test_each_level_keeps_its_own_number(widths):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    with torch.no_grad():
        context = {name: tensor[:1] for name, tensor in tiny_context(catalogue, model).items()}
        found = beam_search(model, catalogue, model.encode_context(**context), widths)
        expected = by_hand(model, catalogue, context, widths)
    assert found.scores.shape == (1, widths[-1])
    alive = found.scores[0, : len(expected)]
    assert_close(alive, expected)
    assert (found.scores[0, len(expected) :] == float("-inf")).all()


def test_widths_reach_the_search_from_every_call():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    widths = [5, 18, 20]
    found = model.recommend_items(20, num_beams=widths, **context)
    assert not torch.equal(found.scores, model.recommend_items(20, num_beams=20, **context).scores)
    offsets = torch.tensor(model.config.level_offsets)
    ranker = ItemRanker(model, OneRecCollator((catalogue.semantic_ids + offsets).numpy()), widths)
    history = [int(i) for i in catalogue.item_ids[:4]]
    served = Recommender(ranker).recommend([history], 20)[0]
    rows = {"user": [0], "history": [[0, 1, 2, 3]]}
    assert [item.item_id for item in served] == catalogue.item_ids[ranker.recommend(rows, 20)[0]].tolist()
    wide = Recommender(ItemRanker(model, ranker.collator, 20)).recommend([history], 20)[0]
    assert [item.score for item in served] != [item.score for item in wide]
    assert len(Recommender(ranker).recommend([history], 21)[0]) == 21  # the last level grows with k


def test_numbers_of_numpy_are_numbers():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    expected = model.recommend_items(60, num_beams=60, **context).items
    for k, widths in ((np.int64(60), None), (60, np.int64(60)), (60, np.array([60, 60, 60]))):
        assert torch.equal(model.recommend_items(k, num_beams=widths, **context).items, expected)


@pytest.mark.parametrize("widths", [[2, 5], [2, 0, 5], 0, [2, 5, 5, 5]])
def test_wrong_widths_are_named(widths):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    with pytest.raises(ValueError, match="a number of at least 1, or a list of 3 of them"):
        model.recommend_items(1, num_beams=widths, **tiny_context(catalogue, model))
