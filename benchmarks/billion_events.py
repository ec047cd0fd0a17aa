"""On paper: what a billion events, 20 million users and 10 million items would take on 64 GPUs.

    python benchmarks/billion_events.py --output results/billion_events.json --commit COMMIT

Every number is a measured one of results/*.json times how much more there is; nothing of this size was run. Growth is
taken as linear, many machines as equally many times faster, a GPU as the one that was measured.
"""

import argparse
import datetime
import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
EVENTS, USERS, ITEMS, GPUS = 1e9, 20e6, 10e6, 64
IMPORTS = 8  # processor seconds of every run of prepare_large, as its title says


def value(name: str, label: str, column: str, after: str = "") -> float:
    """A number of a record: of the first row that begins so, `after` another row where a label stands twice."""
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    place = [each["name"] for each in record["columns"]].index(column)
    rows = record["rows"]
    first = next(i for i, row in enumerate(rows) if after in row) if after else 0
    found = next(row for row in rows[first:] if label in [str(each)[: len(label)] for each in row])[place]
    return found["mean"] if isinstance(found, dict) else float(found)


def steps() -> list[list]:
    """Step, what was measured, how many times as much, where it runs, hours."""
    seconds = "processor seconds"
    splits = value("prepare_large", "splits written", seconds)
    pairs = value("prepare_large", "co-occurrence embedding", seconds) - splits
    rows = value("stream_epoch", "streamed", seconds)
    codes = value("semantic_ids_growth", "10,000,000 x 8,192", seconds)
    texts = value("text_files", "first", "texts a processor second")
    target = value("architectures_gpu", "lazy decoder-only", "microseconds per target", after=256) / 1e6
    search = value("generation_gpu", "16", "ours, CUDA graph") / 1e3 / 16
    more = EVENTS / 20e6
    found = []

    def add(step: str, measured: str, amount: str, where: str, hours: float) -> None:
        found.append([step, measured, amount, where, hours])

    core, gpus = "one core", f"{GPUS} GPUs"
    add(
        "log cut and sorted, splits",
        f"{splits - IMPORTS:.0f} processor s for 20 million events (`prepare_large`)",
        f"{more:.0f} x events",
        core,
        (splits - IMPORTS) * more / 3600,
    )
    add(
        "co-occurrence embedding",
        f"{pairs:.0f} processor s for 20 million events, 100,000 items (`prepare_large`)",
        f"{ITEMS / 1e5:.0f} x items (events: {more:.0f} x)",
        core,
        pairs * ITEMS / 1e5 / 3600,
    )
    add(
        "text embeddings, MiniLM",
        f"{texts:.0f} texts a processor s (`text_files`)",
        "10 million texts, `--text_shard` on 64 cores",
        "64 cores",
        ITEMS / texts / 64 / 3600,
    )
    add(
        "semantic IDs, 3 x 8,192",
        f"{codes:,.0f} processor s for 10 million items (`semantic_ids_growth`)",
        f"{ITEMS / 1e7:.0f} x items",
        core,
        codes * ITEMS / 1e7 / 3600,
    )
    add(
        "an epoch read from disk",
        f"{rows:.2f} processor s for 16,000 users (`stream_epoch`)",
        "20 million users, 64 processes",
        "64 cores",
        rows * USERS / 16e3 / GPUS / 3600,
    )
    add(
        "supervised training, an epoch, 1B",
        f"{target * 1e6:.0f} microseconds a target, context 512 (`architectures_gpu`)",
        "a billion targets",
        gpus,
        EVENTS * target / GPUS / 3600,
    )
    add(
        "IPA, pairs of an iteration",
        f"{search * 1e3:.1f} ms a user, 128 beams (`generation_gpu`)",
        "1% of the users",
        gpus,
        0.01 * USERS * search / GPUS / 3600,
    )
    add(
        "recommendations for all users",
        f"{search * 1e3:.1f} ms a user, 128 beams (`generation_gpu`)",
        "20 million users",
        gpus,
        USERS * search / GPUS / 3600,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--commit", required=True, help="of this script and of the records that it reads")
    args = parser.parse_args()
    columns = ["step", "measured", "how much", "where"]
    record = {
        "title": "On paper: a billion events, 20 million users, 10 million items, 64 GPUs",
        "commands": ["python benchmarks/billion_events.py --output results/billion_events.json --commit COMMIT"],
        "seeds": [],
        "hardware": "nothing was run: the records that are named were made on 2 cores (AMD EPYC, Intel Xeon), "
        "`architectures_gpu` and `generation_gpu` on one NVIDIA H200",
        "date": datetime.date.today().isoformat(),
        "commit": args.commit,
        "columns": [{"name": name} for name in columns] + [{"name": "hours", "picture": "0.000"}],
        "rows": steps(),
    }
    Path(args.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
