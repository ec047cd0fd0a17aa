"""Model cards: valid metadata, snippets that run as printed, pictures, and the committed cards."""

import contextlib
import importlib
import io
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from transformers import AutoConfig

from onerec_hf import SemanticIdTokenizer
from onerec_hf.evaluation import prediction_entropy
from onerec_hf.hub import model_card, plot_prediction_entropy, results_table, training_text

from ..tiny import ARCHITECTURES, SIZES, tiny_catalogue, tiny_context, tiny_model

ROOT = Path(__file__).resolve().parents[2]
KEPT, MASKED = {"recall@10": 0.123456, "ndcg@10": 0.06, "invalid_rate": 0.0}, {"recall@10": 0.2, "ndcg@10": 0.1}


def snippet_of(config, repo="folder"):
    """The Python of a card."""
    return model_card(config, title="T", repo=repo, data="", training="").text.split("```python\n")[1].split("```")[0]


def card_of(architecture="v2", **arguments):
    texts = {"title": "Tiny", "repo": "org/tiny", "data": "Some data.", "training": "Some training."}
    return model_card(tiny_model(architecture=architecture).config, **texts | arguments)


def test_metadata_survive_the_way_through_a_file(tmp_path):
    results = {"Tiny": (KEPT, MASKED), "popularity": (MASKED, MASKED)}
    card = card_of(results=results, dataset_name="Some Log", dataset="org/log", base_model="org/base", tags=["beauty"])
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name, data.datasets) == ("apache-2.0", "transformers", ["org/log"])
    assert (data.base_model, data.base_model_relation) == ("org/base", "finetune")
    assert {"onerec", "onerec_v2", "recommendation", "beauty"} <= set(data.tags)
    assert [
        (r.metric_name, r.metric_value, r.metric_type, r.dataset_type, r.dataset_split) for r in data.eval_results
    ] == [
        ("recall@10", 0.12346, "recall", "org/log", "test"),
        ("ndcg@10", 0.06, "ndcg", "org/log", "test"),
        ("recall@10, seen items masked", 0.2, "recall", "org/log", "test"),
        ("ndcg@10, seen items masked", 0.1, "ndcg", "org/log", "test"),
    ]


def test_the_training_section_of_a_card_is_found_again(tmp_path):
    assert training_text(tmp_path) == ""
    card_of(training="Three epochs.\n\n| steps | 3 |", pictures=[("a.png", "A")]).save(tmp_path / "README.md")
    assert training_text(tmp_path).startswith("Three epochs.\n\n| steps | 3 |")
    (tmp_path / "README.md").write_text("# Somebody's card\n", encoding="utf-8")
    assert training_text(tmp_path) == ""


def test_an_adapter_says_what_it_needs():
    data = card_of(adapter=True, base_model="org/base").data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "org/base", "adapter")


@pytest.mark.parametrize("architecture, arxiv", [("onerec", "2502.18965"), ("v1", "2506.13695"), ("v2", "2508.20900")])
def test_each_system_names_its_paper_and_its_risks(architecture, arxiv):
    text = card_of(architecture, papers=["dpo"]).text
    assert f"https://arxiv.org/abs/{arxiv}" in text and f"arXiv preprint arXiv:{arxiv}" in text
    assert "2305.18290" in text and "2305.05065" in text  # DPO as asked for, TIGER always
    for words in ("## Limits", "Feedback loop", "Popularity", "personal data", "Some data.", "Some training."):
        assert words in text
    assert "simulated" not in text and "simulated" in card_of(architecture, simulated=True).text
    assert "{{" not in text and "{%" not in text and "None" not in text


def test_what_a_card_refuses():
    with pytest.raises(ValueError, match="results need a dataset_name"):
        card_of(results={"Tiny": (KEPT, None)})
    with pytest.raises(ValueError, match=r"papers=\['nobody'\] are unknown"):
        card_of(papers=["nobody"])
    with pytest.raises(ValueError, match="the card of 'onerec_v2' shows `results`"):
        card_of(metrics={"swt_auc": 0.7}, dataset_name="log")
    with pytest.raises(ValueError, match="no card for model_type='bert'"):
        model_card(AutoConfig.for_model("bert"), title="", repo="", data="", training="")


ODD = "a | b\n\n## c <script>"  # a name that would end a cell, a line, a text


