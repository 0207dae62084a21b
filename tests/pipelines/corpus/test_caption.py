"""Captions of a corpus as a column, the code around the engine, and captions for a stream through a cache."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helper_modules import load_helper

from components.captions.presets import build_captioner, resolve_captioner
from components.captions.tags import describe
from components.corpora import CaptionSpec
from components.images import encode_png
from components.synthetic import dead_leaves
from components.types import Image, SampleError
from pipelines.core.errors import Failure, UsageError
from pipelines.core.rows import read_lines
from pipelines.corpus.columns.caption_engine import run_engine, vllm_processor
from pipelines.corpus.columns.captioners import (
    Batcher,
    CaptionCache,
    CaptionerPool,
    in_equal_batches,
    picture_sha256,
    start_captioner_pool,
)
from pipelines.corpus.columns.captions import CaptionOptions, caption_corpus, existing_caption
from pipelines.corpus.columns.computing import compute_column
from pipelines.corpus.columns.reading import open_column
from pipelines.corpus.columns.spec import ColumnSpec
from pipelines.corpus.shards import Corpus, write_corpus

TAGS = CaptionSpec(model="tags", workers=0)
IDENTITY = {"model": "m", "prompt": "p", "digest": "0" * 64}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = load_helper("components/_captioners.py").save_llava(tmp_path_factory.mktemp("llava") / "model")
    return folder


def picture(number: int) -> Image:
    return dead_leaves(24 + 4 * number, 0, number)


def make_corpus(
    folder: Path, captions: Sequence[str] = ("", "a lake\nat dawn ", "", "", ""), spoilt: int = -1
) -> Corpus:
    samples = []
    for number, caption in enumerate(captions):
        data = encode_png(picture(number))
        data = data[: len(data) // 2] if number == spoilt else data
        samples.append((f"picture-{number}", "png", data, {"caption": caption}))
    return write_corpus(folder, "test", {"train": samples}, samples_per_shard=2)


def values(corpus: Corpus, name: str = "captions") -> list[Any]:
    column = open_column(corpus, name)
    return [column.value("train", number) for number in range(len(corpus.split("train")))]


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_a_corpus_is_captioned_and_its_own_captions_pass(tmp_path: Path) -> None:
    corpus, calls = make_corpus(tmp_path / "corpus"), []
    result = caption_corpus(corpus.folder, TAGS, progress=lambda count, of=0, note="": calls.append((count, of)))
    expected = [describe(picture(number)) for number in range(5)]
    assert values(corpus) == [expected[0], "a lake at dawn", *expected[2:]]
    assert (result.samples, result.given, result.quarantined, result.reused) == (5, 1, 0, 0)
    assert calls[-1] == (5, 5)
    column = open_column(corpus, "captions")
    assert column.kind == "text"
    assert column.provenance("train", 0)["producer"] == result.producer
    assert (
        result.producer["model"] == "tags" and result.producer["digest"] == resolve_captioner("tags").identity["digest"]
    )
    assert column.provenance("train", 1)["producer"] == {"name": "corpus"}
    assert caption_corpus(corpus.folder, TAGS).reused == 3


def test_overwrite_captions_everything(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    caption_corpus(corpus.folder, TAGS)
    result = caption_corpus(corpus.folder, CaptionSpec(model="tags", workers=0, overwrite=True))
    assert (result.given, result.reused) == (0, 0)
    assert values(corpus)[1] == describe(picture(1))


def test_a_model_captions_a_corpus(tmp_path: Path, llava: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", spoilt=2)
    spec = CaptionSpec(model=str(llava), prompt="describe this picture", max_tokens=8, workers=0, batch_size=3)
    result = caption_corpus(corpus.folder, spec, name="llava")
    captioner = build_captioner(str(llava), prompt="describe this picture", max_tokens=8)
    expected = captioner.caption([picture(number) for number in range(5)])
    assert all(expected)
    assert values(corpus, "llava") == [expected[0], "a lake at dawn", None, *expected[3:]]
    assert result.reasons == {"truncated": 1}
    producer = json.loads((result.folder / "column.json").read_text())["producer"]
    assert producer == {**captioner.identity, "view": "hq", "overwrite": False, "engine": "transformers"}
    with pytest.raises(UsageError, match="another producer"):
        caption_corpus(corpus.folder, TAGS, name="llava")


def test_empty_captions_are_quarantined(tmp_path: Path, llava: Path) -> None:
    """With one token, a text that ends at once is empty."""
    spec = CaptionSpec(model=str(llava), prompt="describe this picture", max_tokens=1, workers=0, overwrite=True)
    texts = build_captioner(str(llava), prompt=spec.prompt, max_tokens=1).caption([picture(n) for n in range(12)])
    assert "" in texts and len(set(texts)) > 1
    corpus = make_corpus(tmp_path / "corpus", captions=[""] * 12)
    result = caption_corpus(corpus.folder, spec, options=CaptionOptions(max_bad_fraction=1.0))
    assert values(corpus) == [text or None for text in texts]
    assert result.reasons == {"empty_caption": texts.count("")}


def test_existing_captions_are_tidied() -> None:
    assert existing_caption({"key": "a", "caption": " two\n words "}) == "two words"
    assert existing_caption({"key": "a", "caption": " \n"}) is None
    assert existing_caption({"key": "a"}) is None


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (CaptionSpec(model="lava"), {}, 'Did you mean "llava"'),
        (CaptionSpec(model="tags", prompt="p"), {}, "neither a revision nor a prompt"),
        (CaptionSpec(model="llava"), {"engine": "vlm"}, 'Did you mean "vllm"'),
        (CaptionSpec(model="tags"), {"engine": "vllm"}, "has no model"),
        (CaptionSpec(model="llava"), {"engine": "vllm"}, r"pip install \"restoray\[captions-vllm\]\""),
        (CaptionSpec(model="tags"), {"view": "hk"}, 'Did you mean "hq"'),
    ],
)
def test_wrong_options_are_refused_with_one_sentence(
    tmp_path: Path, spec: CaptionSpec, options: dict[str, str], message: str
) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    with pytest.raises(UsageError, match=message) as error_info:
        caption_corpus(corpus.folder, spec, options=CaptionOptions(**options))
    assert "\n" not in str(error_info.value)
    assert not (corpus.folder / "columns").exists()


def test_a_view_of_a_system_can_be_captioned(tmp_path: Path) -> None:
    def negative(hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        assert hq is not None
        return 255 - hq

    corpus = make_corpus(tmp_path / "corpus", captions=["", ""])
    options = CaptionOptions(view="negative", views={"negative": negative})
    result = caption_corpus(corpus.folder, TAGS, options=options)
    assert values(corpus) == [describe(255 - picture(0)), describe(255 - picture(1))]
    assert result.producer["view"] == "negative"


# --- the engine's plumbing --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_reach_an_engine_and_answers_find_their_rows(tmp_path: Path, llava: Path, ray_session: None) -> None:
    """Ray's own processor. In the place of the engine, a stage returns its own input, and fails on one row."""
    from ray.llm._internal.batch.processor.base import OfflineProcessorConfig, Processor
    from ray.llm._internal.batch.stages.base import StatefulStage, StatefulStageUDF

    from pipelines.corpus.columns.caption_engine import engine_answer, engine_question

    class Echo(StatefulStageUDF):  # a local class travels by value
        async def udf(self, batch: Any) -> Any:
            for row in batch:
                image, sampling = row["multimodal_data"]["image"], row["sampling_params"]
                text = f"{image.size} {row['tokenized_prompt']} {sampling['temperature']} {sampling['max_tokens']}\n"
                error = "" if image.size != (36, 36) else "EngineError: no room"
                yield {"__idx_in_batch": row["__idx_in_batch"], "generated_text": text, "__inference_error__": error}

    def processor() -> Any:
        config = OfflineProcessorConfig(model_source="", batch_size=2, should_continue_on_error=True)
        stage = StatefulStage(fn=Echo, fn_constructor_kwargs={}, map_batches_kwargs={"concurrency": 1})
        return Processor(
            config, [stage], preprocess=lambda row: engine_question(row, [7, 8], 9), postprocess=engine_answer
        )

    corpus = make_corpus(tmp_path / "corpus", spoilt=0)
    result = compute_column(
        corpus.folder,
        ColumnSpec(name="captions", kind="text", producer={"model": "echo"}, existing=existing_caption),
        run=lambda job, tasks: run_engine(job, tasks, processor),
    )
    assert values(corpus) == [None, "a lake at dawn", "(32, 32) [7, 8] 0.0 9", None, "(40, 40) [7, 8] 0.0 9"]
    codes = {row["key"]: (row["code"], row["detail"]) for row in read_lines(result.folder / "quarantine.jsonl")}
    assert codes["picture-0"][0] == "truncated"
    assert codes["picture-3"] == ("failed", "EngineError: no room")

    # ray.data.llm accepts the real configuration; a test without vLLM can check no more.
    plan = resolve_captioner(str(llava))
    assert vllm_processor(plan, CaptionSpec(model=str(llava), num_gpus=2)).list_stage_names() == ["vLLMEngineStage"]


