"""`onerec serve` when things fail, on loopback: a killed replica, a roll-out, a killed process, many bad requests.

    OMP_NUM_THREADS=1 python benchmarks/failures.py --repo outputs/quickstart/onerec-v2-quickstart --record failures

Needs `onerec_hf[ray]`. Killed replica: two replicas of Ray Serve under clients that ask again at once; one is killed,
and a request that fails is sent once more. Roll-out: the same weights under another name, in the same way. Killed
process: `onerec serve` alone, started again at once; the second try comes `--pause` seconds after the first. Bad
requests: the kinds of tests/serving/test_bad_requests.py and half-open connections, against the tests' tiny model;
memory is that of the serving process. Server and clients share the machine.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import ray
from ray import serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving import Client, bodies, service

from onerec_hf.models import Catalogue
from onerec_hf.scripts.serve import ServeArguments, application
from onerec_hf.serving import Limits
from onerec_hf.serving.replicas import APP, Replicas, deploy, start
from tests.serving.served import recommender
from tests.serving.test_bad_requests import BODIES, CONTENTS, LIMITS, OK

ROOT = Path(__file__).resolve().parents[1]


class Load:
    """Clients that ask again at once; a request that fails is sent once more, after `pause` seconds."""

    def __init__(self, port: int, content: list[bytes], clients: int, pause: float):
        self.port, self.content, self.clients, self.pause = port, content, clients, pause
        self.asked = self.failed = self.lost = 0
        self.answers: list[tuple[float, float, str]] = []  # when asked, when answered, by which version
        self.busy = True

    async def _ask(self) -> None:
        client = Client(self.port)
        while self.busy:
            body = self.content[self.asked % len(self.content)]
            self.asked += 1
            for attempt in range(2):
                began = time.perf_counter()
                try:
                    status, answer = await asyncio.wait_for(client.post("/recommend", body), 30)
                except TimeoutError:
                    status, answer, client = 0, {}, Client(self.port)
                if status == 200:
                    self.answers.append((began, time.perf_counter(), answer["version"]))
                    break
                if attempt == 0:
                    self.failed += 1
                    await asyncio.sleep(self.pause)
            else:
                self.lost += 1

    async def during(self, event: Callable[[], None], before: float, after: float) -> tuple[float, float]:
        """Runs `event` under load, in a thread; returns when it began and how many seconds it took."""
        self.busy = True
        tasks = [asyncio.create_task(self._ask()) for _ in range(self.clients)]
        await asyncio.sleep(before)
        began = time.perf_counter()
        await asyncio.to_thread(event)
        seconds = time.perf_counter() - began
        await asyncio.sleep(after)
        self.busy = False
        await asyncio.gather(*tasks)
        return began, seconds

    def longest_pause(self) -> float:
        """Seconds between two answers, at most."""
        return float(np.diff(sorted(end for _, end, _ in self.answers)).max())


def actors() -> set[str]:
    names = (one["name"] for one in ray.util.list_named_actors(all_namespaces=True))
    return {name for name in names if name.startswith("SERVE_REPLICA::")}


def kill_one() -> None:
    """Kills a replica, and waits until as many answer as before."""
    before = actors()
    ray.kill(ray.get_actor(sorted(before)[0], namespace="serve"))
    missed = False  # until the controller has seen it, its status is that of before
    while True:
        time.sleep(0.1)
        states = serve.status().applications[APP].deployments[APP].replica_states
        missed |= states.get("RUNNING", 0) < len(before)
        if missed and states.get("RUNNING", 0) == len(before):
            return


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def replicas(args: argparse.Namespace, content: list[bytes]) -> list[list]:
    """Rows of a killed replica and of a roll-out, each `args.repeats` times."""
    limits, options, port = Limits(), Replicas(replicas=2, replica_cpus=0.5), free_port()
    start(options, "127.0.0.1", port)

    def roll_out(name: str) -> None:
        own = ServeArguments(repo=args.repo, name=name, threads=1, log=False, ray=True)
        deploy(partial(application, own, limits, None), limits, options)

    roll_out("v0")
    kills, rolls, times, mixed, late = [], [], {"kill": [], "roll": []}, 0, 0
    for _ in range(args.repeats):
        load = Load(port, content, args.clients, 0.0)
        times["kill"].append(asyncio.run(load.during(kill_one, 5.0, 3.0))[1])
        kills.append(load)
        print("kill", times["kill"][-1], load.asked, load.failed, load.lost, load.longest_pause(), flush=True)
    for i in range(args.repeats):
        load = Load(port, content, args.clients, 0.0)
        began, seconds = asyncio.run(load.during(partial(roll_out, f"v{i + 1}"), 5.0, 3.0))
        times["roll"].append(seconds)
        rolls.append(load)
        mixed += sum(version not in (f"v{i}", f"v{i + 1}") for *_, version in load.answers)
        late += sum(version != f"v{i + 1}" for asked, _, version in load.answers if asked > began + seconds)
        print("roll", seconds, load.asked, load.failed, load.lost, load.longest_pause(), late, flush=True)
    serve.shutdown()
    ray.shutdown()
    rows = [row(f"one of two replicas killed, {args.repeats} times", kills, times["kill"])]
    rows.append(row(f"roll-out over two replicas, {args.repeats} times", rolls, times["roll"]))
    assert mixed == 0, f"{mixed} answers of a version that was not there"
    print("answers of the old version to requests that began behind the roll-out:", late, flush=True)
    return rows


def row(name: str, loads: list[Load], seconds: list[float]) -> list:
    counts = [sum(getattr(load, each) for load in loads) for each in ("asked", "failed", "lost")]
    spread = {"low": min(seconds), "high": max(seconds)}
    return [name, *map(str, counts), spread, max(load.longest_pause() for load in loads)]


def killed_process(args: argparse.Namespace, content: list[bytes]) -> list[list]:
    """A row of `onerec serve` alone, killed and started again at once."""
    port, environment = free_port(), os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = f"{sys.executable} -m onerec_hf.scripts.serve --repo {args.repo} --port {port} --threads 1 --log false"
    running: list[subprocess.Popen] = []

    def begin() -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running.append(subprocess.Popen(words.split(), env=environment, **quiet))
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return
            time.sleep(0.05)

    def kill() -> None:
        running[-1].send_signal(signal.SIGKILL)
        running[-1].wait()
        begin()

    try:
        begin()
        loads, times = [], []
        for _ in range(args.repeats):
            loads.append(Load(port, content, args.clients, args.pause))
            times.append(asyncio.run(loads[-1].during(kill, 5.0, 3.0))[1])
            print("process", times[-1], loads[-1].asked, loads[-1].failed, loads[-1].lost, flush=True)
    finally:
        running[-1].terminate()
        running[-1].wait()
    name = (
        f"`onerec serve` without replicas killed and started again, {args.repeats} times; retry after {args.pause:g} s"
    )
    return [row(name, loads, times)]


def resident(pid: int) -> float:
    """MiB of a process."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


