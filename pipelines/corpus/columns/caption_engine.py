"""Captions from an inference engine: Ray Data takes the pictures of a corpus to vLLM, and the captions to a column.

Written for ray.data.llm of Ray 2.60. Tests cover everything but the engine, which needs a GPU and the extra
captions-vllm.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from components.captions.identity import CaptionerError, CaptionerPlan
from components.captions.text import empty_caption, tidy
from components.captions.transformer import prompt_ids
from components.corpora import CaptionSpec
from components.types import SampleError
from pipelines.core.cluster import quiet_data, running_ray
from pipelines.core.errors import UsageError
from pipelines.core.pool import MAX_BLOCKS, ray_errors
from pipelines.corpus.columns.spec import ColumnJob, ShardAnswer, ShardTask
from pipelines.corpus.columns.workers import OpenShard, open_shard

ERROR = "__inference_error__"  # ray.data.llm's column; "" in rows without an error


def run_engine(
    job: ColumnJob, tasks: Sequence[ShardTask], processor: Callable[[], Callable[[Any], Any]]
) -> Iterator[ShardAnswer]:
    """Runner of `compute_column` for an engine that turns a Ray dataset of pictures into one of captions.

    The driver holds a task of each shard, and only the shards that the engine is working on: the workers open the rest.

    Args:
        processor: called once, when Ray runs; returns the engine. It turns rows {split, shard, place, pixels (bytes of
            uint8 [H, W, 3]), height, width} into rows {split, shard, place, text}, in any order; a row with an error
            has it in ERROR. Rows may be missing.
    """
    queue = deque(tasks)
    while queue and not (shard := open_shard(job, queue[0])).missing():  # without a missing caption no engine starts
        yield ShardAnswer(row=shard.write())
        queue.popleft()
    if not queue:
        return
    import ray

    waiting = {(task.split, task.shard): task for task in queue}
    shards: dict[tuple[str, int], OpenShard] = {}  # those of which the engine has answered a part
    with running_ray(), ray_errors("the engine"):
        quiet_data()
        rows = [{"task": task} for task in queue]
        work: Callable[..., Any] = _pictures_of
        pictures = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).flat_map(
            work, fn_kwargs={"job": job}
        )
        for row in processor()(pictures).iter_rows():
            place = str(row["split"]), int(row["shard"])
            shard = shards[place] if place in shards else shards.setdefault(place, open_shard(job, waiting[place]))
            text, error = tidy(str(row.get("text") or "")), str(row.get(ERROR) or "")
            shard.settle(int(row["place"]), SampleError("failed", error) if error else text or empty_caption())
            if not shard.missing():
                del waiting[place], shards[place]
                yield ShardAnswer(row=shard.write())
    for place, task in waiting.items():  # a picture that did not reach the engine could not be read: that is its error
        shard = shards.pop(place) if place in shards else open_shard(job, task)
        for number in shard.missing():
            picture = shard.read(number)
            silent = SampleError("failed", "the engine gave no answer")
            error_of_picture = picture.content if isinstance(picture.content, SampleError) else silent
            shard.settle(number, error_of_picture, picture.sha256)
        yield ShardAnswer(row=shard.write())


def _pictures_of(row: Mapping[str, Any], job: ColumnJob) -> list[dict[str, Any]]:
    """Rows of the pictures of one shard. Pictures that cannot be read are left out; the caller quarantines them."""
    task: ShardTask = row["task"]
    shard = open_shard(job, task)
    pictures = (shard.read(place) for place in shard.missing())
    return [
        {
            "split": task.split,
            "shard": task.shard,
            "place": picture.place,
            "pixels": picture.content.tobytes(),
            "height": picture.content.shape[0],
            "width": picture.content.shape[1],
        }
        for picture in pictures
        if not isinstance(picture.content, SampleError)
    ]


def vllm_processor(plan: CaptionerPlan, spec: CaptionSpec) -> Callable[[Any], Any]:
    """vLLM behind ray.data.llm, as `run_engine` takes it.

    Pictures go as data, never as addresses. The question goes as token ids, made with the model's own template. So the
    engine needs neither its multimodal stage nor its template stage, and its question equals that of transformers.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=plan.folder,
        batch_size=spec.batch_size,
        concurrency=max(1, spec.workers),
        should_continue_on_error=True,
        log_engine_metrics=False,
        engine_kwargs={
            "tensor_parallel_size": max(1, int(spec.num_gpus)),
            "limit_mm_per_prompt": {"image": 1},
            "load_format": "safetensors",
            "trust_remote_code": False,
            "seed": 0,
        },
        prepare_multimodal_stage=False,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    try:
        ids = prompt_ids(Path(plan.folder), plan.identity, plan.system)
    except CaptionerError as error:
        raise UsageError(f"{error}.") from error
    ask = functools.partial(engine_question, ids=ids, max_tokens=int(plan.identity["max_tokens"]))
    return build_processor(config, preprocess=ask, postprocess=engine_answer)


def engine_question(row: Mapping[str, Any], ids: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """Row for the engine stage of ray.data.llm: greedy decoding of the question about one picture."""
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(int(row["height"]), int(row["width"]), 3)
    return {
        "split": row["split"],
        "shard": row["shard"],
        "place": row["place"],
        "pixels": b"",  # Ray carries the input columns along
        "tokenized_prompt": list(ids),
        "multimodal_data": {"image": Pillow.fromarray(pixels)},
        "sampling_params": {"temperature": 0.0, "max_tokens": max_tokens},
    }


def engine_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Row for `run_engine`. Rows with an error bypass this function and stay as they are."""
    return {**{name: row[name] for name in ("split", "shard", "place")}, "text": row["generated_text"]}
