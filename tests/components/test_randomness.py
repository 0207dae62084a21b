"""Every bit is a function of (seed, position, name)."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.randomness import Noise, generator, stream_key


def test_a_sample_draws_the_same_alone_and_in_any_batch() -> None:
    together = Noise(5, np.array([7, 3, 9])).normal("noise", (2, 4))
    alone = Noise(5, np.array([3])).normal("noise", (2, 4))
    assert torch.equal(together[1], alone[0])


def test_names_seeds_and_positions_are_independent_streams() -> None:
    draws = [
        generator(seed, position, name).random()
        for seed in (0, 1)
        for position in (0, 1, 10)
        for name in ("a", "b", "1")
    ]
    assert len(set(draws)) == len(draws)


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_an_int_and_its_text_give_different_keys(seed: int, position: int) -> None:
    assert stream_key(seed, position) != stream_key(seed, str(position))


@given(st.integers(0, 2**40), st.integers(-1, 2**40))
def test_a_generator_is_numpys_philox_with_the_key(seed: int, position: int) -> None:
    numpys = np.random.Generator(np.random.Philox(key=stream_key(seed, position, "x")))
    assert np.array_equal(generator(seed, position, "x").integers(0, 2**63, 9), numpys.integers(0, 2**63, 9))


def test_normal_is_standard() -> None:
    values = Noise(0, np.arange(64)).normal("x", (1000,))
    assert abs(float(values.mean())) < 0.02 and abs(float(values.std()) - 1) < 0.02
