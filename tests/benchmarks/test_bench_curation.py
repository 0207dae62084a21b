"""The benchmark of a curation pass runs at a size that takes a second; the test checks no times."""

from __future__ import annotations

import bench_curation as bench


def test_every_arm_is_measured_with_decoding_as_the_base() -> None:
    data = bench.pictures(None, 128, 2)
    assert len(data) == 2 and data[0] != data[1]
    results = bench.measure(data, rounds=1)
    assert set(results) == set(bench.arms())
    assert results[bench.BASE]["rate_of_decode_only"] == 1
    for name, arm in bench.arms().items():
        assert arm(data[0]) is not None, name
    shape, sharpness, digest, print_ = bench.arms()["named, and fingerprint"](data[0])
    assert shape == (128, 128, 3) and sharpness > 0 and len(digest) == 32 and len(print_) == 4
