"""The feed of a trainer: Ray Data tasks make batches of rows, in order, a little ahead of their use.

One task reads, decodes, degrades and packs the rows of its positions, so no compressed pictures go between processes.
It yields blocks of uint8 pixels, each with whole batches of the consumer. A batch is then a view of the object store.
The order of the rows does not depend on the number of tasks, workers or machines.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import cv2
import numpy as np

from pipelines.stream.ahead import FetchAhead, choose_reads
from pipelines.stream.config import DEAD_LEAVES, StreamConfig
from pipelines.stream.opened import FETCHES, Reads, localized, prepare, use
from pipelines.stream.ordering import rank_count, rank_position
from pipelines.stream.rows import check_stream, load_columns, precomputed_columns, samples_of

if TYPE_CHECKING:
    from ray.data import Dataset

BLOCK_BYTES = 40 << 20
"""Most bytes of pixels in a block of the object store. Ours, measured: blocks of 64 rows cost a tenth less than 32."""

BLOCK_ROWS = 64
TASK_ROWS, TASK_BYTES = 256, 160 << 20
"""Most rows and bytes of pixels of one Ray task. Ours, measured: a worker waits about 0.2 s between two tasks. With
tasks of 128 small rows, workers were idle half of the time (256: two fifths), at 3 % more CPU time per row. The bytes
have a limit since all rows of a task may have to wait for the task before it."""

LEAST_STORE_BYTES = 64 << 20

STRETCH_TASKS = 1024  # tasks per dataset: Ray Data plans all tasks of a dataset before it starts the first
LEAD_BATCHES = 64  # the next stretch starts so many batches before the end of one

ADVANCE_S = 1.0  # pause between two messages to the actor that fetches ahead

Columns = Mapping[str, np.ndarray]
T = TypeVar("T")


class Pause:
    """Execution callback that pauses Ray Data's scheduling loop between its steps.

    While finished blocks wait for a slower consumer, the loop's own wait returns at once. The loop then took nine
    tenths of a core without work. A trainer's stream is in this state nearly all the time.
    """

    SECONDS = 0.02  # ours: 50 steps per second; each step passes on all blocks that are ready

    def on_execution_step(self, executor: object) -> None:
        time.sleep(self.SECONDS)

    def before_execution_starts(self, executor: object) -> None:
        """Do nothing; Ray Data calls all four methods."""

    def after_execution_succeeds(self, executor: object) -> None:
        """Do nothing."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Do nothing."""


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
    reads: Reads | None = None,
) -> Iterator[Columns]:
    """Yield one rank's batches in order. Ray Data tasks make them during the iteration.

    The positions are split into stretches, each a dataset of STRETCH_TASKS tasks. A stretch starts shortly before the
    one before it ends, so that the consumer does not wait between them. So no plan or statistic grows with the run.

    Args:
        config, start, stop, batch_size, rank, world, tasks, task_cpus: see `rank_dataset`.
        micro: rows of a micro-batch, a part of the rank's share of the global batch; 0: the whole share.
        own_process: run Ray Data's scheduler in its own process. As a thread of the trainer it held the interpreter's
            lock so often that nano steps took four times as long.
        reads: how corpora in stores are read, see ahead.choose_reads, which makes the default with its "auto". Shards
            that come whole are fetched ahead of the tasks by an actor on this node, which ends with the iteration.

    Yields:
        Columns of `micro` rows; the pixels are read-only views of the object store.
    """
    count = rank_count(start, stop, batch_size, rank, world)
    micro = micro or batch_size // world
    config = absolute(config)
    if reads is None:
        reads = choose_reads(config, stop - start, 1.0 / world, "auto", FETCHES, 0)
    stride = (
        max(1, STRETCH_TASKS * block_rows(config, micro, batch_size // world)[1] * world // batch_size) * batch_size
    )

    def begin(first: int) -> Iterator[Columns]:
        last = min(first + stride, stop)
        rows: Any = rank_dataset(
            config, first, last, batch_size, rank, world, micro=micro, tasks=tasks, task_cpus=task_cpus, reads=reads
        )
        if own_process:
            (rows,) = rows.streaming_split(1)
        batches = iter(rows.iter_batches(batch_size=micro, prefetch_batches=2, batch_format="numpy"))
        return chain([next(batches)], batches)

    place = {"start": start, "batch_size": batch_size, "rank": rank, "world": world}
    with fetching_ahead(config, reads, count, place) as advance:
        parts = [partial(begin, first) for first in range(start, stop, stride)]
        for number, columns in enumerate(in_turn(parts, stride // world // micro)):
            advance(start + number * micro * world // batch_size * batch_size)
            yield columns


@contextmanager
def fetching_ahead(
    config: StreamConfig, reads: Reads, rows: int, place: dict[str, int]
) -> Iterator[Callable[[int], None]]:
    """Run an actor on this node that fetches shards ahead, see ahead.FetchAhead; yields its `advance`.

    The actor is a process of its own, so that its work does not hold the interpreter's lock of a trainer. It is killed
    at the end, with the fetches in work: a killed fetch leaves no wrong file and no lock.
    """
    if not reads.whole:
        yield lambda position: None
        return
    import ray

    options = {"num_cpus": 0, "scheduling_strategy": near_this_node()}
    actor: Any = ray.remote(FetchAhead).options(**options).remote(config, reads, rows, place)
    actor.start.remote()
    last = time.monotonic()

    def advance(position: int) -> None:
        nonlocal last
        if time.monotonic() - last > ADVANCE_S:
            last = time.monotonic()
            actor.advance.remote(position)

    try:
        yield advance
    finally:
        with suppress(Exception):  # Ray may have ended before the stream
            ray.kill(actor)


def near_this_node() -> Any:
    """A scheduling strategy of Ray: this node if it has free resources, else any other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # without the last argument, Ray waits for a busy node; a node may have no CPU besides those of its trainers
    return NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True, _spill_on_unavailable=True
    )


def absolute(config: StreamConfig) -> StreamConfig:
    """The configuration with absolute paths of its corpora: a worker may have another current folder."""
    sources = tuple((s if s == DEAD_LEAVES else str(Path(s).absolute()), weight) for s, weight in config.sources)
    return replace(config, sources=sources, unpaired=config.unpaired and str(Path(config.unpaired).absolute()))


def in_turn(parts: Sequence[Callable[[], Iterator[T]]], length: int, lead: int = LEAD_BATCHES) -> Iterator[T]:
    """Yield the items of several iterators in turn. A thread opens the next iterator before the current one ends.

    The thread is a daemon. It may wait without end, for example for a Ray that was shut down; a thread of an executor
    then blocked the exit of the process. So a consumer can stop at any time.

    Args:
        parts: functions that open an iterator each; this may take long.
        length: items of each part; the last part may have fewer.
        lead: items before the end of a part at which the next part is opened.
    """
    future = _in_thread(parts[0])
    for number in range(len(parts)):
        for index, item in enumerate(future.result()):
            if index == max(0, length - lead) and number + 1 < len(parts):
                future = _in_thread(parts[number + 1])
            yield item


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a daemon thread and return its future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - result() raises it; without it result() would never return
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
    reads: Reads = Reads(),
) -> Dataset:
    """Return one rank's rows in order as a lazy dataset. Each Ray Data task reads, decodes and degrades its blocks.

    Args:
        config: configuration of the stream.
        start, stop, batch_size, rank, world: see `ordering.rank_positions`.
        micro: rows per batch of the consumer, see `block_rows`.
        tasks: tasks that run at a time; with the blocks that wait for their turn, this limits the memory.
        task_cpus: logical CPUs of each task; the trainers must leave them free. Tasks run on this process' node while
            it has them, and elsewhere otherwise.
        reads: how corpora in stores are read.

    Raises:
        UsageError, Failure: see check_stream.
    """
    import ray
    from ray.data import ExecutionResources
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    count = rank_count(start, stop, batch_size, rank, world)
    config = absolute(config)
    check_stream(config)
    per_block, per_task = block_rows(config, micro or batch_size // world, batch_size // world)
    place = {"start": start, "batch_size": batch_size, "rank": rank, "world": world}

    class Stretch(Datasource):
        """The tasks of this rank between start and stop."""

        def estimate_inmemory_data_size(self) -> int:
            return count * row_bytes(config)

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            edges = pairwise([*range(0, count, per_task), count])
            return [
                ReadTask(
                    partial(_read, config, first, last, per_block, place, reads),
                    BlockMetadata(num_rows=last - first, size_bytes=None, input_files=None, exec_stats=None),
                )
                for first, last in edges
            ]

    n = -(-count // per_task)
    dataset = ray.data.read_datasource(
        Stretch(),
        override_num_blocks=n,
        concurrency=min(tasks, n),
        num_cpus=task_cpus,
        ray_remote_args={"scheduling_strategy": near_this_node()},
    )
    context, pause = dataset.context, cast(Any, Pause)
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # the thread that polls a task's memory took 5 % of the task's time
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, pause]
    # Ray Data passes a block on when it exceeds this size, and splits it from 1.5 times the size on. With 0.95 of its
    # size, a block of _read stays as it is.
    context.target_max_block_size = max(1, int(0.95 * per_block * row_bytes(config)))
    context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=float(store_bytes(config, micro or batch_size // world, batch_size // world, tasks))
    )
    return dataset


def block_rows(config: StreamConfig, micro: int, share: int) -> tuple[int, int]:
    """Return the rows of a block and of a task.

    A block has a whole number of micro-batches, which are then views of it, or is a whole fraction of one. With buckets
    a block lies within one global batch, since its rows have one size.

    Args:
        config: configuration of the stream.
        micro: rows of a micro-batch.
        share: rows of a global batch for this rank.
    """
    most_rows = max(1, BLOCK_BYTES // row_bytes(config))
    if most_rows < micro:
        rows = max(n for n in range(1, most_rows + 1) if micro % n == 0)
    else:
        most = max(1, min(most_rows, BLOCK_ROWS) // micro)
        rows = micro * max(n for n in range(1, most + 1) if not config.buckets or (share // micro) % n == 0)
    return rows, rows * max(1, min(TASK_ROWS, TASK_BYTES // row_bytes(config)) // rows)


def store_bytes(config: StreamConfig, micro: int, share: int, tasks: int = 2) -> int:
    """Most bytes of the object store that a rank's dataset may use; see block_rows for the arguments."""
    _, per_task = block_rows(config, micro, share)
    return max(LEAST_STORE_BYTES, 2 * tasks * per_task * row_bytes(config))


def row_bytes(config: StreamConfig) -> int:
    """Bytes of a row's pixels, in the largest bucket, and of its precomputed values."""
    area = max((h * w for h, w in config.buckets), default=config.resolution**2)
    return 3 * area * (2 if config.degrades else 1) + precomputed_columns(config).row_bytes


def _read(
    config: StreamConfig, first: int, last: int, per_block: int, place: Mapping[str, int], reads: Reads
) -> Iterator[Any]:
    """Yield the blocks of one task: a rank's local rows first..last-1."""
    from ray.data.block import BlockAccessor

    cv2.setNumThreads(1)  # a task has one core; OpenCV would use all cores
    use(reads)
    config = localized(config, reads)
    locals_of = [np.arange(begin, min(begin + per_block, last)) for begin in range(first, last, per_block)]
    for positions in with_samples(config, reads, [rank_position(local, **place) for local in locals_of]):
        yield BlockAccessor.batch_to_block(load_columns(config, positions))


def with_samples(config: StreamConfig, reads: Reads, blocks: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the positions of each block when its samples are there: those of the next block are fetched meanwhile."""
    if not reads.stores:
        yield from blocks
        return
    with ThreadPoolExecutor(1, "next-block") as pool:
        parts = [partial(prepare, config.split, samples_of(config, positions)) for positions in blocks]
        following = pool.submit(parts[0])
        for number, positions in enumerate(blocks):
            prepared = following.result()
            if number + 1 < len(blocks):
                following = pool.submit(parts[number + 1])
            yield positions
            prepared.release()
