"""Starts a few processes that train together over gloo, and gives back what each of them found."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_PRELOADED = ["torch", "llava_scale.training.trainer", "llava_scale.training.process_group", "llava_scale.data.loader"]


def run_ranks(size: int, job: Callable[..., Any], *arguments: Any, timeout_s: float = 240.0) -> list[Any]:
    """What ``job(ranks, *arguments)`` returns on each of ``size`` processes."""
    processes, pipes = start_ranks(size, job, *arguments)
    results = [_receive(pipe, timeout_s) for pipe in pipes]
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
    problems = [f"rank {rank}: {result['error']}" for rank, result in enumerate(results) if "error" in result]
    assert not problems, "\n".join(problems)
    return [result["value"] for result in results]


def start_ranks(size: int, job: Callable[..., Any], *arguments: Any) -> tuple[list[Any], list[Any]]:
    """Start ``job(ranks, *arguments)`` on ``size`` processes; return these and the pipes they will answer through.

    The processes are forked from a server that has imported everything once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        environment = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in environment.items()}
        process = context.Process(target=_child, args=(sender, environment, job, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    return processes, pipes


def _receive(pipe: Any, timeout_s: float) -> dict[str, Any]:
    try:
        return pipe.recv() if pipe.poll(timeout_s) else {"error": "no answer in time"}
    except EOFError:
        return {"error": "died"}


def _child(sender: Any, environment: dict[str, str], job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import os

    import torch

    from llava_scale.training.process_group import open_ranks

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with open_ranks(os.environ, device="cpu", timeout_s=60) as ranks:
            sender.send({"value": job(ranks, *arguments)})
    except BaseException:  # told to the parent
        sender.send({"error": traceback.format_exc()})
