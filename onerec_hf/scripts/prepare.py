"""Logs -> splits, item embeddings and semantic IDs: the folder that every other recipe reads.

    onerec prepare --config amazon_prepare.yaml --source FOLDER --output outputs/beauty
    onerec prepare --source logs.parquet --columns '{"user_id": "uid", "item_id": "vid", "timestamp": "ts"}' \\
        --output outputs/mydata
    onerec prepare --source logs.parquet --feedback request_id play_time_ms is_click is_like is_follow is_forward \\
        --sessions '{"request": "request_id", "min_interactions": 0}' --output outputs/mysessions

Writes `splits/` (a `DatasetDict`), `items.parquet`, `users.parquet`, `item_embeddings.safetensors`, `tokenizer/`
(tokenizer, catalogue and codebooks), `semantic_ids.json` (quality report) and `codebook_usage.png`. Co-occurrence and
popularity are learned from the training split alone.

A log that is cut into shards (above 2 million events) is prepared piece by piece. A run that was stopped goes on with
the same command, and says what it takes over: what is finished lies in `.prepare/` of the output until the run ends.
"""

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch

from .. import Catalogue, SemanticIdTokenizer, item_embeddings
from .. import data as logs
from ..data.event_shards import whole
from ..data.log_shards import CUT
from ..recommender import Recommender
from ..semantic_ids import (
    RQVAE,
    EmbeddingFiles,
    ResidualKMeans,
    UnitFiles,
    append_codes,
    plot_codebook_usage,
    quality_report,
    resolve_collisions,
)
from .model_arguments import mapping, model_path
from .parser import ScriptParser
from .prepare_arguments import (
    PrepareArguments,
    balance,
    check_arguments,
    check_lifelong,
    lifelong_settings,
    settle,
    text_shard,
)
from .prepare_splits import Histories, write_splits
from .prepare_work import EMBEDDINGS, LEVELS, RQVAE_DONE, WORK, forget, kept, work_folder

TEXT_EMBEDDINGS = "text_embeddings"  # folder beside the splits, of more items than one file takes
TEXTS_PER_FILE = 100_000


def load(args: PrepareArguments, work: Path | None = None, resume: bool = False) -> logs.EventShards:
    """Events of any layout, k-core filtered; `work` is for a log of several shards, by default beside the output, and
    `resume` takes those that are there.
    """
    if args.layout == "logs":
        shards = logs.load_shards(
            args.source,
            work or f"{args.output}/work",
            num_shards=args.num_shards,
            columns=mapping(args.columns),
            feedback=args.feedback,
            items=args.items,
            users=args.users,
            resume=resume,
            **mapping(args.load_options),
        )
    else:
        settings = {"history": True} if args.shown_before else {}
        shards = logs.EventShards.of(getattr(logs, f"load_{args.layout}")(args.source, **settings))
    return shards.k_core(args.k_core) if args.k_core > 1 else shards


def table_of(shards: logs.EventShards, name: str) -> datasets.Dataset:
    """What items.parquet (`name="item"`) or users.parquet will hold: a row per index, ids and features."""
    features = {column: list(values) for column, values in getattr(shards, f"{name}s").items()}
    return datasets.Dataset.from_dict({f"{name}_id": getattr(shards, f"{name}_ids"), **features})


def embed_texts(
    texts: list[str], model: str, optional: bool, folder: Path | None = None, shard: tuple[int, int] = (0, 1)
) -> np.ndarray | EmbeddingFiles:
    """
    Text embeddings (N, D); where texts are `optional`, an item without one stands at the mean of the others.

    Args:
        folder: For files of them, which are not made again; where it is given, those of one `shard` may be made alone.
    """
    there = np.array([bool(text.strip()) for text in texts])
    some = optional and there.any() and not there.all()
    own = [texts[i] for i in np.flatnonzero(there)] if some else texts
    if folder is None:
        known = item_embeddings.text_embeddings(own, model_path(model))
    else:
        settings: dict[str, Any] = {"rows_per_file": TEXTS_PER_FILE, "shard": shard}
        paths = item_embeddings.text_embedding_files(own, model_path(model), folder, **settings)
        if shard[1] > 1:
            return np.empty((0, 0))
        if not some:
            return EmbeddingFiles(paths)
        known = EmbeddingFiles(paths)[:].numpy()
    if not some:
        return known
    print(f"{len(texts) - there.sum():,} of {len(texts):,} items have no text: they get the mean of the others")
    found = np.tile(known.mean(0), (len(texts), 1))
    found[there] = known
    return found


