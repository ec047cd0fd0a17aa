"""Sampling under a catalogue, with and without replacement, against the exact probabilities of a small catalogue."""

import math

import pytest
import torch

from onerec_hf import Catalogue, ContextKV, sample_items

from ..numeric import assert_close
from ..tiny import tiny_catalogue, tiny_context, tiny_model
from .test_sessions import CODES, HistoryModel

LEAVES = sorted({tuple(codes) for codes in CODES.tolist()})


def same_users(model, batch):
    users = model.context(1).key_states[0].expand(batch, -1)
    return ContextKV(key_states=(users,), value_states=(users,), mask=torch.ones(batch, 1, dtype=torch.bool))


def exact(model, temperature=1.0, length=1, leaves=LEAVES):
    """{session: (log-probability of being drawn, model's log-probability)}, code by code over what exists and is
    left.
    """
    user = model.context(1).key_states[0]
    found = {}

    def walk(codes, history, drawn, score):
        if len(codes) == 3 * length:
            found[codes] = (drawn, score)
            return
        level = len(codes) % 3
        if level == 0:
            history = [*history, model.config.bos_token_id]
        done = {codes[i : i + 3] for i in range(0, len(codes) - level, 3)}
        nexts = sorted({leaf[level] for leaf in set(leaves) - done if leaf[:level] == codes[len(codes) - level :]})
        log_probs = model.level_log_probs(model.hidden(torch.tensor([history]), user), level)[0, nexts]
        for code, q, p in zip(nexts, (log_probs / temperature).log_softmax(0).tolist(), log_probs.tolist()):
            token = model.config.level_offsets[level] + code
            walk((*codes, code), [*history, token], drawn + q, score + p)

    walk((), [], 0.0, 0.0)
    return found


def check_probabilities(found, expected):
    for codes, drawn, score in zip(
        found.semantic_ids.flatten(0, 1).flatten(1).tolist(),
        found.sample_log_probs.flatten().tolist(),
        found.scores.flatten().tolist(),
    ):
        assert (drawn, score) == pytest.approx(expected[tuple(codes)], abs=1e-4)


def within_noise(count, probability, total):
    """Five standard deviations of a binomial count."""
    assert abs(count - total * probability) < 5 * math.sqrt(total * probability * (1 - probability)) + 1


@pytest.mark.parametrize("temperature, length", [(1.0, 1), (2.0, 1), (1.0, 2)])
def test_with_replacement(temperature, length):
    model, catalogue, total = HistoryModel(scale=0.5), Catalogue(CODES, [3, 3, 3]), 4000
    generator = torch.Generator().manual_seed(0)
    found = sample_items(
        model, catalogue, same_users(model, 2), total // 2, True, temperature, generator, num_session_items=length
    )
    expected = exact(model, temperature, length)
    check_probabilities(found, expected)
    rows = [tuple(codes) for codes in found.semantic_ids.flatten(0, 1).flatten(1).tolist()]
    for codes, (drawn, _) in expected.items():
        within_noise(rows.count(codes), math.exp(drawn), total)


@pytest.mark.parametrize("length", [1, 2])
def test_without_replacement(length):
    """The first sample has the probabilities of the model, the second those that are left, renormalised."""
    model, catalogue, total = HistoryModel(scale=0.5), Catalogue(CODES, [3, 3, 3]), 4000
    generator = torch.Generator().manual_seed(0)
    found = sample_items(model, catalogue, same_users(model, total), 2, generator=generator, num_session_items=length)
    expected = exact(model, length=length)
    check_probabilities(found, expected)
    pairs = [tuple(tuple(codes) for codes in pair) for pair in found.semantic_ids.flatten(2).tolist()]
    assert all(first != second for first, second in pairs)
    probability = {codes: math.exp(drawn) for codes, (drawn, _) in expected.items()}
    for first in probability:
        within_noise(sum(pair[0] == first for pair in pairs), probability[first], total)
        for second in probability.keys() - {first}:
            both = probability[first] * probability[second] / (1 - probability[first])
            within_noise(pairs.count((first, second)), both, total)