# --- on the fly -------------------------------------------------------------------------------------------------------


def name_of(number: int) -> str:
    return picture_sha256(picture(number))


def test_pictures_are_named_by_their_pixels() -> None:
    zeros = np.zeros((4, 6, 3), np.uint8)
    names = [picture_sha256(image) for image in (zeros, zeros.reshape(6, 4, 3), zeros.astype(np.float32), zeros + 1)]
    assert len(set(names)) == 4
    assert picture_sha256(zeros.copy(order="F")) == names[0]


def test_a_cache_reads_the_captions_of_all_writers(tmp_path: Path) -> None:
    one, two = CaptionCache(tmp_path, IDENTITY), CaptionCache(tmp_path, IDENTITY)
    assert one.get([name_of(0)]) == [None]
    one.put({name_of(0): "naïve 日本\u2028x", name_of(1): "b"})
    assert two.get([name_of(1), name_of(2), name_of(0)]) == ["b", None, "naïve 日本\u2028x"]
    two.put({name_of(2): "c"})
    one.put({name_of(3): "d"})
    assert one.get([name_of(2), name_of(3)]) == ["c", "d"]
    assert CaptionCache(tmp_path, IDENTITY).get([name_of(n) for n in range(4)]) == ["naïve 日本\u2028x", "b", "c", "d"]
    files = sorted(path.name for path in tmp_path.rglob("*.jsonl"))
    assert len(files) == 2
    assert CaptionCache(tmp_path, {**IDENTITY, "prompt": "q"}).get([name_of(0)]) == [None]


