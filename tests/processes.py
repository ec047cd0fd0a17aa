"""Processes of a test that may talk over gloo. All are forked from one that has imported what they need, and that runs
no thread: an import takes longer than what most of these tests do.
"""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["peft", "pytest", "onerec_hf.recommender", "onerec_hf.trainers"])


def _process(rank, count, port, function, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    function(rank, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads can wait for each other forever when the groups are taken down


def run_processes(function: Callable, *arguments, count: int = 2) -> None:
    """`function(rank, *arguments)`, of a test's module, in processes that know of one another as `torchrun` says it;
    what they print of an error is in the output of the test.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_process, args=(rank, count, port, function, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0] * count
