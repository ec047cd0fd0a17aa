"""OneRec-V2: the all-targets pass, attention implementations, checkpointing, features, gradients, bad input."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from onerec_hf import OneRecV2Config

from ..numeric import assert_close, assert_gradients_close
from ..tiny import tiny_catalogue, tiny_context, tiny_model

SHARING = {
    "num_context_layers": 2,
    "context_key_value_split": 2,
    "num_context_key_value_heads": 2,
    "num_key_value_heads": 2,
}
VARIANTS = [{}, SHARING, {"context_position": "none"}, {"context_position": "bias"}, {"score_normalization": "valid"}]


def all_targets(catalogue, model, batch=3, length=6, seed=2):
    """Context of `length` items, each of which but the first is a target that sees the ones before it; user 1 is
    shorter.
    """
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(catalogue.num_items, (batch, length + 1), generator=generator)
    ids = catalogue.semantic_ids[history] + torch.tensor(model.config.level_offsets)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, 3:] = False
    return {
        "context_ids": ids[:, :-1] * mask.unsqueeze(2),
        "context_mask": mask,
        "target_ids": ids[:, 1:] * mask.unsqueeze(2),
        "target_positions": torch.arange(1, length + 1).expand(batch, -1),
    }


@pytest.mark.parametrize("overrides", VARIANTS)
def test_all_targets_in_one_pass_equal_one_sample_per_target(overrides):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **overrides)
    batch = all_targets(catalogue, model)
    together = model(**batch)
    alone = []
    for user in range(3):
        for target in range(int(batch["context_mask"][user].sum())):
            one = model(
                context_ids=batch["context_ids"][user : user + 1, : target + 1],
                target_ids=batch["target_ids"][user : user + 1, target : target + 1],
            )
            assert_close(one.target_log_probs[0, 0], together.target_log_probs[user, target])
            alone.append(one.loss)
    assert_close(torch.stack(alone).mean(), together.loss)


def test_gradients_of_both_ways_agree():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **SHARING)
    batch = all_targets(catalogue, model)
    model(**batch).loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    count = int(batch["context_mask"].sum())
    for user in range(3):
        for target in range(int(batch["context_mask"][user].sum())):
            one = {"context_ids": batch["context_ids"][user : user + 1, : target + 1]}
            (
                model(**one, target_ids=batch["target_ids"][user : user + 1, target : target + 1]).loss / count
            ).backward()
    assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, together)


@pytest.mark.parametrize("causal", [False, True])
def test_a_target_does_not_see_itself_or_the_future(causal):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    batch = all_targets(catalogue, model) | {"causal_targets": causal}
    before = model(**batch).target_log_probs
    changed = dict(batch, context_ids=batch["context_ids"].clone())
    changed["context_ids"][0, 4] = batch["context_ids"][2, 0]
    after = model(**changed).target_log_probs
    assert_close(after[0, :4], before[0, :4])
    assert (after[0, 4:] != before[0, 4:]).any()


@pytest.mark.parametrize("overrides", VARIANTS)
def test_sdpa_and_eager_agree(overrides):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **overrides)
    batch = all_targets(catalogue, model)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(**batch).target_log_probs
    model.set_attn_implementation("eager")
    assert_close(model(**batch).target_log_probs, sdpa)


def test_gradient_checkpointing_changes_nothing():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **SHARING).train()
    batch = all_targets(catalogue, model)
    model(**batch).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, plain)


def test_every_parameter_learns():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **SHARING)
    model(**all_targets(catalogue, model)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_logits_and_labels_give_the_loss_of_target_ids():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    targets = catalogue.semantic_ids[:3] + torch.tensor(model.config.level_offsets)
    ids = torch.nn.functional.pad(targets, (1, 0), value=1)
    out = model(input_ids=ids, labels=ids, **context)
    expected = model(target_ids=targets.unsqueeze(1), **context)
    assert_close(out.loss, expected.loss)
    log_probs = out.logits.log_softmax(-1)[:, :-1].gather(2, targets.unsqueeze(2)).squeeze(2)
    assert_close(log_probs, expected.target_log_probs[:, 0])


def test_a_cache_changes_nothing():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    ids = torch.nn.functional.pad(
        catalogue.semantic_ids[:3] + torch.tensor(model.config.level_offsets), (1, 0), value=1
    )
    full = model(input_ids=ids, **context).logits
    kv = model.model.encode_context(**context)
    cache, steps = None, []
    for i in range(4):
        out = model(input_ids=ids[:, i : i + 1], context_kv=kv, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert_close(torch.cat(steps, dim=1), full)


def test_hidden_states_and_attentions_are_recorded():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    model.set_attn_implementation("eager")
    ids = torch.ones(3, 1, dtype=torch.long)
    out = model(input_ids=ids, **tiny_context(catalogue, model), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5 and out.hidden_states[0].shape == (3, 1, 32)
    assert len(out.attentions) == 4 and out.attentions[0].shape == (3, 4, 1, 1)
    assert len(out.cross_attentions) == 4 and out.cross_attentions[0].shape == (3, 4, 1, 7)


def test_features_reach_the_output_and_are_demanded():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, context_features={"action": 5, "author": 9}, user_features={"city": 4})
    context = tiny_context(catalogue, model)
    features = torch.zeros(3, 6, 2, dtype=torch.long)
    ids = torch.ones(3, 1, dtype=torch.long)

    def logits(features, city):
        return model(
            input_ids=ids, **context, context_features=features, user_features=torch.tensor([[city]] * 3)
        ).logits

    changed = features.clone()
    changed[0, 2, 1] = 3
    assert (logits(changed, 0)[0] != logits(features, 0)[0]).any()
    assert_close(logits(changed, 0)[1], logits(features, 0)[1])
    assert (logits(features, 2) != logits(features, 0)).any()
    with pytest.raises(
        ValueError, match=r"context_features holds 0 features, the config names 2 \(\['action', 'author'\]\)"
    ):
        model(input_ids=ids, **context)
    with pytest.raises(ValueError, match="context_features holds 2 features, the config names 0"):
        tiny_model(catalogue)(input_ids=ids, **context, context_features=features)


def test_the_order_of_features_survives_a_reload(tmp_path):
    """config.json is written with sorted keys; the columns of context_features must not change their meaning with
    it.
    """
    config = OneRecV2Config(
        codebook_sizes=[4, 4], context_features={"watch": 5, "action": 9}, user_features={"z": 2, "b": 3}
    )
    config.save_pretrained(tmp_path)
    again = OneRecV2Config.from_pretrained(tmp_path)
    assert list(again.context_features) == list(config.context_features) == ["action", "watch"]
    assert list(again.user_features) == list(config.user_features) == ["b", "z"]


def test_learns_a_rule():
    """The next item is a function of the last one; a few steps must find it."""
    catalogue = tiny_catalogue(num_items=20, num_collisions=0)
    torch.manual_seed(0)
    model = tiny_model(catalogue, hidden_size=32, num_hidden_layers=2).train()
    offsets = torch.tensor(model.config.level_offsets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        start = torch.randint(20, (16, 1))
        history = (start + torch.arange(5)) % 20
        ids = catalogue.semantic_ids[history] + offsets
        loss = model(
            context_ids=ids[:, :-1], target_ids=ids[:, 1:], target_positions=torch.arange(1, 5).expand(16, -1)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    ids = catalogue.semantic_ids[torch.arange(4).unsqueeze(0)] + offsets
    best = model.generate(context_ids=ids, num_beams=5)
    assert torch.equal(best[0, 1:] - offsets, catalogue.semantic_ids[4])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"vocab_size": 7}, "vocab_size=7 does not fit"),
        ({"num_context_key_value_heads": 3}, "num_context_key_value_heads=3 must divide num_attention_heads=4"),
        ({"context_key_value_split": 3}, "S_kv is 1"),
        ({"num_context_layers": 9}, "L_kv must be between 1 and num_hidden_layers=2"),
        ({"codebook_sizes": [8, 0]}, "every level needs at least one code"),
    ],
)
def test_impossible_configs(overrides, message):
    sizes = {"codebook_sizes": [8, 8], "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        OneRecV2Config(**(sizes | overrides))


def test_bad_inputs_are_named():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    ids = torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="context_ids is missing"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=r"expected \(batch, items, 3\)"):
        model(input_ids=ids, context_ids=torch.ones(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="2 rows of input_ids cannot share 3 contexts"):
        model(input_ids=ids, **tiny_context(catalogue, model))
    with pytest.raises(NotImplementedError, match="semantic IDs"):
        model.resize_token_embeddings(5)


def test_the_encoded_context_is_a_pytree():
    """Field names must not shadow the methods of a dictionary: FSDP, export and the FLOP counter flatten outputs."""
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    kv = model.model.encode_context(**tiny_context(catalogue, model))
    leaves = torch.utils._pytree.tree_leaves(kv)
    assert sum(torch.is_tensor(leaf) for leaf in leaves) == 3


def test_a_fixed_feature_is_given_looked_up_and_not_trained():
    catalogue = tiny_catalogue()
    vectors = torch.randn(catalogue.num_items, 5, generator=torch.Generator().manual_seed(3))
    features = {"action": 4, "item": catalogue.num_items + 1}
    model = tiny_model(
        catalogue, context_features=features, fixed_context_features=["item"], feature_embed_dims={"item": 5}
    )
    tables = model.model.context_processor.embed_features
    tables.fill("item", vectors)
    first, second = tables(torch.tensor([[1, 0], [2, 7]]), (2,))
    assert first.shape == (2, 8)  # context_embed_dim
    assert_close(second, torch.stack([torch.zeros(5), vectors[6]]))
    batch = all_targets(catalogue, model)
    given = torch.ones(3, 6, 2, dtype=torch.long)
    assert [name for name, _ in tables.named_parameters()] == ["tables.0.weight"]
    other = given.clone()
    other[0, 0, 1] = 9
    log_probs = [model(**batch, context_features=x).target_log_probs for x in (given, other)]
    assert (log_probs[0][0] != log_probs[1][0]).any() and torch.equal(log_probs[0][1], log_probs[1][1])
    with pytest.raises(ValueError, match=r"shape \(3, 5\), the config says 65 rows"):
        tables.fill("item", vectors[:3])


def test_a_fixed_feature_survives_saving(tmp_path):
    catalogue = tiny_catalogue()
    settings = {"context_features": {"item": catalogue.num_items + 1}, "fixed_context_features": ["item"]}
    model = tiny_model(catalogue, feature_embed_dims={"item": 5}, **settings)
    vectors = torch.randn(catalogue.num_items, 5, generator=torch.Generator().manual_seed(3))
    model.model.context_processor.embed_features.fill("item", vectors)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    table = again.model.context_processor.embed_features.tables[0].weight
    assert torch.equal(table[1:], vectors) and not table.requires_grad


def test_context_dropout_is_that_of_the_context_alone():
    model = tiny_model(dropout=0.1, context_dropout=0.5)
    assert model.model.context_processor.dropout.p == 0.5 and model.model.decoder.layers[0].dropout.p == 0.1
    assert tiny_model(dropout=0.1).model.context_processor.dropout.p == 0.1


def test_a_fixed_feature_must_be_a_feature_of_given_width():
    with pytest.raises(StrictDataclassClassValidationError, match=r"fixed_context_features names \['item'\]"):
        OneRecV2Config(context_features={"action": 4, "item": 5}, fixed_context_features=["item"])
