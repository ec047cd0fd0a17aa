"""How far two float32 results may lie apart that are equal on paper.

Processors add in different orders, and the same product of the same numbers differs with the address that the numbers
lie at. So no test expects equal bits of floats that come from two tensors, two code paths or two loads. What it may
expect: the rounding errors of a sum of n terms grow like sqrt(n) * eps, relative to the largest number in it.
"""

import math

import torch

# The longest way from a weight of the tiny models to a logit: 4 blocks with some 4 products of 32 to 48 terms each,
# and the head.
TERMS = 4 * 4 * 48 + 32
_SPREAD = 4  # standard deviations of that error; all errors to one side would be sqrt(n) of them


def tolerance(expected: torch.Tensor, terms: int = TERMS, scale: float | None = None) -> float:
    """
    The largest difference allowed: with the terms of the tiny models 1.4e-5 of the largest number, so 1e-4 of a
    log-probability of
    7. `test_numeric.py` says which errors it still finds.
    """
    largest = expected[expected.isfinite()].abs().max(dim=0).values.item() if scale is None else scale
    return _SPREAD * math.sqrt(terms) * torch.finfo(torch.float32).eps * largest


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    terms: int = TERMS,
    scale: float | None = None,
    msg: str | None = None,
) -> None:
    """
    Equal but for rounding; whole numbers exactly.

    Args:
        terms: Numbers that are added on the longest way from what is given to what is compared.
        scale: Largest number on that way, where it is not among the results: small differences of large numbers.
    """
    atol = tolerance(expected, terms, scale) if expected.is_floating_point() and expected.isfinite().any() else 0
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, msg=msg and (lambda text: f"{msg}: {text}"))


def assert_gradients_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], terms: int = TERMS
) -> None:
    """By name; relative to the largest gradient of the model, since those of one weight can cancel to nothing."""
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, terms, scale, msg=name)


def assert_same_ranking(
    actual: torch.Tensor, expected: torch.Tensor, scores: torch.Tensor, terms: int = TERMS
) -> None:
    """
    Rows of the same things in the same order; neighbours whose scores are equal but for rounding may change places.

    Args:
        actual, expected (`torch.LongTensor` of shape (S, C)): Ranked rows of tokens.
        scores (`torch.Tensor` of shape (S,)): Of `expected`, best first.
    """
    margin = 2 * tolerance(scores[scores.isfinite()], terms)
    assert actual.shape == expected.shape
    for place, row in enumerate(actual):
        same = (expected == row).all(-1).nonzero().flatten().tolist()
        assert any(abs(scores[place] - scores[other]) <= margin for other in same), (place, row.tolist(), same)


def unaligned(model: torch.nn.Module) -> torch.nn.Module:
    """The model, each weight at an address that is no multiple of 16 bytes, as in a file that is mapped into
    memory.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_contiguous():
            room = torch.empty(parameter.numel() + 1, dtype=parameter.dtype)
            parameter.data = room[1:].view(parameter.shape).copy_(parameter.data)
    return model
