"""Needs of workers: how they are written, which nodes can hold them, and what the refusal says."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.core import placement
from pipelines.core.errors import UsageError
from pipelines.core.placement import Needs, Node, check_placement, matches, needs_of, read_needs
from pipelines.core.pool import Pool

GIB = 2**30
NODES = [
    Node(name="head", resources={"memory": 8.0 * GIB, "node:10.0.0.1": 1.0}),
    Node(name="a", resources={"CPU": 8.0, "GPU": 2.0, "memory": 32.0 * GIB, "disk": 1.0}, labels={"group": "gpu"}),
    Node(name="b", resources={"CPU": 4.0, "memory": 16.0 * GIB}, labels={"group": "cpu"}),
]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    living = list(NODES)
    monkeypatch.setattr(placement, "living_nodes", lambda: living)
    return living


def test_needs_are_read_from_pairs_and_from_a_spec() -> None:
    pairs = [
        "workers=3",
        "cpus=0.5",
        "gpus=1",
        "memory_gib=2",
        "resources.disk=1",
        "labels.group=gpu",
        "labels.zone=!b",
    ]
    needs = Needs(
        workers=3, cpus=0.5, gpus=1.0, memory_gib=2.0, resources={"disk": 1.0}, labels={"group": "gpu", "zone": "!b"}
    )
    assert read_needs(pairs) == needs
    assert needs_of({"workers": 3, "cpus": 0.5, "gpus": 1, "memory_gib": 2, "resources": {"disk": 1},
                     "labels": {"group": "gpu", "zone": "!b"}}) == needs  # fmt: skip
    assert needs.bundle() == {"CPU": 0.5, "GPU": 1.0, "memory": 2.0 * GIB, "disk": 1.0}
    assert needs.options() == {"memory": 2 * GIB, "resources": {"disk": 1.0}, "label_selector": dict(needs.labels)}
    assert Needs().options() == {}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("worker=2", 'Did you mean "workers"'),
        ("cpus", "is not KEY=VALUE"),
        ("workers=1.5", "must be a whole number, got 1.5"),
        ("gpus=many", "must be a number, got many"),
        ("cpus=-1", "at least 0"),
        ("memory_gib=nan", "at least 0"),
        ("workers=0", "workers >= 1"),
        ("label.group=x", "unknown key"),
    ],
)
def test_a_wrong_need_is_refused(pair: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_needs([pair])


@pytest.mark.parametrize(
    ("expression", "value", "expected"),
    [
        ("gpu", "gpu", True),
        ("gpu", "cpu", False),
        ("gpu", None, False),
        ("!gpu", "cpu", True),
        ("!gpu", "gpu", False),
        ("in(a, b)", "b", True),
        ("!in(a, b)", "b", False),
        ("!in(a, b)", None, True),
    ],
)
def test_labels_match_as_rays_selectors(expression: str, value: str | None, expected: bool) -> None:
    assert matches(expression, value) is expected


@pytest.mark.parametrize(
    ("needs", "counts"),
    [
        (Needs(cpus=2), (0, 4, 2)),
        (Needs(cpus=2, gpus=1), (0, 2, 0)),
        (Needs(cpus=0.1), (0, 80, 40)),
        (Needs(cpus=1, memory_gib=9), (0, 3, 1)),
        (Needs(cpus=1, labels={"group": "cpu"}), (0, 0, 4)),
        (Needs(resources={"disk": 0.5}), (0, 2, 0)),
        (Needs(memory_gib=8), (1, 4, 2)),
    ],
)
def test_how_many_workers_a_node_holds(needs: Needs, counts: tuple[int, ...]) -> None:
    assert tuple(node.count(needs) for node in NODES) == counts


def test_what_has_no_place_is_refused_with_what_there_is(nodes: list[Node]) -> None:
    check_placement("a worker", Needs(workers=99, cpus=4))  # an elastic pool needs one place
    check_placement("a rank", Needs(workers=3, cpus=4), together=True)
    with pytest.raises(UsageError) as error:
        check_placement("a rank", Needs(workers=4, cpus=4, memory_gib=1), together=True)
    assert str(error.value) == (
        "a rank needs 4 CPU, 1 GiB, and the nodes can hold 3 of 4 at once. Ray has 3 nodes:\n"
        "  head: 8.0 GiB\n"
        "  a: 8 CPUs, 2 GPUs, 1 disk, 32.0 GiB, group=gpu\n"
        "  b: 4 CPUs, 16.0 GiB, group=cpu"
    )
    with pytest.raises(UsageError, match=r"needs 3 GPU, group=gpu, and no node has that"):
        check_placement("a worker", Needs(gpus=3, labels={"group": "gpu"}))


def test_waiting_asks_the_autoscaler_and_takes_the_request_back(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node with 4 GPUs comes after the second look."""
    requests: list[int] = []
    notes: list[str] = []
    monkeypatch.setattr(placement, "_ask_autoscaler", lambda needs, count: requests.append(count))

    def sleep(seconds: float) -> None:
        assert 0 < seconds <= placement.POLL_S
        if len(notes) == 2:
            nodes.append(Node(name="new", resources={"GPU": 4.0}))

    monkeypatch.setattr("time.sleep", sleep)

    def progress(count: int, of: int = 0, note: str = "") -> None:
        notes.append(note)

    check_placement("a rank", Needs(workers=6, gpus=1, wait_minutes=1), together=True, progress=progress)
    assert requests == [6, 0] and notes == ["waiting for nodes: 2 of 6 workers have a place"] * 2


def test_a_pool_takes_the_stated_numbers_only() -> None:
    pool = Pool(workers=2, num_gpus=1.0, batch_size=5)
    assert pool.placed(Needs()) == Pool(
        workers=2, num_gpus=1.0, batch_size=5, needs=Needs(workers=2, cpus=1.0, gpus=1.0)
    )
    placed = pool.placed(Needs(workers=8, cpus=3.0, labels={"group": "gpu"}))
    assert (placed.workers, placed.num_cpus, placed.num_gpus, placed.batch_size) == (8, 3.0, 1.0, 5)
    assert placed.needs.labels == {"group": "gpu"}
    assert Pool(workers=0).placed(Needs(workers=4)).workers == 0  # this process


def test_nodes_of_ray_are_read_without_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[dict[str, Any]] = [
        {
            "Alive": True,
            "NodeName": "a",
            "NodeManagerAddress": "10.0.0.1",
            "Resources": {"CPU": 2.0},
            "Labels": {"k": "v"},
        },
        {"Alive": False, "NodeName": "b", "NodeManagerAddress": "10.0.0.2", "Resources": {}, "Labels": {}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: entries)
    assert placement.living_nodes() == [Node(name="a", resources={"CPU": 2.0}, labels={"k": "v"})]
