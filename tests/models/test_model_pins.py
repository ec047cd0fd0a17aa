"""Numbers of tiny models that no rewriting may change: loss, score of the best item or session, and the items
themselves.

Weights are a seeded draw in the order of `named_parameters`, so this also says that the order of the blocks has
stayed. When a change of the numbers is meant, say so in the changelog, and write the new ones here.
"""

import pytest

from ..tiny import tiny_catalogue
from .test_modeling_common import prepared

# architecture, overrides -> loss, best score of each user, tokens of the best beam of the first user
PINS = [
    ("onerec", {}, 16.67428, [-1.18109, -1.10989, -1.1108], [1, 7, 16, 25, 1, 7, 19, 22, 1, 7, 13, 21]),
    (
        "onerec",
        {"context_tokens": "item", "score_normalization": "valid"},
        10.46245,
        [-0.40698, -0.38556, -0.50058],
        [1, 6, 17, 24, 1, 7, 13, 21, 1, 5, 13, 25],
    ),
    ("v1", {}, 11.2583, [-1.60466, -1.80887, -1.3529], [1, 6, 17, 22]),
    ("v1", {"lifelong_length": 0}, 8.54641, [-0.89823, -1.37609, -1.19169], [1, 9, 18, 25]),
    ("v2", {}, 3.17356, [-1.0442, -1.30871, -1.02349], [1, 5, 18, 23]),
    ("v2", {"context_position": "bias"}, 2.64747, [-1.28322, -1.59981, -1.22909], [1, 8, 18, 21]),
    (
        "v2",
        {"context_position": "none", "score_normalization": "valid"},
        2.18547,
        [-0.61328, -0.36542, -0.26045],
        [1, 7, 12, 22],
    ),
    ("v2_moe", {}, 3.62077, [-1.33243, -1.42949, -0.93109], [1, 7, 17, 23]),
    ("v2_moe", {"context_position": "bias"}, 3.08734, [-1.5211, -1.56675, -0.71169], [1, 5, 13, 25]),
]


@pytest.mark.parametrize("architecture, overrides, loss, scores, tokens", PINS)
def test_numbers_stay(architecture, overrides, loss, scores, tokens):
    """Relative to 1e-4: a weight that lands in another block, a norm at another position changes the first digit."""
    model, context, targets = prepared(tiny_catalogue(), architecture, **overrides)
    assert model(target_ids=targets, **context).loss.item() == pytest.approx(loss, rel=1e-4)
    found = model.generate(**context, num_beams=8, num_return_sequences=3, return_dict_in_generate=True)
    assert found.sequences_scores[::3].tolist() == pytest.approx(scores, rel=1e-4)
    assert found.sequences[0].tolist() == tokens
