"""Sessions of items against brute force over every ordered session of a small catalogue."""

import itertools

import pytest
import torch

from onerec_hf import Catalogue, ContextKV, OneRecV2Config, beam_search

from ..numeric import assert_close
from ..tiny import tiny_catalogue, tiny_context, tiny_model

# seven semantic IDs; level 1 code 2 has one leaf only, so it is used up after one item
CODES = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 0, 0], [1, 2, 1], [2, 1, 1], [0, 0, 1], [1, 2, 2]])


class HistoryModel:
    """Scores that depend on every token so far, in order, and on the user: nothing but what the search may ask of a
    model.
    """

    def __init__(self, sizes=(3, 3, 3), width=8, scale=2.0):
        self.config = OneRecV2Config(
            codebook_sizes=list(sizes), hidden_size=width, num_hidden_layers=1, num_attention_heads=1
        )
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(self.config.vocab_size, width, generator=generator)
        self.head = scale * torch.randn(self.config.vocab_size, width, generator=generator)

    def context(self, batch: int) -> ContextKV:
        users = torch.randn(batch, self.embedding.shape[1], generator=torch.Generator().manual_seed(1))
        return ContextKV(key_states=(users,), value_states=(users,), mask=torch.ones(batch, 1, dtype=torch.bool))

    def hidden(self, history, users):
        """(R, T) tokens, (R, D) users -> (R, D)."""
        weight = 0.7 ** torch.arange(history.shape[1] - 1, -1, -1.0)
        return torch.tanh((self.embedding[history] * weight[:, None]).sum(1) + users)

    def next_hidden(self, tokens, context_kv, cache):
        history, _ = cache.update(*[tokens[:, None, :, None].float()] * 2, 0)
        users = context_kv.key_states[0]
        return self.hidden(history[:, 0, :, 0].long(), users.repeat_interleave(len(tokens) // len(users), 0))

    def level_log_probs(self, hidden, level, node=None, catalogue=None):
        start = self.config.level_offsets[level]
        return (hidden @ self.head[start : start + self.config.codebook_sizes[level]].T).log_softmax(-1)

    def session_score(self, session, user):
        history, score = torch.zeros(1, 0, dtype=torch.long), 0.0
        for item in session:
            history = torch.cat([history, torch.tensor([[self.config.bos_token_id]])], dim=1)
            for level, code in enumerate(item):
                score += float(self.level_log_probs(self.hidden(history, user[None]), level)[0, code])
                history = torch.cat([history, torch.tensor([[self.config.level_offsets[level] + code]])], dim=1)
        return score


def brute_force(model, user, items, length):
    """(score, session) of every ordered session of `length` different semantic IDs, best first."""
    leaves = sorted({tuple(codes) for codes in items.tolist()})
    sessions = itertools.permutations(leaves, length)
    return sorted(((model.session_score(session, user), session) for session in sessions), reverse=True)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("subset", [False, True])
def test_equals_brute_force(length, subset):
    model, catalogue, batch = HistoryModel(), Catalogue(CODES, [3, 3, 3]), 2
    allowed = torch.ones(batch, len(CODES), dtype=torch.bool)
    allowed[0, [0, 3]] = False  # item 1 keeps [0, 0, 1] alive without item 6 ...
    allowed[1, [1, 6, 4]] = False  # ... and here that leaf is gone
    context_kv = model.context(batch)
    found = beam_search(model, catalogue, context_kv, 400, allowed if subset else None, num_session_items=length)
    assert found.semantic_ids.shape == (batch, 400, length, 3) and found.leaves.shape == (batch, 400, length)
    for user in range(batch):
        items = CODES[allowed[user]] if subset else CODES
        expected = brute_force(model, context_kv.key_states[0][user], items, length)
        real = found.scores[user].isfinite()
        assert int(real.sum()) == len(expected)
        assert_close(found.scores[user][real], torch.tensor([score for score, _ in expected]))
        sessions = [tuple(tuple(item) for item in session) for session in found.semantic_ids[user][real].tolist()]
        assert sessions == [session for _, session in expected]
        assert (found.semantic_ids[user][~real] == -1).all() and (found.leaves[user][~real] == -1).all()
        leaves = catalogue.leaves_of(found.semantic_ids[user][real].flatten(0, 1)).view(-1, length)
        assert torch.equal(leaves, found.leaves[user][real])


def test_a_pruned_search_equals_a_pruned_search_in_plain_python():
    """Few beams, so that prefixes are lost: which ones is part of the contract."""
    model, catalogue, beams, length = HistoryModel(), Catalogue(CODES, [3, 3, 3]), 4, 3
    context_kv = model.context(1)
    leaves = {tuple(codes) for codes in CODES.tolist()}
    kept = [(0.0, ())]  # (score, codes so far)
    for step in range(length * 3):
        longer = []
        for _, codes in kept:
            done = {codes[i : i + 3] for i in range(0, step - step % 3, 3)}
            prefix = codes[step - step % 3 :]
            nexts = {leaf[step % 3] for leaf in leaves - done if leaf[: step % 3] == prefix}
            longer += [(*codes, code) for code in nexts]
        items = [[codes[i : i + 3] for i in range(0, len(codes), 3)] for codes in longer]
        scored = [(model.session_score(session, context_kv.key_states[0][0]), c) for session, c in zip(items, longer)]
        kept = sorted(scored, reverse=True)[:beams]
    found = beam_search(model, catalogue, context_kv, beams, num_session_items=length)
    assert found.semantic_ids[0].flatten(1).tolist() == [list(codes) for _, codes in kept]
    assert_close(found.scores[0], torch.tensor([score for score, _ in kept]))


def test_no_session_is_longer_than_the_catalogue():
    model = HistoryModel()
    found = beam_search(model, Catalogue(CODES[:2], [3, 3, 3]), model.context(2), 5, num_session_items=3)
    assert torch.isinf(found.scores).all() and (found.semantic_ids == -1).all() and (found.leaves == -1).all()


def test_generate_writes_a_bos_before_every_item():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    out = model.generate(
        **context, num_session_items=2, num_beams=6, num_return_sequences=4, return_dict_in_generate=True
    )
    assert out.sequences.shape == (12, 8)
    rows = out.sequences.view(12, 2, 4)
    assert (rows[:, :, 0] == model.config.bos_token_id).all()
    leaves = catalogue.leaves_of((rows[:, :, 1:] - torch.tensor(model.config.level_offsets)).flatten(0, 1)).view(12, 2)
    assert (leaves >= 0).all() and (leaves[:, 0] != leaves[:, 1]).all()
    model.num_session_items = 2  # what a model of sessions says of itself
    assert torch.equal(model.generate(**context, num_beams=6, num_return_sequences=4), out.sequences)


def test_sessions_need_the_fast_search():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    with pytest.raises(ValueError, match=r"num_session_items=2.*together with output_scores=True"):
        model.generate(**tiny_context(catalogue, model), num_session_items=2, num_beams=2, output_scores=True)
