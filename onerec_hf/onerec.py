"""OneRec on a table of interactions: fit, recommend, save. A thin layer over `onerec prepare`, `onerec sft` and
[`Recommender`].
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from .recommender import Recommender


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
        prepare (`dict`, *optional*): Arguments of `onerec prepare`, such as `{"codebook_size": 64, "text_fields":
            ["title"]}`. Where it says nothing, codebooks and embeddings are as wide as the number of items allows.
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
        self.histories: dict[Any, list] = {}
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

        names = {name: name for name in ("user_id", "item_id", "timestamp")} | dict(columns or {})
        interactions = _frame(interactions, names)
        items = None if items is None else _frame(items, names)
        if absent := sorted({name for name in names.values() if name is not None} - set(interactions.columns)):
            raise ValueError(
                f"interactions has no column {absent}; it has {list(interactions.columns)}. Say which are meant: "
                "columns={'user_id': ..., 'item_id': ..., 'timestamp': ...}."
            )
        size = len(items) if items is not None else interactions[names["item_id"]].nunique()
        settings: dict[str, Any] = {"codebook_size": min(256, max(2, size // 8)), "collaborative_dim": min(128, size)}
        settings |= self.prepare
        sources: dict[str, Any] = {"source": interactions, "items": items, "columns": names}
        prepare.main(prepare.PrepareArguments(output=str(self.folder / "data"), **sources, **settings))
        self.metrics = sft.main(*self._parsed())["test"]
        ordered = interactions
        if names["timestamp"] is not None:
            ordered = interactions.sort_values(names["timestamp"], kind="stable")
        self.histories = ordered.groupby(names["user_id"], sort=False)[names["item_id"]].agg(list).to_dict()
        self._recommender = None
        return self

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

        if users is not None and histories is not None:
            raise ValueError("give users or histories, not both.")
        if histories is None:
            users = list(self.histories if users is None else users)
            if unknown := [user for user in users if user not in self.histories]:
                raise KeyError(
                    f"{len(unknown)} of {len(users)} users have no history here; the first is {unknown[0]!r}. Give "
                    "`histories`."
                )
            histories = [self.histories[user] for user in users]
        names = range(len(histories)) if users is None else users
        found = self.recommender.recommend(histories, k, exclude_seen=exclude_seen, **kwargs)
        rows = [(user, rank + 1, *item[:2]) for user, row in zip(names, found) for rank, item in enumerate(row)]
        return pd.DataFrame(rows, columns=["user_id", "rank", "item_id", "score"])

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """The model with all it is served with; histories stay here."""
        self.recommender  # noqa: B018  # raises where there is no model
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in (self.folder / "model").iterdir():
            if file.is_file():
                shutil.copy2(file, folder)
        if (scorers := self.folder / "model" / "scorers").is_dir():
            shutil.copytree(scorers, Path(folder) / "scorers", dirs_exist_ok=True)

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


def _frame(table: Any, names: Mapping[str, str | None]) -> "pd.DataFrame":
    """Any table as pandas has it; ids keep their spelling, and those that are no integer of 64 bits are refused."""
    import pandas as pd

    from .data.tables import read_table

    ids = [str(names[name]) for name in ("user_id", "item_id")]
    if hasattr(table, "to_arrow"):  # polars
        table = table.to_arrow()
    if not isinstance(table, pd.DataFrame):
        table = read_table(table, ids=ids).to_pandas()
    for name in set(ids) & set(table.columns):
        column = table[name]
        numbers = column[[isinstance(value, int) for value in column]] if column.dtype == object else column
        large = [value for value in numbers if abs(value) >= 2**63] if numbers.dtype in (object, "uint64") else []
        if large:
            raise ValueError(f"{name} holds {large[0]}, which is beyond 64 bits: pass these ids as strings.")
    return table


__all__ = ["OneRec"]
