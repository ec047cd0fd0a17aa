"""The three ways in which rows attend to a context give the same numbers, and what orders the context does so."""

import cmath
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.t5.modeling_t5 import T5Attention

from onerec_hf import OneRecV2Config
from onerec_hf.models.modeling_attention import (
    ContextAttention,
    ContextRotary,
    age_buckets,
    rotate,
    with_padding_channels,
)

from ..numeric import assert_close, assert_gradients_close
from ..tiny import tiny_catalogue, tiny_context, tiny_model
from .test_modeling_onerec_v2 import SHARING, all_targets

VARIANTS = [
    {},
    SHARING,
    {"num_context_key_value_heads": 1},
    {"context_position": "none"},
    {"context_position": "bias"},
]


def both_ways(model, batch):
    """Log-probabilities of real targets, loss and gradients: with positions, and with `causal_targets`."""
    found = []
    for causal in (False, True):
        own = {name: value for name, value in batch.items() if name != "target_positions"}
        own |= {"causal_targets": True} if causal else {"target_positions": batch["target_positions"]}
        model.zero_grad()
        output = model(**own)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((output.target_log_probs[batch["context_mask"]].detach(), output.loss.detach(), gradients))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_causal_targets_equal_target_positions(overrides, attention):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **overrides)
    if overrides.get("context_position") == "bias":
        torch.nn.init.normal_(model.model.position_bias.weight)
    model.set_attn_implementation(attention)
    (masked, loss, gradients), (causal, own_loss, own_gradients) = both_ways(model, all_targets(catalogue, model))
    assert_close(causal, masked)
    assert_close(own_loss, loss)
    assert_gradients_close(own_gradients, gradients)


