"""`onerec loop`: days of real processes, some of which are killed; what each part makes of what it finds."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from onerec_hf.data.log_shards import shard_of
from onerec_hf.models import Catalogue
from onerec_hf.scripts import loop, loop_parts
from onerec_hf.scripts.loop_report import day_report
from onerec_hf.scripts.loop_state import Loop, LoopArguments, read_json, read_tables, write_json, write_table
from onerec_hf.simulator import Visitors, simulate_visits

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"num_users": 60, "num_videos": 120, "mean_events": 60, "num_days": 3, "warm_days": 5, "held_out": 0.5}
SMALL |= {"codebook_size": 8, "first_epochs": 2, "epochs": 1, "list_size": 8, "num_beams": 20}
MODEL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL |= {"context_embed_dim": 8}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def arguments(folder: Path, **settings) -> LoopArguments:
    return LoopArguments(output=str(folder), model=json.dumps(MODEL), port=free_port(), **SMALL | settings)


def process_of(part: str, desk: Path) -> int | None:
    """The part of a loop that was started in a folder, by its command line."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode().split("\0")
            own = words[2:5] == ["onerec_hf.scripts.loop_parts", part, "outputs/loop"]
            if own and (place / "cwd").readlink() == desk:
                return int(place.name)
        except OSError:  # it has ended meanwhile
            continue
    return None


def kill(part: str, desk: Path) -> bool:
    """SIGKILL, where it runs."""
    number = process_of(part, desk)
    if number is not None:
        os.kill(number, signal.SIGKILL)
    return number is not None


