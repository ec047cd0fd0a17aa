"""The caption loss against transformers' own, and that it keeps in the vectors what behaviour alone would throw
away.
"""

import numpy as np
import pytest
import torch

from onerec_hf.item_embeddings import CaptionDecoder, ItemAlignment, small_caption_model

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
TEXTS = ["a red brush", "a very long blue comb of wood", "", "soap"]


@pytest.fixture
def small():
    return small_caption_model(TEXTS, vocab_size=300, hidden_size=16, num_hidden_layers=1)


def test_loss_equals_transformers_own(small):
    model, tokenizer = small
    captions = CaptionDecoder(TEXTS, 5, model, tokenizer, num_prefix_tokens=2)
    vectors, items = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 3])
    total = count = 0
    for vector, item in zip(vectors, items):
        ids = torch.tensor([[*tokenizer(TEXTS[item])["input_ids"], tokenizer.eos_token_id]])
        prefix = captions.prefix(vector).view(1, 2, 16)
        labels = torch.cat([torch.full((1, 2), -100), ids], 1)
        loss = model(inputs_embeds=torch.cat([prefix, model.get_input_embeddings()(ids)], 1), labels=labels).loss
        total, count = total + loss.item() * ids.numel(), count + ids.numel()
    assert captions(vectors, items).item() == pytest.approx(total / count, rel=1e-5)


def test_captions_are_cut_and_end(small):
    _, tokenizer = small
    captions = CaptionDecoder(TEXTS, 5, *small, max_length=4)
    own = len(tokenizer(TEXTS[3])["input_ids"])
    assert captions.tokens.shape == (4, 4) and captions.lengths.tolist() == [4, 4, 0, min(4, own + 1)]
    assert (captions.tokens[:, -1] == tokenizer.eos_token_id).all()


def two_factors(num_items=360, seed=0):
    """Items whose behaviour depends on a group (strong) and whose text is a colour (weak); both show in the
    content.
    """
    rng = np.random.default_rng(seed)
    group, colour = rng.integers(0, 12, num_items), rng.integers(0, len(COLOURS), num_items)
    content = 0.3 * rng.normal(size=(num_items, 24))
    content[:, :12] += rng.normal(size=(12, 12))[group]
    content[:, 12:] += 0.7 * rng.normal(size=(len(COLOURS), 12))[colour]
    pairs = np.array([(i, j) for i in range(num_items) for j in range(num_items) if i != j and group[i] == group[j]])
    return content.astype(np.float32), group, colour, pairs[rng.permutation(len(pairs))[:3000]]


def linear_probe(vectors, labels, seen):
    """Accuracy on the items that were not seen, of least squares on one-hot labels."""
    x = np.concatenate([vectors, np.ones((len(vectors), 1))], 1)
    weights = np.linalg.lstsq(x[seen], np.eye(labels.max() + 1)[labels[seen]], rcond=None)[0]
    return ((x[~seen] @ weights).argmax(1) == labels[~seen]).mean()


def test_the_caption_loss_keeps_the_content():
    content, group, colour, pairs = two_factors()
    texts = [COLOURS[c] for c in colour]
    settings = {"num_epochs": 10, "batch_size": 100, "learning_rate": 3e-3, "progress": False}
    result = {}
    for told in (False, True):
        alignment = ItemAlignment(24, output_dim=16, hidden_size=16, dropout=0.0)
        captions = CaptionDecoder(texts, 16, *small_caption_model(texts, vocab_size=400, hidden_size=32))
        given = {"captions": captions} if told else {}
        vectors = alignment.fit(content, pairs, **settings, **given).embed(content)
        seen = np.arange(len(content)) < 240
        result[told] = {"group": linear_probe(vectors, group, seen), "colour": linear_probe(vectors, colour, seen)}
        if given:  # the decoder reads the vectors
            items = torch.arange(len(content))
            with torch.no_grad():
                own = captions(torch.from_numpy(vectors), items)
                others = captions(torch.from_numpy(vectors[np.random.default_rng(0).permutation(len(vectors))]), items)
            assert own < 0.2 * others
    assert result[False]["colour"] < 0.6 and result[True]["colour"] > 0.8
    assert min(value["group"] for value in result.values()) > 0.9


def test_items_without_text_take_no_part(small):
    captions, seen = CaptionDecoder(TEXTS, 5, *small), []
    captions.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[1].tolist()))
    content, pairs = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32), np.array([[0, 1], [2, 3]])
    ItemAlignment(6, 5, 8).fit(content, pairs, captions=captions, num_epochs=2, progress=False)
    assert set(seen) == {0, 1, 3} and len(seen) == 2 * 64


def test_a_model_from_a_folder_is_frozen(small, tmp_path):
    model, tokenizer = small
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    content, pairs = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32), np.array([[0, 1], [2, 3]])
    named, given = CaptionDecoder(TEXTS, 5, str(tmp_path)), CaptionDecoder(TEXTS, 5, model, tokenizer)
    assert named.tokens.tolist() == given.tokens.tolist()
    for captions, frozen in ((named, True), (given, False)):  # what was given by its name keeps its weights
        before = captions.model.lm_head.weight.clone()
        ItemAlignment(6, 5, 8).fit(content, pairs, captions=captions, num_epochs=2, progress=False)
        assert torch.equal(captions.model.lm_head.weight, before) == frozen


def test_it_refuses_what_it_cannot_use(small):
    model, tokenizer = small
    with pytest.raises(ValueError, match="got 2, all empty"):
        CaptionDecoder(["", ""], 5)
    with pytest.raises(ValueError, match="without the model"):
        CaptionDecoder(TEXTS, 5, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no eos_token"):
        tokenizer.eos_token = None
        CaptionDecoder(TEXTS, 5, model, tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match="captions of 4 items for embeddings of 3"):
        captions = CaptionDecoder(TEXTS, 5, model, tokenizer)
        ItemAlignment(6, 5).fit(np.ones((3, 6)), np.array([[0, 1], [1, 2]]), captions=captions, progress=False)


def test_the_width_of_a_caption_model_is_checked():
    with pytest.raises(ValueError, match="hidden_size=12: a multiple of 8"):
        small_caption_model(TEXTS, vocab_size=300, hidden_size=12)
