"""Simulated A/B test: two models serve the same simulated users for some days, their exposures become the next day's
logs.

    onerec ab_test --a outputs/quickstart/onerec-v2-quickstart --b outputs/rl --log impressions.parquet \\
        --world '{"num_users": 2000, "num_items": 2000, "seed": 0}' --num_days 7 --seeds 0 1 2 --output outputs/ab

Both meet the same users and random numbers; the interval is over users (bootstrap, each with both of their totals).
`--return_slope` says how much a good visit brings a user back: without it nobody's lifetime, the days with a visit,
can change. It is calibrated on nothing. `--log` is the world's log of all impressions. Writes `ab_test.json`, a table,
a picture and, with `--keep_logs`, the exposures of both with the log-probabilities of their codes, as `onerec grpo`
takes them. A simulated world says nothing about real users.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..data import read_table
from ..evaluation import bootstrap_lift
from ..item_ranker import judge_ids
from ..recommender import ItemRanker, Recommender
from ..rewards import RewardModel
from ..simulator import ShortVideoWorld, simulate_visits, user_totals
from ..simulator.serving import EVENT_COLUMNS
from .checks import check_columns, check_output
from .model_arguments import mapping

COLD_VIEWS = 5  # a video with at most so many long views in the training log is cold
MEANS = ("diversity", "cluster_density")  # of a user's days; all other metrics are sums
SHARES = {"new_item_share": ("cold_start_views", "views")}


class Server:
    """A model behind `simulate_visits`: rows of video ids in, lists of unseen video ids and their log-probabilities
    out.
    """

    def __init__(
        self,
        ranker: ItemRanker,
        users: list[int],
        batch_size: int = 256,
        reward: RewardModel | None = None,
        num_candidates: int = 64,
    ):
        self.ranker, self.model, self.batch_size = ranker, ranker.model, batch_size
        self.reward, self.num_candidates = reward, num_candidates
        self.place = {user: i for i, user in enumerate(users)}

    def __call__(self, rows: list[dict], seen: list[np.ndarray], k: int) -> tuple[np.ndarray, ...]:
        parts = [
            self._batch(rows[i : i + self.batch_size], seen[i : i + self.batch_size], k)
            for i in range(0, len(rows), self.batch_size)
        ]
        return tuple(np.concatenate(values) for values in zip(*parts))

    @torch.no_grad()
    def _batch(self, rows, seen, k):
        catalogue, collator = self.model.catalogue, self.ranker.collator
        allowed = torch.ones(len(rows), catalogue.num_items, dtype=torch.bool)
        known, converted = set(catalogue.item_ids.tolist()), []
        for row, own, mask in zip(rows, seen, allowed):
            mask[catalogue.index_of([video for video in own.tolist() if video in known])] = False
            keep = [video in known for video in row["video_id"]]
            events = {n: [v for v, k_ in zip(row[n], keep) if k_] for n in row if n not in ("user_id", "video_id")}
            history = catalogue.index_of([v for v, k_ in zip(row["video_id"], keep) if k_])
            converted.append(
                {"user": self.place[row["user_id"]], "history": history, "timestamp": events["time_ms"], **events}
            )
        judge, width = None, max(k, self.ranker.num_beams)
        if self.reward is not None:
            width = max(width, self.num_candidates)
            judge = judge_ids(self.reward, catalogue, converted, converted[0], {}, self.num_candidates)
        items, _ = self.ranker.search(converted, k, allowed, num_beams=width, item_scorer=judge)
        tokens = catalogue.semantic_ids[items.clamp(min=0)].long() + torch.tensor(self.model.config.level_offsets)
        log_probs = self.model(**collator.context(converted), target_ids=tokens).target_log_probs
        videos = np.where(items.numpy() < 0, -1, catalogue.item_ids[items.clamp(min=0).numpy()])
        return videos, log_probs.numpy()


def compare(
    world: ShortVideoWorld,
    log: pd.DataFrame,
    servers: dict,
    num_days: int,
    seeds: list[int],
    output: Path | None,
    return_slope: float = 0.0,
) -> tuple[dict, dict, dict]:
    """Totals per user of each policy, summed over the seeds, and the lift of every metric of the second over the
    first.
    """
    users = np.unique(log.user_id[log.long_view == 1])
    log = log[log.user_id.isin(users)]
    views = np.bincount(log.video_id[log.long_view == 1], minlength=world.num_items)
    about = world.content_embeddings, views <= COLD_VIEWS, pd.factorize(world.items.category)[0]
    totals: dict[str, dict[str, Any]] = {}
    daily: dict[str, Any] = {}
    for name, server in servers.items():
        for seed in seeds:
            shown = simulate_visits(world, server, log, num_days=num_days, seed=seed, return_slope=return_slope)
            if output is not None:
                shown.to_parquet(output / f"exposures_{name}_{seed}.parquet")
            found = user_totals(shown, users.tolist(), *about)
            mine = totals.setdefault(name, dict.fromkeys(found, 0.0))
            totals[name] = {metric: mine[metric] + values for metric, values in found.items()}
            play = shown.groupby("day").play_time_ms.sum() / 1000 / len(users)
            daily[name] = daily.get(name, 0.0) + play.to_numpy() / len(seeds)
    a, b = totals.values()
    lifts = {m: bootstrap_lift(a[m], b[m]) for m in a if a[m].sum()}
    for name, (part, whole) in SHARES.items():
        if a[part].sum():
            lifts[name] = bootstrap_lift(a[part], b[part], per=(a[whole], b[whole]))
    return totals, daily, lifts


def table(totals: dict, lifts: dict, num_days: int, num_seeds: int) -> str:
    """Like OneRec-V2's Tables 6 and 7: percent over the control, and the control's own value per user and day."""
    a = next(iter(totals.values()))
    lines = ["| metric | control, per user and day | lift, % | 95% interval |", "|---|---|---|---|"]
    for metric, lift in lifts.items():
        if metric in SHARES:
            part, whole = SHARES[metric]
            per_user = a[part].sum() / a[whole].sum()
        else:
            per_user = a[metric].mean() / num_seeds / (1 if metric in MEANS else num_days)
        low, high = (f"{100 * x:+.2f}" for x in (lift.low, lift.high))
        lines.append(f"| {metric.replace('_', ' ')} | {per_user:.4g} | {100 * lift.value:+.2f} | {low} to {high} |")
    return "\n".join(lines)


def plot(lifts: dict, daily: dict, path: Path) -> None:
    """Lifts with their intervals, and watch time per day of both policies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), gridspec_kw={"width_ratios": [3, 2]})
    names = list(lifts)[::-1]
    for y, name in enumerate(names):
        lift = lifts[name]
        sure = lift.low > 0 or lift.high < 0
        left.plot([100 * lift.low, 100 * lift.high], [y, y], color="tab:blue" if sure else "grey", linewidth=2)
        left.plot(100 * lift.value, y, "o", color="tab:blue" if sure else "grey")
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    left.set_xlabel("lift over the control, % (95% interval over users; grey: holds 0)")
    for name, values in daily.items():
        right.plot(range(1, len(values) + 1), values, marker="o", label=name)
    right.set(xlabel="day", ylabel="watch time per user, s", ylim=(0, None))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    a: str,
    b: str,
    log: str,
    output: str,
    world: str = "{}",
    num_days: int = 7,
    seeds: Sequence[int] = (0,),
    num_beams: int = 50,
    keep_logs: bool = False,
    reward: str | None = None,
    num_candidates: int = 64,
    return_slope: float = 1.0,
) -> dict:
    """Runs the test; returns what it writes to `ab_test.json`."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}: a seed that is named twice would count twice.")
    check_output(output, replaces=False)
    folder = Path(output)
    world_settings = mapping(world)
    rows = read_table(log)
    check_columns(f"--log {log}", rows.column_names, ("user_id", "video_id", *EVENT_COLUMNS))
    impressions = rows.to_pandas()
    users = np.unique(impressions.user_id[impressions.long_view == 1]).tolist()
    control, treatment = (Recommender.from_pretrained(path, num_beams).ranker for path in (a, b))
    for path, ranker in ((a, control), (b, treatment)):
        if ranker.reranker is not None:
            print(f"{path} has a re-ranker, which this test leaves out: it compares what the models search.")
    selection = None if reward is None else RewardModel.from_pretrained(reward)
    if selection is not None:
        selection.check_policy(treatment.model)
    servers = {
        "control": Server(control, users),
        "treatment": Server(treatment, users, reward=selection, num_candidates=num_candidates),
    }
    simulated = ShortVideoWorld(**world_settings)
    first, second = (set(server.model.catalogue.item_ids.tolist()) for server in servers.values())
    if first != second:
        only = f"{len(first - second)} items are in the first alone, {len(second - first)} in the second alone"
        raise ValueError(f"{a} and {b} do not serve the same items: {only}. Train both on data of the same items.")
    if strange := first - set(range(simulated.num_items)):
        world = f"the world of {simulated.num_items}"
        what = f"{len(strange)} items of {a} and {b} are no videos of {world}, such as {min(strange)!r}"
        raise ValueError(f"{what}: give in --world the world whose log they were trained on.")
    folder.mkdir(parents=True, exist_ok=True)
    totals, daily, lifts = compare(
        simulated, impressions, servers, num_days, list(seeds), folder if keep_logs else None, return_slope
    )
    text = table(totals, lifts, num_days, len(seeds))
    plot(lifts, daily, folder / "ab_test.png")
    report = {"a": a, "b": b, "reward": reward, "num_days": num_days, "seeds": list(seeds), "num_users": len(users)}
    report["return_slope"] = return_slope
    report["lifts"] = {name: lift._asdict() for name, lift in lifts.items()}
    report["totals"] = {name: {m: float(v.sum()) for m, v in own.items()} for name, own in totals.items()}
    (folder / "ab_test.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    (folder / "ab_test.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return report


def run(argv: list[str] | None = None) -> None:
    """`onerec ab_test`; `argv`: its arguments, by default those of the command line."""
    parser = argparse.ArgumentParser(
        "onerec ab_test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--a", required=True, help="Folder of the control.")
    parser.add_argument("--b", required=True, help="Folder of the treatment.")
    parser.add_argument("--log", required=True, help="All impressions of the world, parquet.")
    parser.add_argument("--output", required=True, help="Folder to write.")
    parser.add_argument("--world", default="{}", help="Arguments of ShortVideoWorld, JSON.")
    parser.add_argument("--num_days", type=int, default=7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_beams", type=int, default=50)
    parser.add_argument("--keep_logs", action="store_true")
    parser.add_argument("--reward", help="Reward model: the treatment serves the best of its candidates (B may be A).")
    parser.add_argument("--num_candidates", type=int, default=64, help="Items that --reward judges for each user.")
    parser.add_argument("--return_slope", type=float, default=1.0, help="Log-odds of coming back, see above.")
    main(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run()
