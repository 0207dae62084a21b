"""Parameters of the service are read as the command line reads them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from components.options import TEXTS
from components.overrides import read_options
from components.restoring import Ask, parse_ask, picture_seed
from pipelines.restoration.models import option_check
from pipelines.service.front import Refusal, ServeLimits, read_parameters

LIMITS = ServeLimits(max_output_pixels=100_000_000)  # as in a batch job
WORDS = ("0x10", "0b11", "1_0", "010", " 3 ", "1e1", "\u0661\u0662", "\uff13", "\ufeff3", "\xa03", "null", "~", "yes")


@pytest.mark.parametrize("name", ["steps", "cfg_scale", "adaptive_clamp", "view", "scale", "png_level", "prompt"])
@pytest.mark.parametrize("word", WORDS)
def test_the_service_and_the_command_line_agree_on_a_word(name: str, word: str) -> None:
    check = option_check("instantir", {})
    by_command = _answer(lambda: parse_ask(read_options([f"{name}={word}"], TEXTS), check))
    assert by_command == _answer(lambda: read_parameters({name: word}, LIMITS, check)[2])


def _answer(read: Callable[[], Ask]) -> Ask | str:
    try:
        return read()
    except (ValueError, Refusal):
        return "refused"


def test_a_seed_is_a_whole_number_and_a_key_a_text() -> None:
    assert read_parameters({"seed": "null", "key": "010"}, LIMITS, dict)[:2] == ("010", picture_seed(0, "010"))
    assert read_parameters({"seed": "0x10"}, LIMITS, dict)[1] == 16
    for seed in ("true", "3.0", "-1", "x", "[3]", ""):
        with pytest.raises(Refusal, match="seed must be"):
            read_parameters({"seed": seed}, LIMITS, dict)
