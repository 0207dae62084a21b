"""InstaRevive against golden tensors of the official code. Each network is built from its json's configuration alone.

The test reads every instarevive_*.json of the golden folder, so that another set with other sizes and seeds can replace
the files. A check must compare every output tensor.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from components.color import adain, wavelet
from components.models import load_strictly
from components.priors.conditions import Conditions
from components.priors.one_text import OneTextPrior
from components.samplers.schedules import Schedule
from components.systems.instarevive.backbone import Backbone
from components.systems.instarevive.network import EpsPredictor, OneStep, OneStepGenerator, build_network
from components.systems.instarevive.options import FIXED_PROMPTS
from components.systems.instarevive.parity import to_levels
from components.systems.instarevive.restorer import Coarse, InstaReviveRestorer
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.weights import load_swinir
from components.tensors import images_to_tensor
from components.types import Request

OTHER_TESTS = {"bfr_distribution"}
"""Degradation statistics, which the tests of the degradations check."""


@dataclass
class Golden:
    """One golden file; `check` compares an output and marks it as checked."""

    name: str
    description: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    checked: set[str] = field(default_factory=set)

    @property
    def config(self) -> dict[str, Any]:
        return self.description["config"]

    def input(self, name: str) -> Tensor:
        return self.tensors[f"input/{name}"]

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        start = f"weights/{prefix}"
        return {k.removeprefix(start): v.to(_full_dtype(v)) for k, v in self.tensors.items() if k.startswith(start)}

    def check(self, name: str, value: Tensor, atol: float | None = None, rtol: float | None = None) -> None:
        expected, tolerance = self.tensors[f"output/{name}"], self.description["tolerance"]
        assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)}, not {tuple(expected.shape)}"
        torch.testing.assert_close(
            value.detach().to(expected.dtype),
            expected,
            atol=tolerance["atol"] if atol is None else atol,
            rtol=tolerance["rtol"] if rtol is None else rtol,
            msg=lambda text: f"{self.name}, output {name}: {text}",
        )
        self.checked.add(f"output/{name}")

    def unchecked(self) -> set[str]:
        return {name for name in self.tensors if name.startswith("output/")} - self.checked


def _full_dtype(tensor: Tensor) -> torch.dtype:
    """Weights may be stored in half precision; integers keep their dtype."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    assert (config["prediction_type"], config["clip_sample"]) == ("epsilon", False)
    return Schedule(**{k: config[k] for k in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")})


def tiny_generator(golden: Golden, config: Mapping[str, Any], prefix: str, mask_as_bias: bool) -> OneStepGenerator:
    network = build_network("pixart", config).eval()
    load_strictly(network, golden.weights(prefix), "generator")
    predictor = EpsPredictor(network, schedule_of(golden.description["scheduler"]), mask_as_bias=mask_as_bias)
    return OneStepGenerator(predictor, OneStep(timestep=golden.description["t"]))


def check_generator(golden: Golden) -> None:
    generator = tiny_generator(golden, golden.config, "", mask_as_bias=False)
    golden.check("alphas_cumprod", generator.schedule.alphas_cumprod)
    latent, mask, text = (golden.input(n) for n in ("latent", "prompt_mask", "prompt_embeds"))
    conditions = Conditions(text=text, mask=mask)
    timesteps = torch.full((len(latent),), golden.description["t"])
    golden.check("full8", generator.predictor.raw(latent, timesteps, conditions))
    golden.check("eps", generator.predictor.predict_eps(latent, timesteps, conditions))
    golden.check("x0", generator(latent, conditions))
    golden.check("x0_nonsquare", generator(golden.input("latent_nonsquare"), conditions))
    golden.check("x0_nomask", generator(latent, Conditions(text=text)))
    as_released = tiny_generator(golden, golden.config, "", mask_as_bias=True)
    golden.check("x0_mask3d_bias", as_released(latent, conditions))


def check_colorfix(golden: Golden) -> None:
    golden.check("wavelet", wavelet(golden.input("content"), golden.input("style")))
    golden.check("adain", adain(golden.input("content"), golden.input("style")))


def check_inference(golden: Golden) -> None:
    """The restorer with the released preset on a picture, as a whole and in tiles; and its parts as floats."""
    config, tolerance = golden.config, golden.description["tolerance"]
    generator = tiny_generator(golden, config["generator"], "generator.", mask_as_bias=True)
    autoencoder = AutoencoderKL(**{k: tuple(v) if isinstance(v, list) else v for k, v in config["vae"].items()}).eval()
    load_strictly(autoencoder, golden.weights("vae."), "autoencoder")
    size = SwinIRConfig(**config["swinir"])
    coarse = Coarse(load_swinir(golden.weights("swinir."), size, "swinir"), size.multiple_px)
    prompt = (golden.input("prompt_embeds"), golden.input("prompt_mask3d")[:, 0])
    backbone = Backbone(
        family="pixart",
        prior=OneTextPrior(
            name="golden",
            digest="",
            network=generator.predictor.network,
            autoencoder=autoencoder,
            text_encoder=None,
            tokenizer=None,
            schedule=generator.schedule,
            prompt_embeddings={FIXED_PROMPTS["photo"]: prompt},
        ),
    )
    restorer = InstaReviveRestorer(generator, backbone, coarse)
    image = golden.input("image").numpy()
    tile, stride = golden.description["tile_size"], golden.description["tile_stride"]

    def restore(**options: Any) -> Tensor:
        options = {"preset": "released", "min_side_px": 0, **options}
        return torch.from_numpy(restorer.restore([Request(key="golden", image=image, options=options)])[0].image)

    levels = {"atol": tolerance["uint8_max_abs"], "rtol": 0}

    def check_levels(name: str, value: Tensor) -> None:
        expected = golden.tensors[f"output/{name}"]
        assert value.shape == expected.shape
        torch.testing.assert_close(value.int(), expected.int(), **levels)
        golden.checked.add(f"output/{name}")

    check_levels("whole", restore())
    for color in [n.removeprefix("output/tiled_") for n in golden.tensors if n.startswith("output/tiled_")]:
        tiles = {"tiles": "auto", "tile_px": tile, "tile_overlap": 1 - stride / tile, "color": color}
        check_levels(f"tiled_{color}", restore(**tiles))

    pixels = images_to_tensor([image]) * 0.5 + 0.5
    stage1 = coarse(pixels)
    check_levels("stage1", torch.from_numpy(to_levels(stage1, "truncate")[0]))
    latents = {"atol": tolerance["latent_atol"], "rtol": tolerance["latent_rtol"]}
    lq = backbone.encode(stage1 * 2 - 1)
    golden.check("cond_latent", lq, **latents)
    clean = generator(lq, backbone.conditions([FIXED_PROMPTS["photo"]], torch.zeros(1, 6)))
    golden.check("whole_latent", clean, **latents)
    golden.check("whole_float", backbone.decode(clean) / 2 + 0.5, tolerance["float_atol"], 0)


def training_checks() -> Mapping[str, Callable[[Any], None]]:
    """The checks of coarse restorer and objective, from their own file."""
    return training_module().CHECKS  # type: ignore[no-any-return]


def training_module() -> ModuleType:
    path = Path(__file__).with_name("_golden_instarevive_training.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(path.stem, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


CHECKS: dict[str, Callable[[Golden], None]] = {
    "generator": check_generator,
    "inference": check_inference,
    "colorfix": check_colorfix,
    **training_checks(),
}
"""Checks by module name; a file of another module fails the test."""


def descriptions(folder: Path) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """Path, module and contents of each file; the file name is "instarevive_", the module, and maybe more."""
    modules = {*CHECKS, *OTHER_TESTS}
    for path in sorted(folder.glob("instarevive_*.json")):
        name = path.stem.removeprefix("instarevive_")
        module = next((module for module in modules if name.startswith(f"{module}_")), name)
        yield path, module, json.loads(path.read_text(encoding="utf-8"))


def test_every_golden_file_has_a_check(golden_dir: Path) -> None:
    modules = {module for _, module, _ in descriptions(golden_dir)}
    assert modules - set(CHECKS) - OTHER_TESTS == set()
    assert set(CHECKS) - modules == set(), "a check without a golden file"


@pytest.mark.parametrize("module", CHECKS)
@torch.no_grad()
def test_golden(module: str, golden_dir: Path) -> None:
    matches = [(path, d) for path, name, d in descriptions(golden_dir) if name == module]
    assert matches
    for path, description in matches:
        golden = Golden(path.name, description, load_file(path.with_suffix(".safetensors")))
        CHECKS[module](golden)
        assert not golden.unchecked(), f"{path.name}: outputs without a check: {sorted(golden.unchecked())}"
