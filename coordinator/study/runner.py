"""Runs the trainings that are missing, one after the other or several at a time.

Each training has one torch thread: the same study gives the same numbers however many run at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any

import torch

from coordinator.study.cells import Training
from coordinator.study.data import StudyData, load_study_data
from coordinator.study.execute import run_training
from coordinator.study.results import CellResult
from coordinator.study.settings import TrainingSettings
from coordinator.study.training import Stopped
from wire.errors import SplitfleetError

_LOOK_EVERY_S = 0.5
_PR_SET_PDEATHSIG = 1


class StudyError(SplitfleetError):
    """A training process has ended by itself."""


@dataclass(frozen=True, slots=True)
class Task:
    """A training, and a cell of it that was finished earlier, if any."""

    training: Training
    known: CellResult | None


Finished = tuple[Task, list[CellResult]]


def run_here(
    tasks: Sequence[Task],
    settings: TrainingSettings,
    data: StudyData,
    should_stop: Callable[[], bool],
) -> Iterator[Finished]:
    """Train in this process, one after the other; ends early once asked to stop."""
    with _one_thread():
        for task in tasks:
            try:
                if should_stop():
                    return
                yield task, _run(task, settings, data, should_stop)
            except Stopped:
                return


def run_in_processes(
    tasks: Sequence[Task],
    settings: TrainingSettings,
    jobs: int,
    should_stop: Callable[[], bool],
) -> Iterator[Finished]:
    """Train ``jobs`` at a time, each in a process of its own; in the order in which they end."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    stop = context.Event()
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin, initargs=(os.getpid(), stop, settings)
    )
    waiting = {pool.submit(_run_in_process, task): task for task in tasks}
    try:
        while waiting and not should_stop():
            done, _ = wait(waiting, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), _result_of(future)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _result_of(future: Future[list[CellResult]]) -> list[CellResult]:
    try:
        return future.result()
    except BrokenProcessPool as exc:
        raise StudyError(
            "a training process has ended by itself; short of memory? Fewer --jobs take less"
        ) from exc


def _run(
    task: Task, settings: TrainingSettings, data: StudyData, should_stop: Callable[[], bool]
) -> list[CellResult]:
    return run_training(task.training, settings, data, known=task.known, should_stop=should_stop)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What a training process holds from its start on.
_process: dict[str, Any] = {}


def _begin(parent_pid: int, stop: Event, settings: TrainingSettings) -> None:
    """Start of a training process: it ends with its parent, and Ctrl-C is the parent's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # it ended before we asked
            os._exit(1)
    torch.set_num_threads(1)
    _process.update(stop=stop, settings=settings, data=load_study_data(settings.data))


def _run_in_process(task: Task) -> list[CellResult]:
    return _run(task, _process["settings"], _process["data"], _process["stop"].is_set)
