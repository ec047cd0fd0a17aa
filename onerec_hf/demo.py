"""A page to try recommenders: build a history from titles, see what is recommended and why, and the beam as a tree.

`onerec demo --repo FOLDER_OR_HUB` opens it; [`make_demo`] is the `gradio.Blocks` behind it, for a Space or a notebook.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .recommender import Recommendation, Recommender

MATCHES = 50  # titles that a search shows
EXPLAINED = 3  # recommendations whose reasons are computed: each costs a pass over the history
# one column on a telephone, where tables scroll in themselves
STYLE = """
.beam ul {list-style: none; padding-left: 1.1em; margin: 0; border-left: 1px solid var(--border-color-primary)}
.beam > ul {border: none; padding-left: 0}
.beam summary {cursor: pointer} .beam code {font-size: .9em} .beam .share {opacity: .65; font-size: .85em}
.history ol {margin: 0; padding-left: 1.6em}
.why {opacity: .65; font-size: .85em}
.results {overflow-x: auto} .results table {width: 100%} .results td {vertical-align: top}
"""

Truth = Callable[[int, Sequence[Any]], Sequence[float]]


class ExampleUser(NamedTuple):
    """A user to start from: what the list shows, the ids of the history, and the user's number (for a truth)."""

    label: str
    history: list[Any]
    user: int


def title_of(recommender: Recommender, item: Any) -> str:
    """The title of an item, or its id where the repository knows none."""
    return str(recommender.metadata.get(item, {}).get("title", item))


def search_titles(recommender: Recommender, text: str) -> list[tuple[str, Any]]:
    """The first `MATCHES` items whose title, id or other metadata hold every word of `text`: (label, id)."""
    words, found = text.lower().split(), []
    for item in recommender.model.catalogue.item_ids.tolist():
        row = recommender.metadata.get(item, {})
        place = " ".join([str(item), *map(str, row.values())]).lower()
        if all(word in place for word in words):
            category = f" ({row['category']})" if row.get("category") else ""
            found.append((title_of(recommender, item) + category, item))
            if len(found) == MATCHES:
                break
    return found


def filter_values(recommender: Recommender) -> list[str]:
    """The categories of the items, where the repository knows them."""
    return sorted({str(row["category"]) for row in recommender.metadata.values() if row.get("category")})


def beam_tree(recommender: Recommender, found: Sequence[Recommendation]) -> str:
    """
    The semantic IDs of the best items as an HTML tree: codes as branches, titles as leaves.

    The share beside a branch is the sum of the probabilities of the items below it, which are those that the search
    kept: a part of what the model gives to the branch.
    """
    catalogue = recommender.model.catalogue
    codes = catalogue.semantic_ids[catalogue.index_of([one.item_id for one in found])].tolist() if found else []
    tree: dict[Any, Any] = {}
    for one, path in zip(found, codes):
        branch = tree
        for code in path:
            branch = branch.setdefault(code, {})
        branch.setdefault("items", []).append(one)
    return f'<div class="beam">{_branches(recommender, tree, 0)}</div>' if found else "<p>Nothing to show.</p>"


def _share(branch: Mapping) -> float:
    if items := branch.get("items"):  # of one semantic ID: they have its score each, and share its probability
        return math.exp(items[0].score)
    return sum(_share(below) for below in branch.values())


def _branches(recommender: Recommender, branch: Mapping, depth: int) -> str:
    parts = []
    ordered = sorted(((key, b) for key, b in branch.items() if key != "items"), key=lambda pair: -_share(pair[1]))
    for place, (code, below) in enumerate(ordered):
        label = f'<code>level {depth + 1}: {code}</code> <span class="share">{_share(below):.1%}</span>'
        opened = " open" if depth or place < 3 else ""
        inside = _branches(recommender, below, depth + 1)
        parts.append(f"<li><details{opened}><summary>{label}</summary>{inside}</details></li>")
    parts += [f"<li>{html.escape(title_of(recommender, one.item_id))}</li>" for one in branch.get("items", [])]
    return f"<ul>{''.join(parts)}</ul>"


def history_list(recommender: Recommender, history: Sequence[Any]) -> str:
    """The history as an HTML list, oldest first."""
    if not history:
        return "<p>Empty: what is recommended is what suits somebody unknown.</p>"
    rows = "".join(f"<li>{html.escape(title_of(recommender, item))}</li>" for item in history)
    return f'<div class="history"><ol>{rows}</ol></div>'


def reasons(recommender: Recommender, history: Sequence[Any], item: Any, count: int = 2) -> str:
    """The items of the history that speak most for `item`; empty where none does."""
    found = sorted(recommender.explain(history, item), key=lambda one: -one.contribution)[:count]
    texts = [
        f"{title_of(recommender, one.item_id)} (+{one.contribution:.2f})" for one in found if one.contribution > 0
    ]
    return "; ".join(texts)


