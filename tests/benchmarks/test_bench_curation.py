"""The benchmark of a curation's pass runs, at a size that takes a second; nothing here is timed."""

from __future__ import annotations

import bench_curation as bench


def test_every_arm_is_measured_and_decoding_alone_is_cheapest() -> None:
    data = bench.pictures(None, 128, 2)
    assert len(data) == 2 and data[0] != data[1]
    found = bench.measure(data, rounds=1)
    assert set(found) == set(bench.arms())
    assert found[bench.BASE]["rate_of_decode_only"] == 1
    for name, arm in bench.arms().items():
        assert arm(data[0]) is not None, name
    shape, sharpness, digest, print_ = bench.arms()["named, and fingerprint"](data[0])
    assert shape == (128, 128, 3) and sharpness > 0 and len(digest) == 32 and len(print_) == 4
