"""From the stream to a trainer: batches of rows made by Ray Data tasks, in order, a little ahead of their consumption.

One task reads, decodes, degrades and packs the rows of its positions, so that compressed bytes never travel; it hands
them on in blocks that hold whole batches of the consumer, uint8, which are then views of the object store. The order
of the rows does not depend on the number of tasks, workers or machines.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import cv2
import numpy as np

from pipelines.ordering import rank_count, rank_position
from pipelines.stream import check_stream, load_columns, precomputed
from pipelines.stream_config import DEAD_LEAVES, StreamConfig

if TYPE_CHECKING:
    from ray.data import Dataset

BLOCK_BYTES = 40 << 20
"""Of pixels in one block of the object store, at most. Ours: measured, 64 rows a block cost a tenth less than 32."""

BLOCK_ROWS = 64
TASK_ROWS, TASK_BYTES = 256, 160 << 20
"""Of one Ray task, at most. Ours: measured, about a fifth of a second passes between two tasks of a worker, so that
tasks of 128 small rows left workers idle half of the time (256: two fifths) at 3 % more CPU time a row. All that a task
makes may have to wait for the task before it, so that its pixels are bounded too."""

STRETCH_TASKS = 1024  # planned at a time: Ray Data plans all tasks of a dataset before it starts the first
LEAD_BATCHES = 64  # before a stretch ends, the next one is started


Columns = Mapping[str, np.ndarray]
Made = TypeVar("Made")


class Pause:
    """Execution callback that lets Ray Data's scheduling loop rest between its steps.

    Finished blocks that wait for a slower consumer keep the loop's own wait from blocking, so that it took nine tenths
    of a core while nothing was to be done; a trainer's stream is nearly always in that state.
    """

    SECONDS = 0.02  # ours: 50 steps a second, each of which hands on all blocks that are ready

    def on_execution_step(self, executor: object) -> None:
        time.sleep(self.SECONDS)

    def before_execution_starts(self, executor: object) -> None:
        """Nothing to do; Ray Data calls all four."""

    def after_execution_succeeds(self, executor: object) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Nothing to do."""


