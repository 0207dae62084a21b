"""`restoray.dataset` yields the rows of the training stream, for any number of DataLoader workers and ranks."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image as Pillow
from torch.utils.data import DataLoader

import restoray
from pipelines.corpus.shards import write_corpus
from pipelines.stream.ordering import rank_positions
from pipelines.stream.rows import load_row
from pipelines.training.inputs import TrainInputs, stream_config
from pipelines.training.recipes import load_checked_recipe

SETTINGS = {"resolution": 32, "short_side": 40, "seed": 7, "captioner": "manifest"}
PRESET = "realesrgan-nano"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eleven noisy pictures in shards of two, and one that cannot be read."""

    def picture(number: int) -> bytes:
        target = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (48, 60, 3), dtype=np.uint8)
        Pillow.fromarray(noise).save(target, "PNG")
        return target.getvalue()

    pictures = {f"t{number}": picture(number) for number in range(11)} | {"broken": picture(11)[:900]}
    splits = {
        "train": [(key, "png", data, {"caption": f"caption of {key}"}) for key, data in pictures.items()],
        "held_out": [("h0", "png", picture(20), {"caption": "c"})],
    }
    folder = tmp_path_factory.mktemp("dataset") / "corpus"
    write_corpus(folder, "test", splits, samples_per_shard=2)
    return str(folder)


def stream_rows(data: Any, positions: Any) -> list[dict[str, Any]]:
    """The stream's own rows, from the configuration of the pipeline's last stage."""
    return [load_row(data.pipeline[-1].config, int(position)) for position in positions]


def assert_equal(samples: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    assert len(samples) == len(rows)
    for sample, row in zip(samples, rows, strict=True):
        assert sample["__key__"] == row["key"] and int(sample["position"]) == row["position"]
        assert np.array_equal(sample["hq"], row["hq"]) and np.array_equal(sample["lq"], row["lq"])
        assert sample["plan"] == json.loads(row["plan"]) and sample["prompt"] == row["prompt"]
        assert np.array_equal(sample["sizes"], row["sizes"]) and sample["replaced"] == row["replaced"]


def test_500_samples_equal_the_stream_of_a_training(corpus: str) -> None:
    """The configuration is that of a recipe's training, from the training's own code."""
    overrides = ["resolution=32", "short_side=40", "captioner=manifest", "sources={corpus: 0.7, dead_leaves: 0.3}"]
    recipe = load_checked_recipe("unetres-regression-finetune", overrides)
    config = stream_config(recipe, TrainInputs(corpora={"corpus": Path(corpus)}))
    data = restoray.dataset(
        corpus,
        recipe="unetres-regression-finetune",
        resolution=32,
        short_side=40,
        captioner="manifest",
        sources={"corpus": 0.7, "dead_leaves": 0.3},
        stop=500,
    )
    samples = list(data)
    assert_equal(samples, [load_row(config, position) for position in range(500)])
    assert any(sample["replaced"] for sample in samples) and any("dead" in sample["__key__"] for sample in samples)
    assert sum(not np.array_equal(sample["hq"], sample["lq"]) for sample in samples) > 400


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [0, 4])
def test_any_number_of_workers_gives_the_same_order(corpus: str, workers: int, batch_size: int) -> None:
    data = restoray.dataset(corpus, PRESET, batch_size=batch_size, start=8, stop=32, **SETTINGS)
    units = list(DataLoader(data, batch_size=None, num_workers=workers))
    samples = units
    if batch_size:
        assert len(units) == 6 and units[0]["lq"].shape == (4, 32, 32, 3) and units[0]["lq"].dtype == torch.uint8
        samples = [{name: column[n] for name, column in unit.items()} for unit in units for n in range(4)]
    assert_equal(samples, stream_rows(data, range(8, 32)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_part_of_each_global_batch(corpus: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = restoray.dataset(corpus, PRESET, batch_size=3, stop=24, **SETTINGS)
    positions = [int(p) for batch in DataLoader(data, batch_size=None, num_workers=2) for p in batch["position"]]
    assert positions == rank_positions(0, 24, 6, rank, 2).tolist()


def test_it_is_a_webdataset_pipeline(corpus: str) -> None:
    data = restoray.dataset(corpus, PRESET, **SETTINGS)
    assert isinstance(data, webdataset.DataPipeline)
    pairs = list(data.to_tuple("lq", "hq").slice(5))
    assert_equal(list(islice(data, 5)), stream_rows(data, range(5)))
    assert np.array_equal(pairs[4][0], stream_rows(data, [4])[0]["lq"])
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=2).slice(4)
    assert [int(sample["position"]) for sample in loader] == [0, 1, 2, 3]
    again = pickle.loads(pickle.dumps(data))  # for workers that are spawned
    assert_equal(list(islice(again, 2)), stream_rows(data, range(2)))


def test_without_a_degradation_lq_is_hq(corpus: str) -> None:
    sample = next(iter(restoray.dataset(corpus, "", **SETTINGS)))
    assert np.array_equal(sample["lq"], sample["hq"]) and sample["plan"] == {}


def test_several_corpora_by_weight(corpus: str) -> None:
    data = restoray.dataset({corpus: 1, "dead_leaves": 3}, PRESET, stop=200, **SETTINGS)
    keys = [sample["__key__"] for sample in data]
    assert 120 <= sum(key.startswith("dead-leaves") for key in keys) <= 180


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"degradation": "realesrgam"}, 'Did you mean "realesrgan'),
        ({"resolutoin": 64}, 'Did you mean "resolution"'),
        ({"crop": "centre"}, 'Did you mean "center"'),
        ({"start": 3, "batch_size": 4}, "multiples of batch_size"),
        ({"stop": 0}, "stop above start"),
        ({"recipe": "swinir-nanno"}, 'Did you mean "swinir-nano"'),
        ({"recipe": "swinir-nano", "degradation": "none"}, "a recipe has its own degradation"),
    ],
)
def test_a_mistake_is_one_sentence(corpus: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(restoray.UsageError, match=sentence):
        restoray.dataset(corpus, **arguments)
    with pytest.raises(restoray.UsageError, match="there is no folder nowhere"):
        restoray.dataset("nowhere")


def test_an_endless_stream_goes_through_epochs(corpus: str) -> None:
    def keys(samples: Iterator[dict[str, Any]]) -> list[str]:
        return [sample["__key__"] for sample in samples]

    data = restoray.dataset(corpus, "", **SETTINGS)
    epochs = keys(islice(iter(data), 24))
    assert set(epochs[:12]) == set(epochs[12:]) == {f"t{n}" for n in range(11)} and epochs[:12] != epochs[12:]
