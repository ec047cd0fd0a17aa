"""`pipeline("onerec-recommendation", model=repo)`: the [`Recommender`] under transformers' own entry point."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

TASK = "onerec-recommendation"
BATCH_SIZE = 64  # users in one search where nothing else is said


class OneRecRecommendationPipeline(Pipeline):
    """
    Histories of item ids in, recommended items out.

    ```python
    recommend = pipeline("onerec-recommendation", model="org/onerec-1b")
    recommend([1003, 1007], k=10)  # one user: a list of {"item_id", "score", ...}
    recommend([[1003, 1007], [1063]], k=10, exclude_seen=True)  # several
    recommend({"history": [1003, 1007], "is_like": [1, 0]})  # with what the model reads beside the ids
    recommend([1003, 1007], k=1, session=True)  # a OneRec model's best session: {"item_ids", "score", "metadata"}
    for found in recommend(dataset): ...  # rows with a column `history`
    ```

    Keyword arguments are those of [`Recommender.recommend`]; `batch_size` users are searched at once, with what is
    given for them: `events`, `users`, and `allow` or `deny` with a list per user. A row brings its own under the names
    of the columns.
    """

    # transformers annotates None, and documents True and False beside it
    _load_processor = _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, model: Any, *args, num_beams: int = 50, **kwargs):
        from .recommender import Recommender  # needs `datasets`, which the models alone do not

        super().__init__(model, *args, **kwargs)
        hub_kwargs = vars(self.model).pop("_hub_kwargs", {})
        self.recommender = Recommender.of_model(self.model, str(self.model.name_or_path), num_beams, **hub_kwargs)

    def __call__(self, inputs: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        """
        Recommends for one user, for several, or for a stream of them.

        Args:
            inputs: A history of item ids, or a row `{"history": [...], ...}`; a list (array, `DataFrame`) of either;
                or a data set or any other iterable of either. A row may hold `allow`, `deny`, and the event columns
                and user features of the model; its other columns are not read.
            batch_size: Users in one search; by default 64.

        Returns:
            For one user a list of dictionaries, for a list of users a list of these. For a data set or a generator an
            iterator: no more than `batch_size` users are in memory.

        Raises:
            ValueError: What is given twice, or per user for a stream of unknown length.
        """
        if isinstance(inputs, str) or not (isinstance(inputs, Iterable) or hasattr(inputs, "__getitem__")):
            raise ValueError(
                f"the input is {inputs!r}: pass a list of item ids, oldest first, also for a single item."
            )
        kwargs.pop("num_workers", None)  # of transformers: nothing is loaded in other processes
        parameters = self._forward_params | kwargs
        size = batch_size or self._batch_size or BATCH_SIZE
        if isinstance(inputs, Mapping):
            return next(self._stream([inputs], 1, size, parameters))
        if hasattr(inputs, "to_dict") and hasattr(inputs, "columns"):  # a DataFrame
            inputs = inputs.to_dict("records")
        if not (isinstance(inputs, Sequence) or hasattr(inputs, "__array__")):
            n = len(inputs) if hasattr(inputs, "__len__") else None
            return self._stream(inputs, n, size, parameters)
        users = list(inputs)
        if not users or _is_id(users[0]):
            return next(self._stream([users], 1, size, parameters))
        return list(self._stream(users, len(users), size, parameters))

    def _stream(self, users: Any, n: int | None, size: int, parameters: dict) -> Iterator[list]:
        """What each of the users gets, in their order; arguments are checked here, before the first search."""
        per_user = self._per_user(n, parameters)
        waiting = iter(users)

        def found() -> Iterator[list]:
            start = 0
            while batch := list(itertools.islice(waiting, size)):
                part = slice(start, start + len(batch))
                own = self._arguments(batch)
                given = {name: cut(part) for name, cut in per_user.items()}
                if twice := sorted(set(own) & set(given | parameters)):
                    raise ValueError(f"{twice} are given in the rows and as arguments: leave out one side.")
                yield from self.run_single(own | given, {}, parameters, {})
                start += len(batch)

        return found()

    def _arguments(self, batch: list) -> dict:
        """What `Recommender.recommend` takes, of histories or of rows."""
        from .collators.histories import rows_to_arguments

        if not any(isinstance(row, Mapping) for row in batch):
            return {"histories": batch}
        return rows_to_arguments(self.recommender.ranker.collator, batch)

    @staticmethod
    def _per_user(n: int | None, arguments: dict) -> dict:
        """Takes out of the arguments what is given per user: name -> a function that cuts a slice of the users from
        it.
        """
        from .collators.histories import check_per_user, is_per_user

        given = {name: arguments.get(name) for name in ("events", "users", "allow", "deny")}
        if n is None:
            listed = [name for name, value in given.items() if name in ("events", "users") or is_per_user(value)]
            if surplus := [name for name in listed if given[name]]:
                raise ValueError(
                    f"{surplus} are given per user for a stream whose length is not known: write them into its rows, "
                    'such as {"history": [...], "is_like": [...]}.'
                )
            return {}
        check_per_user(n, **given)
        cuts: dict = {}
        for name in ("events", "users"):
            if given[name]:
                columns = arguments.pop(name)
                cuts[name] = lambda part, columns=columns: {key: values[part] for key, values in columns.items()}
        for name in ("allow", "deny"):
            if is_per_user(given[name]):
                cuts[name] = list(arguments.pop(name)).__getitem__
        return cuts

    def _sanitize_parameters(self, **kwargs):
        return {}, kwargs, {}

    def preprocess(self, input_: dict, **parameters: Any) -> dict:
        """As `Pipeline.preprocess`, and nothing is done: `input_` holds what `Recommender.recommend` takes of a batch
        of users (`histories`, `events`, ...).
        """
        return input_

    def _forward(self, input_tensors: dict, **parameters: Any) -> Any:
        found = self.recommender.recommend(**input_tensors, **parameters)
        # plain dictionaries: transformers takes a forward's outputs apart to move their tensors
        rows = [[_as_dict(one) for one in row] for row in found]
        return {"found": rows}

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list:
        """As `Pipeline.postprocess`: per user of the batch a list of dictionaries, best first."""
        return model_outputs["found"]


def _is_id(value: Any) -> bool:
    """Text has a length, and numbers of numpy and torch have an empty shape."""
    return isinstance(value, str) or not getattr(value, "shape", hasattr(value, "__len__"))


def _as_dict(found: Any) -> dict:
    if hasattr(found, "item_ids"):  # a session
        return found._asdict()
    return {"item_id": found.item_id, "score": found.score, **found.metadata}


PIPELINE_REGISTRY.register_pipeline(TASK, OneRecRecommendationPipeline, pt_model=AutoModelForCausalLM)
