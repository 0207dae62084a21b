"""The benchmark of buckets at nano size: every byte comes once, an index is mapped, and the report is complete."""

from __future__ import annotations

import bench_stream_buckets as buckets
import pytest


@pytest.mark.slow
def test_an_index_in_a_bucket_is_mapped() -> None:
    """4,000 shards: the processes share the index, and fetch the rows of a few shards of the table."""
    report = buckets.index(samples=512_000, rows=256)
    assert report["index.json"] > 250_000 and report["train.arrow"] > 20e6
    for worker in report["workers"]:
        assert worker["first_s"] > 0 and worker["opens_a_row"] <= 1.0
        assert worker["private_mb_first"] < 20


@pytest.mark.full
def test_all_arms_run_at_nano_size() -> None:
    """Without the peers' environment: webdataset of ours, and the stream in both ways."""
    arms = ("webdataset", "ours-whole", "ours-ranged")
    row = buckets.loaders(samples=64, shards=4, side=96, crop=64, rounds=1, server="moto", arms=arms)
    for arm in arms:
        assert row[arm]["requests"] > 0 and len(row[arm]["wall_ms"]) == 2
    assert row["ours-whole"]["bytes_over_shards"][1] == pytest.approx(1.0, abs=0.1)  # two epochs, with HTTP's headers
    assert row["void"] is True  # a single round shows no spread
