"""Recall by frequency by hand; prepare, the baselines and the leaderboard on a data set of twelve items."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml

from onerec_hf import Catalogue
from onerec_hf.evaluation import (
    frequency_strata,
    history_strata,
    novelty_at_k,
    paired_bootstrap,
    recall_by_frequency,
    recall_by_history,
)
from onerec_hf.item_embeddings import ItemAlignment
from onerec_hf.semantic_ids import RQVAE, load_quantizer

from ..baselines.test_baselines import cycles


def test_recall_by_frequency_by_hand():
    counts = np.array([0, 1, 1, 4, 9, 9])
    targets = [[0], [1], [2, 3], [3], [4], [5]]
    strata = frequency_strata(counts, targets, num_strata=3)
    assert strata == [(0, 0), (1, 1), (2, 4), (5, 9)]  # targets above 0: 1 1 4 4 9 9
    predictions = np.array([[0, 1], [2, 1], [3, 5], [-1, -1], [5, 4], [5, 0]])
    found = recall_by_frequency(predictions, targets, counts, strata, k=1)
    assert found == [(1.0, 1), (0.0, 2), (0.5, 2), (0.5, 2)]
    assert recall_by_frequency(predictions, targets, counts, [(1, 4)], k=2) == [(0.5, 4)]
    assert np.isnan(recall_by_frequency(predictions, targets, counts, [(5, 8)], k=2)[0][0])
    with pytest.raises(ValueError, match="1 <= k <= 2"):
        recall_by_frequency(predictions, targets, counts, strata, k=3)


def test_recall_by_history_and_novelty_by_hand():
    lengths = [0, 1, 2, 2, 5, 9]
    strata = history_strata(lengths, num_strata=2)
    assert strata == [(0, 0), (1, 2), (3, 9)]
    recalls = np.array([1.0, 0.0, 1.0, 0.5, 0.0, 1.0])
    assert recall_by_history(recalls, lengths, strata) == [(1.0, 1), (0.5, 3), (0.5, 2)]
    assert np.isnan(recall_by_history(recalls, lengths, [(10, 12)])[0][0])
    with pytest.raises(ValueError, match="one recall and one length per user, got 6 and 2"):
        recall_by_history(recalls, [1, 2], strata)

    counts = np.array([7, 3, 0, 2])  # with one more each: 8, 4, 1, 3 of 16
    lists = np.array([[0, 1], [2, -1], [-1, -1]])
    np.testing.assert_allclose(novelty_at_k(lists, 2, counts), [1.5, 4.0, np.nan])
    np.testing.assert_allclose(novelty_at_k(lists, 1, counts), [1.0, 4.0, np.nan])


def test_strata_cover_every_target_once():
    rng = np.random.default_rng(0)
    counts = rng.geometric(0.1, 200) - 1
    targets = rng.integers(0, 200, (500, 1)).tolist()
    strata = frequency_strata(counts, targets)
    for (target,) in targets:
        assert sum(low <= counts[target] <= high for low, high in strata) == 1
    sizes = [size for _, size in recall_by_frequency(np.zeros((500, 1), int), targets, counts, strata, k=1)]
    assert sum(sizes) == 500 and max(sizes[1:]) < 2 * min(sizes[1:])
    assert frequency_strata(np.full(3, 7), [[0], [2]]) == [(1, 7)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Semantic IDs of an RQ-VAE over given embeddings that were aligned to behaviour."""
    from onerec_hf.scripts import prepare

    folder = tmp_path_factory.mktemp("leaderboard")
    histories = [row[-12:] for row in cycles(80) if len(row) > 4]
    columns = {"user_id": range(len(histories)), "item_ids": histories}
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / "sequences.parquet"))
    items = {"item_id": range(12), "group": [f"g{i % 3}" for i in range(12)]}
    datasets.Dataset.from_dict(items).to_parquet(str(folder / "items.parquet"))
    np.save(folder / "embeddings.npy", np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32))
    arguments = prepare.PrepareArguments(str(folder), str(folder / "data"), layout="amazon")
    arguments.embeddings, arguments.collaborative_dim = str(folder / "embeddings.npy"), 0
    arguments.caption_model, arguments.text_fields = "new", ["group"]
    with pytest.raises(ValueError, match="set align, too"):
        prepare.main(arguments)
    arguments.text_model = "package:no_such_package/model"
    with pytest.raises(ValueError, match="no package 'no_such_package' is installed"):
        prepare.main(arguments)
    arguments.align, arguments.text_model = True, None
    arguments.quantizer, arguments.codebook_size, arguments.num_levels = "rqvae", 4, 2
    arguments.collisions = "extra_level"
    report = prepare.main(arguments)
    assert report["before collisions"]["reconstruction_relative"] < 1
    return folder / "data"


