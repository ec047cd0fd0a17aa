"""The item head of OneRec-V2: its loss by hand, its scores, and the ways to serve with it."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError

from onerec_hf import OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.collators import OneRecCollator
from onerec_hf.recommender import ItemRanker, Recommender
from onerec_hf.reranker import Reranker

from ..numeric import assert_close
from ..tiny import tiny_catalogue, tiny_context, tiny_model

VECTORS = {"context_features": {"item_vectors": 66}, "feature_embed_dims": {"item_vectors": 5}}
VECTORS |= {"fixed_context_features": ["item_vectors"]}


def model_with(catalogue, vectors=False, **settings):
    own = VECTORS if vectors else {}
    model = tiny_model(catalogue, item_head_dim=6, item_head_size=65, **own, **settings)
    if vectors:
        table = torch.randn(65, 5, generator=torch.Generator().manual_seed(3))
        model.model.context_processor.embed_features.fill("item_vectors", table)
    return model


def inputs(catalogue, model, vectors=False):
    context = tiny_context(catalogue, model)
    if vectors:
        context["context_features"] = torch.randint(1, 66, (3, 6, 1), generator=torch.Generator().manual_seed(4))
    return context


def targets(catalogue, model, items):
    """Token ids (B, n, L) of item indices, pad tokens for -1."""
    tokens = catalogue.semantic_ids.long() + torch.tensor(model.config.level_offsets)
    items = torch.tensor(items)
    return tokens[items.clamp(min=0)].masked_fill((items < 0).unsqueeze(2), model.config.pad_token_id)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_by_hand(vectors, reduction):
    catalogue = tiny_catalogue()
    model = model_with(catalogue, vectors, item_loss_weight=0.5, loss_reduction=reduction)
    context, items = inputs(catalogue, model, vectors), [[3, 9, -1], [12, -1, -1], [4, 5, 6]]
    target_ids = targets(catalogue, model, items)
    found = model(**context, target_ids=target_ids)
    table = model.item_head.items.weight
    if vectors:
        given = model.model.context_processor.embed_features.tables[0].weight[1:]
        table = table + given @ model.item_head.project.weight.T
    losses = []
    for row, own in enumerate(items):
        one = {name: tensor[row : row + 1] for name, tensor in context.items()}
        hidden = model.model(torch.tensor([[1]]), **one).last_hidden_state[0, 0]
        scores = table @ (model.item_head.query.weight @ hidden)
        losses += [F.cross_entropy(scores, torch.tensor(item)) for item in own if item >= 0]
        assert_close(model.score_items(**one)[0], scores.log_softmax(0))
    real = target_ids != model.config.pad_token_id
    codes = -found.target_log_probs[real].sum() / (len(losses) * (3 if reduction == "mean" else 1))
    assert_close(found.loss, codes + 0.5 * torch.stack(losses).mean())
    # `Trainer` gives the number of codes (or rows) of a whole step: here of two such batches
    count = 2 * model.loss_items(real)
    assert_close(model(**context, target_ids=target_ids, num_items_in_batch=count).loss, found.loss / 2)
    found.loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.item_head.parameters())
    model.config.item_loss_weight = 0.0
    assert_close(model(**context, target_ids=target_ids).loss, codes)


def test_items_of_one_semantic_id_have_one_target():
    """Items 60 to 64 repeat the semantic IDs of 0 to 4: the first of a semantic ID stands for all."""
    catalogue = tiny_catalogue()
    model = model_with(catalogue)
    context = inputs(catalogue, model)
    both = [model(**context, target_ids=targets(catalogue, model, [[item]] * 3)).loss for item in (2, 62)]
    assert_close(*both)


def test_what_the_head_does_not_know_teaches_the_codes_alone():
    """An item that joined the catalogue later, and codes of no item."""
    catalogue = tiny_catalogue()
    model = model_with(catalogue)
    free = next(code for code in itertools.product(range(8), repeat=3) if catalogue.leaves_of([code])[0] < 0)
    context = inputs(catalogue, model)
    tokens = torch.tensor(free) + torch.tensor(model.config.level_offsets)
    target_ids = tokens.expand(3, 1, 3)
    for known in (catalogue, catalogue.with_items(np.array([free]), [2000])):
        model.catalogue = known
        found = model(**context, target_ids=target_ids)
        assert_close(found.loss, -found.target_log_probs.mean())


def test_it_is_saved_and_checked(tmp_path):
    catalogue = tiny_catalogue()
    model = model_with(catalogue, vectors=True)
    model.save_pretrained(tmp_path)
    again = OneRecV2ForCausalLM.from_pretrained(tmp_path)
    context = inputs(catalogue, model, vectors=True)
    assert_close(again.score_items(**context), model.score_items(**context))
    with pytest.raises(ValueError, match="this model has no item head"):
        tiny_model(catalogue).score_items(**tiny_context(catalogue, model))
    with pytest.raises(
        StrictDataclassClassValidationError,
        match="item_head_dim=8 with item_head_size=0: a head has a width and a number",
    ):
        OneRecV2Config(codebook_sizes=[4, 4], item_head_dim=8)


def test_the_vectors_of_the_items_follow_the_weights():
    """They are kept from one call to the next, and never after a weight has changed."""
    catalogue = tiny_catalogue()
    model = model_with(catalogue, vectors=True)
    context, head = inputs(catalogue, model, vectors=True), model.item_head

    def scores():
        found = model.score_items(**context)
        head._known = None
        assert_close(found, model.score_items(**context))
        return found

    before = scores()
    assert model.score_items(**context) is not None and (first := head._known[1]) is not None
    model.score_items(**context)
    assert head._known[1] is first
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    changes = [
        lambda: head.project.weight.mul_(2),
        lambda: torch.optim.SGD([head.items.weight], lr=0.5).step(),
        lambda: model.model.context_processor.embed_features.fill("item_vectors", torch.randn(65, 5)),
        lambda: setattr(head.project.weight, "data", torch.randn_like(head.project.weight)),
        lambda: model.load_state_dict(weights),
    ]
    last = before
    head.items.weight.grad = torch.ones_like(head.items.weight).cumsum(0)
    for change in changes:
        with torch.no_grad():
            change()
        now = scores()
        assert not torch.allclose(now, last)
        last = now
    assert_close(last, before)
    model.double()
    assert model.score_items(**context).dtype == torch.float32 and head._known[1].dtype == torch.float64
    model.train().eval()
    assert head._known is None
    loss = model(**context, target_ids=targets(catalogue, model, [[1], [2], [3]])).loss
    loss.backward()
    assert head._known is None and head.project.weight.grad.abs().sum() > 0
    with torch.inference_mode():
        assert_close(model.score_items(**context), before)
    copy.deepcopy(model), pickle.dumps(model)


def test_a_reranker_reads_it(tmp_path):
    catalogue = tiny_catalogue()
    model = model_with(catalogue)
    tokens = catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets)
    reranker = Reranker({}, num_candidates=65, item_head=True)
    for kind in ("kept", "masked"):
        reranker.weights[kind] = dict.fromkeys(reranker.features, 0.0) | {"item head": 1.0}
    recommender = Recommender(ItemRanker(model, OneRecCollator(tokens), 20, reranker))
    histories = [[1003, 1004], [1010]]
    context = recommender.ranker.collator.context([{"user": 0, "history": [3, 4]}, {"user": 0, "history": [10]}])
    best = model.score_items(**context).topk(5)
    recommender.save_pretrained(tmp_path)
    for served in (recommender, Recommender.from_pretrained(tmp_path, num_beams=20)):
        found = served.recommend(histories, k=5)
        assert [[item.item_id for item in row] for row in found] == (1000 + best.indices).tolist()
        assert_close(torch.tensor([[item.score for item in row] for row in found]), best.values)
    rows = {"user": [0, 0], "history": [[3, 4], [10]]}
    assert recommender.ranker.recommend(rows, 5).tolist() == best.indices.tolist()
    recommender.remove_items([1000])  # the head keeps its own numbers of the items
    moved = [[i.item_id for i in row] for row in recommender.recommend(histories, k=4)]
    assert moved == [[1000 + i for i in row if i != 0][:4] for row in best.indices.tolist()]