async def send_bad(port: int, kinds: list[bytes], number: int, clients: int) -> dict[int, int]:
    """Statuses of so many requests, of every kind in turn; a connection in fifty is left half open."""
    counts: dict[int, int] = {}
    numbers = iter(range(number))

    async def ask() -> None:
        client = Client(port)
        for i in numbers:
            status, _ = await client.post("/recommend", kinds[i % len(kinds)])
            counts[status] = counts.get(status, 0) + 1
            if i % 50 == 0:  # half of a head, until the service closes it
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /recommend HTTP/1.1\r\nhost:")
                half.append(asyncio.create_task(until_closed(reader, writer)))

    half: list[asyncio.Task] = []
    await asyncio.gather(*(ask() for _ in range(clients)))
    await asyncio.gather(*half)
    counts[408] = len(half)
    return counts


async def until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert b" 408 " in await reader.read()
    writer.close()


async def held(port: int, pid: int) -> float:
    """MiB of the service while 300 clients have sent a part of their bodies."""
    head = b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 19000\r\n\r\n"
    writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(300)]
    for writer in writers:
        writer.write(head + b"x" * 18_000)
    await asyncio.sleep(1)
    memory = resident(pid)
    for writer in writers:
        writer.close()
    return memory


def bad_requests(args: argparse.Namespace, folder: Path) -> list[list]:
    """
    Rows of memory: before, after every tenth of `args.bad` bad requests, and, as a control that the number moves,
    while 300 bodies are held open.
    """
    recommender().save_pretrained(folder / "tiny")
    kinds = [json.dumps(OK | change).encode() for change, _, _ in BODIES.values()] + list(CONTENTS.values())
    limits = [word for name, value in LIMITS.items() for word in (f"--{name}", str(value))]
    rows: list[list] = []
    with service(str(folder / "tiny"), [*limits, "--log", "false", "--body_timeout_s", "2"]) as (port, pid):
        rows.append(["0", resident(pid), None, "0"])
        for tenth in range(10):
            before = time.perf_counter()
            counts = asyncio.run(send_bad(port, kinds, args.bad // 10, 8))
            done = (tenth + 1) * args.bad // 10
            rate = args.bad / 10 / (time.perf_counter() - before)
            assert all(400 <= status < 500 for status in counts), counts
            rows.append([f"{done:,}", resident(pid), rate, str(counts[408])])
            print("bad", *rows[-1], counts, flush=True)
        rows.append(["control: 300 bodies of 18 kB held open", asyncio.run(held(port, pid)), None, "0"])
        print(*rows[-1], flush=True)
    return rows


def record(
    args: argparse.Namespace, name: str, title: str, columns: list[dict], rows: list[list], load: float
) -> None:
    """Writes results/NAME.json."""
    whole = {
        "title": title,
        "commands": [f"OMP_NUM_THREADS=1 python benchmarks/failures.py --repo {args.shown} --record {args.record}"],
        "seeds": [args.seed],
        "hardware": f"2 shared cores (AMD EPYC), no GPU; one thread of torch per process; load average {load:.1f}",
        "date": datetime.date.today().isoformat(),
        "commit": args.commit,
        "columns": columns,
        "rows": rows,
    }
    (ROOT / "results" / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--bad", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", help="Name of the records in results/ that are written.")
    parser.add_argument("--shown", help="The repository as the record names it; default as it was given.")
    args = parser.parse_args()
    args.shown = args.shown or args.repo
    git = ["git", "rev-parse", "--short", "HEAD"]  # before the run: there may be another commit behind it
    args.commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip() or None
    content = [
        json.dumps(body).encode() for body in bodies(Catalogue.from_pretrained(args.repo).item_ids, 64, args.seed)
    ]
    with tempfile.TemporaryDirectory() as folder:
        bad = bad_requests(args, Path(folder))
    loads = [os.getloadavg()[0]]
    rows = [*replicas(args, content), *killed_process(args, content)]
    loads.append(os.getloadavg()[0])
    if args.record:
        names = ["what fails", "requests", "failed at first", "lost after one retry", "seconds until all answer"]
        columns: list[dict] = [{"name": name} for name in names] + [{"name": "longest pause, s", "picture": "0.0"}]
        columns[4]["picture"] = "0.0"
        title = f"`onerec serve` when processes die: {args.clients} clients that ask again at once"
        record(args, args.record, title, columns, rows, max(loads))
        columns = [{"name": "bad requests so far"}, {"name": "memory of the service, MiB", "picture": "0.0"}]
        columns += [{"name": "requests/s", "picture": "0,"}, {"name": "half-open connections in this part"}]
        title = "Memory of `onerec serve` under bad requests of some 100 kinds, tiny model"
        record(args, f"{args.record}_bad", title, columns, bad, loads[0])


if __name__ == "__main__":
    main()
