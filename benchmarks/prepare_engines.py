"""One step of the preparation with DuckDB and with Polars: distinct ids, join, cut into 16 shards.

    python benchmarks/prepare.py --events 20000000     # writes the log
    python benchmarks/prepare_engines.py --log outputs/benchmark_prepare/log_20000000_400000_100000.parquet

`pip install polars` first: the package does not need it.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time

SHARDS = 16


def with_duckdb(log: str, folder: str) -> None:
    import duckdb

    settings = {"memory_limit": "700MB", "threads": 2, "temp_directory": f"{folder}/spilled"}
    database = duckdb.connect(f"{folder}/log.duckdb", config=settings | {"preserve_insertion_order": False})
    for name in ("user", "item"):
        database.execute(
            f"CREATE TABLE {name}s AS SELECT id, row_number() OVER (ORDER BY id) - 1 AS place "
            f"FROM (SELECT DISTINCT {name}_id AS id FROM '{log}')"
        )
    database.execute(
        f"COPY (SELECT users.place % {SHARDS} AS shard, users.place AS user, items.place AS item, timestamp, is_like, "
        f"file_row_number AS row FROM read_parquet('{log}', file_row_number=true) JOIN users ON user_id = users.id "
        f"JOIN items ON item_id = items.id) TO '{folder}/events' (FORMAT parquet, PARTITION_BY (shard))"
    )


def with_polars(log: str, folder: str) -> None:
    os.environ["POLARS_MAX_THREADS"] = "2"
    import polars

    rows, tables = polars.scan_parquet(log, row_index_name="row"), []
    for name in ("user", "item"):
        distinct = rows.select(polars.col(f"{name}_id").unique()).sort(f"{name}_id")
        tables.append(distinct.collect(engine="streaming").with_row_index(name).lazy())
    rows = rows.join(tables[0], on="user_id").join(tables[1], on="item_id")
    rows = rows.select((polars.col("user") % SHARDS).alias("shard"), "user", "item", "timestamp", "is_like", "row")
    rows.sink_parquet(polars.PartitionBy(f"{folder}/events", key="shard"), mkdir=True, engine="streaming")


def measured(engine, log: str, queue) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engine(log, folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"processor seconds": used.ru_utime + used.ru_stime, "seconds": time.perf_counter() - start}
    queue.put(found | {"peak GiB": used.ru_maxrss / 2**20})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--log", required=True)
    args = parser.parse_args()
    context, report = multiprocessing.get_context("spawn"), {}
    for engine in (with_duckdb, with_polars):
        queue = context.Queue()
        process = context.Process(target=measured, args=(engine, args.log, queue))
        process.start()
        report[engine.__name__] = queue.get()
        process.join()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