def test_prepare_aligns_and_quantises(prepared):
    quantizer, catalogue = load_quantizer(prepared / "tokenizer"), Catalogue.from_pretrained(prepared / "tokenizer")
    assert isinstance(quantizer, RQVAE) and catalogue.num_semantic_ids == 12
    content = np.load(prepared.parent / "embeddings.npy")
    content = content - content.mean(0)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    aligned = ItemAlignment.from_pretrained(prepared / "tokenizer").embed(content)
    saved = quantizer.encode(torch.from_numpy(aligned - aligned.mean(0)))  # prepare centres and normalises once more
    assert saved.shape == (12, 2)


def entries(tmp_path) -> str:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    fit = {"num_epochs": 1, "progress": False}
    path = tmp_path / "entries.yaml"
    rows = {
        "popularity": {"recipe": "baseline", "name": "popularity", "seeds": [0]},
        "itemknn": {"recipe": "baseline", "name": "itemknn", "seeds": [0], "model": {"shrink": 0.0}},
        "bert4rec": {"recipe": "baseline", "name": "bert4rec", "model": tiny, "fit": fit},
        "fdsa": {
            "recipe": "baseline",
            "name": "fdsa",
            "seeds": [1],
            "attributes": ["group"],
            "model": tiny,
            "fit": fit,
        },
        "tiger": {
            "recipe": "baseline",
            "name": "tiger",
            "seeds": [1],
            "eval_users": 5,
            "model": tiny | {"intermediate_size": 8, "head_dim": 4},
            "fit": fit,
        },
    }
    path.write_text(yaml.safe_dump(rows))
    return str(path)


