"""Public data sets in parquet form: Amazon 2014 in the S3-Rec order, KuaiRand-Pure, KuaiRand-27K likes and dislikes."""

from pathlib import Path

import numpy as np
import pyarrow.parquet

from .interactions import Interactions
from .tables import feature_values


def load_amazon(folder: str | Path) -> Interactions:
    """Amazon Beauty or Sports (2014, 5-core) in the order of S3-Rec (arXiv:2008.07873), the benchmark of TIGER.

    Reads `sequences.parquet` (`user_id`, `item_ids`: items in time order) and `items.parquet` (`item_id` and text
    columns). Only the order is known: timestamps are 0, 1, 2, ... inside each user.

    Returns:
        [`Interactions`], ids as in the S3-Rec files; the columns of `items.parquet` in `items`.
    """
    sequences = _read(folder, "sequences.parquet").combine_chunks()
    items = _read(folder, "items.parquet")
    lists = sequences["item_ids"].combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    item_ids = items["item_id"].to_numpy().astype(np.int64)
    order = np.argsort(item_ids)
    item_index = order[np.searchsorted(item_ids, lists.flatten().to_numpy(), sorter=order)]
    return Interactions(
        user_index=np.repeat(np.arange(len(lengths)), lengths),
        item_index=item_index,
        timestamp=np.concatenate([np.arange(n) for n in lengths]),
        user_ids=sequences["user_id"].to_numpy().astype(np.int64),
        item_ids=item_ids,
        items={name: feature_values(items[name]) for name in items.column_names if name != "item_id"},
    )


def _read(folder: str | Path, name: str):
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; the folder must hold {name} (see the docstring of the loader)"
        )
    return pyarrow.parquet.read_table(path)