@pytest.mark.parametrize("replacement", [False, True])
def test_prefixes_with_hundreds_of_children(replacement):
    """Longer than a run of the index, and of very different lengths."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.stack(
        [torch.zeros(250).long(), torch.ones(250).long(), torch.randperm(256, generator=generator)[:250]], 1
    )
    narrow = torch.tensor([[0, 0, 5], [0, 0, 9], [0, 2, 7]])
    codes, model = torch.cat([wide, narrow]), HistoryModel(sizes=(1, 3, 256), scale=0.5)
    found = sample_items(
        model, Catalogue(codes, [1, 3, 256]), same_users(model, 4), 50, replacement, generator=generator
    )
    check_probabilities(found, exact(model, leaves=[tuple(code) for code in codes.tolist()]))
    assert len(found.leaves.unique()) > 20


def test_gumbels_give_unbiased_sums():
    """sum over all items of p(item) f(item), from 3 samples without replacement, as the docstring of the output
    says.
    """
    model, catalogue, total = HistoryModel(scale=0.5), Catalogue(CODES, [3, 3, 3]), 4000
    found = sample_items(model, catalogue, same_users(model, total), 4, generator=torch.Generator().manual_seed(1))
    kappa, q = found.gumbels[:, -1:], found.sample_log_probs[:, :-1]
    weight = q.exp() / (1 - (-(q - kappa).exp()).exp())
    value = found.leaves[:, :-1, 0].float() ** 2
    estimates = (weight * value).sum(1)
    truth = sum(math.exp(drawn) * LEAVES.index(codes) ** 2 for codes, (drawn, _) in exact(model).items())
    assert abs(float(estimates.mean()) - truth) < 5 * float(estimates.std()) / math.sqrt(total)


@pytest.mark.parametrize("replacement", [False, True])
def test_subset_seed_and_dead_samples(replacement):
    model, catalogue = HistoryModel(scale=0.5), Catalogue(CODES, [3, 3, 3])
    allowed = torch.zeros(2, len(CODES), dtype=torch.bool)
    allowed[0, [1, 6, 4]] = True  # items 1 and 6 are one leaf
    arguments = {"num_samples": 4, "replacement": replacement, "allowed_items": allowed}
    draws = [
        sample_items(model, catalogue, model.context(2), **arguments, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0].sample_log_probs, draws[1].sample_log_probs)
    assert torch.equal(draws[0].leaves, draws[1].leaves)
    assert replacement or not torch.equal(draws[0].gumbels, draws[2].gumbels)
    for found in draws:
        leaves = found.leaves[0, :, 0].tolist()
        assert set(leaves) <= {*catalogue.leaves_of(CODES[[1, 4]]).tolist(), -1}
        assert leaves.count(-1) == (0 if replacement else 2)
        assert (found.leaves[1] == -1).all() and torch.isinf(found.scores[1]).all()
        assert torch.isinf(found.sample_log_probs[1]).all() and not found.sample_log_probs.isnan().any()


def test_generate_draws_different_items_of_the_catalogue():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    settings = {"do_sample": True, "num_return_sequences": 60, "return_dict_in_generate": True}
    out = model.generate(**tiny_context(catalogue, model), **settings, replacement=False)
    codes = (out.sequences[:, 1:] - torch.tensor(model.config.level_offsets)).view(3, 60, 3)
    assert all(len({tuple(row) for row in user.tolist()}) == 60 for user in codes)  # all there are
    targets = out.sequences[:, 1:].view(3, 60, 3)
    with torch.no_grad():
        scores = model(target_ids=targets, **tiny_context(catalogue, model)).target_log_probs.sum(-1)
    assert_close(out.sequences_scores.view(3, 60) * 3, scores)
    torch.manual_seed(0)
    first = model.generate(**tiny_context(catalogue, model), **settings)
    again = model.generate(**tiny_context(catalogue, model), **settings, generator=torch.manual_seed(0))
    assert torch.equal(first.sequences, again.sequences)


def test_both_loops_draw_from_the_same_distribution():
    """transformers' default of the 50 best tokens must not cut one of them."""
    catalogue = Catalogue(torch.arange(120).unsqueeze(1), [120])
    model = tiny_model(catalogue, codebook_sizes=[120])
    context = {"context_ids": catalogue.semantic_ids[:4].long().view(1, 4, 1) + 4}
    torch.manual_seed(0)
    draws = {"do_sample": True, "num_return_sequences": 3000, "temperature": 4.0}
    fast = model.generate(**context, **draws)[:, 1].bincount(minlength=124)
    loop = model.generate(**context, **draws, output_scores=True)[:, 1].bincount(minlength=124)
    assert (loop > 0).sum() > 60 and (fast > 0).sum() > 60
    difference = (fast - loop).abs().float()
    assert (difference < 5 * (fast + loop).float().sqrt() + 3).all()


def test_temperature_must_be_positive():
    model = HistoryModel(scale=0.5)
    with pytest.raises(ValueError, match="for the best items use beam_search"):
        sample_items(model, Catalogue(CODES, [3, 3, 3]), model.context(1), 3, temperature=0.0)
