"""What is recorded, kept and copied; in place of a GPU's recordings, functions of tensors that stay in their places."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from components import cuda_graphs
from components.cuda_graphs import Graphed, can_record


class OnTheCpu:
    """cuda_graphs._Recording with the function called again in place of a replay."""

    made = 0

    def __init__(self, function: cuda_graphs.Function, changing: Sequence[Tensor], standing: Sequence[Tensor]) -> None:
        OnTheCpu.made += 1
        self.function, self.given = function, standing
        self.changing, self.standing = [t.clone() for t in changing], [t.clone() for t in standing]

    def fits(self, standing: Sequence[Tensor]) -> bool:
        return [t.shape for t in standing] == [t.shape for t in self.standing]

    def __call__(self, changing: Sequence[Tensor], standing: Sequence[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self.changing, list(changing))
        if standing is not self.given:
            torch._foreach_copy_(self.standing, list(standing))
            self.given = standing
        return [t.clone() for t in self.function(self.changing, self.standing)]


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_Recording", OnTheCpu)
    OnTheCpu.made = 0


def product(changing: Sequence[Tensor], standing: Sequence[Tensor]) -> Sequence[Tensor]:
    return (changing[0] * standing[0], changing[0] + changing[1])


def test_each_form_is_recorded_once_and_results_are_the_callers_own() -> None:
    graphed, by = Graphed(product), [torch.full((3,), 2.0)]
    first = graphed([torch.ones(3), torch.ones(3)], by)
    second = graphed([torch.full((3,), 5.0), torch.ones(3)], by)
    assert first[0].tolist() == [2.0] * 3 and second[0].tolist() == [10.0] * 3 and second[1].tolist() == [6.0] * 3
    assert OnTheCpu.made == 1
    graphed([torch.ones(4), torch.ones(4)], [torch.ones(4)])
    graphed([torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)], by)
    assert OnTheCpu.made == 3


def test_what_stands_is_copied_when_it_is_another() -> None:
    graphed, one = Graphed(product), [torch.full((3,), 2.0)]
    x = [torch.ones(3), torch.ones(3)]
    assert graphed(x, one)[0].tolist() == [2.0] * 3
    assert graphed(x, [torch.full((3,), 7.0)])[0].tolist() == [7.0] * 3
    assert graphed(x, one)[0].tolist() == [2.0] * 3
    assert OnTheCpu.made == 1


def test_what_else_decides_makes_a_recording_of_its_own() -> None:
    graphed, by = Graphed(product), [torch.ones(3)]
    for also in ("a", "b", "a"):
        graphed([torch.ones(3), torch.ones(3)], by, also)
    assert OnTheCpu.made == 2


def test_the_longest_unused_goes() -> None:
    graphed = Graphed(product, kept=2)

    def call(size: int) -> None:
        graphed([torch.ones(size), torch.ones(size)], [torch.ones(size)])

    for size in (1, 2, 1, 3, 1):
        call(size)
    assert OnTheCpu.made == 3
    call(2)
    assert OnTheCpu.made == 4


def test_nothing_is_recorded_on_a_cpu() -> None:
    with torch.no_grad():
        assert not can_record(torch.device("cpu"))
