"""Networks take turns on a device; the order of moves, with networks that only record them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from components.residence import Residence


class Traveller(nn.Module):
    """Records where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.place = "cpu"

    def to(self, *arguments: Any, **options: Any) -> Traveller:  # type: ignore[override]
        self.place = str(arguments[0])
        return self


def groups() -> tuple[dict[str, list[nn.Module]], list[Traveller]]:
    one, two, both = (Traveller() for _ in range(3))
    return {"a": [one, both], "b": [two, both]}, [one, two, both]


def test_only_the_networks_of_a_phase_are_on_the_device() -> None:
    by_phase, networks = groups()
    residence = Residence(torch.device("cuda"), by_phase, in_turns=True)
    with residence.phase("a"):
        assert [network.place for network in networks] == ["cuda", "cpu", "cuda"]
    with residence.phase("b"):
        assert [network.place for network in networks] == ["cpu", "cuda", "cuda"]
    with pytest.raises(KeyError), residence.phase("c"):
        pass


@pytest.mark.parametrize(("device", "in_turns"), [("cuda", False), ("cpu", True)])
def test_without_turns_nothing_moves(device: str, in_turns: bool) -> None:
    by_phase, networks = groups()
    with Residence(torch.device(device), by_phase, in_turns).phase("a"):
        assert [network.place for network in networks] == ["cpu", "cpu", "cpu"]
