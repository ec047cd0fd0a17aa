"""`onerec serve` under load on loopback: throughput, latency, and hot swaps that must lose nothing.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --repo outputs/quickstart/onerec-v2-quickstart --record serving

Four parts. Saturation: a fixed number of clients that ask again at once, of a service with micro-batches and of one
that searches for one request at a time, in turns. Offered load: Poisson arrivals, latency counted from the planned
arrival. Low load: one client, and a bare `Recommender.recommend` of the same history, in turns. Hot swaps: weights and
catalogue change after every 200 requests; each answer is compared with what its version answers in this process.
Server and clients are two processes and share the machine. `--record` writes results/NAME.json and NAME_goals.json.
"""

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onerec_hf.recommender import Recommender
from onerec_hf.serving import save_bundle
from onerec_hf.serving.bundles import with_catalogue

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"micro-batches": ["--max_rows", "32"], "one at a time": ["--max_rows", "1", "--max_wait_ms", "0"]}


class Client:
    """A connection that is kept open; little work per request, since service and clients share the machine."""

    def __init__(self, port: int):
        self.port, self.streams = port, None

    async def post(self, path: str, body: dict | bytes) -> tuple[int, dict]:
        """Status and answer; 0 where there was none."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        try:
            if self.streams is None:
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = self.streams
            writer.write(f"{head}\r\n\r\n".encode() + content)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            length = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
            answer = json.loads(await reader.readexactly(length))
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            print("no answer:", repr(error), flush=True)
            self.streams = None
            return 0, {}
        if "connection: close" in lines:
            self.streams = None
        return int(lines[0].split()[1]), answer


@contextlib.contextmanager
def service(repo: str, options: list[str]):
    """`onerec serve` in a process of its own; yields its port and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "onerec_hf.scripts.serve", "--repo", repo, "--port", str(port), "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    process = subprocess.Popen([*words, "--max_queue", "2000", *options], **quiet)
    try:
        for _ in range(600):
            time.sleep(0.1)
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def processor_seconds(pid: int) -> float:
    """Of a process and its threads so far; what others do on the machine is not in it."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bodies(items: np.ndarray, number: int, seed: int) -> list[dict]:
    """Requests of one user each: 5 to 50 items, half of them without what was seen, a quarter with a deny list."""
    generator = np.random.default_rng(seed)
    made = []
    for i in range(number):
        history = items[generator.integers(len(items), size=generator.integers(5, 51))].tolist()
        deny = items[generator.integers(len(items), size=20)].tolist() if i % 4 == 0 else None
        made.append({"histories": [history], "k": 10, "exclude_seen": i % 2 == 0, "deny": deny})
    return made


def percentiles(seconds: list[float]) -> list[float]:
    """p50, p95 and p99 in milliseconds."""
    return [float(1000 * value) for value in np.percentile(seconds, [50, 95, 99])] if seconds else [float("nan")] * 3


async def saturate(port: int, content: list[bytes], clients: int, seconds: float) -> tuple[float, list[float]]:
    """Answers per second, and the latencies of these and of those that came later."""
    end, found, bodies_left = time.perf_counter() + seconds, [], itertools.cycle(content)
    in_time = 0

    async def ask() -> None:
        nonlocal in_time
        client = Client(port)
        while (start := time.perf_counter()) < end:
            status, _ = await client.post("/recommend", next(bodies_left))
            if status == 200:
                found.append(time.perf_counter() - start)
                in_time += time.perf_counter() < end

    await asyncio.gather(*(ask() for _ in range(clients)))
    return in_time / seconds, found


async def offer(port: int, content: list[bytes], rate: float, seconds: float, seed: int) -> dict:
    """Poisson arrivals at `rate` per second: what came back per second, its latency, and what was refused."""
    generator = np.random.default_rng(seed)
    planned = np.cumsum(generator.exponential(1 / rate, size=int(rate * seconds)))
    idle: list[Client] = []
    latencies, failed = [], 0
    begin = time.perf_counter()

    async def ask(at: float, body: bytes) -> None:
        nonlocal failed
        client = idle.pop() if idle else Client(port)
        status, _ = await client.post("/recommend", body)
        if status == 200:
            latencies.append(time.perf_counter() - begin - at)
        failed += status != 200
        idle.append(client)

    tasks = []
    for at, body in zip(planned.tolist(), itertools.cycle(content)):
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(at, body)))
    await asyncio.gather(*tasks)
    return {"rate": len(latencies) / (time.perf_counter() - begin), "latencies": latencies, "failed": failed}


async def compare_with_bare(port: int, recommender: Recommender, requests: list[dict], repeats: int) -> dict:
    """Milliseconds of a request on an idle service and of the bare call, in turns."""
    client, times = Client(port), {"service": [], "bare": []}
    for body in itertools.islice(itertools.cycle(requests), repeats):
        content = json.dumps(body).encode()
        start = time.perf_counter()
        status, _ = await client.post("/recommend", content)
        middle = time.perf_counter()
        recommender.recommend(**body)
        times["bare"].append(time.perf_counter() - middle)
        assert status == 200
        times["service"].append(middle - start)
    return {name: 1000 * float(np.median(own)) for name, own in times.items()}


def swap_bundles(repo: str, folder: Path) -> tuple[dict[str, Recommender], np.ndarray]:
    """Two sets of weights and two catalogues, as bundles in `folder`. Returns `"weights catalogue"` -> what answers
    so, in this process; and the ids that both catalogues have.
    """
    first = Recommender.from_pretrained(repo)
    ids = first.model.catalogue.item_ids
    gone = ids[np.random.default_rng(0).permutation(len(ids))[: len(ids) // 10]]
    fewer = with_catalogue(first, first.model.catalogue.without_items(gone))
    save_bundle(first, folder / "all")
    save_bundle(fewer, folder / "fewer")
    shutil.copytree(repo, folder / "one", ignore=shutil.ignore_patterns("checkpoint-*"))
    second = Recommender.from_pretrained(repo)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    shutil.copytree(folder / "one", folder / "two")
    second.save_pretrained(folder / "two")
    found = {}
    for weights, own in (("one", first), ("two", second)):
        found[f"{weights} all"] = own
        found[f"{weights} fewer"] = with_catalogue(own, fewer.model.catalogue)
    return found, np.setdiff1d(ids, gone)


async def hot_swaps(port: int, expected: dict, requests: list[dict], total: int, every: int, clients: int) -> dict:
    """Requests while versions change; counts of what was lost, wrong, or outside the catalogue of its version."""
    changes = [("/model", {"bundle": "two", "catalogue": "keep"}), ("/catalogue", {"bundle": "fewer"})]
    changes += [("/model", {"bundle": "one", "catalogue": "keep"}), ("/catalogue", {"bundle": "all"})]
    kinds = ["two all", "two fewer", "one fewer", "one all"]
    versions = {"v1": ("one all", 0.0, float("inf"))}  # name -> what it is, first and last moment it may be current
    counts = dict.fromkeys(("asked", "lost", "wrong version", "outside the catalogue", "swaps", "refused swaps"), 0)
    answers, swapped = [], asyncio.Event()

    async def swap() -> None:
        admin, current = Client(port), "v1"
        for i in range(total // every):
            while counts["asked"] < (i + 1) * every and counts["asked"] < total:
                swapped.clear()
                await swapped.wait()
            path, body = changes[i % 4]
            start = time.perf_counter()
            status, _ = await admin.post(path, body | {"name": f"s{i}"})
            end = time.perf_counter()
            counts["swaps"] += status == 200 and counts["asked"] < total  # those under load count
            counts["refused swaps"] += status != 200
            if status == 200:
                versions[current] = (*versions[current][:2], end)
                current = f"s{i}"
                versions[current] = (kinds[i % 4], start, float("inf"))

    async def ask(number: int) -> None:
        client = Client(port)
        for i in range(number, total, clients):
            which, start = i % len(requests), time.perf_counter()
            status, answer = await client.post("/recommend", requests[which])
            answers.append((which, start, time.perf_counter(), status, answer))
            counts["asked"] += 1
            swapped.set()

    await asyncio.gather(swap(), *(ask(number) for number in range(clients)))
    for which, start, end, status, answer in answers:
        if status != 200:
            counts["lost"] += 1
            continue
        kind, first, last = versions[answer["version"]]
        recommender, lists = expected[kind]
        found, wanted = answer["results"][0], lists[which]
        in_time = first <= end and start <= last and answer["fingerprint"] == recommender.model.catalogue.fingerprint()
        scores = np.array([[a["score"], b.score] for a, b in zip(found, wanted)])
        same = len(found) == len(wanted) and bool(np.abs(scores[:, 0] - scores[:, 1]).max() < 1e-2)
        counts["wrong version"] += not (in_time and same)
        absent = recommender.model.catalogue.index_of([one["item_id"] for one in found], "ignore") < 0
        counts["outside the catalogue"] += int(absent.sum())
    return counts


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[list[list], list[list], list[str]]:
    """Rows of the two records, and what is worth a word in their hardware line."""
    expected, ids = swap_bundles(arguments.repo, folder)
    requests = bodies(ids, 64, arguments.seed)
    content = [json.dumps(body).encode() for body in requests]
    loads = [os.getloadavg()[0]]
    full: dict[str, list[float]] = {name: [] for name in WAYS}
    work: dict[str, list[float]] = {name: [] for name in WAYS}
    rows, goals = [], []
    with contextlib.ExitStack() as stack:
        services = {name: stack.enter_context(service(arguments.repo, own)) for name, own in WAYS.items()}
        ports = {name: port for name, (port, _) in services.items()}
        for port in ports.values():
            asyncio.run(saturate(port, content, 4, 2.0))  # warm
        for _ in range(arguments.rounds):
            for name, (port, pid) in services.items():
                before = processor_seconds(pid)
                rate, found = asyncio.run(saturate(port, content, arguments.clients, arguments.seconds))
                full[name].append(rate)
                work[name].append(len(found) / (processor_seconds(pid) - before))
                print("saturation", name, rate, work[name][-1], flush=True)
        for rate in arguments.rates:
            for name, port in ports.items():
                got = asyncio.run(offer(port, content, rate, arguments.seconds, arguments.seed))
                rows.append([name, rate, got["rate"], *percentiles(got["latencies"]), got["failed"]])
                print(*rows[-1], flush=True)
        low = asyncio.run(compare_with_bare(ports["micro-batches"], expected["one all"], requests, arguments.repeats))
        print(low, flush=True)
        loads.append(os.getloadavg()[0])
    ratios = [a / b for a, b in zip(full["micro-batches"], full["one at a time"])]
    batched, alone = (float(np.median(full[name])) for name in WAYS)
    cheap, dear = (float(np.median(work[name])) for name in WAYS)
    print("ratios", ratios, cheap / dear, flush=True)
    answered = {k: (own, [own.recommend(**body)[0] for body in requests]) for k, own in expected.items()}
    with service(arguments.repo, ["--bundles", str(folder)]) as (port, _):
        counts = asyncio.run(hot_swaps(port, answered, content, arguments.total, arguments.every, 32))
    print(counts, flush=True)
    what = f"medians: {batched:.0f} and {alone:.0f} requests a second; "
    what += f"median of the rounds' ratios, which were {min(ratios):.1f} to {max(ratios):.1f}"
    goals.append([f"throughput at saturation, to one at a time ({what})", float(np.median(ratios)), "at least 4"])
    goals.append(
        [f"answers per processor second of the service, likewise ({cheap:.0f} and {dear:.0f})", cheap / dear, None]
    )
    what = f"{low['service']:.1f} and {low['bare']:.1f} ms"
    goals.append([f"p50 of one client, to a bare `recommend` ({what})", low["service"] / low["bare"], "at most 1.3"])
    what = f"of {counts['asked']} requests with {counts['swaps']} swaps under them"
    for name in ("lost", "wrong version"):
        goals.append([f"{name}, {what}", str(counts[name]), "0"])
    goals.append([f"items outside the catalogue of their version, {what}", str(counts["outside the catalogue"]), "0"])
    goals.append([f"swaps refused, {what}", str(counts["refused swaps"]), "0"])
    loads.append(os.getloadavg()[0])
    return rows, goals, [f"load average {min(loads):.1f} to {max(loads):.1f}, service, client and others together"]


def record(arguments: argparse.Namespace, rows: list[list], goals: list[list], notes: list[str]) -> None:
    """Writes results/NAME.json and NAME_goals.json."""
    shared = {
        "commands": [
            f"OMP_NUM_THREADS=1 python benchmarks/serving.py --repo {arguments.shown} --record {arguments.record}"
        ],
        "seeds": [arguments.seed],
        "hardware": "; ".join(["2 shared cores (AMD EPYC), no GPU; one thread of torch", *notes]),
        "date": datetime.date.today().isoformat(),
        "commit": arguments.commit,
    }
    names = ["search", "offered, requests/s", "answered, requests/s", "p50, ms", "p95, ms", "p99, ms", "refused"]
    pictures = [None, "0", "0.0", "0,", "0,", "0,", "0,"]
    columns = [{"name": name} | ({"picture": one} if one else {}) for name, one in zip(names, pictures)]
    title = f"`onerec serve` over offered load: {arguments.seconds:g} seconds each, 50 beams, 10 items, one history"
    whole = {"title": title, **shared, "columns": columns, "rows": rows}
    columns = [{"name": "goal"}, {"name": "measured", "picture": "0.00"}, {"name": "wanted"}]
    other = {"title": "What `onerec serve` was to reach", **shared, "columns": columns, "rows": goals}
    for name, own in ((arguments.record, whole), (f"{arguments.record}_goals", other)):
        (ROOT / "results" / f"{name}.json").write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 5, 10, 20, 40, 80, 120])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--total", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", help="Name of the records in results/ that are written.")
    parser.add_argument("--shown", help="The repository as the record names it; default as it was given.")
    arguments = parser.parse_args()
    arguments.shown = arguments.shown or arguments.repo
    torch.set_num_threads(1)
    git = ["git", "rev-parse", "--short", "HEAD"]  # before the run: there may be another commit behind it
    arguments.commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip() or None
    with tempfile.TemporaryDirectory() as folder:
        rows, goals, notes = measure(arguments, Path(folder))
    for row in goals:
        print(*row, sep=" | ")
    if arguments.record:
        record(arguments, rows, goals, notes)


if __name__ == "__main__":
    main()
