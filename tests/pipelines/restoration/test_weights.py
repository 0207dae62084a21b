"""`restoray weights`: rules of the command, and a tiny InstantIR on a tiny SDXL folder that restores a photograph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from components.models import load_model
from components.priors.opening import load_prior
from components.priors.sdxl import Prior
from components.randomness import generator, seeded_init
from components.restoring import picture_seed
from components.systems import SYSTEMS
from components.systems.instantir.network import Conditions, InstantIR
from components.tensors import images_to_tensor, tensor_to_images
from pipelines.api.options import build_options
from pipelines.core.errors import Failure, UsageError
from pipelines.restoration.weights import (
    export_weights,
    import_lines,
    import_weights,
    layout,
    layout_lines,
    weights_of,
)

KEY, SIDE = "oakland-zoo-otters", (64, 96)
TEXT_LENGTH = 16


# -- a tiny prior of SDXL's own classes, in the hub's layout -----------------------------------------------------------


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[("r", "e"), ("re", "d</w>")],
        model_max_length=TEXT_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_prior(folder: Path, unet: UNet2DConditionModel, dino_dim: int, variant: str | None = None) -> None:
    """Write an SDXL folder and, in its sub-folder dino/, a Dinov2 of transformers with its image processor."""
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = write_tokenizer(folder / name)
    width = unet.config["cross_attention_dim"]
    text = {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": TEXT_LENGTH, "bos_token_id": tokenizer.bos_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    pooled = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
    with seeded_init(0, "tiny sdxl"):
        parts: dict[str, Any] = {
            "vae": AutoencoderKL(
                block_out_channels=(8, 8, 16, 16),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=1,
                latent_channels=unet.config["in_channels"],
                norm_num_groups=4,
                scaling_factor=0.13025,
                force_upcast=True,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=width // 3, **text)),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig(hidden_size=width - width // 3, projection_dim=pooled, **text)
            ),
        }
        dino = Dinov2Model(
            Dinov2Config(hidden_size=dino_dim, num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=70)
        )
    for name, module in {"unet": unet, **parts}.items():
        module = module.half() if variant else module
        module.save_pretrained(folder / name, variant=variant, safe_serialization=True)
    (folder / "scheduler").mkdir()
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 1000, **schedule}))
    dino.save_pretrained(folder / "dino")
    view = {"size": {"shortest_edge": 80}, "crop_size": {"height": 70, "width": 70}, "do_center_crop": True}
    view |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "dino" / "preprocessor_config.json").write_text(json.dumps(view))


class Released:
    """The official tiny InstantIR: a folder of its prior, and three weights files in the published format."""

    def __init__(self, golden_dir: Path, folder: Path) -> None:
        self.folder, self.files = folder, folder / "released" / "models"
        base = load_file(golden_dir / "instantir_pipeline_weights_unet_adapter.safetensors")
        lora = load_file(golden_dir / "instantir_pipeline_weights_lora.safetensors")
        control = load_file(golden_dir / "instantir_pipeline_weights_aggregator.safetensors")
        description = json.loads((golden_dir / "instantir_pipeline_weights_unet_adapter.json").read_text())
        self.config = description["config"]
        self.unet_state = section(base, "weights/unet/")
        self.parts = {
            "perceptor": section(base, "weights/adapter/"),
            "previewer": section(lora, "weights/previewer_lora/"),
            "aggregator": section(control, "weights/aggregator/"),
        }
        write_prior(folder / "prior", self.unet(), self.config["resampler"]["embedding_dim"])
        self.files.mkdir(parents=True)
        adapter: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in self.parts["perceptor"].items():
            head, _, rest = key.partition(".")
            adapter[head][rest] = tensor
        torch.save(adapter, self.files / "adapter.pt")
        torch.save(self.parts["previewer"], self.files / "previewer_lora_weights.bin")
        torch.save(self.parts["aggregator"], self.files / "aggregator.pt")
        size = {k: v for k, v in self.config["resampler"].items() if k not in ("embedding_dim", "output_dim")}
        self.arguments = {
            "prior": str(folder / "prior"),
            "image_encoder": str(folder / "prior" / "dino"),
            "sizes": {"resampler": size},
        }

    def unet(self) -> UNet2DConditionModel:
        unet = UNet2DConditionModel(**self.config["unet"])
        unet.load_state_dict(self.unet_state)
        return unet

    def words(self) -> list[str]:
        sizes = [f"resampler.{k}={v}" for k, v in self.arguments["sizes"]["resampler"].items()]
        return [*sizes, "--prior", self.arguments["prior"], "--image-encoder", self.arguments["image_encoder"]]


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def released(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Released:
    return Released(golden_dir, tmp_path_factory.mktemp("instantir"))


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))


# -- the rules of the command ------------------------------------------------------------------------------------------


def test_an_unknown_name_raises_with_the_closest_name() -> None:
    with pytest.raises(UsageError, match='Did you mean "instantir"'):
        weights_of("instantr")
    with pytest.raises(UsageError, match="prior has no published weights"):
        weights_of("prior")
    with pytest.raises(UsageError, match=r'Did you mean "resampler\.depth"'):
        import_weights("instantir", [], sizes={"resampler": {"dept": 2}})
    with pytest.raises(UsageError, match=r"--from FILE or FOLDER. Published: InstantX/InstantIR"):
        import_weights("instantir", [])
    with pytest.raises(UsageError, match='Did you mean "released"'):
        export_weights("instantir", "nano", Path("x"), spelling="relesed")
    with pytest.raises(UsageError, match='unknown precision "fp61"'):
        build_options("cpu", "fp61")
    with pytest.raises(UsageError, match='Did you mean "blocks"'):
        build_options("cpu", "fp32", "block")
    assert build_options("cpu", "fp32", "blocks") == {"speed": {"compile": "blocks"}}
    assert build_options("cuda", "fp32", offload=True) == {"device": "cuda", "offload": True}
    assert build_options("cpu", "fp32") == {} and build_options("cuda", "bf16") == {
        "device": "cuda",
        "precision": "bf16",
    }


def test_the_module_names_no_system(repository: Path) -> None:
    text = (repository / "pipelines" / "restoration" / "weights.py").read_text()
    names = [name for name, system in SYSTEMS.items() if system.weights is not None]  # without "prior", a common word
    assert names and not [name for name in names if name in text]


def test_a_second_import_into_restoray_home_writes_nothing(released: Released, tmp_path: Path) -> None:
    dry = import_weights("instantir", [released.files.parent], dry_run=True, **released.arguments)
    assert dry.model is None and not (tmp_path / "home").exists()
    first = import_weights("instantir", [released.files.parent], **released.arguments)
    folder = tmp_path / "home" / "weights" / "instantir"
    assert first.model == str(folder) and load_model("instantir").path == folder
    assert [p.name for p in folder.parent.iterdir()] == ["instantir"]  # no partial folder is left
    mtime_ns = (folder / "model.json").stat().st_mtime_ns
    again = import_weights("instantir", [released.files], **released.arguments)
    assert "nothing was done" in again.notes[-1] and again.digest == first.digest
    assert (folder / "model.json").stat().st_mtime_ns == mtime_ns
    # the same files with other settings need --overwrite
    with pytest.raises(UsageError, match="made of these files with other licence"):
        import_weights("instantir", [released.files], licence="CC-BY-4.0", **released.arguments)
    sizes = {**released.arguments["sizes"], "lora": {"alpha": 8.0}}
    with pytest.raises(UsageError, match="with other sizes"):
        import_weights("instantir", [released.files], **{**released.arguments, "sizes": sizes})
    assert load_model(folder).info["licence"] == first.licence
    report = import_weights("instantir", [released.files], licence="CC-BY-4.0", overwrite=True, **released.arguments)
    assert load_model(folder).info["licence"] == "CC-BY-4.0" and report.digest in "\n".join(import_lines(report))
    import_weights("instantir", [released.files], overwrite=True, **released.arguments)
    # the import replaces a damaged part
    (folder / "parts" / "previewer.safetensors").write_bytes(b"x")
    import_weights("instantir", [released.files], **released.arguments)
    assert set(load_model(folder).part("previewer")) == set(released.parts["previewer"])


def test_other_contents_need_overwrite(released: Released, tmp_path: Path) -> None:
    names = ("adapter.pt", "previewer_lora_weights.bin")
    partial = import_weights(
        "instantir", [released.files / name for name in names], tmp_path / "m", **released.arguments
    )
    assert partial.missing == ("aggregator (aggregator.pt)",)
    with pytest.raises(UsageError, match="holds another model"):
        import_weights("instantir", [released.files], tmp_path / "m", **released.arguments)
    assert not import_weights(
        "instantir", [released.files], tmp_path / "m", overwrite=True, **released.arguments
    ).missing
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a model folder"):
        import_weights("instantir", [released.files], tmp_path / "letters", overwrite=True, **released.arguments)
    export_weights("instantir", tmp_path / "m", tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds aggregator.pt, adapter.pt, previewer_lora_weights.bin already"):
        export_weights("instantir", tmp_path / "m", tmp_path / "out")
    export_weights("instantir", tmp_path / "m", tmp_path / "out", overwrite=True)
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_faults_are_failures_and_write_nothing(released: Released, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"of the wrong shape: image_proj\.latents"):
        import_weights("instantir", [released.files], tmp_path / "m", **{**released.arguments, "sizes": {}})
    with pytest.raises(Failure, match=r"is not a folder.*not a hub id"):
        import_weights("instantir", [released.files], tmp_path / "m", prior="nowhere")
    assert not (tmp_path / "m").exists()


def test_the_layout_depends_on_the_prior() -> None:
    shapes = layout("instantir", prior="nano", sizes={"resampler": {"dim": 64, "depth": 2, "dim_head": 16, "heads": 4}})
    assert shapes["adapter.pt"]["image_proj.proj_in.weight"] == (64, 64)
    lines = layout_lines(shapes)
    assert lines[0].startswith("adapter.pt: ") and "  image_proj.proj_in.weight [64, 64]" in lines


def test_a_system_without_a_prior_is_imported_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SwinIR's file is imported and exported: no line is about a prior, and the second import writes nothing."""
    from components.systems.swinir.config import SwinIRConfig
    from components.systems.swinir.network import build_swinir

    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    size: dict[str, Any] = {"embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 4, "img_size": 8}
    network = build_swinir(SwinIRConfig(**size))
    torch.save(network.state_dict(), tmp_path / "general_swinir_v1.ckpt")
    first = import_weights("swinir", [tmp_path])
    assert not any(line.startswith("prior") for line in import_lines(first)) and first.model is not None
    assert "nothing was done" in import_weights("swinir", [tmp_path]).notes[-1]
    export_weights("swinir", "swinir", tmp_path / "out")
    tensors = torch.load(tmp_path / "out" / "general_swinir_v1.ckpt", weights_only=True)
    assert all(torch.equal(value, tensors[key]) for key, value in network.state_dict().items())
    assert layout("swinir")["general_swinir_v1.ckpt"]["conv_first.1.weight"] == (180, 192, 3, 3)
    with pytest.raises(UsageError, match="no prior"):
        import_weights("swinir", [tmp_path], tmp_path / "m", prior="nano")


# -- SDXL's own classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_diffusers_folder_loads_in_any_precision(released: Released, tmp_path: Path, precision: Any) -> None:
    """The folder has full files, or fp16 files only; SDXL's autoencoder stays in float32."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    write_prior(tmp_path / "half", released.unet(), released.config["resampler"]["embedding_dim"], variant="fp16")
    for folder in (released.folder / "prior", tmp_path / "half"):
        prior = load_prior(folder, image_encoder=str(folder / "dino"), precision=precision)
        for name, module in prior.modules.items():
            dtypes = {p.dtype for p in module.parameters()}
            assert dtypes == {torch.float32 if name == "autoencoder" else dtype}, name
        assert (prior.factor, prior.multiple_px, prior.latent_channels) == (8, 32, 4)
        assert (prior.view.shortest_edge_px, prior.view.crop_px, prior.view.fit) == (80, 70, "crop")
        assert prior.source["image_encoder"] == str((folder / "dino").resolve())
        expected = released.unet_state["conv_in.weight"]
        weight = prior.unet.state_dict()["conv_in.weight"]
        torch.testing.assert_close(weight.float(), expected, atol=1e-2, rtol=1e-2)
        if folder.name == "prior" and precision == "fp32":
            assert torch.equal(weight, expected)


def test_unsupported_priors_are_refused(released: Released, tmp_path: Path) -> None:
    folder = tmp_path / "prior"
    write_prior(folder, released.unet(), 48)
    for file, change, reason in (
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "must predict noise"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "not flow_prediction"),
        (
            "scheduler/scheduler_config.json",
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr is not supported",
        ),
        ("dino/config.json", {"model_type": "dinov2_with_registers"}, "without register tokens"),
        ("dino/preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "is not ImageNet's"),
        ("unet/config.json", {"norm_num_groups": 4, "block_out_channels": [16, 32, 36]}, "cannot be loaded|do not fit"),
    ):
        path = folder / file
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), **change}))
        with pytest.raises(ValueError, match=reason):
            load_prior(folder, image_encoder=str(folder / "dino"))
        path.write_text(before)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks vae/diffusion_pytorch_model.safetensors"):
        load_prior(folder, image_encoder=str(folder / "dino"))


def by_hand(released: Released, image: np.ndarray, seed: int, steps: int, cfg_scale: float) -> np.ndarray:
    """The published sampling loop on the published tensors: only the networks come from our modules."""
    folder = released.folder / "prior"
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    whole = load_prior(folder, image_encoder=str(folder / "dino"))
    prior = Prior(
        name="by hand",
        digest="",
        unet=released.unet(),
        autoencoder=vae,
        text_encoders=whole.text_encoders,
        tokenizers=whole.tokenizers,
        image_encoder=whole.image_encoder,
        schedule=whole.schedule,
        view=whole.view,
    )
    lora = {k: released.config["lora"][k] for k in ("rank", "alpha", "targets")}
    network = InstantIR(prior, released.config["resampler"], lora, aggregator=True)
    network.load_parts(released.parts)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    pixels = images_to_tensor([image])
    lq = vae.encode(pixels).latent_dist.mean * 0.13025
    text, pooled = prior.embed_prompts([""])
    ids = torch.tensor([[*image.shape[:2], 0, 0, *image.shape[:2]]], dtype=torch.float32)
    tokens = torch.cat([prior.null_image_tokens(1), prior.embed_images(pixels)])
    both = Conditions(
        text=text.repeat(2, 1, 1), pooled=pooled.repeat(2, 1), time_ids=ids.repeat(2, 1), image_tokens=tokens
    )
    noise = torch.from_numpy(generator(seed, "start").standard_normal(tuple(lq.shape[1:]), dtype=np.float32))[None]
    times = [1 + i * (1000 // steps) for i in reversed(range(steps))]
    latents = float(alphas[times[0]] ** 0.5) * lq + float((1 - alphas[times[0]]) ** 0.5) * noise
    for number, time in enumerate(times):
        t, pair = torch.tensor([time]), latents.repeat(2, 1, 1, 1)
        preview = network.preview(pair, t, both)
        eps = network.denoise_eps(pair, t, both, network.residuals(lq.repeat(2, 1, 1, 1), t, preview, both))
        eps = eps[:1] + cfg_scale * (eps[1:] - eps[:1])
        a, b = float(alphas[time]), float(alphas[times[number + 1]]) if number + 1 < steps else 1.0
        clean = (latents - (1 - a) ** 0.5 * eps) / a**0.5
        latents = b**0.5 * clean + (1 - b) ** 0.5 * eps
    return tensor_to_images(vae.decode(latents / 0.13025).sample)[0]


@pytest.mark.slow
@pytest.mark.full
def test_published_weights_restore_a_photograph_by_commands_alone(
    released: Released, repository: Path, tmp_path: Path
) -> None:
    """Commands import, restore and export; the picture equals that of `by_hand`."""
    source = repository / "pipelines" / "demo_corpus" / f"{KEY}.jpg"
    (tmp_path / "in").mkdir()
    Image.open(source).convert("RGB").resize((SIDE[1], SIDE[0]), Image.Resampling.BICUBIC).save(
        tmp_path / "in" / f"{KEY}.png"
    )

    def restoray(*words: str) -> dict[str, Any]:
        process = subprocess.run(
            [sys.executable, "-m", "pipelines.commands.main", *words, "--json"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        return dict(json.loads(process.stdout))

    report = restoray("weights", "import", "instantir", "--from", str(released.files.parent), *released.words())
    parts = [source["part"] for source in report["sources"]]
    assert report["missing"] == [] and parts == ["perceptor", "previewer", "aggregator"]
    # an import restores at the release's working size, at least 768 px; `by_hand` works at the picture's own
    options = ("steps=3", "cfg_scale=3", "view=crop", "resize=native")
    result = restoray("restore", "in", "--model", "instantir", "--out", "out", *options)
    assert result["restored"] == 1
    restored = np.asarray(Image.open(tmp_path / "out" / f"{KEY}.png"))
    with torch.no_grad():
        image = np.asarray(Image.open(tmp_path / "in" / f"{KEY}.png"))
        expected = by_hand(released, image, picture_seed(0, KEY), steps=3, cfg_scale=3.0)
    assert restored.shape == (*SIDE, 3) and restored.std() > 1
    assert np.abs(restored.astype(int) - expected).max() <= 1
    # another precision gives another result, so the picture is restored again
    half = restoray("restore", "in", "--model", "instantir", "--out", "out", *options, "--precision", "bf16")
    assert half["restored"] == 1
    gap = np.abs(np.asarray(Image.open(tmp_path / "out" / f"{KEY}.png")).astype(int) - restored)
    assert 0 < gap.mean() < 0.1 * 255
    restoray("weights", "export", "instantir", "--model", "instantir", "--to", "back")
    back = torch.load(tmp_path / "back" / "aggregator.pt", weights_only=True)
    assert all(torch.equal(back[key], tensor) for key, tensor in released.parts["aggregator"].items())


@pytest.mark.slow
def test_the_command_prints_one_message_for_a_fault(released: Released, repository: Path, tmp_path: Path) -> None:
    def restoray(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.commands.main", "weights", *words]
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    typo = restoray("import", "instantr", "--from", ".")
    assert typo.returncode == 2 and 'Did you mean "instantir"' in typo.stderr
    option = restoray("import", "instantir", "--form", ".")
    assert option.returncode == 2 and '"--from"' in option.stderr
    wrong = restoray("import", "instantir", "--from", str(released.files), *released.words()[:2], "--out", "m")
    assert wrong.returncode == 1 and "missing" in wrong.stderr and "Traceback" not in wrong.stderr
    assert not (tmp_path / "m").exists()
