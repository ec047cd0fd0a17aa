"""What `onerec prepare` writes and every later step reads: splits, items, users, semantic IDs and item embeddings in
one folder.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..semantic_ids.embedding_files import EmbeddingFiles
from ..semantic_ids.rqvae import RQVAE, ResidualKMeans, load_quantizer
from .split_files import CONTRACT, SPLITS, SplitWriter, load_splits, split_parts
from .splits import arrow_dataset
from .streams import mapped_split, stream_split

TOKENIZER, EMBEDDINGS, REPORT = "tokenizer", "item_embeddings.safetensors", "semantic_ids.json"
TABLES = {"items": "items.parquet", "users": "users.parquet"}
REQUIRED = (f"{SPLITS}/{CONTRACT}", *TABLES.values(), f"{TOKENIZER}/catalogue.safetensors")
REQUIRED += (f"{TOKENIZER}/quantizer_config.json", EMBEDDINGS, REPORT)


def id_fingerprint(ids: Iterable) -> str:
    """Tells whether two tables have the same ids in the same order: rows know users and items by number alone."""
    return hashlib.sha256(json.dumps([str(each) for each in ids]).encode()).hexdigest()[:16]


class DataFolder:
    r"""
    A data folder. Its files are checked when it is opened, and read when they are asked for.

    | file | attribute | |
    |---|---|---|
    | `splits/` | `splits` | `train`, `validation` and `test`; rows name items and users by index |
    | `items.parquet`, `users.parquet` | `items`, `users` | a row per index: `item_id` or `user_id`, and features |
    | `tokenizer/` | `tokenizer`, `catalogue`, `quantizer` | the semantic IDs and their codebooks |
    | `item_embeddings.safetensors` | `item_embeddings` | float32 of shape (N, D), a row per item index |
    | `semantic_ids.json` | | quality of the semantic IDs; written last |

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: Where a file is missing: which one, and the command that makes it.
        ValueError: Where a file is cut off, or the files are not of one run.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        advice = f"Make it with `onerec prepare --source LOG --output {path}`, or name the one that you made."
        absent = [name for name in REQUIRED if not (self.path / name).is_file()]
        if (self.path / SPLITS / "dataset_dict.json").is_file():  # of an earlier version: one file per split
            absent = [name for name in absent if name != REQUIRED[0]]
        if len(absent) == len(REQUIRED):
            raise FileNotFoundError(f"{path} is no data folder: {self.path / SPLITS} is not there. {advice}")
        if absent:
            raise FileNotFoundError(
                f"{path} is no complete data folder: {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not "
                f"there. The run that made it was stopped, or files were moved. {advice}"
            )
        try:
            rows = {name: pyarrow.parquet.read_metadata(self.path / file).num_rows for name, file in TABLES.items()}
            with safe_open(self.path / EMBEDDINGS, framework="np") as file:
                vectors = file.get_slice("item_embeddings").get_shape()[0]
            with safe_open(self.path / TOKENIZER / "catalogue.safetensors", framework="np") as file:
                catalogue = file.get_slice("semantic_ids").get_shape()[0]
        except (pa.ArrowException, SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): a file is cut off. {advice}") from error
        if not rows["items"] == vectors == catalogue:
            raise ValueError(
                f"{path} holds files of several runs: items.parquet has {rows['items']} items, the catalogue "
                f"{catalogue}, {EMBEDDINGS} {vectors}. {advice}"
            )
        self.num_items, self.num_users = rows["items"], rows["users"]

    @classmethod
    def save(
        cls,
        path: str | os.PathLike,
        *,
        splits: Mapping[str, datasets.Dataset] | SplitWriter | None,
        items: datasets.Dataset,
        users: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        quantizer: ResidualKMeans | RQVAE,
        item_embeddings: np.ndarray | EmbeddingFiles,
        report: dict,
    ) -> "DataFolder":
        """
        Writes a data folder. A run that is stopped here leaves a folder that cannot be opened.

        Args:
            path: The folder; made if it does not exist.
            splits: Their rows; or the writer that has written them into this folder; or None: they are there
                already, made by a warehouse, say (docs/large_data.md).
            items (`datasets.Dataset` of N rows): Row i is item index i: `item_id` and features.
            users (`datasets.Dataset` of U rows): Row u is user index u: `user_id` and features.
            tokenizer ([`SemanticIdTokenizer`]): With the catalogue of the N items, as `tokenizer.catalogue`.
            quantizer ([`ResidualKMeans`] or [`RQVAE`]): The trained codebooks of the semantic IDs.
            item_embeddings (`np.ndarray` or [`EmbeddingFiles`] of shape (N, D)): float32, what the semantic IDs were
                made from; files are copied block by block.
            report: What `quality_report` says of the semantic IDs.

        Returns:
            The folder, opened.

        Raises:
            RuntimeError: A quantizer that is not trained. FileNotFoundError: With `splits=None`, as `split_parts`; a
                tokenizer without catalogue. ValueError: Items, catalogue and embeddings of different N.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT).unlink(missing_ok=True)  # of an earlier run: until the end this folder is not complete
        tokenizer.save_pretrained(folder / TOKENIZER)
        quantizer.save_pretrained(folder / TOKENIZER)
        if isinstance(splits, Mapping):
            writer, rows = SplitWriter(folder), splits
            writer.write(rows)
            splits = writer
        if splits is None:
            split_parts(folder)  # refuses what is not whole
        else:
            splits.finish()
        if isinstance(item_embeddings, EmbeddingFiles):
            item_embeddings.save_safetensors(folder / EMBEDDINGS, "item_embeddings")
        else:
            save_file({"item_embeddings": item_embeddings}, folder / EMBEDDINGS)
        items.to_parquet(folder / TABLES["items"])
        users.to_parquet(folder / TABLES["users"])
        (folder / REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")
        return cls(folder)

    @cached_property
    def splits(self) -> datasets.DatasetDict:
        """`train`, `validation` and `test`, in memory."""
        return load_splits(self.path)

    def splits_on_disk(self) -> datasets.DatasetDict:
        """As `splits`, but training rows stay on disk: [`mapped_split`]."""
        others = load_splits(self.path, ["validation", "test"])
        return datasets.DatasetDict({"train": mapped_split(self.path), **others})

    def stream(self, split: str = "train", **settings: Any) -> datasets.IterableDataset:
        """The rows of a split without end, a part in memory at a time: [`stream_split`]."""
        return stream_split(self.path, split, **settings)

    @cached_property
    def items(self) -> datasets.Dataset:
        """A row per item index."""
        return self._table("items")

    @cached_property
    def users(self) -> datasets.Dataset:
        """A row per user index."""
        return self._table("users")

    @cached_property
    def tokenizer(self) -> Any:
        """The `SemanticIdTokenizer`, with the catalogue."""
        return AutoTokenizer.from_pretrained(self.path / TOKENIZER)

    @property
    def catalogue(self) -> Any:
        """The `Catalogue`: items and their semantic IDs."""
        return self.tokenizer.catalogue

    @cached_property
    def quantizer(self) -> ResidualKMeans | RQVAE:
        """What makes the codes of new items from their embeddings."""
        return load_quantizer(self.path / TOKENIZER)

    @cached_property
    def item_embeddings(self) -> np.ndarray:
        """What the semantic IDs were made from, float32 of shape (N, D)."""
        return load_file(self.path / EMBEDDINGS)["item_embeddings"]

    @cached_property
    def user_fingerprint(self) -> str:
        """Tells whether two folders have the same users in the same order."""
        return id_fingerprint(self.users["user_id"][:])

    def columns(self, table: str, names: Sequence[str]) -> dict[str, list]:
        """
        Columns of `"items"` or `"users"`, by name.

        Raises:
            ValueError: For a column that the table does not have; the message lists those it has.
        """
        rows: datasets.Dataset = getattr(self, table)
        if absent := [name for name in names if name not in rows.column_names]:
            raise ValueError(f"{TABLES[table]} has no {absent}; it has {rows.column_names}. ({self.path})")
        return {name: rows[name][:] for name in names}

    def check_model(self, model: str | os.PathLike, catalogue: Any) -> None:
        """Raises a ValueError unless the folder is of a model's items: its rows hold numbers, which would fit any
        model.
        """
        if difference := catalogue.difference(self.catalogue):
            raise ValueError(
                f"{model} (a model) and {self.path} (a data folder) do not belong together: {difference}. Give the "
                "data folder the model was trained on, or train the model again on this one."
            )

    def _table(self, name: str) -> datasets.Dataset:
        return arrow_dataset(pyarrow.parquet.read_table(self.path / TABLES[name]))


__all__ = ["DataFolder"]
