"""Which calls are captured, kept and copied. Tests replace a GPU's graphs by functions of fixed tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from components import cuda_graphs
from components.cuda_graphs import GraphedFunction, can_record


class CpuRecording:
    """cuda_graphs._Recording, but it calls the function instead of replaying a graph."""

    count = 0

    def __init__(self, function: cuda_graphs.Function, changing: Sequence[Tensor], constant: Sequence[Tensor]) -> None:
        CpuRecording.count += 1
        self.function, self.source = function, constant
        self.changing, self.constant = [t.clone() for t in changing], [t.clone() for t in constant]

    def fits(self, constant: Sequence[Tensor]) -> bool:
        return [t.shape for t in constant] == [t.shape for t in self.constant]

    def __call__(self, changing: Sequence[Tensor], constant: Sequence[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self.changing, list(changing))
        if constant is not self.source:
            torch._foreach_copy_(self.constant, list(constant))
            self.source = constant
        return [t.clone() for t in self.function(self.changing, self.constant)]


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_Recording", CpuRecording)
    CpuRecording.count = 0


def product(changing: Sequence[Tensor], constant: Sequence[Tensor]) -> Sequence[Tensor]:
    return (changing[0] * constant[0], changing[0] + changing[1])


def test_each_form_is_captured_once_and_results_are_copies() -> None:
    graph, by = GraphedFunction(product), [torch.full((3,), 2.0)]
    first = graph([torch.ones(3), torch.ones(3)], by)
    second = graph([torch.full((3,), 5.0), torch.ones(3)], by)
    assert first[0].tolist() == [2.0] * 3 and second[0].tolist() == [10.0] * 3 and second[1].tolist() == [6.0] * 3
    assert CpuRecording.count == 1
    graph([torch.ones(4), torch.ones(4)], [torch.ones(4)])
    graph([torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)], by)
    assert CpuRecording.count == 3


def test_constant_tensors_are_copied_when_they_are_another_object() -> None:
    graph, one = GraphedFunction(product), [torch.full((3,), 2.0)]
    x = [torch.ones(3), torch.ones(3)]
    assert graph(x, one)[0].tolist() == [2.0] * 3
    assert graph(x, [torch.full((3,), 7.0)])[0].tolist() == [7.0] * 3
    assert graph(x, one)[0].tolist() == [2.0] * 3
    assert CpuRecording.count == 1


def test_other_values_make_a_separate_recording() -> None:
    graph, by = GraphedFunction(product), [torch.ones(3)]
    for also in ("a", "b", "a"):
        graph([torch.ones(3), torch.ones(3)], by, also)
    assert CpuRecording.count == 2


def test_the_least_recently_used_graph_is_dropped() -> None:
    graph = GraphedFunction(product, limit=2)

    def call(size: int) -> None:
        graph([torch.ones(size), torch.ones(size)], [torch.ones(size)])

    for size in (1, 2, 1, 3, 1):
        call(size)
    assert CpuRecording.count == 3
    call(2)
    assert CpuRecording.count == 4


def test_a_cpu_cannot_record() -> None:
    with torch.no_grad():
        assert not can_record(torch.device("cpu"))
