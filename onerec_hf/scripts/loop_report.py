"""What a day of `onerec loop` brought: `days.json`, and the same for TensorBoard."""

from typing import Any

import numpy as np
import pandas as pd

from ..models import Catalogue
from ..simulator import user_totals
from ..simulator.population import DAY_MS
from .loop_state import Loop, read_json, read_tables, write_json

NEW_DAYS = 3  # a video is new for so many days
TOP = 10  # of a list, for its true watch time
TOTALS = ("watch_time", "likes", "views", "long_views", "lifetime")


class Dashboard:
    """
    Adds a day at a time, as soon as its impressions are there.

    Args:
        loop ([`Loop`]): Whose days; what is in its `days.json` is not added again.
    """

    def __init__(self, loop: Loop):
        from torch.utils.tensorboard import SummaryWriter

        self.loop, place = loop, loop.root / "days.json"
        self.days: list[dict[str, Any]] = read_json(place)["days"] if place.exists() else []
        self.writer = SummaryWriter(str(loop.root / "tensorboard"))

    @property
    def next_day(self) -> int:
        return len(self.days) + 1

    def add(self) -> dict[str, Any]:
        """The next day; its impressions must be there."""
        row = day_report(self.loop, self.next_day)
        self.days.append(row)
        write_json(self.loop.root / "days.json", {"settings": vars(self.loop.args), "days": self.days})
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"loop/{name}", value, row["day"])
        self.writer.flush()
        return row


def day_report(loop: Loop, day: int) -> dict[str, Any]:
    """
    What a day brought.

    Returns:
        `watch_time` (s), `likes`, `views`, `long_views`, `lifetime` (visits): per user, whether he came or not.
        `true_watch_time`: the world's expected seconds of the first ten videos of a list, a mean over lists.
        `legality`: share of the wanted places of the lists that hold a video of the version's catalogue;
        `sampled_legality`: of unconstrained samples. `catalogue`: its videos. `staleness`: days from the last event
        that the model was trained on to the beginning of the day. `new_share`: share of views on videos uploaded in
        the last three days, `new_in_catalogue` their share of the catalogue. `coverage`: share of the catalogue that
        was in the first ten of some list. `concentration`: share of the views on the most viewed tenth of the
        catalogue. `diversity`: a mean over visits of 1 - mean cosine of two videos of a visit.
    """
    world, served = loop.world, read_json(loop.place("served", day, ".json"))
    shown = read_tables(loop.place("impressions", day), "part-*.parquet")
    lists = read_tables(loop.place("events", day), "lists-*.parquet")
    version = loop.place("versions", day - 1)
    catalogue, about = Catalogue.from_pretrained(version), read_json(version / "day.json")
    strange = set(lists.version) - {version.name}
    if strange or served["fingerprint"] != catalogue.fingerprint():
        raise RuntimeError(f"day {day} was served with {strange or served}, its version is {version.name}.")
    today = loop.args.warm_days + day - 1
    is_new = (world.items.upload_day > today - NEW_DAYS).to_numpy()
    everyone = np.unique(read_tables(loop.place("impressions", 0), "part-*.parquet").user_id)
    clusters = pd.factorize(world.items.category)[0]
    totals = user_totals(shown, everyone.tolist(), world.content_embeddings, is_new, clusters)
    row: dict[str, Any] = {"day": day, "policy": loop.args.policy, "version": version.name}
    row |= {name: float(totals[name].mean()) for name in TOTALS}
    row["diversity"] = float(totals["diversity"][totals["lifetime"] > 0].mean())
    midday = loop.end_of(day) - DAY_MS // 2
    first = [own[:TOP] for own in lists.video_ids]
    seconds = [
        world.expected_feedback(user, np.asarray(own), midday)["play_time_ms"].sum() / 1000
        for user, own in zip(lists.user_id, first)
    ]
    row["true_watch_time"] = float(np.mean(seconds))
    known, sent = set(catalogue.item_ids.tolist()), [video for own in lists.video_ids for video in own]
    row["legality"] = sum(video in known for video in sent) / (len(lists) * loop.args.list_size)
    row |= {"sampled_legality": about["legality"], "catalogue": len(catalogue), "trainer_seconds": about["seconds"]}
    row["staleness"] = (loop.end_of(day - 1) - served["trained_until"]) / DAY_MS
    row["new_share"] = float(is_new[shown.video_id].mean())
    row["new_in_catalogue"] = float(is_new[catalogue.item_ids].mean())
    row["coverage"] = len({video for own in first for video in own}) / len(catalogue)
    views = np.sort(np.bincount(shown.video_id, minlength=world.num_items)[catalogue.item_ids])[::-1]
    row["concentration"] = float(views[: len(catalogue) // 10].sum() / views.sum())
    if "held_out" in about:
        row["held_out_recall@10"] = about["held_out"]["recall@10"]
    return row
