"""What workers need and where they may run, stated by recipe, spec or flag, and the check against the nodes there are.

Ray waits without a word for resources that no node has. So every verb checks its workers against the nodes first.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.naming import did_you_mean
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import UsageError

POLL_S = 5.0
KEY_OF_KIND = {"resources": "resources.NAME", "labels": "labels.NAME"}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Number of workers and the needs of each; None keeps what the verb takes without them.

    Attributes:
        workers: processes.
        cpus, gpus: logical ones of a worker; may be fractions.
        memory_gib: memory of a worker; Ray places by it and does not enforce it. 0: not counted.
        resources: custom resources of the cluster, by name.
        labels: labels that a worker's node must have, by name; a value may be Ray's expression such as "!spot".
        wait_minutes: how long to wait for nodes that an autoscaler may start; 0: what no node has is refused at once.
    """

    workers: int | None = None
    cpus: float | None = None
    gpus: float | None = None
    memory_gib: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    wait_minutes: float = 0.0

    def __post_init__(self) -> None:
        numbers = [self.cpus, self.gpus, self.memory_gib, self.wait_minutes, *self.resources.values()]
        if (self.workers is not None and self.workers < 1) or not all(
            number is None or 0 <= number < math.inf for number in numbers
        ):
            raise UsageError(
                "placement needs workers >= 1, and numbers of at least 0 for cpus, gpus, memory_gib, wait_minutes and "
                "resources."
            )

    def or_else(self, workers: int, cpus: float, gpus: float) -> Needs:
        """These needs with defaults in place of None."""
        return dataclasses.replace(
            self,
            workers=workers if self.workers is None else self.workers,
            cpus=cpus if self.cpus is None else self.cpus,
            gpus=gpus if self.gpus is None else self.gpus,
        )

    def bundle(self) -> dict[str, float]:
        """The resources of one worker by Ray's names; memory in bytes."""
        bundle = {"CPU": self.cpus or 0.0, "GPU": self.gpus or 0.0, "memory": self.memory_gib * 2**30}
        return {name: number for name, number in {**bundle, **self.resources}.items() if number}

    def options(self) -> dict[str, Any]:
        """The arguments of Ray's tasks and actors for everything but CPUs and GPUs."""
        options: dict[str, Any] = {}
        if self.memory_gib:
            options["memory"] = int(self.memory_gib * 2**30)
        if self.resources:
            options["resources"] = dict(self.resources)
        if self.labels:
            options["label_selector"] = dict(self.labels)
        return options


def needs_of(document: Mapping[str, Any]) -> Needs:
    """Needs of a mapping in a spec or a plan.

    Raises:
        UsageError: an unknown key, with the nearest one, or a value of a wrong type.
    """
    return read_needs([f"{key}={value}" for key, value in _flat(document)])


