"""Model cards: two templates, filled from a config and from what training left behind."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@10", "coverage@10", "invalid_rate")
FEEDBACK_METRICS = {
    "auc": "AUC",
    "gauc": "GAUC",
    "calibration": "mean prediction / mean label",
    "calibration_error": "calibration error",
}
TAGS = ["recommendation", "generative-retrieval", "semantic-ids", "onerec"]


class Paper(NamedTuple):
    """What a card cites."""

    title: str
    authors: str
    arxiv: str
    year: int


PAPERS = {
    "onerec": Paper(
        "OneRec: Unifying Retrieve and Rank with Generative Recommender and Iterative Preference Alignment",
        "Deng, Jiaxin and Wang, Shiyao and Cai, Kuo and Ren, Lejian and Hu, Qigen and Ding, Weifeng and Luo, Qiang "
        "and Zhou, Guorui",
        "2502.18965",
        2025,
    ),
    "onerec_v1": Paper("OneRec Technical Report", "Zhou, Guorui and others", "2506.13695", 2025),
    "onerec_v2": Paper("OneRec-V2 Technical Report", "Zhou, Guorui and others", "2508.20900", 2025),
    "tiger": Paper("Recommender Systems with Generative Retrieval", "Rajput, Shashank and others", "2305.05065", 2023),
    "dpo": Paper(
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafailov, Rafael and others",
        "2305.18290",
        2023,
    ),
    "grpo": Paper(
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "Shao, Zhihong and others",
        "2402.03300",
        2024,
    ),
}
_ONE = {"reads": "what a user did, item by item,", "writes": "the item that comes next, as a *semantic ID*,"}
# model_type -> its paper, and the words of its card
KINDS: dict[str, dict[str, str]] = {
    "onerec": _ONE | {"paper": "onerec", "name": "OneRec", "writes": "a session of items, each as a *semantic ID*,"},
    "onerec_v1": _ONE
    | {
        "paper": "onerec_v1",
        "name": "OneRec-V1",
        "reads": "the latest, the liked and all interactions of a user, side by side,",
    },
    "onerec_v2": _ONE | {"paper": "onerec_v2", "name": "OneRec-V2"},
    "onerec_session_reward": {
        "paper": "onerec",
        "judges": "a whole session",
        "rewards": "(R,): a weighted sum of the probabilities",
    },
    "onerec_p_score": {
        "paper": "onerec_v1",
        "judges": "single items",
        "rewards": "(R, m): the P-Score, one number made of all objectives",
    },
}


def table_cell(text: object) -> str:
    """A text as one line of Markdown that ends no table cell and is no HTML."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")


def one_line(text: object) -> str:
    """A text without line breaks."""
    return " ".join(str(text).split())


def code(text: str) -> str:
    """A name as code inside a line or a table cell."""
    return "`" + one_line(text).replace("|", "\\|").replace("`", "'") + "`"


