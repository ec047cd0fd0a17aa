"""Model cards, filled by code (`card_template.md`) from a config and from what training left behind."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card_template.md")
METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@10", "coverage@10", "invalid_rate")
ITEM_VECTORS = "item_vectors"  # the context feature that `onerec sft` fills with the items' own vectors
TAGS = ["recommendation", "generative-retrieval", "semantic-ids", "onerec"]


@dataclass(frozen=True)
class Paper:
    """What a card cites."""

    title: str
    authors: str
    arxiv: str
    year: int = 2025

    def bibtex(self, key: str) -> str:
        return (
            f"@article{{{key},\n  title   = {{{self.title}}},\n  author  = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}},\n  year    = {{{self.year}}}\n}}"
        )


@dataclass(frozen=True)
class System(Paper):
    """One of the three systems, in the words of a card."""

    name: str = ""
    reads: str = "what a user did, item by item,"
    writes: str = "the item that comes next, as a *semantic ID*,"


SYSTEMS = {
    "onerec": System(
        "OneRec: Unifying Retrieve and Rank with Generative Recommender and Iterative Preference Alignment",
        "Deng, Jiaxin and Wang, Shiyao and Cai, Kuo and Ren, Lejian and Hu, Qigen and Ding, Weifeng and Luo, Qiang and "
        "Zhou, Guorui",
        "2502.18965",
        name="OneRec",
        writes="a session of items, each as a *semantic ID*,",
    ),
    "onerec_v1": System(
        "OneRec Technical Report",
        "Zhou, Guorui and others",
        "2506.13695",
        name="OneRec-V1",
        reads="the latest, the liked and all interactions of a user, side by side,",
    ),
    "onerec_v2": System("OneRec-V2 Technical Report", "Zhou, Guorui and others", "2508.20900", name="OneRec-V2"),
}
PAPERS = {
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
    **SYSTEMS,
}


def table_cell(text: object) -> str:
    """A text as one line of Markdown that ends no table cell and is no HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: object) -> str:
    """A name as code inside a line or a table cell."""
    return "`" + " ".join(str(text).split()).replace("|", "\\|").replace("`", "'") + "`"


def python_string(text: str) -> str:
    """A string as Python and `push_to_hub` read it, that ends no block of code in Markdown."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\x60")


def check_license(name: str) -> None:
    """Raises ValueError for what is no identifier of a license on the Hub."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise ValueError(
            f"license={name!r}: give an identifier of the Hub, such as apache-2.0, cc-by-nc-4.0 or other."
        )