def _flat(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in document.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows


def read_needs(pairs: Sequence[str]) -> Needs:
    """Needs of KEY=VALUE pairs: workers, cpus, gpus, memory_gib, wait_minutes, resources.NAME and labels.NAME.

    Raises:
        UsageError: a pair has a wrong form, an unknown key (with the nearest one) or a wrong value.
    """
    values: dict[str, Any] = {}
    maps: dict[str, dict[str, Any]] = {"resources": {}, "labels": {}}
    plain = [item.name for item in dataclasses.fields(Needs) if item.name not in maps]
    for pair in pairs:
        key, equals, text = pair.partition("=")
        kind, dot, name = key.partition(".")
        if not equals or not key:
            raise UsageError(f'placement "{pair}" is not KEY=VALUE.')
        if dot and name and kind in maps:
            maps[kind][name] = text if kind == "labels" else _number(key, text, float)
        elif key in plain:
            values[key] = _number(key, text, int if key == "workers" else float)
        else:
            choices = [*plain, *KEY_OF_KIND.values()]
            raise UsageError(f'unknown key "{key}" of placement. {did_you_mean(key, choices)}')
    return Needs(**values, resources=maps["resources"], labels=maps["labels"])


def _number(key: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise UsageError(
            f"placement {key} must be {'a whole number' if kind is int else 'a number'}, got {text}."
        ) from error


# --- the check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Node:
    """A living node: its name, all its resources by Ray's names, and its labels."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def count(self, needs: Needs) -> int:
        """How many of these workers fit on this node when it is empty."""
        if not all(matches(value, self.labels.get(name)) for name, value in needs.labels.items()):
            return 0
        # Ray counts in units of 0.0001
        shares = [math.floor(self.resources.get(name, 0.0) / n + 1e-4) for name, n in needs.bundle().items()]
        return min(shares, default=needs.workers or 1)

    def line(self) -> str:
        """The node in words."""
        shown = {name: n for name, n in self.resources.items() if ":" not in name and name != "object_store_memory"}
        memory = shown.pop("memory", 0.0)
        words = [f"{n:g} {name}{'s' * (name in ('CPU', 'GPU') and n != 1)}" for name, n in sorted(shown.items())]
        own = {k: v for k, v in sorted(self.labels.items()) if not k.startswith("ray.io/node-")}
        words += [f"{memory / 2**30:.1f} GiB", *(f"{name}={value}" for name, value in own.items())]
        return f"{self.name}: {', '.join(words)}"


def matches(expression: str, value: str | None) -> bool:
    """Whether a node's label fulfils an expression of Ray: value, !value, in(a, b) or !in(a, b)."""
    text, negated = expression.strip(), expression.strip().startswith("!")
    text = text[1:] if negated else text
    is_list = text.startswith("in(") and text.endswith(")")
    choices = [part.strip() for part in text[3:-1].split(",")] if is_list else [text]
    return (value in choices) != negated


def living_nodes() -> list[Node]:
    """The nodes of the running Ray."""
    import ray

    return [
        Node(
            name=str(entry.get("NodeName") or entry["NodeManagerAddress"]),
            resources=entry["Resources"],
            labels=entry.get("Labels") or {},
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]


def check_placement(what: str, needs: Needs, together: bool = False, progress: Progress = no_progress) -> None:
    """Check that the running Ray's nodes can hold these workers, when nothing else runs.

    Args:
        what: one worker, in words.
        needs: see Needs.
        together: all workers run at once; otherwise one must fit.
        progress: tells why it waits.

    Raises:
        UsageError: they cannot; the sentence has what is there.
    """
    end, asked = time.monotonic() + 60 * needs.wait_minutes, False
    required = (needs.workers or 1) if together else 1
    try:
        while True:
            nodes = living_nodes()
            fits = sum(node.count(needs) for node in nodes)
            if fits >= required:
                return
            if time.monotonic() >= end:
                raise UsageError(refusal(what, needs, nodes, fits, required))
            if not asked:
                asked = True
                _ask_autoscaler(needs, required)
            progress(0, 0, f"waiting for nodes: {fits} of {required} workers have a place")
            time.sleep(min(POLL_S, max(0.0, end - time.monotonic())))
    finally:
        if asked:  # a request stays until it is taken back, and would keep idle nodes for ever
            _ask_autoscaler(needs, 0)


def refusal(what: str, needs: Needs, nodes: Sequence[Node], fits: int, required: int) -> str:
    """The sentence for workers that have no place."""
    wishes = [f"{number:g} {name}" for name, number in needs.bundle().items() if name != "memory"]
    wishes += [f"{needs.memory_gib:g} GiB"] * bool(needs.memory_gib)
    wishes += [f"{name}={value}" for name, value in needs.labels.items()]
    place = "no node has that" if not fits else f"the nodes can hold {fits} of {required} at once"
    lines = "".join(f"\n  {node.line()}" for node in nodes)
    return f"{what} needs {', '.join(wishes) or 'nothing'}, and {place}. Ray has {len(nodes)} nodes:{lines}"


def _ask_autoscaler(needs: Needs, count: int) -> None:
    """Ask for nodes for these workers; without an autoscaler nothing happens."""
    from ray.autoscaler.sdk import request_resources

    bundles = [needs.bundle()] * count
    request_resources(bundles=bundles, bundle_label_selectors=[dict(needs.labels)] * count if needs.labels else None)
