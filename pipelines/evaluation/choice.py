"""The choice between a fine-tuned model and the one that restores without it: the worse one is not handed on.

<out>/hq, lq               held-out pictures, degraded with the gate's seed
<out>/standard, trained    both restorations
<out>/choice.json          the verdict, see evaluation.gate, and which model was chosen
<out>/model                a copy of that model
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.recipes import Gate
from components.writing import replace_file
from pipelines.core.console import Progress
from pipelines.core.errors import GateFailed
from pipelines.core.placement import Needs
from pipelines.core.pool import Pool
from pipelines.evaluation.gate import SEED, compare, restore_arm
from pipelines.evaluation.heldout import prepare_heldout
from pipelines.restoration.models import open_model

STANDARD, TRAINED = ARMS = ("standard", "trained")
VERDICT = "choice.json"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """chosen: "standard" or "trained"; sentence: why; model: the folder of the copy."""

    chosen: str
    sentence: str
    model: Path


def choose_model(
    trained: Path,
    standard: str,
    corpus: Path,
    out: Path,
    gate: Gate,
    *,
    preset: str,
    preset_options: Mapping[str, Any],
    short_side: int = 256,
    on_ray: bool = True,
    needs: Needs = Needs(),
    progress: Progress | None = None,
) -> Choice:
    """Compare two models on a corpus's held-out pictures, and copy the trained one unless it is worse.

    Args:
        trained: model folder.
        standard: model folder or name of the other model.
        corpus: a corpus with held-out pictures; fewer than MIN_PICTURES choose the standard model.
        out: gets the files above.
        gate: the losses that are allowed, and the number of pictures.
        preset, preset_options, short_side: of the degraded pictures.
        on_ray: False restores in this process, without Ray.
        needs: of the worker.

    Raises:
        UsageError, Failure: see prepare_heldout, open_model and gate.compare.
    """
    (out / VERDICT).unlink(missing_ok=True)
    prepare_heldout(corpus, out, preset, preset_options, seed=SEED, short_side=short_side, limit=gate.pictures)
    verdict: dict[str, Any] = {}
    try:
        pool = Pool(workers=int(on_ray)).placed(needs)
        restore_arm("choose", out, STANDARD, standard, {}, pool, progress=progress)
        restore_arm("choose", out, TRAINED, trained, {}, pool, GateFailed, progress)
        result = compare(out, gate, ARMS)
        verdict, passed, why = asdict(result), result.passed, result.sentence("trained model")
    except GateFailed as error:
        passed, why = False, str(error).rstrip(".")
    chosen = TRAINED if passed else STANDARD
    source = trained if passed else open_model(standard).folder
    shutil.rmtree(out / "model", ignore_errors=True)
    shutil.copytree(source, out / "model")
    rest = "it restores" if passed else f"the standard model {standard} restores"
    sentence = f"{why[0].upper()}{why[1:]}: {rest}."
    document = {**verdict, "chosen": chosen, "standard": str(standard), "sentence": sentence}
    replace_file(out / VERDICT, (json.dumps(document, indent=1) + "\n").encode())
    return Choice(chosen=chosen, sentence=sentence, model=out / "model")