def model_card(
    config: Any,
    *,
    title: str,
    repo: str,
    data: str,
    training: str,
    summary: str = "",
    results: Mapping[str, tuple[Mapping[str, float], Mapping[str, float] | None]] | None = None,
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
    The card of a trained model, with `model-index` metadata.

    Args:
        config (`PreTrainedConfig`): Of the model (of an adapter's base model); it decides about the usage snippet.
        title, repo, summary, data, training: Texts; `repo` is the repository (or folder) that the snippet loads.
        results: Per system a pair of metric dictionaries, seen items kept and masked (None: not measured); the first system is
            this model, and makes the metadata.
        dataset_name, dataset: Of the evaluation: a name for people, and its id on the Hub where it has one.
        split: On which it was evaluated.
        simulated: The users are; the card says so.
        pictures: (file name inside the repository, caption).
        base_model: Repository of the model that this one was trained from; with `adapter`, the one that it needs.
        tags, papers: More than the card has by itself; papers are keys of `PAPERS`.

    Returns:
        `huggingface_hub.ModelCard`; `card.save(folder / "README.md")` writes it.

    Raises:
        ValueError: For a model that is none of the three systems, an unknown paper, a license that is no identifier, results
            without a `dataset_name`, or of systems whose names look the same.
    """
    check_license(license)
    if config.model_type not in SYSTEMS:
        raise ValueError(f"no card for model_type={config.model_type!r}: there are cards for {sorted(SYSTEMS)}.")
    if unknown := sorted(set(papers) - set(PAPERS)):
        raise ValueError(f"papers={unknown} are unknown: known are {sorted(PAPERS)}.")
    if results and not dataset_name:
        raise ValueError("results need a dataset_name: numbers without the data they belong to mean nothing.")
    metadata = ModelCardData(
        license=license,
        library_name="peft" if adapter else "transformers",
        tags=list(dict.fromkeys([*TAGS, config.model_type, *tags])),
        datasets=[dataset] if dataset else None,
        base_model=base_model,
        base_model_relation=("adapter" if adapter else "finetune") if base_model else None,
        model_name=" ".join(title.split()) if results else None,
        eval_results=_eval_results(results, dataset_name, dataset, split) if results else None,
    )
    cited = dict.fromkeys([config.model_type, "tiger", *papers])
    both = results and next(iter(results.values()))[1] is not None
    return ModelCard.from_template(
        metadata,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=table_cell(title),
        summary=table_cell(summary),
        system=SYSTEMS[config.model_type],
        snippet=usage_snippet(config, repo, num_beams),
        adapter=adapter,
        facts=_facts(config, num_parameters),
        data=data,
        training=training,
        results=results_table(results) if results else "",
        columns="Left of the stroke seen items stay in the list, right of it they are masked." if both else "",
        num_beams=num_beams,
        pictures=[(name, table_cell(caption)) for name, caption in pictures],
        simulated=simulated,
        citations="\n\n".join(PAPERS[key].bibtex(key) for key in cited),
    )


def _eval_results(results, dataset_name, dataset, split) -> list[EvalResult]:
    kept, masked = next(iter(results.values()))
    dataset_name = " ".join(dataset_name.split())
    slug = dataset or "-".join(dataset_name.lower().split())
    found = []
    for metrics, remark in ((kept, ""), (masked or {}, ", seen items masked")):
        for name in (name for name in _shown(kept) if name in metrics and "@" in name):
            found.append(
                EvalResult(
                    task_type="other",
                    task_name="next-item recommendation",
                    dataset_type=slug,
                    dataset_name=dataset_name,
                    dataset_split=split,
                    metric_type=name.partition("@")[0],
                    metric_name=name + remark,
                    metric_value=round(float(metrics[name]), 5),
                )
            )
    return found


def _shown(own: Mapping[str, float]) -> list[str]:
    return [name for name in METRICS if name in own] or [name for name in own if "@" in name]


def results_table(results: Mapping[str, tuple[Mapping[str, float], Mapping[str, float] | None]]) -> str:
    """A markdown table: a row per system, `kept / masked` per metric that the first system has."""
    shown = [table_cell(name) for name in results]
    if twice := sorted({name for name in shown if shown.count(name) > 1}):
        raise ValueError(f"results has several systems that look like {twice}: give each a name of its own.")
    metrics = _shown(next(iter(results.values()))[0])
    lines = ["| model | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, pair in zip(shown, results.values()):
        cells = [
            " / ".join(f"{part[metric]:.4f}" if metric in part else "–" for part in pair if part is not None)
            for metric in metrics
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _facts(config, num_parameters: int | None) -> list[tuple[str, str]]:
    """What the card's table says about the architecture."""
    sizes = config.codebook_sizes
    codes = f"{sizes[0]:,} each" if len(set(sizes)) == 1 else " / ".join(f"{size:,}" for size in sizes)
    facts = [("semantic IDs", f"{len(sizes)} levels, codes: {codes}")]
    if num_parameters:
        facts.insert(0, ("parameters", f"{num_parameters:,}"))
    facts.append(("decoder", f"{config.num_hidden_layers} blocks of width {config.hidden_size}"))
    if config.num_experts:
        facts.append(("experts", f"{config.num_experts}, {config.num_experts_per_tok} per token"))
    if config.model_type == "onerec_v1":
        facts.append(("pathways", ", ".join(f"{name} {n}" for name, n in config.pathway_lengths.items())))
    if config.model_type == "onerec":
        facts.append(("session", f"up to {config.num_session_items} items"))
    for name, features in (("context features", config.context_features), ("user features", config.user_features)):
        if features:
            facts.append((name, ", ".join(map(code, features))))
    facts.append(("probabilities", "softmax over " + _normalised_over(config)))
    return facts


def _normalised_over(config) -> str:
    if config.score_normalization == "level":
        return "all codes of a level"
    return "the codes that continue to an item of the catalogue"


def usage_snippet(config: Any, repo: str, num_beams: int = 50, history: int = 5) -> str:
    """Python that loads the repository and recommends for a user with `history` items; it runs as printed."""
    levels = len(config.codebook_sizes)
    if config.model_type == "onerec_v1":
        lengths = {name: length for name, length in config.pathway_lengths.items() if length}
        width = sum(lengths.values())
        items = {"short_term": "history", "positive": "liked", "lifelong": "history"}
        pathways = ", ".join(f"({items[name]}[-{length}:], {length})" for name, length in lengths.items())
        names = ", ".join(name.replace("_", "-") for name in lengths)
        liked = ["liked = history[:2]  # those with positive feedback"] if "positive" in lengths else []
        context = [
            *liked,
            f"context = torch.zeros(1, {width}, {levels}, dtype=torch.long)  # the pathways side by side: {names},",
            f"mask = torch.zeros(1, {width}, dtype=torch.bool)  # each padded to its length",
            "start = 0",
            f"for items, length in [{pathways}]:",
            "    context[0, start : start + len(items)] = torch.tensor(tokenizer.encode_items(items))",
            "    mask[0, start : start + len(items)] = True",
            "    start += length",
        ]
        inputs = ["context_ids=context", "context_mask=mask"]
    else:
        width, inputs = history, ["context_ids=context"]
        context = ["context = torch.tensor(tokenizer.encode_items(history)).unsqueeze(0)  # (1, items, levels)"]
    inputs = [f"    {line}," for line in inputs]
    for name, features, shape in (
        ("context_features", config.context_features, f"1, {width}, "),
        ("user_features", config.user_features, "1, "),
    ):
        if features:
            zeros = f"{name} = torch.zeros({shape}{len(features)}, dtype=torch.long)"
            context.append(f'{zeros}  # 0 is "unknown"; columns: {" ".join(", ".join(features).split())}')
            inputs.append(f"    {name}={name},")
    if config.model_type == "onerec_v2" and ITEM_VECTORS in config.fixed_context_features:
        column = list(config.context_features).index(ITEM_VECTORS)
        rows = "torch.tensor(tokenizer.catalogue.index_of(history)) + 1"
        context.append(f"context_features[0, :, {column}] = {rows}  # {ITEM_VECTORS}: a row per item")
    if config.model_type == "onerec" and config.num_session_items > 1:
        inputs.append(f"    num_beams={num_beams},  # the best session; BOS and codes of each of its items in one row")
        comment = "# item ids, in the order of the session"
    else:
        inputs.append(f"    num_beams={num_beams},\n    num_return_sequences=10,")
        comment = "# a list of item ids per semantic ID, best first"
    lines = [
        "import torch",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f"repo = {python_string(repo)}",
        "model = AutoModel.from_pretrained(repo, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)",
        "",
        f"history = tokenizer.catalogue.item_ids[:{history}]  # your user's items, oldest first",
        *context,
        "found = model.generate(",
        *inputs,
        ")",
        f"print(tokenizer.decode_items(found.view(-1, {levels + 1})[:, 1:]))  {comment}",
    ]
    return "\n".join(lines)
