"""OneRec on a table of interactions: fit, recommend, save. A thin layer over `onerec prepare`, `onerec sft` and
[`Recommender`].
"""

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from .data import EventShards
    from .recommender import Recommender
    from .scripts.prepare import PrepareArguments

BATCH_SIZE = 256  # users that are searched together


class OneRec:
    r"""
    A recommender that is trained on a table of interactions.

    ```python
    model = OneRec().fit("log.csv")
    model = OneRec(num_train_epochs=8).fit(interactions)  # columns user_id, item_id, timestamp
    model.recommend(["alice", "bob"], k=3)
    model.save_pretrained("my-recommender")
    ```

    Args:
        output_dir (`str`, *optional*): Keeps the data folder and all that the training writes; default a temporary
            folder, which is gone with this object.
        config (`str`, defaults to `"small_sft.yaml"`): Training arguments: a YAML file, or one that the package
            carries.
        prepare (`dict`, *optional*): Arguments of `onerec prepare`, such as `{"codebook_size": 64}` or
            `{"text_model": "sentence-transformers/all-MiniLM-L6-v2", "text_fields": ["title"]}`. Where it says
            nothing, codebooks and embeddings are as wide as the number of items allows.
        arguments: Arguments of `onerec sft`, over those of `config`: `num_train_epochs`, `model`, `seed`, `use_cpu`,
            ...

    Raises:
        ValueError: For arguments that `onerec sft` does not have.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike | None = None,
        config: str = "small_sft.yaml",
        prepare: Mapping[str, Any] | None = None,
        **arguments: Any,
    ):
        self._temporary = tempfile.TemporaryDirectory(prefix="onerec-") if output_dir is None else None
        self.folder = Path(self._temporary.name if self._temporary else output_dir)  # type: ignore[arg-type]
        self.config, self.prepare, self.arguments = config, dict(prepare or {}), arguments
        self._rows: dict[Any, dict[str, Any]] = {}  # of every user: history, event columns, features
        self.metrics: dict[str, float] = {}
        self._recommender: Recommender | None = None
        self._parsed()

    def _parsed(self) -> tuple:
        """The arguments of `onerec sft`, checked."""
        import yaml

        from .scripts.model_arguments import ModelArguments
        from .scripts.parser import ScriptParser, config_path
        from .trainers import OneRecSFTConfig

        known = yaml.safe_load(Path(config_path(self.config)).read_text(encoding="utf-8"))
        places = {"data": str(self.folder / "data"), "output_dir": str(self.folder / "model")}
        parser = ScriptParser("sft", None, [ModelArguments, OneRecSFTConfig])
        return parser.parse_dict(known | self.arguments | places)

    def fit(
        self,
        interactions: Any,
        items: Any = None,
        columns: Mapping[str, str | None] | None = None,
    ) -> "OneRec":
        """
        Makes semantic IDs, trains, and keeps the best model on the validation events.

        The last event of each user is the test event, the one before it the validation event; `metrics` are of the
        test events.

        Args:
            interactions: One row per event, of any kind that [`~data.load_interactions`] takes: a `DataFrame` of
                pandas or polars, a `pyarrow.Table`, a `datasets.Dataset`, streaming or not, a path (CSV, TSV, JSON
                lines, parquet), a pattern of paths, ...
            items: Item table, of the same kinds, with `item_id` and what text fields or metadata are read from.
            columns: Our names `user_id`, `item_id`, `timestamp` to yours; `{"timestamp": None}` where the rows are in
                time order.

        Raises:
            ValueError: A column that is missing, ids that are integers beyond 64 bits.
        """
        from .scripts import prepare, sft

        self._make_room()
        names = {name: name for name in ("user_id", "item_id", "timestamp")} | dict(columns or {})
        interactions = _table(interactions, names)
        items = None if items is None else _table(items, names)
        given = list(interactions.columns if hasattr(interactions, "iloc") else interactions.column_names)
        if absent := sorted({name for name in names.values() if name is not None} - set(given)):
            raise ValueError(
                f"interactions has no column {absent}; it has {given}. Say which are meant: "
                "columns={'user_id': ..., 'item_id': ..., 'timestamp': ...}."
            )
        sources: dict[str, Any] = {"source": interactions, "items": items, "columns": names}
        arguments = prepare.PrepareArguments(output=str(self.folder / "data"), **sources, **self.prepare)
        with tempfile.TemporaryDirectory() as work:
            log = prepare.load(arguments, Path(work))
            size, levels = log.num_items, arguments.num_levels
            room = math.ceil(size ** (1 / levels))  # or the items would not all get a semantic ID
            fits = {"codebook_size": min(256, max(2, room, size // 8)), "collaborative_dim": min(128, size)}
            fits = {name: value for name, value in fits.items() if name not in self.prepare}
            prepare.main(dataclasses.replace(arguments, **fits))
            self.metrics = sft.main(*self._parsed())["test"]
            self._rows = _rows_of_users(arguments, log)
        self._recommender = None
        return self

    def _make_room(self) -> None:
        """Empties a temporary folder; a ValueError where a model in another one would be lost. A training that is
        resumed keeps both.
        """
        _, training = self._parsed()
        model = self.folder / "model"
        if training.resume_from_checkpoint:
            return
        if self._temporary is not None:
            for folder in self.folder.iterdir():
                shutil.rmtree(folder)
        elif model.is_dir() and any(model.iterdir()):
            raise ValueError(
                f"{model} holds an earlier run, which a fit would replace: choose another output_dir, or remove it."
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy, such as one in another process, has the model itself, since a temporary folder is gone with this
        object.
        """
        state = self.__dict__ | {"_temporary": None, "_had_temporary": self._temporary is not None}
        if self._temporary is not None and (self.folder / "model" / "config.json").is_file():
            state["_recommender"] = self.recommender
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        temporary = state.pop("_had_temporary")
        self.__dict__.update(state)
        if temporary:
            self._temporary = tempfile.TemporaryDirectory(prefix="onerec-")
            self.folder = Path(self._temporary.name)

    @property
    def histories(self) -> dict[Any, list]:
        """Item ids of every user that `fit` saw, oldest first, as they were trained on: without rows that were left
        out, and without what `watched` does not count.
        """
        return {user: row["history"] for user, row in self._rows.items()}

    @property
    def recommender(self) -> "Recommender":
        """What serves: filters, sessions, feedback columns, new items."""
        if self._recommender is None:
            if not (self.folder / "model" / "config.json").is_file():
                raise ValueError("there is no model yet: call `fit`, or load one with `OneRec.from_pretrained`.")
            from .recommender import Recommender

            self._recommender = Recommender.from_pretrained(self.folder / "model")
        return self._recommender

    def recommend(
        self,
        users: Sequence | None = None,
        k: int = 10,
        *,
        histories: Sequence[Sequence] | None = None,
        exclude_seen: bool = True,
        **kwargs: Any,
    ) -> "pd.DataFrame":
        """
        The `k` best items of each user.

        Args:
            users: Ids of users that `fit` saw; default all of them.
            histories: In place of `users`: item ids, oldest first, one list per user.
            exclude_seen: Leave out what the user has had.
            kwargs: Of [`Recommender.recommend`]: `allow`, `deny`, `events`, ...

        Returns:
            `pd.DataFrame` with columns `user_id` (of `histories`, their position), `rank` (1 is best), `item_id` and
            `score` (log-probability, in nats; of a re-ranked model its sum).

        Raises:
            KeyError: For users that `fit` did not see.
        """
        import pandas as pd

        from .collators.histories import check_per_user, is_per_user, rows_to_arguments

        if users is not None and histories is not None:
            raise ValueError("give users or histories, not both.")
        if isinstance(users, str) or not (users is None or hasattr(users, "__iter__")):
            raise ValueError(f"users={users!r}: a list of user ids, also for one user.")
        if histories is None:
            users = list(self._rows if users is None else users)
            if unknown := [user for user in users if user not in self._rows]:
                raise KeyError(
                    f"{len(unknown)} of {len(users)} users have no history here; the first is {unknown[0]!r}. Give "
                    "`histories`."
                )
            rows = [self._rows[user] for user in users]
        else:
            users, rows = range(len(histories)), [{"history": history} for history in histories]
        per_user = {name: kwargs.pop(name, None) for name in ("events", "users", "allow", "deny")}
        check_per_user(len(rows), **per_user)
        recommender, found = self.recommender, []
        for start in range(0, len(rows), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            own = rows_to_arguments(recommender.ranker.collator, rows[part])
            for name, values in per_user.items():
                if name in ("events", "users") and values:
                    own[name] = own.get(name, {}) | {key: column[part] for key, column in values.items()}
                elif values is not None:
                    own[name] = list(values)[part] if is_per_user(values) else values
            found += recommender.recommend(k=k, exclude_seen=exclude_seen, **own, **kwargs)
        table = [(user, rank + 1, *item[:2]) for user, row in zip(users, found) for rank, item in enumerate(row)]
        return pd.DataFrame(table, columns=["user_id", "rank", "item_id", "score"])

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """The model as it is now (`recommender` may have other items by then), with all it is served with; histories
        stay here.
        """
        recommender, folder = self.recommender, Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        made = self.folder / "model"
        for file in made.iterdir() if made.is_dir() else ():  # the card, its pictures, the metrics
            if file.is_file() and folder.resolve() != made.resolve():
                shutil.copy2(file, folder)
        recommender.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, repo: str | os.PathLike, **hub_kwargs: Any) -> "OneRec":
        """A saved folder or a Hub repository; it recommends for `histories`."""
        from .recommender import Recommender

        model = cls()
        model._recommender = Recommender.from_pretrained(repo, **hub_kwargs)
        return model

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Pushes the model folder in one commit; `kwargs` and result are those of `onerec_hf.hub.push_to_hub`."""
        from .hub import push_to_hub

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_to_hub(folder, repo_id, **kwargs)


def _table(table: Any, names: Mapping[str, str | None]) -> Any:
    """A `DataFrame` as it is, any other table of Arrow: it is read more than once, which a stream cannot be."""
    from .data.tables import read_table

    if hasattr(table, "iloc"):  # pandas
        return table
    if hasattr(table, "to_arrow"):  # polars
        table = table.to_arrow()
    return read_table(table, ids=[str(names[name]) for name in ("user_id", "item_id")])


def _rows_of_users(arguments: "PrepareArguments", log: "EventShards") -> dict[Any, dict[str, Any]]:
    """What a request for each user says: `history` (item ids) and event columns, parallel to it; user features."""
    from .data import SessionConfig, reaches
    from .scripts.model_arguments import mapping

    watched, sessions = mapping(arguments.watched), arguments.sessions
    items, users, rows = log.item_ids, log.user_ids.tolist(), {}
    for indices, events in log:
        if sessions is not None:
            config = SessionConfig(**mapping(sessions))
            if config.history != "all":
                events = events.where(config.effective_events(events))
        elif watched:
            events = events.where(reaches(events.feedback, watched))
        columns = {"timestamp": events.timestamp, **events.feedback}
        for user, start, stop in zip(indices, events.user_offsets[:-1], events.user_offsets[1:]):
            if start < stop:
                row = {name: values[start:stop] for name, values in columns.items()}
                row |= {name: values[user] for name, values in log.users.items()}
                rows[users[user]] = row | {"history": items[events.item_index[start:stop]].tolist()}
    return rows


__all__ = ["OneRec"]
