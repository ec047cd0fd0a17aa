"""Two replicas of Ray Serve on loopback: one is killed under load, and another model is rolled out under load."""

import asyncio
import os
import signal
import socket
import time
from functools import partial

import datasets
import numpy as np
import pytest
import torch

from onerec_hf.scripts import recommend
from onerec_hf.scripts.serve import ServeArguments, application
from onerec_hf.serving import Limits
from onerec_hf.serving import replicas as replicas_module
from onerec_hf.serving.replicas import APP, Replicas, deploy, deployment, start

from .served import recommender
from .test_server import post

ray = pytest.importorskip("ray", reason="needs onerec_hf[ray]; `make test-extras` installs it")
from ray import serve  # noqa: E402  behind the skip

LIMITS = Limits()
HISTORY = [1000, 1001]


@pytest.fixture(scope="module")
def replicas():
    """Ray on this machine, and the port of the service."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = Replicas(replicas=2, replica_cpus=0.1)
    try:
        start(own, "127.0.0.1", port)
        yield own, port
    finally:
        serve.shutdown()
        ray.shutdown()


def roll_out(folder, name, replicas):
    args = ServeArguments(repo=str(folder), name=name, num_beams=20, threads=1, log=False, ray=True)
    deploy(partial(application, args, LIMITS, None), LIMITS, replicas)


def actors():
    names = (one["name"] for one in ray.util.list_named_actors(all_namespaces=True))
    return {name for name in names if name.startswith("SERVE_REPLICA::")}


def running():
    return serve.status().applications[APP].deployments[APP].replica_states.get("RUNNING", 0)


def top_score(own):
    return own.recommend([HISTORY], k=5)[0][0].score


async def ask(port):
    """An answer, or None where the request and its one retry failed."""
    for _ in range(2):
        try:
            status, answer, (_, writer) = await asyncio.wait_for(
                post(port, "/recommend", {"histories": [HISTORY], "k": 5}), 30
            )
            writer.close()
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
            continue
        if status == 200:
            return answer
    return None


def test_the_deployment_scales_with_the_requests():
    fixed = deployment(lambda: None, LIMITS, Replicas(replicas=3))
    assert fixed.num_replicas == 3 and fixed.max_ongoing_requests == LIMITS.max_queue
    scaled = deployment(lambda: None, LIMITS, Replicas(replicas=1, max_replicas=4, target_requests=8))
    config = scaled._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (1, 4, 8)


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_stop_while_replicas_start_is_a_stop(address, monkeypatch):
    """SIGTERM in the middle of `deploy`; a cluster that runs already is left alone."""
    done, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(replicas_module, "start", lambda *_: done.append("start"))
    stop = [] if address else [signal.SIGTERM]
    monkeypatch.setattr(replicas_module, "deploy", lambda *_: [os.kill(os.getpid(), sign) for sign in stop])
    monkeypatch.setattr(serve, "shutdown", lambda: done.append("serve"))
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("ray"))
    try:
        replicas_module.run(lambda: None, LIMITS, Replicas(ray_address=address), "127.0.0.1", 0)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert done == (["start"] if address else ["start", "serve", "ray"])


@pytest.mark.slow
def test_files_by_actors_of_ray_data(tmp_path, replicas, monkeypatch):
    """Each file once, by actors that run elsewhere; the same command again finds nothing left."""
    own = recommender()
    own.save_pretrained(tmp_path / "model")
    (tmp_path / "shards").mkdir()
    for i in range(3):
        rows = datasets.Dataset.from_dict({"history": [[1000 + i], [1001, 1002]]})
        rows.to_parquet(str(tmp_path / "shards" / f"{i}.parquet"))
    monkeypatch.chdir(tmp_path)
    args = recommend.RecommendArguments("model", "shards", "out", k=3, num_beams=20, by_file=True, ray_actors=2)
    assert {path.name for path in recommend.main_by_file(args)} == {"0.parquet", "1.parquet", "2.parquet"}
    assert recommend.main_by_file(args) == []
    for i in range(3):
        found = datasets.Dataset.from_parquet(str(tmp_path / "out" / f"{i}.parquet"))["item_ids"][:]
        expected = own.recommend([[1000 + i], [1001, 1002]], 3)
        assert found == [[one.item_id for one in row] for row in expected]


@pytest.mark.slow
def test_a_killed_replica_and_a_roll_out_lose_no_request(tmp_path, replicas):
    options, port = replicas
    own = recommender()
    own.save_pretrained(tmp_path / "one")
    expected = {"v1": top_score(own)}
    with torch.no_grad():
        own.model.lm_head.weight.mul_(1.5)
    own.save_pretrained(tmp_path / "two")
    expected["v2"] = top_score(own)
    roll_out(tmp_path / "one", "v1", options)
    before, answers, busy = actors(), [], True
    assert len(before) == running() == 2

    async def load():
        while busy:
            answers.append(await ask(port))

    async def until(condition):
        end = time.monotonic() + 240
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < end
            await asyncio.sleep(0.2)

    async def run():
        nonlocal busy
        clients = [asyncio.create_task(load()) for _ in range(4)]
        await until(lambda: len(answers) > 20)
        ray.kill(ray.get_actor(sorted(before)[0], namespace="serve"))
        await until(lambda: len(actors() - before) == 1 and running() == 2)
        assert {one and one["version"] for one in answers} == {"v1"}
        await asyncio.to_thread(roll_out, tmp_path / "two", "v2", options)
        here = len(answers)
        await until(lambda: len(answers) > here + 20)
        busy = False
        await asyncio.gather(*clients)
        return here

    rolled = asyncio.run(run())
    assert None not in answers  # nothing was lost after one retry
    assert {one["version"] for one in answers} == {"v1", "v2"}
    assert {one["version"] for one in answers[rolled + 8 :]} == {"v2"}  # those under way were four
    for one in answers:
        assert np.isclose(one["results"][0][0]["score"], expected[one["version"]], atol=1e-3)
    assert not actors() & before
