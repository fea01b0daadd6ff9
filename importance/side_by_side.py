"""Calls in processes beside one another, as many at a time as memory allows."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as ended
from typing import Any, TypeVar

import torch

from depgraph.errors import SweepError
from depgraph.memory import available_bytes

T = TypeVar("T")
R = TypeVar("R")
_SHARE = 0.8  # of the memory that can be had is used
_held: list[Callable[[Any], Any]] = []  # what a process calls


def made(tasks: Sequence[T], make: Callable[[T], R], peak: Callable[[R], int], jobs: int) -> Iterator[R]:
    """What `make` makes of tasks, as it comes; the first task alone, which shows by its `peak` in bytes how many fit.

    With one job, or one task, this process does it. Raises SweepError when a process dies, and what `make` raises.
    """
    if jobs <= 1 or len(tasks) <= 1:
        yield from map(make, tasks)
        return
    memory, largest, waiting = available_bytes(), 0, deque(tasks)
    running: dict[Future[R], T] = {}
    with _pool(make, jobs) as pool:
        while waiting or running:
            while waiting and len(running) < room(largest, memory, jobs):
                task = waiting.popleft()
                running[pool.submit(_call, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = _result(future, running.pop(future))
                largest = max(largest, peak(result))
                yield result


def room(largest: int, memory: int | None, jobs: int) -> int:
    """How many may work at a time when the largest one yet took `largest` of `memory` bytes; one where nothing is known yet."""
    if not largest:
        return 1
    return jobs if memory is None else max(1, min(jobs, int(_SHARE * memory / largest)))


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _result(future: Future[R], task: object) -> R:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise SweepError(
            f"the process that worked on {task} died, perhaps for want of memory: run it again with fewer jobs; what was made is kept"
        ) from error


@contextmanager
def _pool(make: Callable[[T], R], jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are started when they are needed, and ended at once where something goes wrong."""
    others = set(multiprocessing.active_children())
    threads = max(1, processors() // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(make, threads))
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _begin(make: Callable[[Any], Any], threads: int) -> None:
    """Ready a process: quiet, ended by Ctrl-C without a word, and with the process that began it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(threads)
    _held.append(make)


def _end_with_parent() -> None:
    """End as soon as the process that began this one has, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        ended([parent.sentinel])
        os._exit(1)


def _call(task: Any) -> Any:
    return _held[0](task)