def test_odd_names_stay_where_they_belong(tmp_path):
    """In the title, the table, the metadata and the snippet: one line each, and what was given comes back."""
    odd = tiny_model(context_features={"au\nthor|`x`": 7}, user_features={"country": 3}).config
    texts = {"title": ODD, "summary": ODD, "data": "D.", "training": "T.", "dataset_name": ODD}
    results = {ODD: (KEPT, MASKED), "x|y": (MASKED, KEPT)}
    repo = 'a "folder"\nimport os #`'
    card = model_card(odd, repo=repo, results=results, **texts)
    card.save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "a | b ## c <script>" == card.data.eval_results[0].dataset_name
    lines = card.text.split("\n")
    shown = r"a \| b ## c &lt;script>"
    assert f"# {shown}" in lines and shown in lines and "<script>" not in card.text
    assert f"| {shown} | 0.1235 / 0.2000 | 0.0600 / 0.1000 | 0.0000 / – |" in lines
    assert next(line for line in lines if line.startswith("## ")) == "## Use" and card.text.count("```") == 4
    assert r"| context features | `au thor\|'x'` |" in lines
    snippet = card.text.split("```python")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    line = next(line for line in snippet.split("\n") if line.startswith("repo = "))
    names = {}
    exec(line, names)
    assert names["repo"] == repo


def test_systems_that_look_the_same_are_refused():
    with pytest.raises(ValueError, match=r"several systems that look like .'ours a'"):
        card_of(results={"ours a": (KEPT, None), "ours  a": (MASKED, None)}, dataset_name="log")
    with pytest.raises(ValueError, match=r"license='Apache 2\.0: yes'"):
        card_of(license="Apache 2.0: yes")


def test_results_table():
    table = results_table({"ours": (KEPT, MASKED), "theirs": ({"recall@10": 0.5}, None)})
    assert table.splitlines() == [
        "| model | recall@10 | ndcg@10 | invalid_rate |",
        "|---|---|---|---|",
        "| ours | 0.1235 / 0.2000 | 0.0600 / 0.1000 | 0.0000 / – |",
        "| theirs | 0.5000 | – | – |",
    ]


VECTORS = {"context_features": {"age": 5, "item_vectors": 66}, "feature_embed_dims": {"item_vectors": 6}}
VECTORS |= {"fixed_context_features": ["item_vectors"]}
FEATURES = {"context_features": {"author": 7, "age": 5}, "user_features": {"country": 3}}


@pytest.mark.parametrize(
    "architecture, overrides, lists",
    [
        ("onerec", {}, 3),  # the three items of a session
        ("onerec", {"num_session_items": 1}, 10),
        ("onerec", FEATURES, 3),
        ("v1", {}, 10),
        ("v1", {"positive_length": 0, **FEATURES}, 10),
        ("v2", {}, 10),
        ("v2", FEATURES, 10),
        ("v2", VECTORS, 10),
        ("v2_moe", {}, 10),
    ],
)
def test_the_snippet_runs_as_printed(tmp_path, architecture, overrides, lists):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture=architecture, **overrides)
    model.save_pretrained(tmp_path)
    SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=catalogue).save_pretrained(tmp_path)
    snippet = snippet_of(model.config, str(tmp_path))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, {})
    found = eval(printed.getvalue())
    assert len(found) == lists and {item for row in found for item in row} <= set(catalogue.item_ids.tolist())


def test_the_snippet_names_the_features():
    snippet = snippet_of(tiny_model(**FEATURES).config, "folder")
    assert (
        'context_features = torch.zeros(1, 5, 2, dtype=torch.long)  # 0 is "unknown"; columns: age, author' in snippet
    )
    assert 'user_features = torch.zeros(1, 1, dtype=torch.long)  # 0 is "unknown"; columns: country' in snippet
    names = {
        "context_features": torch.zeros(1, 5, 2, dtype=torch.long),
        "torch": torch,
        "history": [1000, 1063, 1001, 1002, 1064],
    }
    line = next(
        line for line in snippet_of(tiny_model(**VECTORS).config, "folder").splitlines() if "[0, :, 1]" in line
    )
    exec(line, names | {"tokenizer": SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=tiny_catalogue())})
    assert names["context_features"][0].T.tolist() == [[0] * 5, [1, 64, 2, 3, 65]]  # row 0 is "unknown"


