"""A log in shards: all events of a user are in one, so that whatever is done per user is done shard by shard."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from .interactions import Interactions
from .splits import k_core, take_features
from .tables import numpy_values

FEEDBACK = "feedback_"  # what the names of feedback columns have in front, in the files of shards


class EventShards:
    """
    Events of U users on N items, in shards that fit into memory one at a time.

    Args:
        shards: Parquet files with the columns `user`, `item` (indices, int64), `timestamp` and `feedback_<name>`,
            sorted by user and time; or one [`Interactions`].
        user_ids, item_ids, items, users: As of [`Interactions`], of the whole log.
    """

    def __init__(
        self,
        shards: Sequence[Path] | Sequence[Interactions],
        user_ids: np.ndarray,
        item_ids: np.ndarray,
        items: dict[str, np.ndarray | list],
        users: dict[str, np.ndarray | list],
    ):
        self.shards, self.user_ids, self.item_ids, self.items, self.users = shards, user_ids, item_ids, items, users

    @classmethod
    def of(cls, interactions: Interactions) -> "EventShards":
        """A log in one piece, as one shard."""
        own = interactions
        return cls([own], own.user_ids, own.item_ids, own.items, own.users)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def __len__(self) -> int:
        """Shards, not events."""
        return len(self.shards)

    @property
    def num_events(self) -> int:
        return sum(
            len(shard) if isinstance(shard, Interactions) else pyarrow.parquet.read_metadata(shard).num_rows
            for shard in self.shards
        )

    def __iter__(self) -> Iterator[tuple[np.ndarray, Interactions]]:
        """
        Per shard the indices of its users (int64, increasing), and its events; in these user `i` is the shard's i-th
        user. Item indices are those of the whole log; features of items and users are left out.
        """
        for shard in self.shards:
            if isinstance(shard, Interactions):
                yield np.arange(shard.num_users), shard
            else:
                yield self._read(shard)

    def _read(self, path: Path) -> tuple[np.ndarray, Interactions]:
        table = pyarrow.parquet.read_table(path)
        users, user = np.unique(table["user"].to_numpy(), return_inverse=True)
        feedback = {
            name.removeprefix(FEEDBACK): numpy_values(table[name])
            for name in table.column_names
            if name.startswith(FEEDBACK)
        }
        return users, Interactions(
            user_index=user.astype(np.int64),
            item_index=table["item"].to_numpy(),
            timestamp=table["timestamp"].to_numpy(),
            user_ids=self.user_ids[users],
            item_ids=self.item_ids,
            feedback=feedback,
        )

    def k_core(self, k: int) -> "EventShards":
        """As [`k_core`] of a log in one piece. The files of the shards stay, and smaller ones come beside them."""
        paths = [shard for shard in self.shards if isinstance(shard, Path)]
        if isinstance(self.shards[0], Interactions):
            return EventShards.of(k_core(self.shards[0], k))
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        users, items = np.ones(self.num_users, dtype=bool), np.ones(self.num_items, dtype=bool)
        left, before = -1, -2
        while left != before:
            item_count, user_count = np.zeros(self.num_items, np.int64), np.zeros(self.num_users, np.int64)
            for path in self.shards:
                user, item = (
                    column.to_numpy() for column in pyarrow.parquet.read_table(path, columns=["user", "item"])
                )
                kept = users[user] & items[item]
                item_count += np.bincount(item[kept], minlength=self.num_items)
                user_count += np.bincount(user[kept], minlength=self.num_users)
            users, items = user_count >= k, item_count >= k
            left, before = int(item_count.sum()), left
        if not left:
            raise ValueError(f"the {k}-core of {self!r} is empty; lower k")
        return EventShards(
            _renumber(paths, users, items),
            self.user_ids[users],
            self.item_ids[items],
            take_features(self.items, items),
            take_features(self.users, users),
        )

    def __repr__(self) -> str:
        return (
            f"EventShards({self.num_events} events in {len(self)} shards, {self.num_users} users, {self.num_items} "
            f"items)"
        )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write a file under: it gets its own when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    partial.replace(path)


def write_shard(path: Path, table: pa.Table) -> None:
    """A file that is whole or not there."""
    with whole(path) as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd")


def _renumber(paths: list[Path], users: np.ndarray, items: np.ndarray) -> list[Path]:
    """Other files, so that a run that is stopped here finds the shards as they were."""
    new_user, new_item = np.cumsum(users) - 1, np.cumsum(items) - 1
    found = [path.with_name(f"core-{path.name}") for path in paths]
    for path, target in zip(paths, found):
        table = pyarrow.parquet.read_table(path)
        user, item = table["user"].to_numpy(), table["item"].to_numpy()
        kept = users[user] & items[item]
        columns = {"user": new_user[user[kept]], "item": new_item[item[kept]]}
        rest = {name: pc.filter(table[name], pa.array(kept)) for name in table.column_names[2:]}
        write_shard(target, pa.table(columns | rest))
    return found