def test_a_copy_in_another_process_writes_to_a_file_of_its_own(tmp_path: Path) -> None:
    cache = CaptionCache(tmp_path, IDENTITY)
    cache.put({name_of(0): "a"})
    copy = pickle.loads(pickle.dumps(cache))
    copy.put({name_of(1): "b"})
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2
    assert cache.get([name_of(1)]) == ["b"] and copy.get([name_of(0)]) == ["a"]


def test_a_cache_that_somebody_tidies_up_or_cuts_has_no_captions(tmp_path: Path) -> None:
    cache, other = CaptionCache(tmp_path, IDENTITY), CaptionCache(tmp_path, IDENTITY)
    other.put({name_of(0): "a", name_of(1): "b"})
    assert cache.get([name_of(0), name_of(1)]) == ["a", "b"]
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[1])
    assert cache.get([name_of(0), name_of(1)]) == [None, None]
    file.unlink()
    assert cache.get([name_of(0), name_of(1)]) == [None, None]


def test_damaged_lines_are_ignored(tmp_path: Path) -> None:
    cache = CaptionCache(tmp_path, IDENTITY)
    cache.put({name_of(number): f"caption {number}" for number in range(3)})
    (path,) = tmp_path.rglob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    incomplete = lines[2][:-9]
    path.write_bytes(lines[0].replace(b"caption 0", b"caption 9") + b"\xff{}\nnull\n[1]\n" + lines[1] + incomplete)
    late = CaptionCache(tmp_path, IDENTITY)
    assert late.get([name_of(number) for number in range(3)]) == [None, "caption 1", None]
    path.write_bytes(path.read_bytes() + lines[2][-9:])  # the writer adds the rest of the line
    assert late.get([name_of(2)]) == ["caption 2"]


def test_many_threads_may_share_a_cache(tmp_path: Path) -> None:
    cache, names = (
        CaptionCache(tmp_path, IDENTITY),
        [picture_sha256(np.full((2, 2, 3), n, np.uint8)) for n in range(64)],
    )

    def write(part: int) -> None:
        for place in range(part, len(names), 4):
            cache.put({names[place]: f"caption {place}"})
            assert cache.get([names[place]]) == [f"caption {place}"]

    threads = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert CaptionCache(tmp_path, IDENTITY).get(names) == [f"caption {place}" for place in range(64)]


def test_callers_share_batches() -> None:
    sizes: list[int] = []

    def work(images: Sequence[Image]) -> list[int]:
        sizes.append(len(images))
        time.sleep(0.05)  # so that other callers wait meanwhile
        return [int(image[0, 0, 0]) for image in images]

    batcher, answers = Batcher(work, batch_size=4), dict[int, list[int]]()

    def ask(number: int) -> None:
        answers[number] = batcher([np.full((1, 1, 3), number, np.uint8), np.full((1, 1, 3), 100 + number, np.uint8)])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [number, 100 + number] for number in range(9)}
    assert sum(sizes) == 18 and max(sizes) == 4 and len(sizes) < 9
    assert batcher([]) == []