def start(desk: Path) -> subprocess.Popen:
    """The command of docs/loop.md, with a model that is small enough for a test."""
    page = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python (recipes/loop.py --output outputs/loop .*)$", page, re.M)
    words = [sys.executable, *line.split(), "--model", json.dumps(MODEL), "--port", str(free_port())]
    words += ["--warm_days", "5", "--list_size", "8", "--epochs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words, cwd=desk, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait(ready, process: subprocess.Popen) -> None:
    while not ready():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_nothing_is_lost_where_parts_are_killed(tmp_path):
    """The trainer in the middle of a day, the logger before one, the service, and at last all of it at once."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    folder = tmp_path / "outputs" / "loop"
    process = start(tmp_path)
    try:
        wait((folder / "work" / "data").exists, process)  # in the middle of day 0
        wait(lambda: kill("trainer", tmp_path), process)
        wait((folder / "served" / "day-001.json").exists, process)
        wait(lambda: kill("logger", tmp_path), process)
        wait(lambda: kill("service", tmp_path), process)
        wait((folder / "impressions" / "day-001").exists, process)
        wait((folder / "work" / "data").exists, process)  # of day 1
        process.kill()
        process.wait()
        end = time.monotonic() + 60
        while any(process_of(part, tmp_path) for part in loop.PARTS):  # they see that it is gone
            assert time.monotonic() < end
            time.sleep(0.1)
        process = start(tmp_path)  # goes on
        printed = process.communicate()[0]
        assert process.returncode == 0, printed[-3000:]
    finally:
        process.kill()
    assert not (folder / "work").exists() and not list(folder.rglob(".*.partial"))
    check_days(folder)


def check_days(folder: Path) -> None:
    """Every impression that users sent was logged once; each day was served by the version of the day before."""
    days = read_json(folder / "days.json")["days"]
    assert [row["day"] for row in days] == [1, 2]
    sizes, items = [], set()
    for row in days:
        day = row["day"]
        events, logged = folder / "events" / f"day-{day:03d}", folder / "impressions" / f"day-{day:03d}"
        sent, shards = read_tables(events, "impressions-*.parquet"), read_tables(logged, "part-*.parquet")
        keys = ["user_id", "video_id", "time_ms", "play_time_ms", "version"]
        ordered = [table.sort_values(keys)[keys].reset_index(drop=True) for table in (sent, shards)]
        pd.testing.assert_frame_equal(*ordered)
        assert not sent.duplicated(["user_id", "video_id"]).any()
        for path in logged.glob("part-*.parquet"):
            number = int(re.findall(r"part-(\d+)", path.name)[0])
            assert {shard_of(user, loop_parts.NUM_SHARDS) for user in pd.read_parquet(path).user_id} <= {number}
        assert set(sent.version) == {row["version"]} == {f"day-{day - 1:03d}"}
        catalogue = Catalogue.from_pretrained(folder / "versions" / row["version"])
        assert items < set(catalogue.item_ids.tolist())  # new videos came
        items = set(catalogue.item_ids.tolist())
        assert set(sent.video_id) <= items and row["catalogue"] == len(items)
        sizes.append(row["views"])
        assert 0 < row["legality"] <= 1 and 0 <= row["sampled_legality"] <= 1 and row["staleness"] == 0.5
    assert min(sizes) > 0
    assert list((folder / "tensorboard").glob("events*"))


@pytest.mark.parametrize("policy", ["ipa", "gbpo"])
def test_days_of_alignment(policy, tmp_path):
    """What the trainer does with days 0 and 1, in this process."""
    args = arguments(tmp_path, policy=policy, align_every=1, align_steps=2, num_days=2)
    own = loop.open_folder(args)
    loop_parts_days(own)
    report = read_json(own.place("trained", 1) / "day.json")
    assert report["drift"]["items"]["appended"] > 0 and report["trained_until"] == own.cut(1)
    assert (own.place("trained", 1) / "model.safetensors").is_file() and not (own.root / "work").exists()
    with pytest.raises(ValueError, match=rf"a loop with policy='{policy}': give the same"):
        loop.open_folder(arguments(tmp_path, policy="sft", align_every=1, align_steps=2, num_days=2))


def loop_parts_days(own: Loop) -> None:
    """The logger's and the trainer's days, with users who get random lists in place of a service."""
    log = own.world.logs(own.args.seed)
    shown = simulate_random(own, log[log.time_ms < own.end_of(0)])
    folder = own.place("events", 1)
    write_table(folder / "impressions-00000.parquet", shown)
    write_json(folder / "complete.json", {"batches": 1})
    own.args.num_days = 1
    loop_parts.logger(own)
    own.args.num_days = 2
    loop_parts.trainer(own)


def simulate_random(own: Loop, log: pd.DataFrame) -> pd.DataFrame:
    visitors = Visitors(own.world, log, first_day=own.args.warm_days - 1, max_views=8)
    here, _, _ = visitors.come(1)
    lists = np.stack([np.random.default_rng(user).permutation(own.videos(1).video_id)[:8] for user in here])
    shown = visitors.watch(1, here, lists).drop(columns="row")
    return shown.assign(day=1, request_id=(1 << 32) + shown.user_id, version="day-000")


def test_a_part_that_dies_again_and_again_ends_the_loop(tmp_path):
    args = arguments(tmp_path)
    own = loop.open_folder(args)
    parts = loop.Parts(own)
    (own.root / "logs" / "users.txt").write_text("no such world", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"users died 6 times within a day; its log ends:\s.*no such world"):
        for _ in range(loop.MAX_DEATHS + 1):
            parts.running["users"] = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
            parts.running["users"].wait()
            parts.start = lambda part: None
            parts.look_after()


def test_visitors_day_by_day_are_those_of_the_whole_test():
    """`simulate_visits` is a loop over them; the second day from what the first one left on disk, too."""
    own = Loop("", LoopArguments(output="", **SMALL))
    log = own.world.logs()

    def serve(rows, seen, k):
        unseen = [np.setdiff1d(np.arange(120), own)[:k] for own in seen]
        return np.stack([np.pad(own, (0, k - len(own)), constant_values=-1) for own in unseen])

    whole = simulate_visits(own.world, serve, log, num_days=2, return_slope=2.0, max_views=8, seed=3)
    again = Visitors(own.world, log, return_slope=2.0, max_views=8, seed=3)
    again.remember(whole[whole.day == 0])
    here, rows, seen = again.come(1)
    second = again.watch(1, here, serve(rows, seen, 8))
    columns = ["user_id", "video_id", "time_ms", "play_time_ms", "is_like"]
    expected = whole[whole.day == 1][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(second[columns], expected)


def test_a_day_that_another_version_served_is_an_error(tmp_path):
    args = arguments(tmp_path)
    own = loop.open_folder(args)
    write_json(own.place("served", 1, ".json"), {"fingerprint": "other"})
    shown = pd.DataFrame({"user_id": [0], "video_id": [1]})
    write_table(own.place("impressions", 1) / "part-0.parquet", shown)
    write_table(own.place("events", 1) / "lists-0.parquet", shown.assign(version="day-007"))
    catalogue = Catalogue([[0, 1], [1, 0]], [2, 2])
    catalogue.save_pretrained(own.place("versions", 0))
    write_json(own.place("versions", 0) / "day.json", {})
    with pytest.raises(RuntimeError, match=r"day 1 was served with \{'day-007'\}, its version is day-000"):
        day_report(own, 1)