def results_table(
    recommender: Recommender, history: Sequence[Any], found: Sequence[Recommendation], truth: Sequence[float] | None
) -> str:
    """Rank, title with what speaks for it (nats), score, and the truth where it is known, as an HTML table."""
    if not found:
        return "<p>No item is left by these filters.</p>"
    names = ["", "title", "score"] + (["true watch time"] if truth is not None else [])
    rows = []
    for place, one in enumerate(found):
        title = html.escape(title_of(recommender, one.item_id))
        if why := reasons(recommender, history, one.item_id) if history and place < EXPLAINED else "":
            title += f'<br><span class="why">because of {html.escape(why)}</span>'
        cells = [str(place + 1), title, f"{one.score:.2f}"]
        cells += [f"{truth[place]:.1f} s"] if truth is not None else []
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    total = "" if truth is None else f"<p>True watch time of the list: <b>{sum(truth):.1f} s</b></p>"
    return f'<div class="results"><table><tr>{head}</tr>{"".join(rows)}</table></div>{total}'


def answer(
    recommender: Recommender,
    history: Sequence[Any],
    k: int = 10,
    exclude_seen: bool = True,
    category: str | None = None,
    truth: Callable[[Sequence[Any]], Sequence[float]] | None = None,
) -> tuple[str, str]:
    """What the page shows for one model: the table of recommendations, and the beam as a tree."""
    allow = None
    if category:
        allow = [item for item, row in recommender.metadata.items() if str(row.get("category")) == category]
    settings: dict[str, Any] = {"exclude_seen": exclude_seen, "allow": allow}
    found = recommender.recommend([list(history)], int(k), **settings)[0]
    beam = recommender.recommend([list(history)], max(20, int(k)), rerank=False, **settings)[0]
    known = None if truth is None else truth([one.item_id for one in found])
    return results_table(recommender, history, found, known), beam_tree(recommender, beam)


def make_demo(
    recommenders: Mapping[str, Recommender], users: Sequence[ExampleUser] = (), truth: Truth | None = None
) -> Any:
    """
    The page.

    Args:
        recommenders: By the name that is shown; one, or two side by side. They share a catalogue.
        users: Users to start from.
        truth: (user, item ids) -> expected watch time of each in seconds, where a simulator knows it.

    Returns:
        `gradio.Blocks`; `.launch()` serves it.

    Raises:
        ImportError: Without gradio. ValueError: For no or more than two recommenders, or two of different items.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("the demo is a page of gradio: `pip install 'onerec_hf[demo]'`.") from error
    if not 1 <= len(recommenders) <= 2:
        raise ValueError(f"{len(recommenders)} recommenders: one, or two to compare.")
    first = next(iter(recommenders.values()))
    known = set(first.model.catalogue.item_ids.tolist())
    if any(set(one.model.catalogue.item_ids.tolist()) != known for one in recommenders.values()):
        raise ValueError(f"{list(recommenders)} recommend different items: compare models of one catalogue.")
    categories = filter_values(first)

    def show(history, user, k, exclude_seen, category):
        own = None if truth is None or user is None else lambda items: truth(users[user].user, items)
        parts = [answer(one, history, k, exclude_seen, category, own) for one in recommenders.values()]
        return [history_list(first, history), *(text for part in parts for text in part)]

    with gr.Blocks(title="onerec_hf") as page:
        gr.Markdown("# What would OneRec recommend?\nPick a user, or build a history from titles, oldest first.")
        history = gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                choices = [(one.label, place) for place, one in enumerate(users)]
                user = gr.Dropdown(choices, value=None, label="Start from a user", visible=bool(users))
                text = gr.Textbox(label="Search titles", placeholder="a word of a title")
                found = gr.Dropdown([], label="Add to the history", value=None)
                with gr.Row():
                    back, clear = gr.Button("Remove the last"), gr.Button("Clear")
                shown = gr.HTML(history_list(first, []), label="History")
                k = gr.Slider(1, 20, 10, step=1, label="Recommendations")
                seen = gr.Checkbox(True, label="Leave out the history")
                category = gr.Dropdown(
                    [("all", ""), *((c, c) for c in categories)], value="", label="Category", visible=bool(categories)
                )
            with gr.Column(scale=2, min_width=320):
                outputs = []
                with gr.Row():
                    for name in recommenders:
                        with gr.Column(min_width=320):
                            gr.Markdown(f"## {name}")
                            with gr.Tab("Recommendations"):
                                outputs.append(gr.HTML())
                            with gr.Tab("The beam as a tree"):
                                outputs.append(gr.HTML())
        inputs, outputs = [history, user, k, seen, category], [shown, *outputs]
        text.change(
            lambda words: gr.Dropdown(choices=search_titles(first, words), value=None), text, found, api_name="search"
        )
        found.select(lambda past, item: [*past, item], [history, found], history, api_name="add")
        back.click(lambda past: past[:-1], history, history)
        clear.click(lambda: ([], None), None, [history, user])
        user.input(lambda place: [] if place is None else list(users[place].history), user, history)
        for changed in (history, k, seen, category):
            changed.change(show, inputs, outputs)
        page.load(lambda: gr.Dropdown(choices=search_titles(first, "")), None, found)
        page.load(show, inputs, outputs, api_name="show")
    return page


__all__ = ["ExampleUser", "answer", "beam_tree", "make_demo", "reasons", "results_table", "search_titles"]