def test_leaderboard_runs_resumes_and_compares(prepared, tmp_path, monkeypatch):
    from onerec_hf.scripts import leaderboard

    monkeypatch.setattr(sys, "argv", [])
    arguments = leaderboard.LeaderboardArguments(str(prepared), str(tmp_path), entries(tmp_path), seeds=[0, 1])
    report = leaderboard.main(arguments)
    results = report["results"]
    assert set(results) == {"popularity", "itemknn", "bert4rec", "fdsa", "tiger"}
    assert results["bert4rec"]["seeds"] == 2 and results["popularity"]["seeds"] == 1
    assert report["reference"] == max(results, key=lambda name: results[name]["validation"])
    assert results[report["reference"]]["interval"]["test"] == (0.0, 0.0)

    # means, deviations, strata and intervals from what the runs wrote
    runs = [json.loads((tmp_path / "bert4rec" / f"seed{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
    values = [run["test_exclude_seen"]["recall@5"] for run in runs]
    assert results["bert4rec"]["test_exclude_seen"]["recall@5"] == (np.mean(values), np.std(values, ddof=1))
    users = {
        name: np.mean(
            [
                datasets.Dataset.from_parquet(str(tmp_path / name / f"seed{seed}" / "predictions.parquet"))[
                    "recall@10"
                ]
                for seed in seeds
            ],
            axis=0,
        )
        for name, seeds in (("bert4rec", (0, 1)), (report["reference"], (0,)))
    }
    interval = paired_bootstrap(users["bert4rec"], users[report["reference"]])
    assert results["bert4rec"]["interval"]["test"] == interval
    assert len(results["tiger"]["strata"]) == len(report["strata"])

    # the mean over users of a table by history is the table's recall; every list of the popular items is the same
    test = leaderboard.DataFolder(str(prepared)).splits["test"]
    sizes = [
        size
        for _, size in recall_by_history(np.zeros(len(test)), list(map(len, test["history"])), report["histories"])
    ]
    for result in results.values():
        assert result["test"]["recall@10"][0] == pytest.approx(np.average(result["histories"], weights=sizes))
    coverage, novelty, diversity = results["popularity"]["beyond"]
    assert coverage == pytest.approx(10 / 12) and 0 < novelty < 8 and 0 < diversity < 2
    assert json.loads((tmp_path / "leaderboard.json").read_text())["reference"] == report["reference"]
    assert "| bert4rec | 2 |" in (tmp_path / "leaderboard.md").read_text()
    assert (tmp_path / "leaderboard.png").read_bytes()[:4] == b"\x89PNG"

    # what has ended is not run again, what has other arguments or no result is
    stamps = {path.parent: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/metrics.json")}
    (tmp_path / "itemknn" / "seed0" / "metrics.json").unlink()
    (tmp_path / "popularity" / "seed0" / "command.json").write_text('["baseline"]')
    again = leaderboard.main(arguments)
    now = {path.parent: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/metrics.json")}
    assert {path.parent.name for path in stamps if stamps[path] != now[path]} == {"itemknn", "popularity"}
    assert again["results"]["itemknn"]["test"] == results["itemknn"]["test"]


def test_leaderboard_errors(prepared, tmp_path):
    from onerec_hf.scripts import leaderboard

    arguments = leaderboard.LeaderboardArguments(str(prepared), str(tmp_path), entries(tmp_path), run=False)
    with pytest.raises(ValueError, match="nothing to compare with"):
        leaderboard.main(arguments)
    arguments.only = ["gru4rec"]
    with pytest.raises(ValueError, match="gru4rec"):
        leaderboard.main(arguments)


def test_every_default_entry_is_an_argument_of_its_recipe():
    import inspect

    from onerec_hf.baselines.training import train_baseline
    from onerec_hf.scripts import baseline
    from onerec_hf.scripts.leaderboard import load_entries
    from onerec_hf.scripts.parser import CONFIGS, config_path

    def parameters(name):
        classes = {
            "sasrec": baseline.SASRec,
            "hstu": baseline.HSTU,
            "bert4rec": baseline.BERT4Rec,
            "fdsa": baseline.FDSA,
            "tiger": baseline.TIGER,
        }
        fit = inspect.signature(classes[name].fit)
        return {*fit.parameters, *inspect.signature(train_baseline).parameters}

    for name, entry in {**load_entries("leaderboard.yaml"), **load_entries("small_leaderboard.yaml")}.items():
        assert Path(config_path(entry.get("config", "leaderboard.yaml"))).is_relative_to(CONFIGS), name
        if entry["recipe"] == "baseline":
            known = set(baseline.BaselineArguments.__dataclass_fields__)
            assert set(entry) - {"recipe", "seeds", "config"} <= known, name
            assert "fit" not in entry or set(entry["fit"]) <= parameters(entry["name"]), name


def test_the_small_leaderboard_trains_the_small_model_with_an_item_head():
    from onerec_hf.scripts.leaderboard import load_entries
    from onerec_hf.scripts.parser import config_path

    small = yaml.safe_load(Path(config_path("small_sft.yaml")).read_text(encoding="utf-8"))["model"]
    assert load_entries("small_leaderboard.yaml")["onerec_v2"]["model"] == small | {"item_head_dim": 64}


def test_one_command_from_a_log_to_the_table(tmp_path, capsys, monkeypatch):
    """It prepares, trains, re-ranks; a second time it takes what is there, and makes anew what hangs on a lost run."""
    from onerec_hf.scripts import leaderboard

    rows = [(user, item, step) for user, items in enumerate(cycles(60)) for step, item in enumerate(items)]
    log = "user_id,item_id,timestamp\n" + "".join(f"u{user},i{item},{step}\n" for user, item, step in rows)
    (tmp_path / "log.csv").write_text(log, encoding="utf-8")
    sizes = "collaborative_dim: 4\nnum_levels: 2\ncodebook_size: null\noptional_text_fields: [title]\n"
    (tmp_path / "prepare.yaml").write_text(
        sizes + "text_model: nobody/loads-this\nbalanced: false\n", encoding="utf-8"
    )
    model = (
        "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, context_embed_dim: 4}"
    )
    (tmp_path / "entries.yaml").write_text(
        "counter: {recipe: baseline, name: cooccurrence, seeds: [0]}\n"
        f"head: {{recipe: sft, model: {model[:-1]}, item_head_dim: 4}}, max_steps: 2, report_to: none, seeds: [0]}}\n"
        f"model: {{recipe: sft, model: {model}, max_steps: 4, report_to: none, num_beams: 20}}\n"
        "both: {recipe: rerank, model: head, num_beams: 20, seeds: [0]}\n"
        "ensemble: {recipe: rerank, scorers: [counter], seeds: [0]}\n"
        "reranked: {recipe: rerank, model: model, scorers: [counter], num_beams: 20}\n",
        encoding="utf-8",
    )
    arguments = leaderboard.LeaderboardArguments(
        source=str(tmp_path / "log.csv"),
        output="board",
        entries=str(tmp_path / "entries.yaml"),
        prepare=str(tmp_path / "prepare.yaml"),
        seeds=[0, 1],
    )
    monkeypatch.chdir(tmp_path)
    report = leaderboard.main(arguments)
    printed = capsys.readouterr().out
    assert "texts: none of the items' columns (none)" in printed and "codebooks of 4 codes for 12 items" in printed
    assert {name: result["seeds"] for name, result in report["results"].items()} == {
        "counter": 1,
        "head": 1,
        "both": 1,
        "ensemble": 1,
        "model": 2,
        "reranked": 2,
    }
    board = tmp_path / "board"
    runs = {seed: json.loads((board / "reranked" / f"seed{seed}" / "metrics.json").read_text()) for seed in (0, 1)}
    for seed, run in runs.items():
        alone = json.loads((board / "model" / f"seed{seed}" / "metrics.json").read_text())
        assert run["search_alone"]["test"] == alone["test"]
        assert run["reranker"]["scorers"] == [str(board / "counter" / "seed0")]
    assert (
        not list(board.glob("reranked/*/checkpoint-*")) and not (board / "model" / "seed0" / "reranker.json").exists()
    )

    stamps = {path: path.stat().st_mtime_ns for path in [*board.glob("*/*/metrics.json"), board / "prepare.json"]}
    (board / "model" / "seed1" / "metrics.json").unlink()
    leaderboard.main(arguments)
    anew = {path.parent.relative_to(board) for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert anew == {Path("model/seed1"), Path("reranked/seed1")}

    assert report["reference"] == "counter"
    against = leaderboard.main(replace(arguments, run=False, reference="ensemble"))
    assert against["reference"] == "ensemble" and against["results"]["ensemble"]["interval"]["test"] == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"has no entries \['neither'\]"):
        leaderboard.main(replace(arguments, reference="neither"))
    with pytest.raises(ValueError, match=r"reference='counter' is not among only=\['model', 'reranked'\]"):
        leaderboard.main(replace(arguments, only=["model", "reranked"], reference="counter"))
    alone = leaderboard.main(replace(arguments, run=False, only=["model", "reranked"]))
    assert alone["reference"] == "model" and set(alone["results"]) == {"model", "reranked"}

    # the same folder from another working directory; nothing is prepared where nothing shall run
    stamps = {path: path.stat().st_mtime_ns for path in stamps}
    monkeypatch.chdir(board)
    near = replace(arguments, source="../log.csv", output=".")
    leaderboard.main(near)
    leaderboard.main(replace(near, run=False))
    with pytest.raises(ValueError, match=r"num_levels=2, asked is 3.*--run false nothing is made"):
        (tmp_path / "prepare.yaml").write_text(sizes.replace("num_levels: 2", "num_levels: 3"), encoding="utf-8")
        leaderboard.main(replace(near, run=False))
    with pytest.raises(ValueError, match=r"board2.data is not prepared"):
        leaderboard.main(replace(near, run=False, output="board2"))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "data=None and source=None: give one"),
        ({"data": "here", "source": "there"}, "data='here' and source='there': give one"),
    ],
)
def test_the_leaderboard_wants_a_folder_or_a_log(tmp_path, given, message):
    from onerec_hf.scripts import leaderboard

    with pytest.raises(ValueError, match=message):
        leaderboard.main(leaderboard.LeaderboardArguments(output=str(tmp_path / "out"), **given))
    assert not (tmp_path / "out").exists()


def test_items_without_text_stand_at_the_mean(monkeypatch):
    from onerec_hf.scripts import prepare

    def lengths(texts, model):
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    monkeypatch.setattr(prepare.item_embeddings, "text_embeddings", lengths)
    found = prepare.embed_texts(["ab", " ", "abcd", ""], "model", optional=True)
    assert found.tolist() == [[2, 1], [3, 1], [4, 1], [3, 1]]