def python_string(text: str) -> str:
    """A string as Python and `push_to_hub` read it, that ends no block of code in Markdown."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\x60")


def model_card(
    config: Any,
    *,
    title: str,
    repo: str,
    data: str,
    training: str,
    summary: str = "",
    results: Mapping[str, tuple[Mapping[str, float], Mapping[str, float] | None]] | None = None,
    metrics: Mapping[str, float | None] | None = None,
    dataset_name: str = "",
    dataset: str | None = None,
    split: str = "test",
    simulated: bool = False,
    pictures: Sequence[tuple[str, str]] = (),
    num_parameters: int | None = None,
    num_beams: int = 50,
    base_model: str | None = None,
    adapter: bool = False,
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
    papers: Sequence[str] = (),
) -> ModelCard:
    """
    The card of a trained model or reward model, with `model-index` metadata and a snippet that runs as printed.

    Args:
        config (`PreTrainedConfig`): Of the model (of an adapter's base model); it decides about the template and the
            snippet.
        title, repo, summary, data, training: Texts; `repo` is the repository (or folder) that the snippet loads.
        results: Per system a pair of metric dictionaries, seen items kept and masked (None: not measured); the first
            system is this model, and makes the metadata.
        metrics: Of a reward model, in place of `results`: `{target}_auc`, ... as
            `onerec_hf.evaluation.feedback_report` makes them.
        dataset_name, dataset: Of the evaluation: a name for people, and its id on the Hub where it has one.
        split: On which it was evaluated.
        simulated: The users are; the card says so.
        pictures: (file name inside the repository, caption).
        base_model: Repository of the model that this one was trained from; with `adapter`, the one that it needs.
        tags, papers: More than the card has by itself; papers are keys of `PAPERS`.

    Returns:
        `huggingface_hub.ModelCard`; `card.save(folder / "README.md")` writes it.

    Raises:
        ValueError: For a model that is none of ours, an unknown paper, a license that is no identifier, numbers
            without a `dataset_name` or of another kind of model, or systems whose names look the same.
    """
    kind = _checked(config, license, papers, results, metrics, dataset_name)
    reward = "judges" in kind
    if reward:
        table, shown = _feedback_table(metrics or {}, config.targets, split)
    else:
        first = next(iter((results or {}).values()), ({}, None))
        table, shown = results_table(results) if results else "", _eval_metrics(*first)
    dataset_name = one_line(dataset_name)
    measured: dict[str, Any] = {
        "task_type": "other",
        "task_name": "prediction of feedback" if reward else "next-item recommendation",
        "dataset_type": dataset or "-".join(dataset_name.lower().split()),
        "dataset_name": dataset_name,
        "dataset_split": split,
    }
    found = [
        EvalResult(**measured, metric_type=a, metric_name=b, metric_value=round(float(c), 5)) for a, b, c in shown
    ]
    metadata = ModelCardData(
        license=license,
        library_name="peft" if adapter else "transformers",
        tags=list(dict.fromkeys([*TAGS, *(["reward-model"] if reward else []), config.model_type, *tags])),
        datasets=[dataset] if dataset else None,
        base_model=base_model,
        base_model_relation=("adapter" if adapter else "finetune") if base_model else None,
        model_name=one_line(title) if found else None,
        eval_results=found or None,
    )
    cited = dict.fromkeys([kind["paper"], *([] if reward else ["tiger"]), *papers])
    texts = {"title": title, "repo": repo, "summary": summary, "data": data, "training": training, "split": split}
    numbers = {"num_parameters": num_parameters, "num_beams": num_beams, "adapter": adapter, "simulated": simulated}
    return _render(
        "reward_card_template.md" if reward else "card_template.md",
        **(texts | numbers | (_reward_inputs(config) if reward else _policy_inputs(config))),
        card_data=metadata.to_yaml(),
        config=config,
        kind=kind,
        paper=PAPERS[kind["paper"]],
        table=table,
        pictures=pictures,
        citations="\n\n".join(_bibtex(key) for key in cited),
        masked=not reward and first[1] is not None,
    )


def training_text(folder: str | Path) -> str:
    """How a model was trained, as the card in its folder says it; empty where there is no card or no such section."""
    path = Path(folder) / "README.md"
    text = ModelCard.load(path).text if path.is_file() else ""
    return text.partition("\n## Training\n")[2].partition("\n## ")[0].strip()


def _checked(config, license: str, papers, results, metrics, dataset_name: str) -> dict[str, str]:
    """The words for this kind of model, once all arguments are known to be right."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"license={license!r}: give an identifier of the Hub, such as apache-2.0, cc-by-nc-4.0 or other."
        )
    if config.model_type not in KINDS:
        raise ValueError(f"no card for model_type={config.model_type!r}: there are cards for {sorted(KINDS)}.")
    if unknown := sorted(set(papers) - set(PAPERS)):
        raise ValueError(f"papers={unknown} are unknown: known are {sorted(PAPERS)}.")
    own, other = ("metrics", results) if "judges" in KINDS[config.model_type] else ("results", metrics)
    if other:
        raise ValueError(f"the card of {config.model_type!r} shows `{own}`: pass its numbers as that.")
    if (results or metrics) and not dataset_name:
        raise ValueError(f"{own} need a dataset_name: numbers without the data they belong to mean nothing.")
    return KINDS[config.model_type]