def embed_text_shard(args: PrepareArguments, shards: logs.EventShards) -> None:
    """One share of the files of text embeddings."""
    if not args.text_model:
        raise ValueError(f"text_shard={args.text_shard!r}: the items have no texts to embed.")
    features: dict[str, Any] = shards.items
    texts = item_embeddings.item_texts(features, args.text_fields)
    optional, folder = bool(args.optional_text_fields), Path(args.output) / TEXT_EMBEDDINGS
    embed_texts(texts, args.text_model, optional, folder, text_shard(args))
    print(f"text embeddings of shard {args.text_shard} -> {folder}; without --text_shard, all that follows")


def embed(
    args: PrepareArguments, shards: logs.EventShards, histories: Histories
) -> list[np.ndarray] | list[EmbeddingFiles]:
    """Every embedding that was asked for, (N, D) each; files where that of many texts is the only one."""
    parts, work = [], histories.work / EMBEDDINGS
    if args.embeddings:
        parts.append(item_embeddings.load_embeddings(args.embeddings, shards.num_items))
    features: dict[str, Any] = shards.items
    texts = item_embeddings.item_texts(features, args.text_fields if args.text_model or args.caption_model else [])
    if args.text_model:
        folder = Path(args.output) / TEXT_EMBEDDINGS
        make = partial(embed_texts, texts, args.text_model, bool(args.optional_text_fields))
        if len(texts) > TEXTS_PER_FILE or folder.is_dir():
            found = make(folder)
        else:
            found = kept(work / "text.npy", make)
        if isinstance(found, EmbeddingFiles):
            others = (args.embeddings, args.align, args.collaborative_dim, args.lifelong, args.semantic_ids_from)
            if not any(others):
                return [found]
            found = found[:].numpy()
        parts.append(found)
    if args.align:
        content = item_embeddings.concat_embeddings(*parts)
        parts = [kept(work / "aligned.npy", lambda: align(args, content, texts, histories))]
    if args.collaborative_dim:
        sizes = {"num_items": shards.num_items, "dim": args.collaborative_dim, "seed": args.seed}
        learn = partial(item_embeddings.collaborative_embeddings, histories, **sizes, folder=histories.work)
        parts.append(kept(work / "collaborative.npy", learn))
    return parts


def align(args: PrepareArguments, content: np.ndarray, texts: list[str], histories: Histories) -> np.ndarray:
    """Embeddings (N, D) adapted to the pairs of the histories; saves what adapts them beside the tokenizer."""
    alignment, captions = item_embeddings.ItemAlignment(content.shape[1], seed=args.seed), None
    if args.caption_model:
        model = None if args.caption_model == "new" else model_path(args.caption_model)
        captions = item_embeddings.CaptionDecoder(texts, alignment.settings["output_dim"], model, seed=args.seed)
    lists = [history for part in histories for history in part.with_format("numpy")["history"]]
    pairs = item_embeddings.behaviour_pairs(lists, len(content), seed=args.seed)
    alignment.fit(content, np.concatenate(pairs), captions=captions).save_pretrained(f"{args.output}/tokenizer")
    return alignment.embed(content)


def join(parts: list, means: np.ndarray | None) -> tuple[np.ndarray | EmbeddingFiles, np.ndarray]:
    """What `concat_embeddings` makes of the parts, in files if it comes in files, and the means: those that are given,
    or their own.
    """
    if isinstance(parts[0], EmbeddingFiles):
        files = UnitFiles(parts[0].paths)
        return files, files.center.numpy()
    means = np.concatenate([part.mean(0) for part in parts]) if means is None else means
    return item_embeddings.concat_embeddings(*parts, means=means), means


def model_with_codebooks(repo: str) -> Recommender:
    """A trained model that new items can join."""
    trained = Recommender.from_pretrained(repo)
    if trained.quantizer is None or trained.quantizer.embedding_mean is None:
        lacking = "codebooks" if trained.quantizer is None else "mean of its embeddings beside its codebooks"
        raise ValueError(
            f"semantic_ids_from: {repo} has no {lacking}: name a model that `onerec sft` trained on data of this "
            "version's `onerec prepare`."
        )
    return trained


def fit_codebooks(
    args: PrepareArguments, codebook_size: int, embeddings: torch.Tensor | EmbeddingFiles, work: Path
) -> RQVAE | ResidualKMeans:
    """The quantizer, with what an earlier run has fitted: levels of k-means, or the whole RQ-VAE."""
    sizes: dict[str, Any] = {"num_levels": args.num_levels, "codebook_size": codebook_size, "seed": args.seed}
    if args.quantizer != "rqvae":
        return ResidualKMeans(**sizes, balanced=balance(args)).fit(embeddings, work / LEVELS)
    folder = work / RQVAE_DONE
    if not folder.is_dir():
        with whole(folder) as unfinished:
            RQVAE(**sizes).fit(embeddings).save_pretrained(unfinished)
    quantizer = RQVAE.from_pretrained(folder)
    quantizer.train_codes = quantizer.encode(embeddings)
    return quantizer


