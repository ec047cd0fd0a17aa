"""Logs -> splits, item embeddings and semantic IDs: the folder that every other recipe reads.

    onerec prepare --config amazon_prepare.yaml --source FOLDER --output outputs/beauty
    onerec prepare --source logs.parquet --columns '{"user_id": "uid", "item_id": "vid", "timestamp": "ts"}' \\
        --output outputs/mydata
    onerec prepare --source logs.parquet --feedback request_id play_time_ms is_click is_like is_follow is_forward \\
        --sessions '{"request": "request_id", "min_interactions": 0}' --output outputs/mysessions

Writes `splits/` (a `DatasetDict`), `items.parquet`, `users.parquet`, `item_embeddings.safetensors`, `tokenizer/`
(tokenizer, catalogue and codebooks), `semantic_ids.json` (quality report) and `codebook_usage.png`. Co-occurrence and
popularity are learned from the training split alone.
"""

from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from .. import Catalogue, SemanticIdTokenizer, item_embeddings
from .. import data as logs
from ..semantic_ids import RQVAE, ResidualKMeans, plot_codebook_usage, quality_report, resolve_collisions
from .model_arguments import mapping, model_path
from .parser import ScriptParser
from .prepare_arguments import (
    PrepareArguments,
    balance,
    check_arguments,
    check_items,
    check_lifelong,
    lifelong_settings,
    session_config,
)


def load(args: PrepareArguments) -> logs.Interactions:
    """Interactions of any layout, k-core filtered."""
    if args.layout == "logs":
        interactions = logs.load_interactions(
            args.source,
            columns=mapping(args.columns),
            feedback=args.feedback,
            items=args.items,
            users=args.users,
            **mapping(args.load_options),
        )
    else:
        settings = {"history": True} if args.shown_before else {}
        interactions = getattr(logs, f"load_{args.layout}")(args.source, **settings)
    return logs.k_core(interactions, args.k_core) if args.k_core > 1 else interactions


def split(args: PrepareArguments, interactions: logs.Interactions) -> tuple[datasets.DatasetDict, datasets.Dataset]:
    """The splits, and the training events that embeddings and popularity may learn from, one row per user."""
    if config := session_config(args):
        splits = logs.session_splits(interactions, config, args.validation_start, args.test_start)
        return splits, logs.training_events(interactions, config, splits, args.validation_start)
    if watched := mapping(args.watched):
        interactions = interactions.where(logs.reaches(interactions.feedback, watched))
    if args.validation_start is None:
        splits = logs.leave_last_out(interactions)
    else:
        splits = logs.global_time_split(interactions, args.validation_start, args.test_start, min_history=1)
    if empty := [name for name, rows in splits.items() if not len(rows)]:
        raise ValueError(
            f"no rows in {empty}: no user has enough events, 2 for a test row and 3 for a validation row."
        )
    return splits, splits["train"]


def table_of(interactions: logs.Interactions, name: str) -> datasets.Dataset:
    """What items.parquet (`name="item"`) or users.parquet will hold: a row per index, ids and features."""
    features = {column: list(values) for column, values in getattr(interactions, f"{name}s").items()}
    return datasets.Dataset.from_dict({f"{name}_id": getattr(interactions, f"{name}_ids"), **features})


def embed(args: PrepareArguments, interactions: logs.Interactions, train: datasets.Dataset) -> np.ndarray:
    """Every embedding that was asked for, normalised and concatenated, (N, D)."""
    parts = []
    if args.embeddings:
        parts.append(item_embeddings.load_embeddings(args.embeddings, interactions.num_items))
    features: dict[str, Any] = interactions.items
    texts = item_embeddings.item_texts(features, args.text_fields if args.text_model or args.caption_model else [])
    if args.text_model:
        parts.append(item_embeddings.text_embeddings(texts, model_path(args.text_model)))
    if args.align:
        content, histories = item_embeddings.concat_embeddings(*parts), train.with_format("numpy")["history"]
        alignment, captions = item_embeddings.ItemAlignment(content.shape[1], seed=args.seed), None
        if args.caption_model:
            model = None if args.caption_model == "new" else model_path(args.caption_model)
            captions = item_embeddings.CaptionDecoder(texts, alignment.settings["output_dim"], model, seed=args.seed)
        pairs = item_embeddings.behaviour_pairs(histories, interactions.num_items, seed=args.seed)
        alignment.fit(content, np.concatenate(pairs), captions=captions).save_pretrained(f"{args.output}/tokenizer")
        parts = [alignment.embed(content)]
    if args.collaborative_dim:
        parts.append(
            item_embeddings.collaborative_embeddings(
                train, interactions.num_items, args.collaborative_dim, seed=args.seed
            )
        )
    return item_embeddings.concat_embeddings(*parts)


def main(args: PrepareArguments) -> dict:
    """Runs the recipe; returns the quality report of the semantic IDs."""
    check_arguments(args)
    output = Path(args.output)
    interactions = load(args)
    splits, train = split(args, interactions)
    check_items(args, interactions)
    if lifelong := lifelong_settings(args):
        check_lifelong(lifelong, splits["train"].column_names)
    for name, rows in splits.items():
        splits[name] = rows.add_column("length", [len(history) for history in rows["history"]])
    embeddings = embed(args, interactions, train)
    for name in splits if lifelong else ():
        splits[name] = logs.compress_lifelong(splits[name], embeddings, **lifelong)
    quantizer_class = RQVAE if args.quantizer == "rqvae" else partial(ResidualKMeans, balanced=balance(args))
    quantizer = quantizer_class(args.num_levels, args.codebook_size, seed=args.seed)
    codes = quantizer.fit(torch.from_numpy(embeddings)).train_codes
    report = {"before collisions": quality_report(codes, torch.from_numpy(embeddings), quantizer)}
    codes = resolve_collisions(codes, quantizer, torch.from_numpy(embeddings), policy=args.collisions)
    sizes = [args.codebook_size] * args.num_levels
    if codes.shape[1] > args.num_levels:
        sizes.append(int(codes[:, -1].max()) + 1)
    train_items = np.concatenate(train.with_format("numpy")["history"])
    popularity = np.bincount(train_items, minlength=interactions.num_items)
    catalogue = Catalogue(codes, sizes, interactions.item_ids, popularity)
    logs.DataFolder.save(
        output,
        splits=splits,
        items=table_of(interactions, "item"),
        users=table_of(interactions, "user"),
        tokenizer=SemanticIdTokenizer(codebook_sizes=sizes, catalogue=catalogue),
        quantizer=quantizer,
        item_embeddings=embeddings,
        report=report,
    )
    plot_codebook_usage(codes[:, : args.num_levels], args.codebook_size, output / "codebook_usage.png")
    counts = ", ".join(f"{len(rows)} {name} rows" for name, rows in splits.items())
    print(f"{catalogue}, {len(interactions)} events of {interactions.num_users} users, {counts} -> {output}")
    return report


def run(argv: list[str] | None = None) -> None:
    """`onerec prepare`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("prepare", __doc__, [PrepareArguments]).parse(argv))


if __name__ == "__main__":
    run()