@cache
def _template(name: str) -> Any:
    """Compiled once: a training writes a card with every checkpoint."""
    import jinja2  # comes with the extra `train`, as everything that writes cards

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"cell": table_cell, "line": one_line, "code": code, "python": python_string}
    return environment.from_string(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _render(template: str, **values: Any) -> ModelCard:
    return ModelCard(_template(template).render(values))


def _policy_inputs(config: Any) -> dict[str, Any]:
    """What the snippet and the table of a policy's card need to know about its inputs."""
    sizes = config.codebook_sizes
    lengths = config.pathway_lengths if config.model_type == "onerec_v1" else {}
    pathways = {name: length for name, length in lengths.items() if length}
    fixed = config.fixed_context_features if config.model_type == "onerec_v2" else []
    return {
        "sizes": sizes,
        "codes": f"{sizes[0]:,} each" if len(set(sizes)) == 1 else " / ".join(f"{size:,}" for size in sizes),
        "lengths": lengths,
        "pathways": pathways,
        "width": sum(pathways.values()) or 5,  # items of the snippet's context
        # the column of the items' own vectors, which `onerec sft` fills
        "vectors": list(config.context_features).index("item_vectors") if "item_vectors" in fixed else None,
        "session": config.model_type == "onerec" and config.num_session_items > 1,
    }


def _reward_inputs(config: Any) -> dict[str, Any]:
    """The optional inputs of a reward model: name, columns, shape in front of them, dtype."""
    inputs = [
        ("context_features", config.context_features, "1, 3, ", "long"),
        ("user_features", config.user_features, "1, ", "long"),
        ("item_features", config.item_features, "1, 5, ", "long"),
        ("item_numbers", config.item_numbers, "1, 5, ", "float"),
    ]
    return {"inputs": inputs}


def _bibtex(key: str) -> str:
    title, authors, arxiv, year = PAPERS[key]
    return (
        f"@article{{{key},\n  title   = {{{title}}},\n  author  = {{{authors}}},\n"
        f"  journal = {{arXiv preprint arXiv:{arxiv}}},\n  year    = {{{year}}}\n}}"
    )


def _shown(own: Mapping[str, float]) -> list[str]:
    return [name for name in METRICS if name in own] or [name for name in own if "@" in name]


def _eval_metrics(kept, masked) -> list[tuple[str, str, float]]:
    """Type, name and value of every metric in the metadata."""
    return [
        (name.partition("@")[0], name + remark, metrics[name])
        for metrics, remark in ((kept, ""), (masked or {}, ", seen items masked"))
        for name in _shown(kept)
        if name in metrics and "@" in name
    ]


def results_table(results: Mapping[str, tuple[Mapping[str, float], Mapping[str, float] | None]]) -> str:
    """A markdown table: a row per system, `kept / masked` per metric that the first system has."""
    shown = [table_cell(name) for name in results]
    if twice := sorted({name for name in shown if shown.count(name) > 1}):
        raise ValueError(f"results has several systems that look like {twice}: give each a name of its own.")
    metrics = _shown(next(iter(results.values()))[0])
    lines = [f"| {' | '.join(['model', *metrics])} |", "|---" * (len(metrics) + 1) + "|"]
    for name, pair in zip(shown, results.values()):
        cells = [
            " / ".join(f"{part[metric]:.4f}" if metric in part else "–" for part in pair if part is not None)
            for metric in metrics
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reranking_text(report: dict) -> str:
    """What `onerec rerank` wrote down of its weights, as a paragraph and a table for the card; empty without it."""
    if "reranker" not in report:
        return ""
    fitted = report["reranker"]
    kinds = [kind for kind in ("kept", "masked") if kind in fitted]
    lines = [
        "",
        "",
        "**Re-ranking.** `Recommender` orders the items of the search and of the scorers "
        f"{', '.join(code(Path(name).name) for name in fitted['scorers'])} by a weighted sum, fitted on "
        f"{fitted['fit_users']:,} validation users; `recommend(..., rerank=False)` and `generate` search alone. "
        + _value_text({kind: fitted[kind] for kind in kinds})
        + "Weights, and recall@10 of half of these users without a part, by weights fitted on the other half:",
        "",
        f"| part | {' | '.join(f'weight, seen items {kind}' for kind in kinds)} | without it |",
        "|---" * (len(kinds) + 2) + "|",
    ]
    for part in fitted[kinds[0]]["weights"]:
        recalls = [fitted[kind]["recall@10 of half of the users"] for kind in kinds]
        without = " / ".join(f"{own[f'without {part}']:.4f}" for own in recalls if f"without {part}" in own) or "–"
        weights = " | ".join(f"{fitted[kind]['weights'][part]:.3f}" for kind in kinds)
        lines.append(f"| {table_cell(part)} | {weights} | {without} |")
    whole = " / ".join(f"{fitted[kind]['recall@10 of half of the users']['all']:.4f}" for kind in kinds)
    return "\n".join([*lines, f"| all |{' |' * len(kinds)} {whole} |"])


def _value_text(fitted: dict[str, dict]) -> str:
    """What the weights of the items' value do; empty where there are none."""
    if any("value" not in own for own in fitted.values()):
        return ""
    found = []
    for kind, own in ((kind, own["value"]) for kind, own in fitted.items()):
        tried = own["validation"]
        more = tried[str(own["weight"])]["mean value"] / tried["0.0"]["mean value"]
        found.append(f"{own['weight']:g} with seen items {kind} ({more:.2f} times the mean value of lists without it)")
    column = code(next(iter(fitted.values()))["value"]["column"])
    return (
        f"The part `value` is the logarithm of what an item is worth, its {column}. Its weight is {', '.join(found)}; "
        "the recalls below are without it. "
    )


def _feedback_table(metrics, targets: Sequence[str], split: str) -> tuple[str, list[tuple[str, str, float]]]:
    """The table of a reward model's card, a row per objective, and the metrics of its metadata."""
    lines = [f"| {' | '.join([split, *FEEDBACK_METRICS.values()])} |", "|---" * (len(FEEDBACK_METRICS) + 1) + "|"]
    shown = []
    for target in targets:
        row = {name: metrics.get(f"{target}_{name}") for name in FEEDBACK_METRICS}
        cells = ["–" if value is None else f"{value:.4f}" for value in row.values()]
        lines.append(f"| {' | '.join([table_cell(target), *cells])} |")
        shown += [
            (name, f"{FEEDBACK_METRICS[name]} of {target}", row[name])
            for name in ("auc", "gauc")
            if row[name] is not None
        ]
    return "\n".join(lines) if shown else "", shown
