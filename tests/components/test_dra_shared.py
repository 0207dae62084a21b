"""Several DRA models on one prior: bits of each model's own process in any order and in threads, and memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import nn

from components.models import Model, ModelCard, ModelError, load_model, save_model
from components.priors.lora import LoraFactors
from components.priors.opening import load_prior
from components.priors.resident import ResidentNetwork
from components.randomness import seeded_init
from components.systems import build_restorer
from components.systems.dra.config import AdapterConfig, LoraConfig
from components.systems.dra.network import Dra
from components.systems.sharing import SharedRestorers, build_shared_restorer, check_sharing
from components.types import Request, Restorer

hand, fast = load_helper("components/test_dra_restorer.py"), load_helper("components/test_dra_fast.py")
untrained = load_helper("benchmarks/untrained.py")


def save_maps(folder: Path, name: str, seed: int) -> Model:
    """A model on the shipped nano prior: "k" is a ControlNet without LoRA, "a" and "c" have LoRAs on other layers."""
    prior = load_prior("nano")
    lora = {"c": LoraConfig(rank=2, targets="all"), "k": LoraConfig(rank=0)}.get(name, LoraConfig(rank=2))
    network = Dra(prior, AdapterConfig(form="controlnet" if name == "k" else "adapters"), lora, seed=seed)
    with seeded_init(seed, "trained"):
        for parameter in (*network.adapters.parameters(), *network.trainable.parameters()):
            nn.init.normal_(parameter, std=0.03)
    recipe = {"restore_options": {"steps": 1, "cfg_scale": 1.0}}
    card = ModelCard(name=name, system="dra", config=network.config(), prior=dict(prior.source), recipe=recipe)
    return save_model(folder / name, card, network.parts())


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    folder = tmp_path_factory.mktemp("maps")
    return [save_maps(folder, name, seed) for seed, name in enumerate("kac")]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    folder = tmp_path_factory.mktemp("tokens")
    return [fast.save_tokens(folder, name, seed) for seed, name in enumerate("ab")]


def request(key: str = "k") -> Request:
    return Request(key=key, image=hand.picture(16, 16, key), seed=3, prompt="red")


def restore(restorer: Restorer, key: str = "k") -> np.ndarray:
    return restorer.restore([request(key)])[0].image


def alone(models: list[Model], **options: Any) -> dict[str, np.ndarray]:
    """What each model gives in a process of its own, by its digest."""
    return {model.digest: restore(build_restorer(model.path, **options)) for model in models}


CASES = [("maps", {}), ("maps", {"precision": "fp8"}), ("tokens", {})]


@pytest.mark.parametrize(("shape", "options"), CASES, ids=lambda each: each if isinstance(each, str) else str(each))
def test_every_model_gives_the_bits_that_it_gives_alone(
    shape: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """In order, back again, and four threads at once."""
    models: list[Model] = request.getfixturevalue(shape)
    models = models[-2:] if options else models  # bfloat16 is slow on a CPU
    expected = alone(models, **options)
    assert len({picture.tobytes() for picture in expected.values()}) == len(models)
    shared: Any = build_shared_restorer([model.path for model in models], **options)
    order = [model.digest for model in (*models, models[-2])]
    for digest in order:
        assert np.array_equal(restore(shared.of_model(digest)), expected[digest])
    if not options:
        assert np.array_equal(restore(shared), expected[models[0].digest])
        with ThreadPoolExecutor(4) as threads:
            often = 8 * order  # a tokenizer used by two threads at once shows in one of some ten pictures
            answers = threads.map(lambda digest: restore(shared.of_model(digest)), often)
            assert all(np.array_equal(answer, expected[digest]) for answer, digest in zip(answers, often, strict=True))


def storages(modules: list[nn.Module]) -> dict[int, int]:
    """Bytes of the distinct storages of all parameters and buffers, by address."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("shape", ["maps", "tokens"])
