"""What the models refuse, and what they must not refuse: nothing is ignored in silence, and every message names what
to do.
"""

import copy
import io
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError as Strict

from onerec_hf import OneRecV2Config

from ..tiny import tiny_catalogue, tiny_model
from .test_modeling_common import every_architecture, prepared, rows_of
from .test_modeling_reward import P_SCORE, SESSION
from .test_modeling_reward import inputs as reward_inputs
from .test_modeling_reward import tiny as tiny_reward


@pytest.fixture(scope="module")
def catalogue():
    return tiny_catalogue()


def refused(message, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=re.escape(message)):
        call(*args, **kwargs)


# ---- values and shapes


@every_architecture
def test_contexts_that_do_not_fit(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    ids, mask = context["context_ids"], context["context_mask"]
    plain = (ids - torch.tensor(model.config.level_offsets)) * mask.unsqueeze(2)  # codes without offsets
    for bad, message in (
        ({"context_mask": mask[:2]}, "context_mask has shape (2, "),
        ({"context_mask": mask[:, 1:]}, "one column per item of context_ids"),
        ({"context_ids": ids - 40}, "allowed are 0 to 27"),
        ({"context_ids": ids + 28}, "allowed are 0 to 27"),
        ({"context_ids": plain}, "the code plus config.level_offsets=[4, 12, 20]"),
        ({"context_ids": ids.flip(2)}, "level 1 has the tokens 4 to 11"),
        ({"context_ids": ids[:0], "context_mask": mask[:0]}, "the batch is empty"),
        ({"context_features": torch.zeros(*mask.shape, 1, dtype=torch.long)}, "context_features holds 1 features"),
    ):
        refused(message, model, target_ids=targets, **context | bad)
        refused(message, model.generate, num_beams=2, **context | bad)


@every_architecture
def test_targets_that_do_not_fit(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    rows = rows_of(targets, model)
    refused("level 1 has the tokens 4 to 11", model, target_ids=targets - 4, **context)
    refused(
        "level 3 has the tokens 20 to 27", model, target_ids=targets + 1 * (targets == targets[0, 0, 2]) * 9, **context
    )
    refused("target_ids has shape (3, 2, 2)", model, target_ids=targets[..., :2], **context)
    refused("target_ids has shape (3, 3)", model, target_ids=targets[:, 0], **context)
    refused("at least one target", model, target_ids=targets[:, :0], **context)
    refused("input_ids holds values from", model, input_ids=rows + 27, **context)
    refused("labels has shape", model, input_ids=rows, labels=rows[:1], **context)
    for name, value in (("input_ids", rows), ("attention_mask", rows), ("use_cache", True), ("shift_labels", rows)):
        refused(f"no place for ['{name}']", model, target_ids=targets, **{name: value}, **context)


def test_features_outside_their_table():
    model = tiny_model(context_features={"action": 3}, user_features={"city": 5})
    ids = torch.tensor([[[4, 12, 20]]])
    given = {"context_ids": ids, "target_ids": ids}
    city, action = torch.tensor([[4]]), torch.tensor([[[2]]])
    model(**given, context_features=action, user_features=city)
    refused("column 0 ('action')", model, **given, context_features=action + 1, user_features=city)
    refused("allowed are 0 to 4", model, **given, context_features=action, user_features=city - 5)
    refused(
        "user_features has shape (2, 1): expected (1, 1)",
        model,
        **given,
        context_features=action,
        user_features=city.expand(2, 1),
    )


def test_positions_of_targets(catalogue):
    model, context, targets = prepared(catalogue, "v2")
    refused(
        "expected (3, 2), one number per target",
        model,
        target_ids=targets,
        target_positions=torch.ones(3, 1),
        **context,
    )
    for bad in (-1, 7):  # a history has six items
        positions = torch.full((3, 2), bad)
        refused("allowed are 0 to 6", model, target_ids=targets, target_positions=positions, **context)


@pytest.mark.parametrize("kind", [SESSION, P_SCORE])
def test_reward_models_name_what_does_not_fit(kind):
    model, batch = tiny_reward(*kind), reward_inputs()
    model(**batch)
    rows = batch["item_ids"].shape[:2]
    for bad, message in (
        ({"item_ids": batch["item_ids"] - 4}, "item_ids holds"),
        ({"context_ids": batch["context_ids"] + 99}, "context_ids holds values from"),
        ({"context_mask": torch.ones(1, 1)}, "context_mask has shape (1, 1)"),
        ({"item_mask": torch.ones(rows[0], 1, dtype=torch.bool).expand(-1, rows[1] + 1)}, "item_mask has shape"),
        ({"item_features": batch["item_features"][:1]}, "item_features has shape (1, "),
        ({"item_numbers": batch["item_numbers"][:1]}, "item_numbers has shape (1, "),
        ({"user_features": batch["user_features"] + 99}, "user_features, column 0"),
    ):
        refused(message, model, **batch | bad)


# ---- keyword arguments


@every_architecture
def test_unknown_arguments_are_refused(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    rows = rows_of(targets, model)
    for inputs in ({"target_ids": targets}, {"input_ids": rows}):
        refused("does not know ['contxt_mask']", model, **inputs, **context, contxt_mask=1, error=TypeError)
        model(**inputs, **context, num_items_in_batch=torch.tensor(9), return_dict=True)  # what `Trainer` may give
    refused("does not know ['labels']", model.model, rows, labels=rows, **context, error=TypeError)


@every_architecture
def test_shift_labels(catalogue, architecture):
    """Labels one place earlier, as sequence-parallel trainers give them, are the same loss."""
    model, context, targets = prepared(catalogue, architecture)
    rows = rows_of(targets, model)
    expected = model(input_ids=rows, labels=rows, **context).loss
    shifted = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(input_ids=rows, shift_labels=shifted, **context).loss, expected)
    refused("give one", model, input_ids=rows, labels=rows, shift_labels=shifted, **context)


def test_ignored_codes_are_still_the_prefix(catalogue):
    """Under "valid" the children of the true first code count, also where that code itself is left out of the loss."""
    model, context, targets = prepared(catalogue, "v2", score_normalization="valid")
    rows = rows_of(targets, model)
    expected = model(input_ids=rows, labels=rows, **context).target_log_probs[..., 1:]
    labels = rows.clone()
    labels[:, 1] = -100
    out = model(input_ids=rows, labels=labels, **context)
    torch.testing.assert_close(out.target_log_probs[..., 1:], expected)
    torch.testing.assert_close(out.loss, -expected.mean())


@every_architecture
def test_no_end_token(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    rows = rows_of(targets, model)
    expected = model(input_ids=rows, labels=rows, **context)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    out = model(input_ids=rows, labels=rows, **context)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logits[:, : rows.shape[1] - 1], expected.logits[:, : rows.shape[1] - 1])
    assert model.generate(**context, num_beams=2, constrained=False, num_session_items=1).shape[0] == 3


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id"])
def test_rows_need_a_begin_and_a_filler(name):
    refused(f"{name}=None", OneRecV2Config, error=Strict, **{name: None})


# ---- generation


@every_architecture
@pytest.mark.parametrize("constrained", [True, False])
def test_arguments_of_generate(catalogue, architecture, constrained):
    model, context, _ = prepared(catalogue, architecture)
    for name in ("num_session_items", "num_beams", "num_return_sequences"):
        for number in (0, -1):
            refused(f"'{name}': {number}", model.generate, **context, constrained=constrained, **{name: number})
    every = {**context, "constrained": constrained, "num_session_items": 1}
    mask = context["context_mask"]
    refused("it belongs to input_ids, BOS alone", model.generate, **every, attention_mask=mask)
    refused("one row for each of 3 users", model.generate, torch.ones(2, 1, dtype=torch.long), **every)
    refused("num_return_sequences", model.generate, **every, num_beams=2, num_return_sequences=3)
    if model.config.session_wise:
        refused("num_session_items=3", model.generate, **every | {"num_session_items": 4})


@pytest.mark.parametrize("extra", [{}, {"output_scores": True}, {"do_sample": True}])
def test_filters_of_other_users_are_refused(catalogue, extra):
    """Two rows of filters for four users would else be shared out over them by transformers' loop."""
    model, context, _ = prepared(catalogue, "v2")
    context = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in context.items()}
    some = torch.ones(2, catalogue.num_items, dtype=torch.bool)
    for filters in (some, catalogue.node_masks(some)):
        refused("2 rows for 4 users", model.generate, **context, allowed_items=filters, **extra)
    refused("2 rows for 4 users", model.generate, **context, allowed_items=[[1001], [1002]], **extra)
    refused("the first is 1", model.generate, error=KeyError, **context, allowed_items=[1, 2], **extra)
    for rows in (1, 4):
        model.generate(**context, allowed_items=some[:1].expand(rows, -1), **extra)


WAYS = {
    "beams": {"num_beams": 4},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "different samples": {"do_sample": True, "num_return_sequences": 3, "replacement": False},
    "own loop, beams": {"num_beams": 4, "output_scores": True, "return_dict_in_generate": True},
    "own loop, samples": {"do_sample": True, "top_p": 0.9},
    "unconstrained beams": {"constrained": False, "num_beams": 4},
    "unconstrained samples": {"constrained": False, "do_sample": True},
    "unconstrained, greedy": {"constrained": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["lm_head.weight", "model.decoder.layers.3.mlp.up_proj.weight"])
def test_weights_that_are_not_finite(catalogue, way, value, place):
    """One bad number is enough; nobody gets items of a broken model."""
    model, context, _ = prepared(catalogue, "v2")
    model.generate(**context, **WAYS[way], num_session_items=1)
    weight = model.get_parameter(place)
    with torch.no_grad():
        weight[5 : 5 + len(weight) // 2] = value
    refused("the weights or the inputs are not finite", model.generate, **context, **WAYS[way], num_session_items=1)


@every_architecture
def test_one_bad_user_is_enough(catalogue, architecture):
    model, context, _ = prepared(catalogue, architecture)
    kv = model.encode_context(**context)
    kv.key_states[0][1] = torch.nan
    refused("not finite", model.generate, context_kv=kv, num_beams=4, num_session_items=1)


def test_no_item_is_no_fault(catalogue):
    model, context, _ = prepared(catalogue, "v2")
    nothing = torch.zeros(1, catalogue.num_items, dtype=torch.bool)
    for extra in ({"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "replacement": False}):
        found = model.generate(**context, allowed_items=nothing, **extra)
        assert (found[:, 1:] == 0).all()


# ---- empty histories, no targets


@every_architecture
def test_users_without_a_history_alone(catalogue, architecture):
    """A batch of empty histories: finite, equal among each other, in training and search, with eager attention too."""
    model, context, targets = prepared(catalogue, architecture)
    context["context_mask"] = torch.zeros_like(context["context_mask"])
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        loss = model(target_ids=targets, **context).loss
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        found = model.generate(**context, num_beams=4, num_return_sequences=4)
        assert torch.equal(found[:4], found[4:8]) and torch.equal(found[:4], found[8:])


@every_architecture
@pytest.mark.parametrize("normalization", ["level", "valid"])
def test_no_target_at_all_is_no_loss(catalogue, architecture, normalization):
    model, context, targets = prepared(catalogue, architecture, score_normalization=normalization)
    rows = rows_of(targets, model)
    ignored = {"input_ids": rows, "labels": torch.full_like(rows, -100)}
    for inputs in ({"target_ids": torch.zeros_like(targets)}, ignored):
        model.zero_grad()
        loss = model(**inputs, **context).loss
        loss.backward()
        assert loss.item() == 0
        assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


# ---- copies, threads, plans


@every_architecture
def test_pickle_and_deepcopy_with_a_catalogue(catalogue, architecture):
    model, context, _ = prepared(catalogue, architecture)
    expected = model.generate(**context, num_beams=4, num_return_sequences=4)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert torch.equal(other.generate(**context, num_beams=4, num_return_sequences=4), expected)
        assert other.catalogue is not model.catalogue


@every_architecture
def test_threads(catalogue, architecture):
    """Four threads with filters of their own find what each finds alone."""
    model, context, _ = prepared(catalogue, architecture)
    filters = [torch.arange(catalogue.num_items)[None] % 4 != i for i in range(4)]
    alone = [model.generate(**context, num_beams=4, allowed_items=one) for one in filters]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: model.generate(**context, num_beams=4, allowed_items=one), filters * 3))
    assert all(torch.equal(found, expected) for found, expected in zip(together, alone * 3))


@every_architecture
def test_experts_are_spoken_of_where_there_are_any(catalogue, architecture):
    model, _, _ = prepared(catalogue, architecture)
    has = architecture != "v2"
    assert model.config.has_experts == model._can_set_experts_implementation() == has
    assert model._keep_in_fp32_modules_strict == ({"e_score_correction_bias"} if has else set())
    dense = tiny_model(architecture=architecture, num_experts=0)
    assert not dense.config.has_experts and not dense._keep_in_fp32_modules_strict
    refused("does not support setting experts", dense.set_experts_implementation, "grouped_mm")
