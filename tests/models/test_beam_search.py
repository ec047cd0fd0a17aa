"""Constrained generation against brute force over the whole catalogue, and transformers' own loop as a second
opinion.
"""

import copy

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessor

from experiments.validity import check_validity
from onerec_hf import Catalogue, beam_search, sample_items
from onerec_hf.models.beam_search import BeamSearch

from ..numeric import assert_close, assert_same_ranking
from ..tiny import tiny_catalogue, tiny_context, tiny_model


class Same(LogitsProcessor):
    """Changes nothing, but sends `generate` to transformers' own loop."""

    def __call__(self, input_ids, scores):
        return scores


VARIANTS = {
    "paper": {},
    "sharing": {
        "num_context_layers": 2,
        "context_key_value_split": 2,
        "num_context_key_value_heads": 2,
        "num_key_value_heads": 2,
    },
    "valid": {"score_normalization": "valid"},
    "no_bias": {"context_position": "none", "num_context_key_value_heads": 1},
}


def brute_force(model, catalogue, context):
    """Summed log-probability (B, S) of every semantic ID of the catalogue, and the codes (S, L)."""
    codes = torch.unique(catalogue.semantic_ids, dim=0)
    targets = codes + torch.tensor(model.config.level_offsets)
    with torch.no_grad():
        log_probs = model(target_ids=targets.expand(len(context["context_ids"]), -1, -1), **context).target_log_probs
    return log_probs.sum(-1), codes


def codes_of(sequences, model, batch):
    return (sequences[:, 1:] - torch.tensor(model.config.level_offsets)).view(batch, -1, model.config.num_levels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_brute_force(variant):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **VARIANTS[variant])
    context = tiny_context(catalogue, model)
    scores, codes = brute_force(model, catalogue, context)
    out = model.generate(**context, num_beams=60, num_return_sequences=60, return_dict_in_generate=True)
    best = scores.topk(60)
    assert_close(out.sequences_scores.view(3, 60) * 3, best.values)
    for found, user, scores in zip(codes_of(out.sequences, model, 3), best.indices, best.values):
        assert_same_ranking(found, codes[user], scores)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers_own_loop(variant):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, **VARIANTS[variant])
    context = tiny_context(catalogue, model)
    arguments = {"num_beams": 7, "num_return_sequences": 7, "return_dict_in_generate": True}
    ours = model.generate(**context, **arguments)
    theirs = model.generate(**context, **arguments, output_scores=True, logits_processor=[Same()])
    assert_same_ranking(ours.sequences, theirs.sequences, theirs.sequences_scores)
    assert_close(ours.sequences_scores, theirs.sequences_scores)


def test_more_beams_than_items_gives_no_filler():
    """transformers fills up with duplicates and invalid rows at -1e9; here the rest is dead."""
    catalogue = Catalogue([[0, 0, 0], [0, 0, 1], [3, 1, 0]], [8, 8, 8])
    model = tiny_model(catalogue)
    context = tiny_context(tiny_catalogue(), model)
    out = model.generate(**context, num_beams=16, num_return_sequences=16, return_dict_in_generate=True)
    rows = out.sequences.view(3, 16, 4)
    assert all(len({tuple(row) for row in user[:3].tolist()}) == 3 for user in rows)
    assert (rows[:, 3:, 1:] == model.config.pad_token_id).all()
    assert torch.isinf(out.sequences_scores.view(3, 16)[:, 3:]).all()
    assert torch.isfinite(out.sequences_scores.view(3, 16)[:, :3]).all()


def test_subset_equals_a_smaller_catalogue():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    generator = torch.Generator().manual_seed(5)
    allowed = torch.rand(3, catalogue.num_items, generator=generator) < 0.3
    arguments = {"num_beams": 20, "num_return_sequences": 20}
    together = model.generate(**context, allowed_items=allowed, **arguments).view(3, 20, 4)
    for user in range(3):
        smaller = Catalogue(catalogue.semantic_ids[allowed[user]], catalogue.codebook_sizes)
        one = {name: tensor[user : user + 1] for name, tensor in context.items()}
        alone = model.generate(**one, catalogue=smaller, **arguments)
        assert torch.equal(together[user], alone)


