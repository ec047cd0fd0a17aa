"""`pipeline("onerec-recommendation", model=repo)`: the [`Recommender`] under transformers' own entry point."""

import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

TASK = "onerec-recommendation"


class OneRecRecommendationPipeline(Pipeline):
    """
    Histories of item ids in, recommended items out.

    ```python
    recommend = pipeline("onerec-recommendation", model="org/onerec-1b")
    recommend([1003, 1007], k=10)  # one user: a list of {"item_id", "score", ...}
    recommend([[1003, 1007], [1063]], k=10, exclude_seen=True)  # several
    recommend([1003, 1007], k=1, session=True)  # a OneRec model's best session: {"item_ids", "score", "metadata"}
    ```

    Keyword arguments are those of [`Recommender.recommend`]; `batch_size` users are searched at once, with what is given for them:
    `events`, `users`, and `allow` or `deny` with a list per user.
    """

    # transformers annotates None, and documents True and False beside it
    _load_processor = _load_image_processor = _load_feature_extractor = _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, model: Any, *args, num_beams: int = 50, **kwargs):
        from .recommender import Recommender  # needs `datasets`, which the models alone do not

        super().__init__(model, *args, **kwargs)
        repo = str(self.model.name_or_path)
        hub_kwargs = {} if os.path.isdir(repo) else {"revision": self.model.config._commit_hash}
        self.recommender = Recommender.of_model(self.model, repo, num_beams, **hub_kwargs)

    def __call__(self, inputs: Sequence, *args: Any, batch_size: int | None = None, **kwargs: Any) -> list:
        """`inputs`: a history of item ids, or several."""
        histories = list(inputs)
        one = not histories or not hasattr(histories[0], "__len__") or isinstance(histories[0], str)
        if one:
            histories = [histories]
        per_user = self._per_user(len(histories), kwargs)
        size = batch_size or len(histories)
        found = []
        for start in range(0, len(histories), size):
            part = slice(start, start + size)
            own = {name: cut(part) for name, cut in per_user.items()}
            found += super().__call__({"histories": histories[part], **own}, *args, **kwargs)
        return found[0] if one else found

    @staticmethod
    def _per_user(n: int, arguments: dict) -> dict:
        """Takes out of the arguments what is given per user: name -> a function that cuts a slice of the users from it."""
        from .data.histories import check_per_user, is_per_user

        given = {name: arguments.get(name) for name in ("events", "users", "allow", "deny")}
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
        return input_

    def _forward(self, input_tensors: dict, **parameters: Any) -> Any:
        found = self.recommender.recommend(**input_tensors, **parameters)
        # plain dictionaries: transformers takes a forward's outputs apart to move their tensors
        rows = [[_as_dict(one) for one in row] for row in found]
        return {"found": rows}

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list:
        return model_outputs["found"]


def _as_dict(found: Any) -> dict:
    if hasattr(found, "item_ids"):  # a session
        return found._asdict()
    return {"item_id": found.item_id, "score": found.score, **found.metadata}


PIPELINE_REGISTRY.register_pipeline(TASK, OneRecRecommendationPipeline, pt_model=AutoModelForCausalLM)