def rank_batches(
    config: StreamConfig,
    start: int,
    stop: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    *,
    micro: int = 0,
    tasks: int = 2,
    task_cpus: float = 1.0,
    own_process: bool = True,
) -> Iterator[Columns]:
    """One rank's batches in order, made by Ray Data tasks while they are consumed.

    The stretch from start to stop is cut into datasets of STRETCH_TASKS tasks; each is started a little before the one
    before it ends, so that nobody waits at the seams, and no plan or statistic grows with the length of a run.

    Args:
        config, start, stop, batch_size, rank, world, tasks, task_cpus: see `rank_dataset`.
        micro: rows of a batch, a part of the rank's share of the global batch; 0 takes the whole share.
        own_process: run Ray Data's scheduler in a process of its own: as a thread of a trainer it held the
            interpreter's lock so often that nano steps took four times as long.

    Yields:
        Columns of `micro` rows; pixels are read-only views of the object store.
    """
    rank_count(start, stop, batch_size, rank, world)
    micro = micro or batch_size // world
    stride = (
        max(1, STRETCH_TASKS * block_rows(config, micro, batch_size // world)[1] * world // batch_size) * batch_size
    )

    def begin(first: int) -> Iterator[Columns]:
        last = min(first + stride, stop)
        rows: Any = rank_dataset(
            config, first, last, batch_size, rank, world, micro=micro, tasks=tasks, task_cpus=task_cpus
        )
        if own_process:
            (rows,) = rows.streaming_split(1)
        batches = iter(rows.iter_batches(batch_size=micro, prefetch_batches=2, batch_format="numpy"))
        return chain([next(batches)], batches)

    yield from in_turn([partial(begin, first) for first in range(start, stop, stride)], stride // world // micro)


def in_turn(parts: Sequence[Callable[[], Iterator[Made]]], length: int, lead: int = LEAD_BATCHES) -> Iterator[Made]:
    """The items of several iterators one after the other; each is opened, in a thread, while the last items of the one
    before it are consumed.

    Whoever stops early does not wait for a part that is being opened: its thread is a daemon, since what it waits for
    (a Ray that has been shut down) may never come, and an executor's thread then kept the whole process from ending.

    Args:
        parts: open an iterator each, which may take long.
        length: items of each part; the last one may have less.
        lead: so many items before the end of a part the next one is opened.
    """
    opened = _in_thread(parts[0])
    for number in range(len(parts)):
        for place, item in enumerate(opened.result()):
            if place == max(0, length - lead) and number + 1 < len(parts):
                opened = _in_thread(parts[number + 1])
            yield item


def _in_thread(work: Callable[[], Made]) -> Future[Made]:
    """What `work` returns or raises, some time later."""
    future: Future[Made] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where the result is taken, which else waits forever
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="stretch").start()
    return future


def rank_dataset(
    config: StreamConfig,
    start: int,
    stop: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    *,
    micro: int = 0,
    tasks: int = 2,
    task_cpus: float = 1.0,
) -> Dataset:
    """One rank's rows in order, as a lazy dataset: Ray Data tasks read, decode and degrade in one, a block at a time.

    Args:
        config: what the rows are.
        start, stop, batch_size, rank, world: see `ordering.rank_positions`.
        micro: rows that the consumer takes at a time; blocks are whole numbers of it, or it is one of blocks.
        tasks: tasks at a time. Bounds the memory too, with the blocks that wait for their turn.
        task_cpus: logical CPUs of each task; trainers must leave that much free.

    Raises:
        UsageError, Failure: see check_stream.
    """
    import ray
    from ray.data import ExecutionResources
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    count = rank_count(start, stop, batch_size, rank, world)
    absolute = tuple((s if s == DEAD_LEAVES else str(Path(s).absolute()), weight) for s, weight in config.sources)
    unpaired = config.unpaired and str(Path(config.unpaired).absolute())
    config = replace(config, sources=absolute, unpaired=unpaired)  # a worker's current folder may be another one
    check_stream(config)
    per_block, per_task = block_rows(config, micro or batch_size // world, batch_size // world)
    where = {"start": start, "batch_size": batch_size, "rank": rank, "world": world}

    class Stretch(Datasource):
        """The tasks of this rank between start and stop."""

        def estimate_inmemory_data_size(self) -> int:
            return count * _row_bytes(config)

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            edges = pairwise([*range(0, count, per_task), count])
            return [
                ReadTask(
                    partial(_read, config, first, last, per_block, where),
                    BlockMetadata(num_rows=last - first, size_bytes=None, input_files=None, exec_stats=None),
                )
                for first, last in edges
            ]

    n = -(-count // per_task)
    dataset = ray.data.read_datasource(Stretch(), override_num_blocks=n, concurrency=min(tasks, n), num_cpus=task_cpus)
    context, pause = dataset.context, cast(Any, Pause)
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # a thread that walked each task's pages took 5 % of its time
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, pause]
    # A block is handed on as soon as it exceeds this, and cut in two from 1.5 times of it on: it stays what _read made.
    context.target_max_block_size = max(1, int(0.95 * per_block * _row_bytes(config)))
    context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=float(max(64 << 20, 2 * tasks * per_task * _row_bytes(config)))
    )
    return dataset


def block_rows(config: StreamConfig, micro: int, share: int) -> tuple[int, int]:
    """Rows of a block and of a task, for a consumer that takes `micro` rows of each batch's `share` at a time.

    A block holds whole consumer's batches, which are then views of it, or is an even part of one. With buckets it lies
    within one global batch, since its rows have one size.
    """
    fits = max(1, BLOCK_BYTES // _row_bytes(config))
    if fits < micro:
        rows = max(n for n in range(1, fits + 1) if micro % n == 0)
    else:
        most = max(1, min(fits, BLOCK_ROWS) // micro)
        rows = micro * max(n for n in range(1, most + 1) if not config.buckets or (share // micro) % n == 0)
    return rows, rows * max(1, min(TASK_ROWS, TASK_BYTES // _row_bytes(config)) // rows)


def _row_bytes(config: StreamConfig) -> int:
    """Pixels of a row, of its largest bucket, and what it brings along precomputed; bytes."""
    area = max((h * w for h, w in config.buckets), default=config.resolution**2)
    return 3 * area * (2 if config.degrades else 1) + precomputed(config).row_bytes


def _read(config: StreamConfig, first: int, last: int, per_block: int, where: Mapping[str, int]) -> Iterator[Any]:
    """One task: the blocks of a rank's local rows first..last-1."""
    from ray.data.block import BlockAccessor

    cv2.setNumThreads(1)  # a task has one core; OpenCV would take them all
    for begin in range(first, last, per_block):
        local = np.arange(begin, min(begin + per_block, last))
        yield BlockAccessor.batch_to_block(load_columns(config, rank_position(local, **where)))
