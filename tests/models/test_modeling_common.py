"""The same checks on every architecture: what transformers' own common tests ask of a model, as far as it applies."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from onerec_hf import OneRecConfig, OneRecV1Config, OneRecV2Config

from ..numeric import assert_close, assert_gradients_close, assert_same_ranking
from ..tiny import ARCHITECTURES, tiny_catalogue, tiny_context, tiny_model

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="module")
def catalogue():
    return tiny_catalogue()


def targets_of(catalogue, model, batch=3, items=2, seed=3):
    """`target_ids` (batch, items, L): different items of the catalogue."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(60, generator=generator)[:items] for _ in range(batch)])
    return catalogue.semantic_ids[rows].long() + torch.tensor(model.config.level_offsets)


def rows_of(target_ids, model):
    """`input_ids`: BOS before each item; one item per row, or a whole session."""
    rows = torch.nn.functional.pad(target_ids, (1, 0), value=model.config.bos_token_id)
    return rows.flatten(1) if model.config.session_wise else rows.flatten(0, 1)


def prepared(catalogue, architecture, **overrides):
    model = tiny_model(catalogue, architecture=architecture, **overrides)
    return model, tiny_context(catalogue, model), targets_of(catalogue, model)


@every_architecture
def test_sdpa_and_eager_agree(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(target_ids=targets, **context).target_log_probs
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert_close(model(target_ids=targets, **context).target_log_probs, sdpa)


@every_architecture
def test_a_user_alone_and_in_a_batch_and_any_padding(catalogue, architecture):
    """Padding on the left or on the right, and the company in the batch, change nothing."""
    model, context, targets = prepared(catalogue, architecture)
    together = model(target_ids=targets, **context).target_log_probs
    segments = (
        list(model.config.pathway_lengths.values()) if architecture == "v1" else [context["context_ids"].shape[1]]
    )
    for user in range(3):
        order, start = [], 0
        for length in segments:  # within a pathway: real items last
            own = context["context_mask"][user, start : start + length]
            order.append(start + torch.argsort(own.int(), stable=True))
            start += length
        order = torch.cat(order)
        left = {name: tensor[user : user + 1, order] for name, tensor in context.items()}
        alone = model(target_ids=targets[user : user + 1], **left).target_log_probs
        assert_close(alone[0], together[user])


@every_architecture
def test_masked_items_do_not_matter(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    before = model(target_ids=targets, **context).target_log_probs
    ids = torch.where(context["context_mask"].unsqueeze(2), context["context_ids"], model.config.level_offsets[0] + 5)
    after = model(target_ids=targets, **context | {"context_ids": ids}).target_log_probs
    assert_close(after, before)


@every_architecture
def test_every_real_item_matters(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    before = model(target_ids=targets, **context).target_log_probs
    for item in range(context["context_ids"].shape[1]):
        ids = context["context_ids"].clone()
        ids[0, item] = torch.tensor(model.config.level_offsets) + 7
        after = model(target_ids=targets, **context | {"context_ids": ids}).target_log_probs
        assert (after[0] != before[0]).any()
        assert_close(after[1:], before[1:])


@every_architecture
def test_labels_equal_target_ids_and_logits(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    expected = model(target_ids=targets, **context)
    rows = rows_of(targets, model)
    out = model(input_ids=rows, labels=rows, **context)
    assert_close(out.loss, expected.loss)
    assert_close(out.target_log_probs.flatten(), expected.target_log_probs.flatten())
    log_probs = out.logits.log_softmax(-1)[:, :-1].gather(2, rows[:, 1:].unsqueeze(2)).squeeze(2)
    is_code = rows[:, 1:] != model.config.bos_token_id
    assert_close(log_probs[is_code], expected.target_log_probs.flatten())
    # what stands behind an item is certain: BOS of the session's next one
    assert (log_probs[~is_code] == 0).all() and (~is_code).sum() == (3 if model.config.session_wise else 0)


@every_architecture
def test_loss_is_the_sum_or_the_mean_over_codes(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    targets[1, 1] = model.config.pad_token_id  # the second user has one item
    out = model(target_ids=targets, **context)
    real = out.target_log_probs[targets != 0]
    assert len(real) == 15
    rows = {"onerec": 3, "v1": 5}.get(architecture)  # sessions, items
    expected = -real.mean() if rows is None else -real.sum() / rows
    assert_close(out.loss, expected)


@every_architecture
def test_gradient_checkpointing_changes_nothing(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    model.train()
    model(target_ids=targets, **context).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(target_ids=targets, **context).loss.backward()
    assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, plain)


@every_architecture
def test_every_parameter_learns(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    model(target_ids=targets, **context).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


@every_architecture
def test_a_cache_changes_nothing(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    rows = rows_of(targets, model)
    full = model(input_ids=rows, **context).logits
    kv = model.encode_context(**context)
    cache, steps = None, []
    for i in range(rows.shape[1]):
        out = model(input_ids=rows[:, i : i + 1], context_kv=kv, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert_close(torch.cat(steps, dim=1), full)


@every_architecture
def test_outputs_are_recorded(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    model.set_attn_implementation("eager")
    ids = rows_of(targets, model)[:3]
    routers = {"onerec": 4, "v1": 6, "v2": 0, "v2_moe": 2}[architecture]  # V1 with those of the encoder
    asked = {"output_hidden_states": True, "output_attentions": True}
    asked |= {"output_router_logits": True} if routers else {}
    out = model.model(ids, **context, **asked)
    assert len(out.hidden_states) == 5 and out.hidden_states[0].shape == (*ids.shape, 32)
    assert [a.shape for a in out.attentions] == [(3, 4, ids.shape[1], ids.shape[1])] * 4
    assert len(out.cross_attentions) == 4
    assert len(out.get("router_logits") or ()) == routers
    for inputs in ({"input_ids": ids}, {"target_ids": targets}):
        head = model(**inputs, **context, **asked)
        assert len(head.hidden_states) == 5 and len(head.attentions) == len(head.cross_attentions) == 4
        assert len(head.router_logits or ()) == routers
        assert all(logits.shape[1] == 4 for logits in head.router_logits or ())
    if not routers:
        with pytest.raises(ValueError, match="no block of this model is a mixture"):
            model(input_ids=ids, **context, output_router_logits=True)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="gives no attention weights"):
        model(input_ids=ids, **context, output_attentions=True)


@every_architecture
def test_save_load_save(catalogue, architecture, tmp_path):
    model, context, targets = prepared(catalogue, architecture)
    model.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == config["auto_map"]["AutoModelForCausalLM"]
    again, info = AutoModel.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert type(again) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "one")) is type(model)
    assert AutoConfig.from_pretrained(tmp_path / "one").to_dict() == again.config.to_dict()
    again.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "catalogue.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert_close(again(target_ids=targets, **context).loss, model(target_ids=targets, **context).loss)


@every_architecture
def test_missing_and_unexpected_weights_are_named(catalogue, architecture, tmp_path):
    model, context, targets = prepared(catalogue, architecture)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["stray.weight"] = weights.pop("model.decoder.layers.1.self_attn.q_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.decoder.layers.1.self_attn.q_proj.weight"}
    assert set(info["unexpected_keys"]) == {"stray.weight"}
    assert torch.isfinite(again(target_ids=targets, **context).loss)  # what was missing is initialised


@every_architecture
def test_weights_of_before_the_decoder_was_a_module(catalogue, architecture, tmp_path):
    """As CHANGELOG.md says."""
    model, context, targets = prepared(catalogue, architecture)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.replace("model.decoder.", "model."): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    renamed = {r"^model\.(layers|embed_tokens|embed_positions|norm)\.": r"model.decoder.\1."}
    again, info = AutoModel.from_pretrained(tmp_path, key_mapping=renamed, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(again(target_ids=targets, **context).loss, model(target_ids=targets, **context).loss)


@every_architecture
def test_shards(catalogue, architecture, tmp_path):
    model, context, targets = prepared(catalogue, architecture)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModel.from_pretrained(tmp_path, device_map="auto").cpu()
    assert_close(again(target_ids=targets, **context).loss, model(target_ids=targets, **context).loss)


def test_whole_numbers_are_numbers():
    """As a YAML file or `--model '{"dropout": 0}'` has them."""
    for config_class in (OneRecConfig, OneRecV1Config, OneRecV2Config):
        config_class(codebook_sizes=[8, 8], dropout=0, router_bias_update_rate=0)
    OneRecV2Config(codebook_sizes=[8, 8], context_dropout=0, context_rope_theta=100, item_loss_weight=1)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(catalogue, architecture, dtype, tmp_path):
    model, context, targets = prepared(catalogue, architecture)
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype
    biases = [b for name, b in half.named_buffers() if "e_score_correction_bias" in name]
    assert all(bias.dtype == torch.float32 for bias in biases)
    out = half(target_ids=targets, **context)
    torch.testing.assert_close(out.loss, model(target_ids=targets, **context).loss, atol=0.3, rtol=0.05)
    found = half.generate(**context, num_beams=4, num_return_sequences=4)
    assert (
        catalogue.leaves_of(found.view(12, -1, 4)[..., 1:].flatten(0, 1) - torch.tensor(model.config.level_offsets))
        >= 0
    ).all()


@every_architecture
def test_initialisation(catalogue, architecture):
    """Every weight is set by `_init_weights`, by the seed alone, and with the spread of the config."""
    _config_class, model_class, _own = ARCHITECTURES[architecture]
    config = tiny_model(architecture=architecture).config
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = model_class.from_pretrained(None, config=config, state_dict={})
        weights.append(dict(model.named_parameters()))
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
        if weight.dim() > 1 and "norm" not in name and "position_bias" not in name:
            assert 0.01 < weight.std() < 0.03, name


@every_architecture
def test_no_graph_breaks(catalogue, architecture):
    """`_can_compile_fullgraph` says so; with the default implementation of the experts, where there are any."""
    model, context, targets = prepared(catalogue, architecture)
    assert model._can_compile_fullgraph and model.model._can_compile_fullgraph
    assert model.config._experts_implementation == ("grouped_mm" if model.config.num_experts else "eager")
    eager = model(target_ids=targets, **context)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert_close(compiled(target_ids=targets, **context).loss, eager.loss)


@every_architecture
def test_generate_equals_brute_force_over_first_items(catalogue, architecture):
    """Every item of the catalogue scored through the loss, against a search that is wide enough to lose none."""
    model, context, _ = prepared(catalogue, architecture)
    codes = torch.unique(catalogue.semantic_ids, dim=0)
    scores = []
    with torch.no_grad():
        for code in codes:
            target = (code + torch.tensor(model.config.level_offsets)).expand(3, 1, -1)
            scores.append(model(target_ids=target, **context).target_log_probs.sum((1, 2)))
    best = torch.stack(scores, dim=1).topk(60)
    out = model.generate(
        **context, num_beams=60, num_return_sequences=60, num_session_items=1, return_dict_in_generate=True
    )
    assert_close(out.sequences_scores.view(3, 60) * 3, best.values)
    found = (out.sequences[:, 1:] - torch.tensor(model.config.level_offsets)).view(3, 60, 3)
    for user in range(3):
        assert_same_ranking(found[user], codes[best.indices[user]].long(), best.values[user])


@every_architecture
def test_sequences_score_what_the_loss_says(catalogue, architecture):
    model, context, _ = prepared(catalogue, architecture)
    out = model.generate(**context, num_beams=5, num_return_sequences=5, return_dict_in_generate=True)
    items = model.config.num_session_items if model.config.session_wise else 1
    assert out.sequences.shape == (15, items * 4)
    again = model(input_ids=out.sequences, labels=out.sequences, **context).target_log_probs.sum((1, 2))
    assert_close(out.sequences_scores * (items * 4 - 1), again)
    if model.config.session_wise:
        sessions = catalogue.leaves_of(
            out.sequences.view(-1, 4)[:, 1:] - torch.tensor(model.config.level_offsets)
        ).view(15, items)
        assert (sessions >= 0).all() and all(len(set(session)) == items for session in sessions.tolist())


def test_the_targets_of_a_model_without_sessions_are_rows_of_their_own(catalogue):
    """OneRec with sessions of one item: three next items of a user are three sessions, not a longer one."""
    model = tiny_model(catalogue, architecture="onerec", num_session_items=1)
    context = tiny_context(catalogue, model)
    targets = (catalogue.semantic_ids[:9].long() + torch.tensor(model.config.level_offsets)).view(3, 3, 3)
    targets[1, 2] = model.config.pad_token_id
    together = model(target_ids=targets, **context)
    alone = [model(target_ids=targets[:, i : i + 1], **context).target_log_probs for i in range(3)]
    assert_close(together.target_log_probs, torch.cat(alone, dim=1))
    real = targets != model.config.pad_token_id
    assert_close(together.loss, -together.target_log_probs[real].sum() / 8)
    assert model.loss_items(real) == 8


def test_sessions_longer_than_the_model_are_refused(catalogue):
    model = tiny_model(catalogue, architecture="onerec", num_session_items=2)
    targets = (catalogue.semantic_ids[:9].long() + torch.tensor(model.config.level_offsets)).view(3, 3, 3)
    message = "rows of 11 tokens, and the model has 8 positions: sessions of num_session_items=2 items"
    with pytest.raises(ValueError, match=message):
        model(target_ids=targets, **tiny_context(catalogue, model))


@every_architecture
def test_resizing_is_refused(catalogue, architecture):
    with pytest.raises(NotImplementedError, match="semantic IDs"):
        tiny_model(architecture=architecture).resize_token_embeddings(99)


@pytest.mark.parametrize("architecture", ["onerec", "v1"])
def test_an_encoder_refuses_positions_of_targets(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    with pytest.raises(ValueError, match="one row per target"):
        model(target_ids=targets, target_positions=torch.ones(3, 2, dtype=torch.long), **context)


@every_architecture
def test_bad_rows(catalogue, architecture):
    model, context, targets = prepared(catalogue, architecture)
    with pytest.raises(ValueError, match="rows have 3 tokens"):
        model(input_ids=rows_of(targets, model)[:, :3], labels=rows_of(targets, model)[:, :3], **context)
    with pytest.raises(ValueError, match=r"expected \(batch, items, 3\)"):
        model(target_ids=targets, context_ids=context["context_ids"][..., :2])
    with pytest.raises(ValueError, match="context_ids is missing"):
        model(target_ids=targets)


def test_bias_of_the_router_is_saved(catalogue, tmp_path):
    model, _, _ = prepared(catalogue, "v2_moe")
    model.model.decoder.layers[2].mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.decoder.layers.2.mlp.gate.e_score_correction_bias").tolist() == pytest.approx(
            [0.1, -0.2, 0.3, 0.0]
        )
