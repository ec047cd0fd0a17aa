"""A real process on loopback: swaps under load, slow and silent clients, SIGTERM; and what the command refuses."""

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from onerec_hf.scripts import serve
from onerec_hf.serving import create_app, save_bundle
from onerec_hf.serving.bundles import with_catalogue
from onerec_hf.serving.replicas import Replicas

from .served import recommender

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def process(tmp_path):
    """`onerec serve` with bundles `all` and `fewer`; yields the process, its port and its log."""
    own = recommender()
    own.save_pretrained(tmp_path / "model")
    save_bundle(own, tmp_path / "bundles" / "all")
    fewer = with_catalogue(own, own.model.catalogue.without_items(range(1010, 1020)))
    save_bundle(fewer, tmp_path / "bundles" / "fewer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--repo {tmp_path / 'model'} --bundles {tmp_path / 'bundles'} --port {port} --num_beams 20"
    options += " --body_timeout_s 1.5 --timeout_s 120"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = tmp_path / "log"
    with log.open("w") as out:  # a pipe that nobody reads is full after some hundred requests, and the service waits
        own = subprocess.Popen(
            [sys.executable, "-m", "onerec_hf.cli", "serve", *options.split()],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
        )
    try:
        while True:
            assert own.poll() is None, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        yield own, port, log
    finally:
        own.kill()
        own.wait()


async def post(port, path, body, streams=None):
    """Status, JSON and the connection."""
    reader, writer = streams or await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    status, answer = await response(reader)
    return status, answer, (reader, writer)


async def queued(port):
    """Histories that wait, by the service's own count."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return float(text.split("\nonerec_queued_rows ")[1].split("\n")[0])


async def response(reader):
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), json.loads(await reader.readexactly(length))


@pytest.mark.slow
def test_a_process_swaps_under_load_waits_for_nobody_and_drains(process):
    own, port, log = process
    gone, answers, running = set(range(1010, 1020)), [], True

    async def load():
        streams = None
        for i in itertools.count():
            if not running:
                return
            history = [1000 + i % 10]
            status, answer, streams = await post(port, "/recommend", {"histories": [history], "k": 65}, streams)
            answers.append((status, answer))

    async def run():
        nonlocal running
        idle = await asyncio.open_connection("127.0.0.1", port)  # sends nothing
        half = await asyncio.open_connection("127.0.0.1", port)
        half[1].write(b"POST /recommend HTTP/1.1\r\nhost:")  # half of a head
        slow = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n"
        slow[1].write(head + b'{"histories"')
        clients = [asyncio.create_task(load()) for _ in range(4)]
        for i, name in enumerate(["fewer", "all"] * 3):
            status, answer, _ = await post(port, "/catalogue", {"bundle": name, "name": f"{name}-{i}"})
            assert status == 200, answer
        for reader, code in ((idle[0], "slow_head"), (half[0], "slow_head"), (slow[0], "slow_body")):
            status, answer = await asyncio.wait_for(response(reader), 60)
            assert status == 408 and answer["error"]["code"] == code
        running = False
        await asyncio.gather(*clients)
        many = {"histories": [[1000, 1001]] * 32, "k": 65}
        last = [asyncio.create_task(post(port, "/recommend", many)) for _ in range(8)]
        while await queued(port) < 3 * 32 and not all(task.done() for task in last):
            await asyncio.sleep(0.01)
        own.send_signal(signal.SIGTERM)
        return [status for status, _, _ in await asyncio.gather(*last)]

    statuses = asyncio.run(run())
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 4  # one was searched for, three and more waited
    assert len(answers) > 4 and {status for status, _ in answers} == {200}
    for _, answer in answers:
        ids = {one["item_id"] for one in answer["results"][0]}
        assert len(ids) == (55 if answer["version"].startswith("fewer") else 65)
        assert bool(ids & gone) != answer["version"].startswith("fewer")
    assert {answer["version"][:3] for _, answer in answers} >= {"few", "all"}
    assert own.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    lines = [json.loads(line) for line in log.read_text().split("\n") if line.startswith("{")]
    assert [line["outcome"] for line in lines if line["event"] == "swap"] == ["done"] * 6
    assert "draining" in [line["event"] for line in lines]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "recommender.example"])
def test_other_machines_need_a_token(host):
    with pytest.raises(ValueError, match="set the environment variable ONEREC_SERVE_TOKEN"):
        serve.check_host(host, None)
    serve.check_host(host, "s3cret")
    for own in ("127.0.0.1", "::1", "localhost"):
        serve.check_host(own, None)


def test_a_folder_of_bundles_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder: make it"):
        serve.run(["--repo", "x", "--bundles", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("numbers", [{"replicas": 0}, {"replicas": 3, "max_replicas": 2}, {"target_requests": 0}])
def test_numbers_of_replicas_are_checked(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        Replicas(**numbers)


def test_replicas_need_ray(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--ray true needs Ray Serve: pip install 'onerec_hf\[ray\]'"):
        serve.run(["--repo", "x", "--ray", "true"])


def test_one_of_several_replicas_keeps_its_version(tmp_path):
    with TestClient(create_app(recommender(), bundles=tmp_path, swaps=False)) as client:
        for path, body in (("/model", {"bundle": "x"}), ("/catalogue", {"remove": [1000]})):
            answer = client.post(path, json=body)
            assert answer.status_code == 409 and answer.json()["error"]["code"] == "replicas"
        assert client.post("/recommend", json={"histories": [[1000]]}).json()["version"] == "v1"
