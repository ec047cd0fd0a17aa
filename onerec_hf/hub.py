"""Model cards and their pictures, written by code from what training left behind."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

Built with `onerec_hf` after [arXiv:{{ paper }}](https://arxiv.org/abs/{{ paper }}). The model writes the semantic ID of the next
item and can only write items of its catalogue.

## Use

```python
import torch
from transformers import AutoModel, AutoTokenizer

repo = "{{ repo }}"
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)

history = tokenizer.catalogue.item_ids[:5]  # your user's items, oldest first
context = torch.tensor(tokenizer.encode_items(history)).unsqueeze(0)  # (1, items, levels)
found = model.generate(context_ids=context, {{ features }}num_beams=50, num_return_sequences=10)
print(tokenizer.decode_items(found[:, 1:]))  # a list of item ids per semantic ID, best first
```

## Data

{{ data }}

## Training

{{ training }}

## Results

{{ results }}

Item level, full catalogue, constrained beam search of width {{ num_beams }}; seen items kept (first column) or masked (second).

{% for name, caption in pictures %}
![{{ caption }}]({{ name }})
{% endfor %}

## Limits and risks

- It recommends only items of its catalogue; new items need a semantic ID from the same codebooks first.
- It imitates the log it was trained on: what the logging policy never showed cannot be learned, popular items are favoured, and
  serving its own output back as training data narrows what users see (a feedback loop). Measure coverage and cold items first.
- Metrics on simulated data say nothing about real users.

## Citation

```bibtex
@article{onerecv2, title = {OneRec-V2 Technical Report}, journal = {arXiv preprint arXiv:{{ paper }}}, year = {2025}}
```
"""


def model_card(
    *,
    title: str,
    repo: str,
    summary: str,
    data: str,
    training: str,
    dataset_name: str,
    results: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]],
    pictures: Sequence[tuple[str, str]] = (),
    paper: str = "2508.20900",
    num_beams: int = 50,
    context_features: Sequence[str] = (),
    license: str = "apache-2.0",
) -> ModelCard:
    """
    The card of a trained model, with `model-index` metadata.

    Args:
        title, repo, summary, data, training: Texts; `repo` is the repository (or folder) that the snippet loads.
        dataset_name: Of the evaluation.
        results: Per system a pair of metric dictionaries, seen items kept and masked; the first system is this model.
        pictures: (file name inside the repository, caption).
        context_features: Names of the features that the model needs beside the semantic IDs.

    Returns:
        `huggingface_hub.ModelCard`; `card.save(folder / "README.md")` writes it.
    """
    own = next(iter(results.values()))[0]
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        tags=["onerec", "recommendation", "generative-retrieval", "semantic-ids"],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="other",
                task_name="next-item recommendation",
                dataset_type=dataset_name.lower().replace(" ", "-"),
                dataset_name=dataset_name,
                metric_type=name.partition("@")[0],
                metric_name=name,
                metric_value=round(float(own[name]), 5),
            )
            for name in own
            if "@" in name
        ],
    )
    features = "context_features=..., " if context_features else ""
    return ModelCard.from_template(
        metadata,
        template_str=TEMPLATE,
        title=title,
        repo=repo,
        summary=summary,
        data=data,
        training=training,
        results=results_table(results),
        pictures=list(pictures),
        paper=paper,
        num_beams=num_beams,
        features=features,
    )


def results_table(
    results: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]],
    metrics: Sequence[str] = ("recall@5", "recall@10", "ndcg@10", "coverage@10", "invalid_rate"),
) -> str:
    """A markdown table: a row per system, `kept / masked` per metric."""
    lines = ["| model | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, (kept, masked) in results.items():
        cells = [f"{kept[metric]:.4f} / {masked[metric]:.4f}" for metric in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figure(width: float = 6.0, height: float = 3.4):
    from matplotlib.figure import Figure  # only pictures need matplotlib

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def plot_training_curve(
    log_history: Sequence[Mapping[str, float]], path: str | Path, metric: str = "eval_ndcg@10"
) -> None:
    """Training and validation loss (nats per code) and a validation metric over epochs, from `trainer.state.log_history`."""
    figure, axes = _figure()
    for name, label, style in (("loss", "training loss", "-"), ("eval_loss", "validation loss", "o-")):
        points = [(record["epoch"], record[name]) for record in log_history if name in record]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3)
    points = [(record["epoch"], record[metric]) for record in log_history if metric in record]
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per code")
    handles, labels = axes.get_legend_handles_labels()
    if points:
        twin = axes.twinx()
        twin.spines["top"].set_visible(False)
        twin.plot(*zip(*points), "s--", color="tab:green", label=metric.removeprefix("eval_"), markersize=3)
        twin.set_ylabel(metric.removeprefix("eval_") + " on validation")
        twin.set_ylim(bottom=0)
        more, names = twin.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def plot_recall_by_frequency(
    recalls: Mapping[str, np.ndarray], target_counts: np.ndarray, path: str | Path, num_strata: int = 5
) -> None:
    """
    Recall by how often the target item occurs in training: the rarest fifth of the test cases on the left.

    Args:
        recalls: Per system the per-user recall, shape (U,).
        target_counts: Training events of each user's target item, shape (U,).
    """
    edges = np.unique(np.quantile(target_counts, np.linspace(0, 1, num_strata + 1)))
    stratum = np.searchsorted(edges[1:-1], target_counts, side="left")
    names = []
    for s in range(len(edges) - 1):
        inside = target_counts[stratum == s]
        names.append(f"{inside.min():.0f}–{inside.max():.0f}\n({len(inside)} users)" if len(inside) else "")
    figure, axes = _figure()
    width = 0.8 / len(recalls)
    for i, (name, values) in enumerate(recalls.items()):
        heights = [values[stratum == s].mean() if (stratum == s).any() else 0 for s in range(len(edges) - 1)]
        axes.bar(np.arange(len(heights)) + (i - (len(recalls) - 1) / 2) * width, heights, width, label=name)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("training events of the target item")
    axes.set_ylabel("recall@10")
    figure.legend(loc="outside upper center", ncols=len(recalls), frameon=False)
    figure.savefig(path)
