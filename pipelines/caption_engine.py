"""Captions from an inference engine: pictures of a corpus go through Ray Data into vLLM, and come back as a column.

Built for ray.data.llm of Ray 2.60. Everything around the engine is tested; the engine itself needs a GPU and the extra
captions-vllm.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.captions.presets import CaptionerError, CaptionerPlan
from components.captions.text import tidy
from components.corpora import CaptionSpec
from components.types import SampleError
from pipelines.caption import unsaid
from pipelines.column_workers import MAX_BLOCKS, open_shard
from pipelines.columns import ColumnJob, ShardTask
from pipelines.errors import Failure, UsageError

ERROR = "__inference_error__"  # ray.data.llm's column; "" in rows that went well


def run_engine(
    job: ColumnJob, tasks: Sequence[ShardTask], processor: Callable[[], Callable[[Any], Any]]
) -> Iterator[dict[str, Any]]:
    """Runner of `compute_column` for an engine that takes a Ray dataset of pictures and gives back one of captions.

    Args:
        processor: makes, once Ray runs, what turns rows {split, shard, place, pixels (bytes of uint8 [H, W, 3]),
            height, width} into rows {split, shard, place, text} in any order, or with what went wrong in ERROR; it may
            leave rows out.
    """
    waiting = {}
    for task in tasks:
        shard = open_shard(job, task)
        if shard.missing():
            waiting[task.split, task.shard] = shard
        else:
            yield shard.write()
    if not waiting:
        return
    import ray

    from pipelines.cluster import local_ray, quiet_data

    with local_ray():
        quiet_data()
        rows = [{"task": json.dumps(vars(shard.task))} for shard in waiting.values()]
        work: Callable[..., Any] = _pictures_of
        pictures = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).flat_map(
            work, fn_kwargs={"job": job}
        )
        try:
            for row in processor()(pictures).iter_rows():
                place = str(row["split"]), int(row["shard"])
                shard = waiting[place]
                text, error = tidy(str(row.get("text") or "")), str(row.get(ERROR) or "")
                shard.settle(int(row["place"]), SampleError("failed", error) if error else text or unsaid())
                if not shard.missing():
                    yield waiting.pop(place).write()
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise Failure(f"the engine ended ({type(error).__name__}: {reason}); the same command continues") from error
    for shard in waiting.values():  # what never reached the engine could not be read; say why
        for missed in shard.missing():
            picture = shard.read(missed)
            silent = SampleError("failed", "the engine gave no answer")
            found = picture.found if isinstance(picture.found, SampleError) else silent
            shard.settle(missed, found, picture.sha256)
        yield shard.write()


def _pictures_of(row: Mapping[str, Any], job: ColumnJob) -> list[dict[str, Any]]:
    """Rows of one shard's pictures; what cannot be read is left out here, and quarantined by the caller."""
    task = ShardTask(**json.loads(row["task"]))
    shard = open_shard(job, task)
    read = (shard.read(place) for place in shard.missing())
    return [
        {
            "split": task.split,
            "shard": task.shard,
            "place": picture.place,
            "pixels": picture.found.tobytes(),
            "height": picture.found.shape[0],
            "width": picture.found.shape[1],
        }
        for picture in read
        if not isinstance(picture.found, SampleError)
    ]


def vllm_processor(plan: CaptionerPlan, spec: CaptionSpec) -> Callable[[Any], Any]:
    """vLLM behind ray.data.llm, as `run_engine` takes it.

    Pictures go as data and never as addresses, and the question goes as token ids made by the model's own template:
    the engine needs neither its multimodal stage nor its template stage, and asks exactly what transformers would.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from components.captions.transformer import prompt_ids

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
    """What ray.data.llm's engine stage reads: greedy decoding of the question about one picture."""
    from PIL import Image as Pillow

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
    """What `run_engine` reads. Rows that failed bypass this function and stay as they are."""
    return {**{name: row[name] for name in ("split", "shard", "place")}, "text": row["generated_text"]}