def new_semantic_ids(
    args: PrepareArguments, codebook_size: int, embeddings: torch.Tensor | EmbeddingFiles, work: Path
) -> tuple:
    """Codebooks fitted on all items, their semantic IDs, the sizes of the levels, and what is to be said of them."""
    quantizer = fit_codebooks(args, codebook_size, embeddings, work)
    codes = quantizer.train_codes
    assert codes is not None
    report = {"before collisions": quality_report(codes, embeddings, quantizer)}
    codes = resolve_collisions(codes, quantizer, embeddings, policy=args.collisions)
    sizes = [codebook_size] * args.num_levels
    if codes.shape[1] > args.num_levels:
        sizes.append(int(codes[:, -1].max()) + 1)
    return quantizer, codes, sizes, report


def frozen_semantic_ids(
    args: PrepareArguments, trained: Recommender, item_ids: np.ndarray, embeddings: torch.Tensor
) -> tuple:
    """The same of the codebooks of a trained model, whose items keep their semantic IDs; others are appended."""
    quantizer, known = trained.quantizer, trained.model.catalogue
    places = torch.from_numpy(known.index_of(item_ids, "ignore"))
    old, new = places >= 0, places < 0
    if not old.any():
        raise ValueError(
            f"{args.source} and {args.semantic_ids_from} have no item in common: name a model of this log."
        )
    policy = "extra_level" if known.num_levels > quantizer.num_levels else args.collisions
    taken, sizes = known.semantic_ids.long(), known.codebook_sizes
    codes = torch.empty(len(item_ids), known.num_levels, dtype=torch.long)
    codes[old] = taken[places[old]]
    codes[new] = append_codes(taken, sizes, quantizer, embeddings[new], policy=policy)
    report: dict[str, Any] = {"appended items": int(new.sum()), "items that left": len(known) - int(old.sum())}
    report["after collisions"] = quality_report(codes, embeddings, quantizer)
    return quantizer, codes, sizes, report


def main(args: PrepareArguments) -> dict:
    """Runs the recipe; returns the quality report of the semantic IDs."""
    check_arguments(args)
    output = Path(args.output)
    work: AbstractContextManager[str | Path] = work_folder(args, output)
    if args.text_shard is not None:  # several of these share an output, and their files are kept as they are
        work = TemporaryDirectory(prefix=f"{WORK}-", dir=output)
    with work as folder:  # on the disk that has room for the result
        return prepare(args, output, Path(folder))


def prepare(args: PrepareArguments, output: Path, work: Path) -> dict:
    """Checked arguments -> the data folder `output`; returns the quality report of the semantic IDs."""
    shards = load(args, work, resume=True)
    if not (work / CUT).is_file():
        forget(work)  # a log in one piece is soon prepared
    args, codebook_size = settle(args, shards)
    if args.text_shard is not None:
        embed_text_shard(args, shards)
        return {}
    histories = Histories(work, shards.num_items)
    writer, columns = write_splits(args, shards, output, histories)
    if lifelong := lifelong_settings(args):
        check_lifelong(lifelong, columns)
    parts = embed(args, shards, histories)
    trained = None if args.semantic_ids_from is None else model_with_codebooks(args.semantic_ids_from)
    embeddings, means = join(parts, None if trained is None else np.asarray(trained.quantizer.embedding_mean))
    if lifelong:
        assert isinstance(embeddings, np.ndarray)
        writer.transform(lambda rows: logs.compress_lifelong(rows, embeddings, **lifelong))
    vectors: Any = torch.from_numpy(embeddings) if isinstance(embeddings, np.ndarray) else embeddings
    if trained is None:
        quantizer, codes, sizes, report = new_semantic_ids(args, codebook_size, vectors, work)
        quantizer.embedding_mean = torch.from_numpy(means)
    else:
        quantizer, codes, sizes, report = frozen_semantic_ids(args, trained, shards.item_ids, vectors)
    catalogue = Catalogue(codes, sizes, shards.item_ids, histories.popularity)
    logs.DataFolder.save(
        output,
        splits=writer,
        items=table_of(shards, "item"),
        users=table_of(shards, "user"),
        tokenizer=SemanticIdTokenizer(codebook_sizes=sizes, catalogue=catalogue),
        quantizer=quantizer,
        item_embeddings=embeddings,
        report=report,
    )
    plot_codebook_usage(codes[:, : quantizer.num_levels], quantizer.codebook_size, output / "codebook_usage.png")
    counts = ", ".join(f"{count} {name} rows" for name, count in writer.rows.items())
    print(f"{catalogue}, {shards.num_events} events of {shards.num_users} users, {counts} -> {output}")
    return report


def run(argv: list[str] | None = None) -> None:
    """`onerec prepare`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("prepare", __doc__, [PrepareArguments]).parse(argv))


if __name__ == "__main__":
    run()
