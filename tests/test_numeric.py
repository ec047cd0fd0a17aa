"""The tolerances of the suite: wide enough for every processor, tight enough for the errors that the tests are there
to find.
"""

import pytest
import torch

from .models.test_modeling_common import every_architecture, prepared
from .numeric import assert_close, assert_gradients_close, assert_same_ranking, tolerance, unaligned


@pytest.fixture(scope="module")
def catalogue():
    from .tiny import tiny_catalogue

    return tiny_catalogue()


@every_architecture
def test_a_small_error_of_the_model_is_found(catalogue, architecture):
    """One item of one context, one code of it, one weight of one block off by 1%, attention without its scale: all
    fail.
    """
    model, context, targets = prepared(catalogue, architecture)
    with torch.no_grad():
        expected = model(target_ids=targets, **context).target_log_probs
        mask = context["context_mask"].clone()
        mask[0, 0] = False
        ids = context["context_ids"].clone()
        ids[0, 1, 2] = model.config.level_offsets[2] + (ids[0, 1, 2] - model.config.level_offsets[2] + 1) % 8
        found = {
            "an item": model(target_ids=targets, **context | {"context_mask": mask}).target_log_probs,
            "a code": model(target_ids=targets, **context | {"context_ids": ids}).target_log_probs,
        }
        weight = model.model.decoder.layers[1].self_attn.v_proj.weight
        largest = weight.abs().flatten().argmax()
        weight.view(-1)[largest] *= 1.01
        found["a weight"] = model(target_ids=targets, **context).target_log_probs
        weight.view(-1)[largest] /= 1.01
        model.model.decoder.layers[0].self_attn.scaling *= 1.01
        found["a scale"] = model(target_ids=targets, **context).target_log_probs
    for error, log_probs in found.items():
        with pytest.raises(AssertionError):
            assert_close(log_probs, expected)
            print(error)


def test_rounding_is_not():
    """Sums of the same 800 terms in other orders, and the same product of weights at other addresses."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(64, 800, generator=generator)
    orders = [terms[:, torch.randperm(800, generator=generator)].cumsum(1)[:, -1] for _ in range(20)]
    for other in orders[1:]:
        assert_close(other, orders[0])
    layer = torch.nn.Linear(48, 48)
    states = torch.randn(7, 48, generator=generator)
    assert_close(
        unaligned(torch.nn.Sequential(layer))(states), torch.nn.functional.linear(states, layer.weight, layer.bias)
    )


def test_what_a_tolerance_is():
    assert tolerance(torch.tensor([-7.0, float("-inf")])) == pytest.approx(4 * 800**0.5 * 2**-23 * 7)
    assert_close(torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0]), torch.tensor([float("-inf")]))
    expected = {"a": torch.tensor([1.0]), "b": torch.zeros(1)}
    with pytest.raises(AssertionError):  # a small gradient that is wrong, beside a large one
        assert_gradients_close(expected | {"b": torch.tensor([1e-4])}, expected)


def test_a_ranking_may_only_swap_ties():
    rows, scores = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([-1.0, -1.000001, -2.0])
    assert_same_ranking(rows[[1, 0, 2]], rows, scores)
    for wrong in (rows[[0, 2, 1]], torch.tensor([[1, 2], [3, 4], [5, 7]])):
        with pytest.raises(AssertionError):
            assert_same_ranking(wrong, rows, scores)
