"""The card of every published recipe, with numbers from results/*.json. `python results/render.py` writes them."""

import re
from pathlib import Path

import render
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import onerec_hf  # noqa: F401  registers the models
from onerec_hf.hub import model_card
from onerec_hf.scripts import quickstart as recipe

ROOT = Path(__file__).resolve().parents[1]


# What the row of the table was measured with; the recipe's own configs take its place when they have a row.
def beauty():
    settings = yaml.safe_load((ROOT / "recipes/configs/small_sft.yaml").read_text(encoding="utf-8"))
    prepare = yaml.safe_load((ROOT / "recipes/configs/amazon_prepare.yaml").read_text(encoding="utf-8"))
    sizes = [prepare["codebook_size"]] * prepare["num_levels"]
    width = 384 + prepare["collaborative_dim"]  # of the item vectors: MiniLM and co-occurrence
    features = {"context_features": {"item_vectors": 12101 + 1}, "fixed_context_features": ["item_vectors"]}
    features["feature_embed_dims"] = {"item_vectors": width}
    features["context_position"] = "bias"  # the default when these numbers were taken
    config = AutoConfig.for_model("onerec_v2", codebook_sizes=sizes, **features, **settings["model"])
    rows = render.metrics(
        "beauty", "OneRec-V2, 0.83M", "popularity", "co-occurrence counter", "SASRec, full softmax, 40 epochs"
    )
    return model_card(
        config,
        title="OneRec-V2 on Amazon Beauty",
        repo="org/onerec-v2-beauty",
        summary="A small OneRec-V2 trained on a CPU: a reference for the recipe, beside the baselines.",
        data="Amazon Beauty (2014), 5-core: 22,363 users, 12,101 items, leave last out. The reviews are "
        "for research use and are not part of the repository. Semantic IDs: plain residual k-means over "
        "text (title, brand, category) and co-occurrence embeddings of the training split, "
        "collisions moved to the next free code; "
        "the same embeddings stand beside the codes in the context "
        "(`recipes/configs/amazon_prepare.yaml`).",
        training="`recipes/sft.py` with `recipes/configs/small_sft.yaml`: every target of a user in one pass, model "
        f"choice by {settings['metric_for_best_model'].removeprefix('eval_')} on validation users, "
        f"{settings['num_train_epochs']} epochs, learning rate {settings['learning_rate']:g}, dropout "
        f"{settings['model']['dropout']:g}. Commands, seeds, hardware and what was tried are in docs/results.md.",
        results=rows,
        dataset_name="Amazon Beauty 2014, 5-core",
        num_parameters=count(config, next(iter(rows))),
        tags=["amazon-beauty"],
    )


def count(config, label: str) -> int:
    """Parameters of the config, which must be what the label of the row says (`..., 0.24M parameters`, two digits)."""
    with torch.device("meta"):
        number = AutoModelForCausalLM.from_config(config).num_parameters()
    said = re.search(r"([\d.]+)M", label)[1]
    if f"{number / 1e6:.2f}" != said:
        raise ValueError(f"the row {label!r} is of another model: this config makes {number:,} parameters.")
    return number


def quickstart():
    config = AutoConfig.for_model("onerec_v2", codebook_sizes=[64] * 3, **recipe.MODEL)
    labels = ("OneRec-V2, 0.14M", "the same sum", "OneRec-V2, its search", "popularity", "co-occurrence", "SASRec")
    rows = render.metrics("quickstart", *labels)
    return model_card(
        config,
        title="OneRec-V2 quickstart",
        repo="org/onerec-v2-quickstart",
        summary="A small OneRec-V2 trained on a **simulated** short-video world; not for real users.",
        data="2,000 simulated users and 2,000 videos (`onerec_hf.simulator`, seed 0), effective views, leave last "
        "out.",
        training="`recipes/quickstart.py`: 12 epochs on a CPU, 312 steps of 64 users, learning rate 0.003 (cosine). "
        "Re-ranked with the counter and SASRec (`onerec rerank`), leaning towards videos that are watched longer "
        "(`--value play_time_ms`): the first row is what `Recommender` ranks, the second the search alone, as in "
        "`generate`.",
        results=rows,
        dataset_name="simulated short videos",
        num_parameters=count(config, next(iter(rows))),
        simulated=True,
    )


CARDS = {"onerec-v2-beauty": beauty, "onerec-v2-quickstart": quickstart}


def main(folder: Path = ROOT / "model_cards") -> None:
    for name, make in CARDS.items():
        make().save(folder / f"{name}.md")
        print(folder / f"{name}.md")
