"""The parts of `onerec loop`, each a process of its own: `python -m onerec_hf.scripts.loop_parts PART FOLDER PARENT`.

Each reads from the folder what is done already, so one that was killed does the rest when it is started again.
"""

import http.client
import json
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd

from ..simulator import Visitors
from .loop_state import Loop, read_json, read_tables, wait_for, write_json, write_table

USERS_PER_REQUEST = 32
NUM_SHARDS = 4
MAX_HISTORY = 50
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine is reached through no proxy


def ask(loop: Loop, path: str, body: dict | None = None) -> dict:
    """The service's answer; while nobody listens, or it is busy, the question is put again."""
    request = urllib.request.Request(f"http://127.0.0.1:{loop.args.port}{path}")
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("content-type", "application/json")
    while True:
        try:
            with _OPENER.open(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code not in (429, 503):
                raise RuntimeError(f"{path} was answered with {error.code}: {error.read().decode()}") from error
        except (OSError, http.client.HTTPException):  # it is being started, or was killed in the middle of an answer
            pass
        time.sleep(0.3)


# ---- users


def users(loop: Loop) -> None:
    """Who comes on a day asks the service for a list, and watches it as the world has it."""
    wait_for(loop.place("impressions", 0))
    log = read_tables(loop.place("impressions", 0), "part-*.parquet")
    visitors = Visitors(
        loop.world,
        log,
        first_day=loop.args.warm_days - 1,  # day 1 is the first one after the log
        return_slope=loop.args.return_slope,
        max_views=loop.args.list_size,
        seed=loop.args.seed,
    )
    for day in range(1, loop.args.num_days + 1):
        folder = loop.place("events", day)
        wait_for(loop.place("served", day, ".json"))
        here, rows, seen = visitors.come(day)
        starts = range(0, len(here), USERS_PER_REQUEST)
        for batch, start in enumerate(starts):
            part = slice(start, start + USERS_PER_REQUEST)
            if not (folder / f"impressions-{batch:05d}.parquet").exists():
                visit(loop, visitors, day, batch, here[part], rows[part], seen[part])
        write_json(folder / "complete.json", {"batches": len(starts)})
        visitors.remember(read_tables(folder, "impressions-*.parquet"))


def visit(
    loop: Loop, visitors: Visitors, day: int, batch: int, here: np.ndarray, rows: list[dict], seen: list[np.ndarray]
) -> None:
    """A batch of users: what they got and what they made of it, as the app would send it."""
    body = {
        "histories": [row["video_id"][-MAX_HISTORY:] for row in rows],
        "deny": [own.tolist() for own in seen],
        "k": loop.args.list_size,
        "unknown_items": "ignore",
    }
    answer = ask(loop, "/recommend", body)
    lists = [[one["item_id"] for one in row] for row in answer["results"]]
    videos = np.full((len(here), loop.args.list_size), -1)
    for i, own in enumerate(lists):
        videos[i, : len(own)] = own
    shown = visitors.watch(day, here, videos).drop(columns="row")
    shown = shown.assign(day=day, request_id=(day << 32) + shown.user_id, version=answer["version"])
    folder = loop.place("events", day)
    sent = pd.DataFrame({"user_id": here, "version": answer["version"], "video_ids": lists})
    write_table(folder / f"lists-{batch:05d}.parquet", sent)
    write_table(folder / f"impressions-{batch:05d}.parquet", shown)


# ---- logger


def logger(loop: Loop) -> None:
    """Turns the events of a day into its shards: all of them or none."""
    from ..data.log_shards import shard_of  # each part imports what it needs itself: there are five of them

    for day in range(loop.args.num_days + 1):
        target = loop.place("impressions", day)
        if target.exists():
            continue
        if day == 0:
            log = loop.world.logs(loop.args.seed)
            log = log[log.time_ms < loop.end_of(0)].assign(day=0, position=-1, version="")
        else:
            events = loop.place("events", day)
            wait_for(events / "complete.json")
            log = read_tables(events, "impressions-*.parquet")
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shard = np.array([shard_of(user, NUM_SHARDS) for user in log.user_id])
        for number in range(NUM_SHARDS):
            own = log[shard == number].sort_index(axis=1)
            write_table(partial / f"part-{number:05d}-of-{NUM_SHARDS:05d}.parquet", own)
        partial.rename(target)


# ---- trainer


def trainer(loop: Loop) -> None:
    """The model of each day from that of the day before."""
    import torch

    from .loop_training import train_day

    torch.set_num_threads(1)  # the others work beside it
    for day in range(loop.args.num_days):  # what the last day teaches, nobody is served with
        target = loop.place("trained", day)
        if target.exists():
            continue
        wait_for(loop.place("impressions", day))
        work = loop.root / "work"
        shutil.rmtree(work, ignore_errors=True)  # of a trainer that was killed
        model = train_day(loop, day, work)
        target.parent.mkdir(exist_ok=True)
        model.rename(target)
        shutil.rmtree(work)


# ---- publisher


def publisher(loop: Loop) -> None:
    """Makes a version of each model, has the service swap it in, and then says which one the next day has."""
    for day in range(loop.args.num_days):
        announced, version = loop.place("served", day + 1, ".json"), loop.place("versions", day)
        if announced.exists():
            continue
        wait_for(loop.place("trained", day))
        if not version.exists():
            partial = version.with_name(f".{version.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(loop.place("trained", day), partial, ignore=shutil.ignore_patterns("predictions*"))
            partial.rename(version)
        info = ask(loop, "/info")
        if info["version"] != version.name:
            kept = version.name in [one["name"] for one in info["versions"]]
            ask(loop, "/model", {"rollback_to" if kept else "bundle": version.name})
        current = ask(loop, "/info")["catalogue"]
        about = {"version": current["name"], "fingerprint": current["fingerprint"], "items": current["num_items"]}
        write_json(announced, about | {"trained_until": read_json(version / "day.json")["trained_until"]})


# ---- service


def service(loop: Loop) -> None:
    """`onerec serve` of the newest version."""
    import torch

    from ..serving import Limits
    from ..serving.replicas import Replicas
    from .serve import ServeArguments
    from .serve import main as serve

    torch.set_num_threads(1)
    folder = loop.root / "versions"
    wait_for(lambda: any(folder.glob("day-*")) or any((loop.root / "trained").glob("day-*")))
    newest = max([*folder.glob("day-*")] or [loop.place("trained", 0)], key=lambda path: path.name)
    folder.mkdir(exist_ok=True)
    arguments = ServeArguments(
        str(newest), port=loop.args.port, bundles=str(folder), name=newest.name, num_beams=loop.args.num_beams
    )
    serve(arguments, Limits(timeout_s=120, max_wait_ms=0, max_histories=USERS_PER_REQUEST), Replicas())


PARTS = {each.__name__: each for each in (users, logger, trainer, publisher, service)}


def leave_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: two trainers of one folder would be in each other's
    way.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    leave_with(int(sys.argv[3]))  # told, and not asked for: it may be gone already
    PARTS[sys.argv[1]](Loop(Path(sys.argv[2])))
