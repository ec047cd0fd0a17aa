"""The catalogue with models of transformers: logits processor and `custom_generate` against scoring every item by
`forward`.
"""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from onerec_hf import Catalogue, CatalogueLogitsProcessor, catalogue_generate

from ..numeric import assert_close
from ..tiny import SIZES, tiny_catalogue, tiny_context, tiny_model

WORDS, OFFSETS, VOCABULARY = 20, [20, 28, 36], 44  # text tokens, then the codes: OpenOneRec's layout
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            eos_token_id=None,
        )
    ),
}


def causal_model(name, **overrides):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.4)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, bos_token_id=None)
    return model


def prompts():
    ids = torch.randint(1, WORDS, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def log_prob_of_items(model, catalogue, row, mask, normalize):
    """(S,) log-probability of each semantic ID behind one prompt, by a forward pass over each; and their codes (S,
    L).
    """
    codes = torch.unique(catalogue.semantic_ids.long(), dim=0)
    row = row[mask.bool()].expand(len(codes), -1)
    with torch.no_grad():
        logits = model(torch.cat([row, codes + torch.tensor(OFFSETS)], dim=1)).logits[:, row.shape[1] - 1 : -1]
    total = torch.zeros(len(codes))
    for level, offset in enumerate(OFFSETS):
        step = logits[:, level]
        if normalize != "vocab":
            step = step[:, offset : offset + SIZES[level]]
        if normalize == "valid":
            same = (codes[:, None, :level] == codes[None, :, :level]).all(2).float()
            step = step.masked_fill(same @ torch.eye(SIZES[level])[codes[:, level]] == 0, float("-inf"))
        column = codes[:, level] + (offset if normalize == "vocab" else 0)
        total += step.log_softmax(-1).gather(1, column.unsqueeze(1)).squeeze(1)
    return total, codes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
def test_custom_generate_equals_scoring_every_item(name, normalize):
    model, catalogue, inputs = causal_model(name), tiny_catalogue(), prompts()
    settings = {
        "catalogue": catalogue,
        "level_offsets": OFFSETS,
        "search_beams": 60,
        "normalize": normalize,
        "max_new_tokens": 3,
    }
    out = model.generate(**inputs, custom_generate=catalogue_generate, **settings, return_dict_in_generate=True)
    assert out.sequences.shape == (180, 9)
    for user in range(3):
        expected, codes = log_prob_of_items(model, catalogue, *(inputs[key][user] for key in inputs), normalize)
        best = expected.topk(60)
        rows = slice(60 * user, 60 * user + 60)
        assert_close(out.sequences_scores[rows] * 3, best.values)
        assert torch.equal(out.sequences[rows, 6:] - torch.tensor(OFFSETS), codes[best.indices])
        assert torch.equal(out.sequences[rows, :6], inputs["input_ids"][user].expand(60, -1))


@pytest.mark.parametrize("name", MODELS)
def test_custom_generate_and_processor_give_the_same_beams(name):
    """Few beams, so that prefixes are lost, and a subset per request."""
    model, catalogue, inputs = causal_model(name), tiny_catalogue(), prompts()
    allowed = torch.rand(3, catalogue.num_items, generator=torch.Generator().manual_seed(2)) < 0.5
    ours = model.generate(
        **inputs, custom_generate=catalogue_generate, catalogue=catalogue, level_offsets=OFFSETS, search_beams=5,
        allowed_items=allowed, return_dict_in_generate=True, max_new_tokens=3,
    )  # fmt: skip
    processor = CatalogueLogitsProcessor(catalogue, OFFSETS, prompt_length=6, allowed_items=allowed)
    theirs = model.generate(
        **inputs, logits_processor=LogitsProcessorList([processor]), num_beams=5, num_return_sequences=5,
        max_new_tokens=3, do_sample=False, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close(ours.sequences_scores, theirs.sequences_scores)


def test_processor_in_an_encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        eos_token_id=None
    )  # fmt: skip
    model, catalogue, inputs = T5ForConditionalGeneration(config).eval(), tiny_catalogue(), prompts()
    model.generation_config.eos_token_id = None
    out = model.generate(
        **inputs, logits_processor=LogitsProcessorList([CatalogueLogitsProcessor(catalogue, OFFSETS)]), num_beams=60,
        num_return_sequences=60, max_new_tokens=3, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    codes = torch.unique(catalogue.semantic_ids.long(), dim=0)
    targets = codes + torch.tensor(OFFSETS)
    for user in range(3):
        one = {key: tensor[user : user + 1].expand(len(codes), -1) for key, tensor in inputs.items()}
        start = torch.nn.functional.pad(targets[:, :-1], (1, 0))
        with torch.no_grad():
            log_probs = model(**one, decoder_input_ids=start).logits.log_softmax(-1)
        expected = log_probs.gather(2, targets.unsqueeze(2)).sum((1, 2)).topk(60)
        rows = slice(60 * user, 60 * user + 60)
        assert_close(out.sequences_scores[rows] * 3, expected.values)
        assert torch.equal(out.sequences[rows, 1:], targets[expected.indices])
    with pytest.raises(ValueError, match="decoder-only model with position_ids"):
        model.generate(**inputs, custom_generate=catalogue_generate, catalogue=catalogue, level_offsets=OFFSETS)


def test_three_entries_of_our_own_model():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tiny_context(catalogue, model)
    beams = {"num_beams": 6, "num_return_sequences": 6, "return_dict_in_generate": True}
    plain = model.generate(**context, **beams)
    custom = model.generate(
        **context, custom_generate=catalogue_generate, search_beams=6, return_dict_in_generate=True
    )
    loop = model.generate(**context, **beams, output_scores=True)  # transformers' loop with the processor
    for other in (custom, loop):
        assert torch.equal(plain.sequences, other.sequences)
        assert_close(plain.sequences_scores, other.sequences_scores)


def test_fewer_items_than_beams():
    model, inputs = causal_model("qwen3"), prompts()
    small = Catalogue([[0, 0, 0], [0, 0, 1], [3, 1, 0]], SIZES)
    out = model.generate(
        **inputs, custom_generate=catalogue_generate, catalogue=small, level_offsets=OFFSETS, search_beams=5,
        return_dict_in_generate=True, max_new_tokens=3,
    )  # fmt: skip
    rows, scores = out.sequences.view(3, 5, 9)[:, :, 6:], out.sequences_scores.view(3, 5)
    assert torch.isfinite(scores[:, :3]).all() and torch.isinf(scores[:, 3:]).all() and (rows[:, 3:] == 0).all()
    assert all(len({tuple(row) for row in user[:3].tolist()}) == 3 for user in rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_beams": 3}, "give search_beams=K instead"),
        ({"normalize": "codes"}, "allowed are 'vocab', 'level' and 'valid'"),
    ],
)
def test_bad_arguments(arguments, message):
    model = causal_model("gpt2")
    with pytest.raises(ValueError, match=message):
        model.generate(
            **prompts(),
            custom_generate=catalogue_generate,
            catalogue=tiny_catalogue(),
            level_offsets=OFFSETS,
            **arguments,
        )


def test_windows_are_refused():
    model = causal_model("qwen3")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 4
    with pytest.raises(ValueError, match="full attention"):
        model.generate(
            **prompts(), custom_generate=catalogue_generate, catalogue=tiny_catalogue(), level_offsets=OFFSETS
        )


def test_processor_ends_with_eos_or_complains():
    catalogue = tiny_catalogue()
    complete = torch.cat(
        [torch.zeros(1, 1, dtype=torch.long), catalogue.semantic_ids[:1] + torch.tensor(OFFSETS)], dim=1
    )
    scores = CatalogueLogitsProcessor(catalogue, OFFSETS, eos_token_id=2)(complete, torch.zeros(1, VOCABULARY))
    assert torch.isfinite(scores).nonzero().tolist() == [[0, 2]]
    with pytest.raises(ValueError, match="set max_new_tokens"):
        CatalogueLogitsProcessor(catalogue, OFFSETS)(complete, torch.zeros(1, VOCABULARY))
