"""What is read and written beside a recommender: the metadata of items, and the recommendations of a data set."""

import datetime
import decimal
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from tqdm.auto import tqdm
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .collators.histories import rows_to_arguments
from .data import arrow_dataset
from .models import SemanticIdTokenizer
from .models.item_ids import id_array
from .reranker import CONFIG_NAME as RERANKER_NAME
from .reranker import FOLDER as SCORERS
from .reranker import VALUES_NAME
from .semantic_ids.residual import CONFIG_NAME as QUANTIZER_NAME
from .semantic_ids.residual import WEIGHTS_NAME as QUANTIZER_WEIGHTS_NAME

METADATA_NAME = "items.jsonl"
logger = logging.get_logger(__name__)


class Recommendation(NamedTuple):
    """One item: its id, its score (the natural log-probability of its semantic ID, unless something else ranked it),
    and what the repository knows about it.
    """

    item_id: Any
    score: float
    metadata: dict


class RecommendedSession(NamedTuple):
    """A session: its item ids in order, the natural log-probability of all their semantic IDs, and what is known of
    each item.
    """

    item_ids: list
    score: float
    metadata: list[dict]


def item_metadata(rows: Mapping) -> dict:
    """Item ids as Python's own numbers or strings, and values that JSON can hold; raises for others."""
    if not rows:
        return {}
    ids = id_array(list(rows), "the item ids of the metadata").tolist()
    if taken := sorted({"item_id", "score"} & set().union(*rows.values())):
        raise ValueError(
            f"metadata columns {taken} are fields of a recommendation already: rename them, or leave them out."
        )
    return {
        item: {name: _json_value(value, item, name) for name, value in row.items()}
        for item, row in zip(ids, rows.values())
    }


def _json_value(value: Any, item: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (datetime.date, datetime.datetime, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):  # a price, of a parquet file
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_json_value(each, item, name) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _json_value(each, item, name) for key, each in value.items()}
    raise ValueError(
        f"metadata {name!r} of item {item!r} is {value!r} ({type(value).__name__}), which JSON cannot hold: pass "
        "numbers, text or dates, or leave the column out."
    )