def test_a_further_model_costs_its_adapters_and_its_lora(shape: str, request: pytest.FixtureRequest) -> None:
    """The prior is there once, also what the fast path derives from it; kept beside are the LoRA's plain weights."""
    models: list[Model] = request.getfixturevalue(shape)[-2:]
    shared: Any = build_shared_restorer([model.path for model in models])
    one, other = (shared.of_model(model.digest) for model in models)
    assert one.network.prior is other.network.prior and one.shared.resident is other.shared.resident
    assert one.network.adapters is not other.network.adapters
    prior = list(one.network.prior.modules.values())
    own = storages(prior)
    adapters = [storages([each.network.adapters]) for each in (one, other)]
    assert not adapters[0].keys() & adapters[1].keys()
    whole = storages([*prior, one.network.adapters, other.network.adapters])
    assert sum(whole.values()) == sum(sum(each.values()) for each in (own, *adapters))
    single: Any = build_restorer(models[0].path)
    assert sum(p.nbytes for m in single.network.prior.modules.values() for p in m.parameters()) == sum(
        p.nbytes for m in prior for p in m.parameters()
    )
    fast_path = one.steps.fast.unet if shape == "maps" else one.steps.fast.mmdit
    assert fast_path is (other.steps.fast.unet if shape == "maps" else other.steps.fast.mmdit)
    joined = [t for t in fast_path.fused if t is not None] if shape == "maps" else [t[0] for t in fast_path.fused]
    assert joined and all(t.untyped_storage().data_ptr() in own for t in joined)  # views, no copies
    layers = {key for each in (one, other) for key in each.shared.updates}
    plain = sum(one.network.prior.network.get_submodule(key).weight.nbytes for key in layers)
    assert one.shared.resident.kept_bytes() == plain
    for model, each in zip(models, (one, other), strict=True):
        size = sum(t.nbytes for part in model.parts().values() for t in part.values())
        lora = sum(f.down.nbytes + f.up.nbytes for f in each.shared.updates.values())
        assert size == lora + sum(p.nbytes for p in each.network.adapters.parameters())


@torch.no_grad()
def test_turns_by_hand_also_after_a_failure() -> None:
    network = nn.ModuleDict({"one": nn.Linear(3, 2), "two": nn.Linear(2, 2)})
    resident = ResidentNetwork(network)
    resident._plain = {name: layer.weight.detach().clone() for name, layer in network.items()}  # type: ignore[union-attr, operator]
    plain = dict(resident._plain)
    factors = LoraFactors(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5], [3.0]]), 2.0)
    delta = torch.tensor([[1.0, 0.0, 2.0], [6.0, 0.0, 12.0]])
    with resident.turn({"one": factors}):
        assert torch.equal(network["one"].weight, plain["one"] + delta) and torch.equal(
            network["two"].weight, plain["two"]
        )
    broken = LoraFactors(torch.zeros(1, 5), torch.zeros(2, 1), 1.0)
    square = LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(RuntimeError), resident.turn({"one": factors, "two": broken}):
        pass
    with resident.turn({"two": square}):
        assert torch.equal(network["one"].weight, plain["one"])
        assert torch.equal(network["two"].weight, plain["two"] + 1)


def test_models_that_do_not_fit_together_are_refused(maps: list[Model], tokens: list[Model], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is on the prior .*prior \(family sd3\), and .* on nano \(family sdxl\)"):
        build_shared_restorer([maps[0].path, tokens[0].path])
    with pytest.raises(ModelError, match=r"equals .*: name a model once"):
        check_sharing([maps[0], load_model(maps[0].path)])
    supir = untrained.save_untrained("supir", tmp_path / "supir")
    with pytest.raises(ModelError, match=r"k \(dra\), untrained \(supir\): .* one system that shares .* \(dra\)"):
        build_shared_restorer([maps[0].path, supir.path])
    with pytest.raises(ModelError, match=r"one system that shares"):
        check_sharing([supir, supir])
    with pytest.raises(ModelError, match="does not run in fp4"):
        build_shared_restorer([maps[0].path, maps[1].path], precision="fp4")
    assert not isinstance(build_shared_restorer([maps[0].path]), SharedRestorers)
