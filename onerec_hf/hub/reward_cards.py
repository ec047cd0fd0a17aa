"""The card of a reward model: what it predicts, from what, how well, and a snippet that runs as printed."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .cards import PAPERS, TAGS, check_license, code, python_string, table_cell

KINDS = {
    "onerec_session_reward": ("onerec", "a whole session", "(R,): a weighted sum of the probabilities"),
    "onerec_p_score": ("onerec_v1", "single items", "(R, m): the P-Score, one number made of all objectives"),
}
METRICS = {
    "auc": "AUC",
    "gauc": "GAUC",
    "calibration": "mean prediction / mean label",
    "calibration_error": "calibration error",
}
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A reward model for {{ judged }}, after *{{ paper.title }}* ([arXiv:{{ paper.arxiv }}](https://arxiv.org/abs/{{ paper.arxiv }})),
built with `onerec_hf`. Objectives: {{ targets }} (`onerec_hf/data/labels.py` defines them). It reads token ids of the policy's
tokenizer, so it fits policies with the same catalogue and semantic IDs alone.

## Use

```python
{{ snippet }}
```

`rewards` is {{ rewards }}; `logits` holds the log-odds of every objective.

## Data

{{ data }}

## Training

{{ training }}
{% if table %}
## How well it predicts

{{ table }}

AUC: over all pairs. GAUC: within users, weighted by events, users with both outcomes alone: what ranking candidates for one user
needs.
{% endif %}
## Limits

- It learned from what an earlier system showed. A policy that is trained against it finds items where it is wrong: judge policies
  by another reward model, trained on other days, and by real users in the end.
- It predicts feedback, not what is good for people. Watch time can be bought with content that users regret.

## Citation

```bibtex
{{ citation }}
```
"""


def reward_card(
    config: Any,
    *,
    title: str,
    repo: str,
    data: str,
    training: str,
    metrics: Mapping[str, float] | None = None,
    dataset_name: str = "",
    split: str = "test",
    license: str = "apache-2.0",
) -> ModelCard:
    """
    The card of a reward model, with `model-index` metadata.

    Args:
        config (`PreTrainedConfig`): Of the model.
        title, repo, data, training: Texts; `repo` is the repository (or folder) that the snippet loads.
        metrics (`dict[str, float]`, *optional*): `{target}_auc`, ... as `onerec_hf.evaluation.feedback_report` makes them.
        dataset_name, split: Of the metrics.

    Raises:
        ValueError: For a model that is no reward model, or metrics without a `dataset_name`.
    """
    if config.model_type not in KINDS:
        raise ValueError(f"no reward card for model_type={config.model_type!r}: there are cards for {sorted(KINDS)}.")
    if metrics and not dataset_name:
        raise ValueError("metrics need a dataset_name: numbers without the data they belong to mean nothing.")
    check_license(license)
    title, dataset_name = " ".join(title.split()), " ".join(dataset_name.split())
    key, judged, rewards = KINDS[config.model_type]
    rows = {target: {m: (metrics or {}).get(f"{target}_{m}") for m in METRICS} for target in config.targets}
    results = [
        EvalResult(
            task_type="other",
            task_name="prediction of feedback",
            dataset_type="-".join(dataset_name.lower().split()),
            dataset_name=dataset_name,
            dataset_split=split,
            metric_type=name,
            metric_name=f"{METRICS[name]} of {target}",
            metric_value=round(float(value), 5),
        )
        for target, row in rows.items()
        for name in ("auc", "gauc")
        if (value := row[name]) is not None
    ]
    lines = [f"| {split} | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    lines += [
        f"| {table_cell(t)} | " + " | ".join("–" if v is None else f"{v:.4f}" for v in r.values()) + " |"
        for t, r in rows.items()
    ]
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        tags=[*TAGS, "reward-model", config.model_type],
        model_name=title if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        metadata,
        template_str=TEMPLATE,
        title=table_cell(title),
        judged=judged,
        paper=PAPERS[key],
        targets=", ".join(map(code, config.targets)),
        snippet=reward_snippet(config, repo),
        rewards=rewards,
        data=data,
        training=training,
        table="\n".join(lines) if results else "",
        citation=PAPERS[key].bibtex(key),
    )


def reward_snippet(config: Any, repo: str) -> str:
    """Python that loads the repository and judges five items for a user with three behaviours; it runs as printed."""
    lines = [
        "import torch",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f"repo = {python_string(repo)}",
        "model = AutoModel.from_pretrained(repo, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)",
        "",
        "items = tokenizer.catalogue.item_ids",
        "found = model(",
        "    context_ids=torch.tensor(tokenizer.encode_items(items[:3])).unsqueeze(0),  # behaviours, oldest first",
        "    item_ids=torch.tensor(tokenizer.encode_items(items[3:8])).unsqueeze(0),  # (1, candidates, levels)",
    ]
    for name, names, shape, kind in (
        ("context_features", config.context_features, "1, 3, ", "long"),
        ("user_features", config.user_features, "1, ", "long"),
        ("item_features", config.item_features, "1, 5, ", "long"),
        ("item_numbers", config.item_numbers, "1, 5, ", "float"),
    ):
        if names:
            listed = " ".join(", ".join(names).split())
            zeros = f"torch.zeros({shape}{len(names)}, dtype=torch.{kind})"
            lines.append(f"    {name}={zeros},  # 0 is unknown; {listed}")
    return "\n".join([*lines, ")", "print(found.rewards)"])
