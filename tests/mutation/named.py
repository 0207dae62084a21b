"""Wrong versions of the training's mathematics, by name. Each is one replacement of source text that a test must refuse.

They are mistakes that a reader could make, not random edits. `old` occurs exactly once in its file, so a change of that
line must also change this list; test_named.py checks it.
"""

from __future__ import annotations

from dataclasses import dataclass

BY_HAND = ("tests/components/test_instantir_objectives_by_hand.py",)
WORKERS = ("tests/components/test_training_workers.py",)
TRAINING = ("tests/components/test_training.py",)


@dataclass(frozen=True, kw_only=True)
class Named:
    """One wrong version.

    Attributes:
        name: the mistake, in words.
        file: the file that it changes, from the top of the repository.
        old: text that occurs once in the file.
        new: the text in its place.
        tests: test files; at least one of them fails with the wrong version.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


OBJECTIVES = "components/systems/instantir/objectives.py"
NETWORK = "components/systems/instantir/network.py"
REFERENCES = "components/systems/instantir/references.py"
DIFFUSION = "components/objectives/diffusion.py"
CONSISTENCY = "components/objectives/consistency.py"
PRECOMPUTED = "components/objectives/precomputed.py"
GUIDANCE = "components/samplers/guidance.py"
TRAIN_STEP = "components/training.py"


def by_hand(name: str, file: str, old: str, new: str) -> Named:
    return Named(name=name, file=file, old=old, new=new, tests=BY_HAND)


TARGET = """        conditions = textless
        with torch.no_grad():
            target = self.network.preview(previous, end, conditions)
        student = self.network.preview(noisy, start, conditions)
"""
"""The lines of the previewer's objective that most of its wrong versions change."""


def target_lines(name: str, old: str, new: str) -> Named:
    assert TARGET.count(old) == 1, (name, old)
    return by_hand(name, OBJECTIVES, TARGET, TARGET.replace(old, new))


def teacher(name: str, old: str, new: str) -> Named:
    return by_hand(f"previewer: {name}", OBJECTIVES, old, new)


NAMED: tuple[Named, ...] = (
    # ------------------------------------------------------------------------------------ the previewer's distillation
    target_lines("previewer: student sees the prompt", "start, conditions)", "start, prompted)").__class__(
        name="previewer: student sees the prompt",
        file=OBJECTIVES,
        old=TARGET,
        new=TARGET,
        tests=BY_HAND,
    ),
)