def test_the_snippet_pads_the_pathways():
    """As the collator does: each pathway to its length, the real items first."""
    snippet = snippet_of(tiny_model(architecture="v1").config, "folder")
    body = snippet.partition("oldest first\n")[2].partition("found =")[0]

    class Tokenizer:
        def encode_items(self, items):
            return np.stack([np.array(items)] * 3, axis=1)

    names = {"torch": torch, "tokenizer": Tokenizer(), "history": np.arange(1, 6)}
    exec(body, names)
    assert names["context"][0, :, 0].tolist() == [4, 5, 1, 2, 0, 2, 3, 4, 5]  # short-term 2, positive 3, lifelong 4
    assert names["mask"][0].tolist() == [True, True, True, True, False, True, True, True, True]


# ---- pictures


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prediction_entropy_is_that_of_the_models_own_probabilities(architecture):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture=architecture)
    context = tiny_context(catalogue, model)
    codes = torch.from_numpy(SemanticIdTokenizer(codebook_sizes=SIZES).encode_semantic_ids(catalogue.semantic_ids[:3]))
    tokens = torch.cat([torch.ones(3, 1, dtype=torch.long), codes], 1)
    with torch.no_grad():
        probabilities = model(input_ids=tokens[:, :-1], **context).logits.softmax(-1)  # outside the level they are 0
    by_hand = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1)
    batch = context | {"target_ids": torch.stack([codes, codes.flip(0)], 1)}  # the first of two targets counts
    torch.testing.assert_close(torch.from_numpy(prediction_entropy(model.train(), batch)), by_hand)
    assert model.training
    batch["target_ids"][1] = 0  # no target
    assert prediction_entropy(model, batch).shape == (2, 3)


def test_prediction_entropy_over_existing_children():
    catalogue = tiny_catalogue(num_items=65)
    model = tiny_model(catalogue, score_normalization="valid")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform over the codes that exist behind the prefix
    codes = catalogue.semantic_ids[:3].long()
    token_ids = torch.from_numpy(SemanticIdTokenizer(codebook_sizes=SIZES).encode_semantic_ids(codes))
    batch = tiny_context(catalogue, model) | {"target_ids": token_ids.unsqueeze(1)}
    everything = {tuple(row) for row in catalogue.semantic_ids.tolist()}
    expected = [
        [
            math.log(len({item[level] for item in everything if item[:level] == tuple(row[:level])}))
            for level in range(3)
        ]
        for row in codes.tolist()
    ]
    np.testing.assert_allclose(prediction_entropy(model, batch), expected, atol=1e-5)


def test_the_entropy_picture(tmp_path):
    values = np.abs(np.random.default_rng(0).normal(1, 0.3, (40, 3)))
    plot_prediction_entropy({"ours": values, "aligned": values / 2}, SIZES, tmp_path / "entropy.png")
    assert (tmp_path / "entropy.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"\(40, 2\): expected \(users, 3\)"):
        plot_prediction_entropy({"ours": values[:, :2]}, SIZES, tmp_path / "entropy.png")


# ---- the committed cards


def test_the_committed_cards_are_what_the_command_writes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    cards = importlib.import_module("cards")
    cards.main(tmp_path)
    for name in cards.CARDS:
        committed = ROOT / "model_cards" / f"{name}.md"
        assert committed.read_text(encoding="utf-8") == (tmp_path / f"{name}.md").read_text(encoding="utf-8"), (
            f"{committed.name} is out of date: run `python results/render.py`"
        )
    assert {path.stem for path in (ROOT / "model_cards").glob("onerec*.md")} == set(cards.CARDS)


def test_the_card_of_the_data_set_says_what_its_code_writes(tmp_path, monkeypatch):
    card = DatasetCard.load(ROOT / "model_cards" / "simulated-short-videos.md")
    assert card.data.license == "apache-2.0" and card.data.task_categories == ["other"]
    (code,) = re.findall(r"^```python\n(.*?)^```", card.text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("num_users=2000, num_items=2000", "num_users=50, num_items=60"), {})
    for config in card.data.configs:
        table = pd.read_parquet(f"outputs/simulated-short-videos/{config['data_files']}")
        (row,) = [line for line in card.text.splitlines() if line.startswith(f"| `{config['data_files']}`")]
        assert re.findall(r"`(\w+)`", row.split("|")[3]) == list(table.columns)