def test_batches_hold_pictures_of_one_shape() -> None:
    shapes = [(4, 4, 3), (4, 6, 3), (4, 4, 3), (4, 4, 3), (4, 6, 3)]
    images = [np.full(shape, number, np.uint8) for number, shape in enumerate(shapes)]
    calls: list[list[int]] = []

    def work(batch: Sequence[Image]) -> list[Any]:
        assert len({image.shape for image in batch}) == 1
        calls.append([int(image[0, 0, 0]) for image in batch])
        return [f"{image[0, 0, 0]}" for image in batch]

    assert in_equal_batches(work, images, 2) == ["0", "1", "2", "3", "4"]
    assert calls == [[0, 2], [3, 3], [1, 4]]


class _Actor:
    """The part of an actor that a pool uses, in this process."""

    def __init__(self, answers: Sequence[Any]) -> None:
        self.answers, self.caption = iter(answers), self

    def remote(self, images: Sequence[Image]) -> Any:
        import ray

        return ray.put([next(self.answers) for _ in images])


@pytest.mark.slow
def test_an_empty_answer_is_cached_and_a_failed_one_is_repeated(tmp_path: Path, ray_session: None) -> None:
    silence, failure = SampleError("empty_caption", "nothing"), SampleError("failed", "no room")
    pool = CaptionerPool(
        [_Actor(["a", silence, failure, "b"])], {**IDENTITY, "short_side_px": 0}, CaptionCache(tmp_path, IDENTITY), 8
    )
    pictures, names = [picture(n) for n in range(3)], [name_of(n) for n in range(3)]
    codes = [getattr(answer, "code", answer) for answer in pool.answers(pictures, names)]
    assert codes == ["a", "empty_caption", "failed"]
    copy = pickle.loads(pickle.dumps(CaptionerPool([], pool.identity, pool.cache, 8)))
    again = pickle.loads(pickle.dumps(copy))
    assert copy.cache is again.cache  # one per process
    codes = [getattr(answer, "code", answer) for answer in pool.answers(pictures, names)]
    assert codes == ["a", "empty_caption", "b"]  # only the failed picture was sent again
    assert copy.cache.get(names) == ["a", "", "b"]


@pytest.mark.full
def test_a_picture_that_kills_its_captioner_does_not_affect_other_pictures(ray_session: None) -> None:
    import ray

    class Deadly:
        def caption(self, images: Sequence[Image]) -> list[str]:
            if any(int(image.max()) == 0 for image in images):
                os._exit(1)
            return [describe(image) for image in images]

    actor: Any = ray.remote(Deadly).options(num_cpus=0.1, max_restarts=-1, max_task_retries=1)
    pool = CaptionerPool([actor.remote()], {**IDENTITY, "short_side_px": 0}, None, 4)
    pictures = [picture(0), np.zeros((24, 24, 3), np.uint8), picture(1), picture(2)]
    answers = pool.answers(pictures, [f"{n:064x}" for n in range(4)])
    assert [answers[n] for n in (0, 2, 3)] == [describe(picture(n)) for n in range(3)]
    assert getattr(answers[1], "code", "") == "crashed"
    pool.close()


@pytest.fixture
def pool(tmp_path: Path, ray_session: None) -> Iterator[CaptionerPool]:
    pool = start_captioner_pool(CaptionSpec(model="tags", workers=2, batch_size=2), tmp_path / "cache")
    yield pool
    pool.close()


@pytest.mark.slow
def test_a_pool_works_in_other_processes_and_caches(pool: CaptionerPool, tmp_path: Path) -> None:
    import ray

    pictures = [picture(number) for number in range(5)]
    names, expected = [picture_sha256(p) for p in pictures], [describe(p) for p in pictures]
    assert pool.captions(pictures[:3], names[:3]) == expected[:3]
    again = [*pictures, pictures[0]]
    assert pool.captions(again, [*names, names[0]]) == [*expected, expected[0]]
    rows = [row for path in (tmp_path / "cache").rglob("*.jsonl") for row in read_lines(path)]
    assert sorted(row["picture"] for row in rows) == sorted(names)  # each picture was sent once

    def elsewhere(there: Any, another: Any) -> Any:
        return there.captions([another], ["ab" * 32])

    another = picture(7)
    assert ray.get(ray.remote(elsewhere).remote(pool, another)) == [describe(another)]
    with pytest.raises(SampleError, match="expected") as error_info:  # no RGB picture
        pool.captions([pictures[1], np.zeros((9, 9), np.uint8), another], [names[1], "cd" * 32, "ef" * 32])
    assert error_info.value.key == "cd" * 32
    pool.close()
    assert pool.captions([*pictures, another], [*names, "ef" * 32]) == [*expected, describe(another)]
    with pytest.raises(Failure, match="the captioners have ended"):
        pool.captions([picture(8)], [name_of(8)])


@pytest.mark.full
def test_a_pool_of_a_broken_model_does_not_start(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(Failure, match=r"cannot be started: .*'bert' model"):
        start_captioner_pool(CaptionSpec(model=str(tmp_path)))
