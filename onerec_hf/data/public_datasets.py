"""Public data sets as parquet files: Amazon 2014 in the order of S3-Rec, KuaiRand-Pure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from .interactions import Interactions, load_interactions

KUAIRAND_COLUMNS = {"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}
KUAIRAND_FEEDBACK = (
    "play_time_ms",
    "duration_ms",
    "is_click",
    "long_view",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "is_profile_enter",
    "profile_stay_time",
    "comment_stay_time",
    "tab",
)


def load_amazon(folder: str | Path) -> Interactions:
    """Amazon Beauty or Sports (2014, 5-core) in the order of S3-Rec (arXiv:2008.07873), the benchmark of TIGER.

    Reads `sequences.parquet` (`user_id`, `item_ids`: items in time order) and `items.parquet` (`item_id`, text).
    Only the order is known: timestamps are 0, 1, 2, ... inside each user.

    Returns:
        [`Interactions`] with the columns of `items.parquet` in `items`: `title`, `brand`, `category_path`, ... for
        Beauty (22,363 users, 12,101 items, 198,502 events), `keywords`, ... for Sports (35,598, 18,357, 296,337).
    """
    sequences = _read(folder, "sequences.parquet", ("user_id", "item_ids"))
    lists = sequences["item_ids"].combine_chunks()
    log = pa.table(
        {"user_id": sequences["user_id"].take(pc.list_parent_indices(lists)), "item_id": pc.list_flatten(lists)}
    )
    return load_interactions(log, columns={"timestamp": None}, items=_read(folder, "items.parquet", ("item_id",)))


def load_kuairand(folder: str | Path, *, history: bool = False, drop_duplicates: bool = False) -> Interactions:
    """KuaiRand-Pure (Gao et al., CIKM 2022): watch time and feedback on short videos.

    Reads `interactions.parquet`, `items.parquet`, `users.parquet` and, if asked for, `history.parquet`. Timestamps are
    milliseconds since 1970 UTC; the days of the data set start at 16:00 UTC (Beijing). 5,872 events repeat another
    one in every column that is read.

    Args:
        history: put the videos a user was shown before the log starts (`watched` of `history.parquet`, the last 50)
            before his events. Of these only the order and the last time are known: they are spaced 1 ms apart up to
            `last_time_ms`, and every feedback value is **-1: unknown**.
        drop_duplicates: see [`load_interactions`].

    Returns:
        [`Interactions`] of all 7,583 videos; `feedback` holds `play_time_ms`, `duration_ms` (0: unknown), the 0/1
        signals, `profile_stay_time` and `comment_stay_time` in ms, and `tab`, the scenario of the app.
    """
    columns = (*KUAIRAND_COLUMNS.values(), *KUAIRAND_FEEDBACK)
    log = _read(folder, "interactions.parquet", columns).select(columns)
    if history:
        watched = _read(folder, "history.parquet", ("user_id", "watched", "last_time_ms"))
        log = pa.concat_tables([_watched_before(watched, log.schema), log])
    return load_interactions(
        log,
        columns=KUAIRAND_COLUMNS,
        feedback=KUAIRAND_FEEDBACK,
        items=_read(folder, "items.parquet", ("video_id",)),
        users=_read(folder, "users.parquet", ("user_id",)),
        drop_duplicates=drop_duplicates,
    )


def _watched_before(history: pa.Table, schema: pa.Schema) -> pa.Table:
    watched = history["watched"].combine_chunks()
    user = pc.list_parent_indices(watched).to_numpy()
    end = np.cumsum(watched.value_lengths().to_numpy())
    age = end[user] - 1 - np.arange(len(user))  # 0 for the last video of a user
    columns = {
        "user_id": history["user_id"].take(pa.array(user)),
        "video_id": watched.flatten(),
        "time_ms": pa.array(history["last_time_ms"].to_numpy()[user] - age),
    }
    columns |= {name: pa.array(np.full(len(user), -1)) for name in KUAIRAND_FEEDBACK}
    return pa.table(columns).select(schema.names).cast(schema)


def _read(folder: str | Path, name: str, columns: Sequence[str]) -> pa.Table:
    path, advice = (
        Path(folder) / name,
        "Other logs are read by `load_interactions`, or `onerec prepare --layout logs`.",
    )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is not the data set of this layout. {advice}")
    table = pyarrow.parquet.read_table(path)
    if absent := [column for column in columns if column not in table.column_names]:
        raise ValueError(
            f"{path} has no {absent}, only {table.column_names}: it is not the data set of this layout. {advice}"
        )
    return table