@pytest.mark.parametrize("loop", [{}, {"output_scores": True}], ids=["ours", "transformers"])
def test_a_leaking_generation_config_does_not_touch_a_beam_search(loop):
    """Qwen's generation_config, for one, samples with a penalty unless told otherwise."""
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    arguments = {"num_beams": 10, "num_return_sequences": 10, "return_dict_in_generate": True}
    expected = model.generate(**context, **arguments).sequences
    leak = {"temperature": 0.1, "top_k": 2, "top_p": 0.3, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    model.generation_config.update(do_sample=True, **leak)
    assert torch.equal(model.generate(**context, **arguments, **loop).sequences, expected)
    given = GenerationConfig(**arguments, **leak, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(**context, generation_config=given, **loop).sequences, expected)


def test_what_is_asked_for_in_the_call_is_done():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    arguments = {"num_beams": 10, "num_return_sequences": 10, "return_dict_in_generate": True}
    plain = model.generate(**context, **arguments)
    penalised = model.generate(**context, **arguments, bad_words_ids=[plain.sequences[0, 1:2].tolist()])
    assert (penalised.sequences[:10, 1] != plain.sequences[0, 1]).all()
    longer = model.generate(**context, num_beams=2, max_new_tokens=4)
    assert (longer[:, 4] == model.config.eos_token_id).all()


def test_samples_are_items_too():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    torch.manual_seed(0)
    out = model.generate(**tiny_context(catalogue, model), do_sample=True, num_return_sequences=50)
    assert out.shape == (150, 4)
    assert (catalogue.leaves_of(codes_of(out, model, 3).flatten(0, 1)) >= 0).all()


def test_unconstrained_leaves_the_catalogue_but_not_the_levels():
    model = tiny_model(tiny_catalogue(num_items=5, num_collisions=0))
    torch.manual_seed(0)
    out = model.generate(
        **tiny_context(tiny_catalogue(), model), do_sample=True, num_return_sequences=50, constrained=False
    )
    codes = codes_of(out, model, 3).flatten(0, 1)
    assert ((codes >= 0) & (codes < 8)).all()
    assert (model.catalogue.leaves_of(codes) < 0).any()


def test_order_of_users_and_padding_do_not_matter():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    together = model.generate(**context, num_beams=10, num_return_sequences=10).view(3, 10, 4)
    left = {
        "context_ids": torch.cat([torch.zeros(1, 2, 3, dtype=torch.long), context["context_ids"][1:2, :3]], dim=1),
        "context_mask": torch.tensor([[False, False, True, True, True]]),
    }
    assert torch.equal(model.generate(**left, num_beams=10, num_return_sequences=10), together[1])


def test_users_may_be_worked_off_in_parts(monkeypatch):
    """On a CPU the log-probabilities of a step are made for so many users at a time as fit a small buffer."""
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    allowed = torch.rand(3, catalogue.num_items, generator=torch.Generator().manual_seed(5)) < 0.5
    arguments = {"allowed_items": allowed, "num_session_items": 2, "num_beams": 6, "num_return_sequences": 6}
    together = model.generate(**context, **arguments)
    monkeypatch.setattr(BeamSearch, "chunk_bytes", 1)
    assert torch.equal(model.generate(**context, **arguments), together)


def test_nothing_invalid_and_nothing_twice():
    """Random models, catalogues, subsets and beam widths; a million items of this are experiments/validity.py."""
    assert sum(check_validity(seed) for seed in range(15)) > 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Beams exist and are distinct, and their scores are those of the same weights in float32 within the precision."""
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue).to(dtype)
    context = tiny_context(catalogue, model)
    out = model.generate(**context, num_beams=20, num_return_sequences=20, return_dict_in_generate=True)
    assert out.sequences_scores.dtype == torch.float32
    codes = codes_of(out.sequences, model, 3)
    assert (catalogue.leaves_of(codes.flatten(0, 1)) >= 0).all()
    assert all(len({tuple(row) for row in user.tolist()}) == 20 for user in codes)
    with torch.no_grad():
        exact = model.float()(target_ids=out.sequences[:, 1:].view(3, 20, 3), **context).target_log_probs.sum(-1)
    torch.testing.assert_close(
        out.sequences_scores.view(3, 20) * 3, exact, atol=0.5 if dtype == torch.bfloat16 else 0.1, rtol=0
    )


def test_decoding_is_one_graph():
    """`torch.compile(fullgraph=True)` of the whole search; inductor takes minutes on a CPU, so the graph is run as it
    is.
    """
    catalogue = Catalogue(tiny_catalogue().semantic_ids[:, :2], [8, 8])
    model = tiny_model(catalogue, num_hidden_layers=1, codebook_sizes=[8, 8])
    context = tiny_context(catalogue, model)
    arguments = {"num_beams": 7, "num_return_sequences": 7, "return_dict_in_generate": True}
    expected = model.generate(**context, **arguments)
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    out = model.generate(**context, **arguments, compile_config=compiled)
    assert torch.equal(out.sequences, expected.sequences)
    assert_close(out.sequences_scores, expected.sequences_scores)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_synchronisation_on_a_gpu(dtype):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    kv = model.encode_context(**context)
    allowed = torch.rand(3, catalogue.num_items, generator=torch.Generator().manual_seed(5)) < 0.5
    expected = [beam_search(model, catalogue, kv, 7, allowed, num_items) for num_items in (1, 2)]
    reference, model, catalogue = model, copy.deepcopy(model).to("cuda", dtype), catalogue.to("cuda")
    kv = model.encode_context(**{name: tensor.cuda() for name, tensor in context.items()})
    alive = catalogue.node_masks(allowed.cuda())
    beam_search(model, catalogue, kv, 7, alive)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [beam_search(model, catalogue, kv, 7, alive, num_items) for num_items in (1, 2)]
        sample_items(model, catalogue, kv, 7, allowed_items=alive, generator=torch.Generator("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if dtype == torch.float32:
        for ours, truth in zip(found, expected):
            assert torch.equal(ours.leaves.cpu(), truth.leaves)
            assert_close(ours.scores.cpu(), truth.scores)
    else:  # other items may be found, their scores must be theirs
        tokens = found[0].semantic_ids[:, :, 0].cpu() + torch.tensor(model.config.level_offsets)
        scores = reference(target_ids=tokens, **context).target_log_probs.sum(-1)
        torch.testing.assert_close(found[0].scores.cpu(), scores, atol=0.3, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_cuda_graph():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue).cuda()
    kv = model.encode_context(**{name: tensor.cuda() for name, tensor in tiny_context(catalogue, model).items()})
    catalogue.to("cuda")
    with torch.no_grad():
        expected = beam_search(model, catalogue, kv, 7)
        compiled = torch.compile(beam_search, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(model, catalogue, kv, 7)
        assert torch.equal(found.leaves, expected.leaves)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"allowed_items": torch.ones(3, 4, dtype=torch.bool)}, r"expected a bool mask \(batch, 65\)"),
        ({"context_idz": 1}, "context_idz"),
        ({"num_beams": 2, "replacement": False}, "are for do_sample=True"),
        ({"constrained": False, "allowed_items": torch.ones(3, 65, dtype=torch.bool)}, "leave out one side"),
    ],
)
def test_bad_arguments(arguments, message):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    with pytest.raises(ValueError, match=message):
        model.generate(**tiny_context(catalogue, model), **arguments)


@pytest.mark.parametrize("static", [False, True])
def test_both_layouts_of_expand_list_every_child_once(static, monkeypatch):
    """A skewed catalogue, one prefix with 200 children: runs are shorter than padding, and both must list the same
    children.
    """
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: static)
    generator = torch.Generator().manual_seed(0)
    wide = torch.stack([torch.zeros(200).long(), torch.arange(200)], dim=1)
    narrow = torch.stack([torch.arange(1, 250), torch.randint(256, (249,), generator=generator)], dim=1)
    catalogue = Catalogue(torch.cat([wide, narrow]), [256, 256])
    node = torch.tensor([[7, 0, 249, -1], [1, 2, 3, 4]])
    parent, child, real = catalogue.expand(node, 1)
    # 7 runs of the wide node and one for each other, of which one row has two (and a dead node), instead of 4 of 200
    assert real.shape == (2, 7 + (3 if static else 2), 32)
    for row in range(2):
        runs = zip(parent[row].tolist(), child[row], real[row])
        found = [(p, c) for p, children, mask in runs for c in children[mask].tolist()]
        expected = []
        for position, one in enumerate(node[row].tolist()):
            if one >= 0:
                _, children, mask = catalogue.children(torch.tensor(one), 1)
                expected += [(position, c) for c in children[mask].tolist()]
        assert found == expected