def save_metadata(metadata: Mapping, folder: str | os.PathLike) -> None:
    """Writes `items.jsonl`, one item a line."""
    lines = [json.dumps({"item_id": item, **row}, ensure_ascii=False) for item, row in metadata.items()]
    (Path(folder) / METADATA_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_metadata(path: str | os.PathLike) -> dict:
    """Reads `items.jsonl`; a line ends at "\\n" alone, since a title may hold U+2028 and others that `splitlines` ends
    one at.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    return {row.pop("item_id"): row for row in rows}


def save_parts(folder: str | os.PathLike, quantizer: Any, metadata: Mapping, reranker: Any) -> None:
    """Writes codebooks, metadata and re-ranker, those that are there, and removes what an earlier recommender left of
    the others: loaded with this model, it would be taken for a part of it.
    """
    folder = Path(folder)
    if quantizer is not None:
        quantizer.save_pretrained(folder)
    if metadata:
        save_metadata(metadata, folder)
    if reranker is not None:
        reranker.save_pretrained(folder)
    without = [] if metadata else [METADATA_NAME]
    without += [] if quantizer is not None else [QUANTIZER_NAME, QUANTIZER_WEIGHTS_NAME]
    without += [] if reranker is not None else [RERANKER_NAME, VALUES_NAME]
    for name in without:
        (folder / name).unlink(missing_ok=True)
    if reranker is None and (folder / SCORERS).is_dir():
        shutil.rmtree(folder / SCORERS)


def read_rows(path: Path) -> datasets.Dataset:
    """A parquet file, with rows or without."""
    return arrow_dataset(pyarrow.parquet.ParquetFile(path).read())


def check_rows(dataset: Any, column: str) -> None:
    """Refuses a data set without histories, and one that has columns of the names that are written."""
    if column not in dataset.column_names:
        raise ValueError(f"the dataset has no column {column!r}; it has {dataset.column_names}.")
    if taken := sorted({"item_ids", "scores"} & set(dataset.column_names)):
        raise ValueError(f"the dataset has columns {taken}, which the result is written to: rename or remove them.")
    if not isinstance(dataset.features[column], (datasets.List, datasets.LargeList)):
        raise ValueError(f"column {column!r} holds {dataset.features[column]}: a list of item ids per row is needed.")


def check_dataset(dataset: Any, column: str, path: Path, overwrite: bool) -> None:
    """All that can be wrong with a data set and a folder, before hours of work."""
    check_rows(dataset, column)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written: choose another folder.")
    # processes of one run start at different times, so the parts of the others may be there; they say of which run
    # they are
    run = path.name.partition("-of-")[2]
    parts = sorted(path.parent.glob("part-*.parquet"))
    earlier = [part for part in parts if part == path or part.name.partition("-of-")[2] != run]
    if earlier and not overwrite:
        raise ValueError(
            f"{path.parent} holds {[part.name for part in earlier]} of an earlier run: remove them, choose another "
            "folder, or pass overwrite=True."
        )
    for part in earlier:
        part.unlink(missing_ok=True)


def read_columns(collator: Any, rows: datasets.Dataset, column: str) -> list[str]:
    """
    The columns of a data set that a model reads beside the histories, its `column`; a warning names those that it
    would read and that are not there, or hold something else.

    Raises:
        ValueError: Lists of events that do not run parallel to the histories.
    """
    reads = sorted({*collator.event_features, *collator.settings.get("positive", ())})
    events = [name for name in reads if name in rows.column_names and _are_numbers(rows.features[name])]
    names = [*events, *(name for name in collator.user_feature_sizes if name in rows.column_names)]
    if absent := [name for name in (*reads, *collator.user_feature_sizes) if name not in names]:
        logger.warning(
            f"The model reads {absent} beside the ids, the data set has no such columns (of events: lists of "
            "numbers): they are unknown."
        )
    start = 0
    chunks = rows.select_columns([column, *events]).with_format("arrow").iter(batch_size=100_000) if events else ()
    for table in chunks:
        items = pc.list_value_length(table[column])
        for name in events:
            values = pc.list_value_length(table[name])
            if odd := pc.indices_nonzero(pc.fill_null(pc.not_equal(items, values), False)).to_pylist():
                raise ValueError(
                    f"row {start + odd[0]} has {values[odd[0]]} values of {name!r} and {items[odd[0]]} items in "
                    f"{column!r}: a value per item, or leave the column out."
                )
        start += len(table)
    return names


def _are_numbers(feature: Any) -> bool:
    """Whether a column holds lists of numbers."""
    numbers = ("int", "uint", "float", "bool", "null", "decimal")
    listed = isinstance(feature, (datasets.List, datasets.LargeList))
    return listed and getattr(feature.feature, "dtype", "").startswith(numbers)


def recommend_rows(
    recommender: Any, rows: datasets.Dataset, k: int, column: str, batch_size: int, **kwargs: Any
) -> tuple[list[list], list[list]]:
    """Item ids (of sessions, lists of them) and scores for every row, by [`Recommender.recommend`], batch by batch;
    event columns and user features that the model reads are taken from the columns of their names.
    """
    collator, names = recommender.ranker.collator, read_columns(recommender.ranker.collator, rows, column)
    read, item_ids, scores = rows.select_columns([column, *names]), [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="recommend", disable=int(os.environ.get("RANK", 0)) > 0):
        batch = read[start : start + batch_size]
        users = [
            {"history": history, **dict(zip(names, values))}
            for history, *values in zip(batch[column], *(batch[name] for name in names))
        ]
        for row in recommender.recommend(k=k, **rows_to_arguments(collator, users), **kwargs):
            item_ids.append(
                [found.item_ids if isinstance(found, RecommendedSession) else found.item_id for found in row]
            )
            scores.append([found.score for found in row])
    return item_ids, scores


def write_part(
    path: Path, rows: datasets.Dataset, item_ids: list[list], scores: list[list], text_ids: bool, sessions: bool
) -> None:
    """The rows with their recommendations as parquet; the types do not depend on whether there are rows."""
    table = rows.with_format("arrow")[:]
    kind = pa.large_string() if text_ids else pa.int64()
    kind = pa.list_(kind) if sessions else kind
    table = table.append_column("item_ids", pa.array(item_ids, pa.list_(kind)))
    table = table.append_column("scores", pa.array(scores, pa.list_(pa.float64())))
    partial = path.with_suffix(".partial")
    table = table.replace_schema_metadata()
    with pyarrow.parquet.ParquetWriter(partial, table.schema) as writer:
        if len(table):  # an empty row group is a file that `datasets` refuses to read
            writer.write_table(table)
    partial.replace(path)


def push_served(recommender: Any, repo_id: str, **kwargs: Any) -> Any:
    """As [`Recommender.push_to_hub`]: its folder, with a tokenizer and a card, in one commit."""
    from .hub import model_card, push_to_hub

    config, catalogue = recommender.model.config, recommender.model.catalogue
    loaded_from = str(recommender.model.name_or_path)
    card = loaded_from and cached_file(loaded_from, "README.md", _raise_exceptions_for_missing_entries=False)
    with tempfile.TemporaryDirectory() as folder:
        recommender.save_pretrained(folder)
        SemanticIdTokenizer(codebook_sizes=config.codebook_sizes, catalogue=catalogue).save_pretrained(folder)
        if card:
            shutil.copy(card, Path(folder) / "README.md")
        else:
            unknown = "Not written down by whoever pushed this model."
            made = model_card(config, title=repo_id.split("/")[-1], repo=repo_id, data=unknown, training=unknown)
            made.save(Path(folder) / "README.md")
        return push_to_hub(folder, repo_id, **kwargs)