@pytest.mark.parametrize("dtype, difference", [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_causal_targets_in_other_types(dtype, difference):
    """bfloat16 has 8 bits: two orders of summation differ in the second digit of a log-probability."""
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **SHARING).to(dtype)
    (masked, loss, _), (causal, own_loss, _) = both_ways(model, all_targets(catalogue, model))
    assert (causal - masked).abs().max() <= difference * masked.abs().max()
    assert (own_loss - loss).abs() <= difference * loss.abs()


def test_no_mask_reaches_the_attention_of_causal_targets():
    """What lets every fused kernel serve it; a bias over ages has one, and so have positions that are a tensor."""
    masks = []

    def look(module, query, key, value, attention_mask, **kwargs):
        if isinstance(module, ContextAttention):
            masks.append((attention_mask is None, kwargs["is_causal"], query.shape[2], key.shape[2]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("look", look)
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, num_hidden_layers=1)
    model.config._attn_implementation = "look"
    batch = all_targets(catalogue, model)
    model(**batch, causal_targets=True)
    assert masks.pop() == (True, True, 7, 7)
    model(**batch)
    assert masks.pop()[:2] == (False, False)
    context = {name: batch[name][[0, 2]] for name in ("context_ids", "context_mask")}  # nobody's is padded
    model(target_ids=batch["target_ids"][[0, 2], :1], **context)
    assert masks.pop()[:2] == (True, False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_channels_equal_a_mask(attention, dtype):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **SHARING)
    model.set_attn_implementation(attention)
    model = model.to(dtype)
    with torch.no_grad():
        context = model.encode_context(**tiny_context(catalogue, model))
        padded = with_padding_channels(context)
        assert padded.key_states[0].shape[-1] == model.config.head_dim + 8
        layer = model.model.decoder.layers[0].cross_attn
        hidden = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        masked, _ = layer(hidden, context.key_states[0], context.value_states[0], context.mask[:, None, None])
        found, _ = layer(hidden, padded.key_states[0], padded.value_states[0])
    if dtype == torch.float32:
        assert_close(found, masked)
    else:
        assert (found - masked).abs().max() <= 0.05 * masked.abs().max()


def test_rotation_depends_on_the_difference_of_two_places():
    """RoPE written out: the sum over pairs of channels of Re(q conj(k) exp(i (p - s) theta^(-2j/d)))."""
    config = OneRecV2Config(codebook_sizes=[4, 4], hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    rotary = ContextRotary(config)
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for p, s in [(0, 0), (-3, -1), (12, 700)]:
        turned = [rotate(x, *rotary(torch.tensor(place), torch.float64)) for x, place in ((query, p), (key, s))]
        expected = 0.0
        for j in range(4):
            q, k = complex(query[j], query[j + 4]), complex(key[j], key[j + 4])
            expected += (q * k.conjugate() * cmath.exp(1j * (p - s) * 10000 ** (-2 * j / 8))).real
        # angles are float32: 700 items are a place that it knows to some 1e-4
        assert math.isclose(turned[0] @ turned[1], expected, abs_tol=2e-3)


def test_the_order_of_a_history_matters_unless_nothing_orders_it():
    catalogue = tiny_catalogue()
    for position, moved in (("rope", True), ("none", False)):
        model = tiny_model(catalogue, context_position=position)
        context = {"context_ids": tiny_context(catalogue, model)["context_ids"][:1]}
        reversed_context = {"context_ids": context["context_ids"].flip(1)}
        target = context["context_ids"][:, :1]
        first, second = (model(target_ids=target, **c).target_log_probs for c in (context, reversed_context))
        if moved:
            assert (first - second).abs().max() > 1e-3
        else:
            assert_close(first, second)


def test_wrong_use_of_causal_targets_is_named():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    batch = all_targets(catalogue, model) | {"causal_targets": True}
    with pytest.raises(ValueError, match=r"15 rows for 3 histories of 6 items.*so there are 7 rows for each"):
        model(**batch | {"target_ids": batch["target_ids"][:, :4], "target_positions": None})
    mask = batch["context_mask"].flip(1)
    with pytest.raises(ValueError, match="padding in front of an item: pad histories on the right"):
        model(**batch | {"context_mask": mask, "context_ids": batch["context_ids"].flip(1)})
    with pytest.raises(ValueError, match="target i sees i items"):
        model(**batch | {"target_positions": batch["target_positions"] - 1})
    with pytest.raises(ValueError, match="causal_targets=True without target_ids"):
        model(input_ids=torch.ones(3, 1, dtype=torch.long), causal_targets=True, context_ids=batch["context_ids"])
    with pytest.raises(ValueError, match="the rows of a batch are all of one kind"):
        model(**batch | {"causal_targets": torch.tensor([True, False, True])})
    encoder = tiny_model(catalogue, architecture="onerec")
    with pytest.raises(ValueError, match="causal_targets: the encoder of OneRecModel mixes the items"):
        encoder(**tiny_context(catalogue, encoder), target_ids=batch["target_ids"][:, :3], causal_targets=True)


def test_configs_of_before_keep_their_bias():
    sizes = {"codebook_sizes": [4, 4], "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    assert OneRecV2Config(**sizes).context_position == "rope"
    assert OneRecV2Config(**sizes, position_bias_buckets=32).context_position == "bias"
    assert OneRecV2Config(**sizes, position_bias_buckets=0).context_position == "none"
    assert OneRecV2Config(**sizes, context_position="bias").position_bias_buckets == 32
    again = OneRecV2Config.from_dict(OneRecV2Config(**sizes, context_position="bias").to_dict())
    assert (again.context_position, again.position_bias_buckets) == ("bias", 32)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"head_dim": 5}, "head_dim=5 with context_position='rope'"),
        ({"context_position": "rope", "position_bias_buckets": 32}, "which has no bias"),
        ({"context_position": "bias", "position_bias_buckets": 1}, "position_bias_buckets=1 with context_position"),
        ({"context_rope_theta": 1.0}, "context_rope_theta=1.0: a base above 1"),
    ],
)
def test_impossible_positions(overrides, message):
    sizes = {"codebook_sizes": [8, 8], "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        OneRecV2Config(**(sizes | overrides))


def test_age_buckets_are_those_of_t5():
    age = torch.arange(0, 400).view(20, 20)
    expected = T5Attention._relative_position_bucket(-age, bidirectional=False, num_buckets=32, max_distance=128)
    assert torch.equal(age_buckets(age, 32, 128), expected)
