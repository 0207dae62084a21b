"""Import and export of InstantIR's released files: published layout and counts, equal bytes, and all faults."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Dinov2Config, Dinov2Model

from components.models import ModelCard, ModelError, load_model, save_model
from components.priors.hub import find_folder, prior_shape, variant_of
from components.priors.opening import load_prior
from components.priors.sdxl_config import DINOV2, SDXL, SDXL_UNET
from components.systems.instantir.layout import layout, meta_unet, parameter_count
from components.systems.instantir.network import InstantIR
from components.systems.instantir.perceptor import cross_attentions
from components.systems.instantir.previewer import previewer_deltas
from components.systems.instantir.released import check_sizes, find_files
from components.systems.instantir.weights import export_weights, import_weights
from components.systems.weights_io import ImportJob
from components.tensor_files import WeightsFileError, read_tensors

RESAMPLER = {"dim": 64, "depth": 2, "dim_head": 16, "heads": 4, "num_queries": 16}
"""The nano recipes' Resampler."""


# -- the published size ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(reference_dir: Path) -> dict[str, Any]:
    return json.loads((reference_dir / "instantir_checkpoint_layout.json").read_text())


@pytest.fixture(scope="module")
def layouts() -> dict[str, dict[str, tuple[int, ...]]]:
    return layout(SDXL_UNET)


def shapes(document: Mapping[str, list[int]], prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + key: tuple(shape) for key, shape in document.items()}


def test_the_computed_layout_equals_the_published_one(document: Mapping[str, Any], layouts: Mapping[str, Any]) -> None:
    adapter = document["adapter.pt"]
    assert layouts["perceptor"] == {
        **shapes(adapter["image_proj"], "image_proj."),
        **shapes(adapter["ip_adapter"], "ip_adapter."),
    }
    assert layouts["previewer"] == shapes(document["previewer_lora_weights.bin"])
    assert layouts["aggregator"] == shapes(document["aggregator.pt"])


def test_the_adapter_numbers_name_the_published_layers(document: Mapping[str, Any]) -> None:
    unet = meta_unet(SDXL_UNET)
    names = {module: name for name, module in unet.named_modules()}
    names_by_number = {number: f"{names[module]}.processor" for number, module in cross_attentions(unet).items()}
    assert names_by_number == document["ip_adapter_index"]


def test_counts_at_sdxl_size_equal_the_references(layouts: Mapping[str, Any], reference_dir: Path) -> None:
    """The whole table of instantir.md section 1, on the meta device."""
    expected = json.loads((reference_dir / "instantir_costs.json").read_text())["params"]
    unet = meta_unet(SDXL_UNET)
    layers_with_text = [
        m for block in (unet.down_blocks, unet.mid_block) for m in block.modules() if hasattr(m, "attn2")
    ]
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        dino = Dinov2Model(
            Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=518)
        )
        first = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
            )
        )
    adapter, lora, aggregator = (layouts[part] for part in ("perceptor", "previewer", "aggregator"))
    joins = {k: v for k, v in aggregator.items() if k.startswith("controlnet_")}
    processors = {k: v for k, v in adapter.items() if k.startswith("ip_adapter.")}
    counts = {
        "unet": count(unet),
        "resampler": parameter_count({k: v for k, v in adapter.items() if k not in processors}),
        "ip_adapter_processors": parameter_count(processors),
        "ip_kv": parameter_count({k: v for k, v in processors.items() if ".to_" in k}),
        "ip_adaln": parameter_count({k: v for k, v in processors.items() if ".ln_" in k}),
        "n_cross": len(cross_attentions(unet)),
        "n_attn_processors": 2 * len(cross_attentions(unet)),
        "lora_params": parameter_count(lora),
        "n_lora_layers": len(lora) // 2,
        "aggregator": parameter_count(aggregator),
        "aggregator_before_attn2_removal": parameter_count(aggregator)
        + sum(count(m.attn2) + count(m.norm2) for m in layers_with_text),
        "aggregator_sft_zeroconv": parameter_count(joins),
        # the reference counts all names with ".0.": the transforms (24,345,600) and level 0's zero convolution
        "aggregator_sft": parameter_count({k: v for k, v in joins.items() if ".0." in k}),
        "aggregator_ref_conv_in": parameter_count(
            {k: v for k, v in aggregator.items() if k.startswith("ref_conv_in.")}
        ),
        "vae": count(vae),
        "vae_encoder": count(vae.encoder),
        "vae_decoder": count(vae.decoder),
        "dinov2_large": count(dino),
        "text_encoder": count(first),
        "text_encoder_2": count(second),
    }
    assert counts == expected
    assert parameter_count(adapter) == 849_799_424 and len(lora) == 1884


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- the golden weights, as files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Any]:
    """Config and tensors of the tiny official InstantIR, by released file."""
    base = load_file(golden_dir / "instantir_pipeline_weights_unet_adapter.safetensors")
    lora = load_file(golden_dir / "instantir_pipeline_weights_lora.safetensors")
    control = load_file(golden_dir / "instantir_pipeline_weights_aggregator.safetensors")

    def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}

    return {
        "config": json.loads((golden_dir / "instantir_pipeline_weights_unet_adapter.json").read_text())["config"],
        "image_proj": section(base, "weights/adapter/image_proj."),
        "ip_adapter": section(base, "weights/adapter/ip_adapter."),
        "lora": section(lora, "weights/previewer_lora/"),
        "aggregator": section(control, "weights/aggregator/"),
    }


@pytest.fixture
def write_files(golden: Mapping[str, Any], tmp_path: Path) -> Callable[..., tuple[list[Path], dict[str, Any]]]:
    """A function that writes released files, some of them changed; it returns them and the import's arguments."""
    config = golden["config"]
    for folder, document in (
        ("prior/unet", {**config["unet"], "_class_name": "UNet2DConditionModel"}),
        ("dino", {"model_type": "dinov2", "hidden_size": config["resampler"]["embedding_dim"]}),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(document))

    def write(**options: Any) -> tuple[list[Path], dict[str, Any]]:
        tensors = {
            "adapter.pt": {"image_proj": golden["image_proj"], "ip_adapter": golden["ip_adapter"]},
            "previewer_lora_weights.bin": golden["lora"],
            "aggregator.pt": golden["aggregator"],
        } | options.pop("tensors", {})
        folder = tmp_path / "released"
        folder.mkdir(exist_ok=True)
        for name, content in tensors.items():
            if content is not None:
                torch.save(content, folder / name)
        size = {k: v for k, v in config["resampler"].items() if k not in ("embedding_dim", "output_dim")}
        arguments = {
            "prior": str(tmp_path / "prior"),
            "image_encoder": str(tmp_path / "dino"),
            "sizes": {"resampler": size},
        }
        return find_files(folder), arguments

    return write


def parts_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    model = load_model(folder)
    return {name: model.part(name) for name in model.info["parts"]}


def same(left: Mapping[str, Mapping[str, Tensor]], right: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether keys, dtypes and bits are equal."""
    return {k: set(v) for k, v in left.items()} == {k: set(v) for k, v in right.items()} and all(
        left[p][k].dtype == right[p][k].dtype and torch.equal(left[p][k], right[p][k]) for p in left for k in left[p]
    )


def expected_parts(golden: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {
        "perceptor": {
            **{f"image_proj.{k}": v for k, v in golden["image_proj"].items()},
            **{f"ip_adapter.{k}": v for k, v in golden["ip_adapter"].items()},
        },
        "previewer": dict(golden["lora"]),
        "aggregator": dict(golden["aggregator"]),
    }


def test_import_and_export_of_released_files_keep_the_bytes(golden, write_files, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files, arguments = write_files()
    result = import_weights(ImportJob(files=files, out=tmp_path / "m", **arguments))
    assert same(parts_of(tmp_path / "m"), expected_parts(golden))
    assert result.missing == () and result.licence == "unstated"  # it has not the published size
    info = load_model(tmp_path / "m").info
    assert info["parents"] == {s.file: f"sha256:{s.sha256}" for s in result.sources} and len(info["parents"]) == 3
    assert info["prior"]["image_encoder"] == str((tmp_path / "dino").resolve())
    assert info["config"]["lora"]["alpha"] == 1 and info["config"]["aggregator"] is True

    export_weights(tmp_path / "m", tmp_path / "back")
    for name, content in (("aggregator.pt", golden["aggregator"]), ("previewer_lora_weights.bin", golden["lora"])):
        back = torch.load(tmp_path / "back" / name, weights_only=True)
        assert same({"x": back}, {"x": content})
        assert all(v.untyped_storage().nbytes() == v.nbytes and v.dtype == torch.float32 for v in back.values())
    adapter = torch.load(tmp_path / "back" / "adapter.pt", weights_only=True)
    assert same(adapter, {k: golden[k] for k in ("image_proj", "ip_adapter")})

    # the export wrote a sidecar, so this import needs no sizes
    again = import_weights(
        ImportJob(files=find_files(tmp_path / "back"), out=tmp_path / "m2", **{k: arguments[k] for k in ("prior",)})
    )
    assert same(parts_of(tmp_path / "m2"), parts_of(tmp_path / "m"))
    assert load_model(tmp_path / "m2").info["config"] == info["config"] and again.digest


@pytest.mark.parametrize("form", ["peft", "diffusers", "processor", "bare", "wrapped"])
def test_every_spelling_of_the_lora_gives_the_same_model(golden, write_files, tmp_path: Path, form: str) -> None:  # type: ignore[no-untyped-def]
    def rename(key: str) -> str:
        if form == "peft":
            return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
        if form == "diffusers":
            return key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        if form == "processor":  # the released loader adds it
            return key.replace(".attn2.", ".attn2.processor.") if "_ip" in key else key
        return key.removeprefix("unet.") if form == "bare" else f"module.{key}"

    lora = {rename(key): tensor for key, tensor in golden["lora"].items()}
    assert set(lora) != set(golden["lora"])
    files, arguments = write_files(tensors={"previewer_lora_weights.bin": lora})
    import_weights(ImportJob(files=files, out=tmp_path / "m", **arguments))
    assert same(parts_of(tmp_path / "m"), expected_parts(golden))


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
def test_export_writes_the_lora_in_the_chosen_spelling(golden, write_files, tmp_path: Path, spelling: str) -> None:  # type: ignore[no-untyped-def]
    files, arguments = write_files()
    import_weights(ImportJob(files=files, out=tmp_path / "m", **arguments))
    export_weights(tmp_path / "m", tmp_path / "out", spelling=spelling, form="safetensors")
    tensors = load_file(tmp_path / "out" / "previewer_lora_weights.safetensors")
    ending = {"peft": ".lora_", "diffusers": ".lora."}[spelling]
    assert all(ending in key for key in tensors) and len(tensors) == len(golden["lora"])
    import_weights(ImportJob(files=find_files(tmp_path / "out"), out=tmp_path / "m2", prior=arguments["prior"]))
    assert same(parts_of(tmp_path / "m2"), expected_parts(golden))


def test_flat_adapters_safetensors_and_training_names_are_imported(golden, write_files, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    flat = {f"image_proj_model.{k}": v for k, v in golden["image_proj"].items()}
    flat |= {f"adapter_modules.{k}": v for k, v in golden["ip_adapter"].items()}
    files, arguments = write_files(tensors={"adapter.pt": None, "adapter_ckpt.pt": flat, "aggregator.pt": None})
    save_file(golden["aggregator"], files[0].parent / "aggregator.safetensors")
    files[1].rename(files[1].with_name("pytorch_lora_weights.bin"))
    files = find_files(files[0].parent)
    assert [f.name for f in files] == ["adapter_ckpt.pt", "pytorch_lora_weights.bin", "aggregator.safetensors"]
    import_weights(ImportJob(files=files, out=tmp_path / "m", **arguments))
    assert same(parts_of(tmp_path / "m"), expected_parts(golden))


def test_an_adapter_without_modulation_gets_zero_modulation(golden, write_files, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    plain = {k: v for k, v in golden["ip_adapter"].items() if ".ln_" not in k}
    files, arguments = write_files(tensors={"adapter.pt": {"image_proj": golden["image_proj"], "ip_adapter": plain}})
    result = import_weights(ImportJob(files=files, out=tmp_path / "m", **arguments))
    assert "no time modulation" in result.notes[0]
    parts = parts_of(tmp_path / "m")["perceptor"]
    modulation = [v for k, v in parts.items() if ".ln_" in k]
    assert len(modulation) == len(golden["ip_adapter"]) - len(plain) and not any(v.any() for v in modulation)
    # an incomplete modulation is a fault
    plain["1.ln_k_ip.linear.bias"] = golden["ip_adapter"]["1.ln_k_ip.linear.bias"]
    files, arguments = write_files(tensors={"adapter.pt": {"image_proj": golden["image_proj"], "ip_adapter": plain}})
    with pytest.raises(ModelError, match=f"{len(modulation) - 1} missing: ip_adapter.1.ln_k_ip.linear.weight, "):
        import_weights(ImportJob(files=files, **arguments))


def test_all_faults_of_all_files_are_in_one_error(golden, write_files) -> None:  # type: ignore[no-untyped-def]
    image_proj = dict(golden["image_proj"])
    del image_proj["proj_in.bias"], image_proj["norm_out.weight"]
    image_proj["extra"] = torch.zeros(1)
    image_proj["latents"] = torch.zeros(1, 9, 48)
    aggregator = {
        **golden["aggregator"],
        "conv_in.bias": torch.full_like(golden["aggregator"]["conv_in.bias"], torch.nan),
    }
    aggregator["conv_in.weight"] = golden["aggregator"]["conv_in.weight"].long()
    adapter = {"image_proj": image_proj, "ip_adapter": golden["ip_adapter"]}
    files, arguments = write_files(tensors={"adapter.pt": adapter, "aggregator.pt": aggregator})
    with pytest.raises(ModelError) as error:
        import_weights(ImportJob(files=files, **arguments))
    first, second = str(error.value).splitlines()
    assert "adapter.pt" in first and "aggregator.pt" in second
    assert "2 missing: image_proj.proj_in.bias, image_proj.norm_out.weight" in first
    assert "1 unexpected: image_proj.extra" in first
    assert "1 of the wrong shape: image_proj.latents is [1, 9, 48] instead of [1, 8, 48]" in first
    assert "looks like resampler.num_queries=9" in first
    assert "1 with values that are not finite: conv_in.bias" in second
    assert "1 not of a floating point type: conv_in.weight is torch.int64" in second


def test_a_duplicate_lora_layer_or_another_rank_is_refused(golden, write_files) -> None:  # type: ignore[no-untyped-def]
    key = next(k for k in golden["lora"] if ".lora.down." in k)
    twice = {**golden["lora"], key.replace(".lora.down.", ".lora_A."): golden["lora"][key]}
    files, arguments = write_files(tensors={"previewer_lora_weights.bin": twice})
    with pytest.raises(ModelError, match="name the same tensor"):
        import_weights(ImportJob(files=files, **arguments))
    files, arguments = write_files()
    arguments["sizes"] = {**arguments["sizes"], "lora": {"rank": 32}}
    with pytest.raises(ModelError, match=r"looks like lora\.rank=64: give these as KEY=VALUE"):
        import_weights(ImportJob(files=files, **arguments))


def test_alpha_in_a_lora_file_is_imported(golden, write_files, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    layers = sorted({key.partition(".lora")[0] for key in golden["lora"]})
    alphas = {f"{layer}.alpha": torch.tensor(8.0) for layer in layers}
    files, arguments = write_files(tensors={"previewer_lora_weights.bin": {**golden["lora"], **alphas}})
    import_weights(ImportJob(files=files, out=tmp_path / "m", **arguments))
    assert load_model(tmp_path / "m").info["config"]["lora"]["alpha"] == 8.0
    alphas[f"{layers[0]}.alpha"] = torch.tensor(-4.0)
    files, arguments = write_files(tensors={"previewer_lora_weights.bin": {**golden["lora"], **alphas}})
    with pytest.raises(ModelError, match="alpha must be positive, and is -4"):
        import_weights(ImportJob(files=files, **arguments))


def test_the_report_of_a_partial_set_lists_missing_parts(golden, write_files, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files, arguments = write_files(tensors={"aggregator.pt": None})
    result = import_weights(ImportJob(files=files, out=tmp_path / "m", **arguments))
    assert result.missing == ("aggregator (aggregator.pt)",)
    assert set(parts_of(tmp_path / "m")) == {"perceptor", "previewer"}
    from components.systems import build_restorer

    with pytest.raises(ModelError, match="restoring needs aggregator too"):
        build_restorer(tmp_path / "m")
    with pytest.raises(ModelError, match=r"no adapter among .*previewer_lora_weights.bin.* adapter.pt"):
        import_weights(ImportJob(files=[f for f in files if "lora" in f.name], **arguments))


# -- files that are not valid weights ----------------------------------------------------------------------------------


class Evil:
    """An object whose pickle runs code: an attack."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.proof),))


def test_a_pickle_with_code_is_refused_before_it_runs(write_files, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    proof = tmp_path / "pwned"
    files, arguments = write_files()
    for write in (
        lambda path: torch.save({"image_proj": Evil(proof)}, path),
        lambda p: p.write_bytes(pickle.dumps(Evil(proof), protocol=2)),
    ):
        write(files[0])
        with pytest.raises(WeightsFileError, match=r"adapter.pt: refused: .*mkdir"):
            import_weights(ImportJob(files=files, out=tmp_path / "m", **arguments))
    assert not proof.exists() and not (tmp_path / "m").exists()
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists()  # pickle.loads does run the code


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89PNG....", "first bytes"),
    ],
)
def test_the_error_tells_why_a_file_holds_no_weights(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "adapter.pt"
    path.write_bytes(content)
    with pytest.raises(WeightsFileError, match=reason):
        read_tensors(path)


def test_the_error_names_truncated_files(golden, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, write in (("a.pt", torch.save), ("a.safetensors", lambda t, path: save_file(t, path))):
        path = tmp_path / name
        write(golden["aggregator"], path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(WeightsFileError, match=f"{name}: damaged"):
            read_tensors(path)


def test_the_error_names_the_keys_of_other_files(tmp_path: Path) -> None:
    torch.save({"epoch": torch.zeros(1), "weights": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(WeightsFileError, match=r"neither adapter, nor aggregator, nor LoRA.* epoch, weights"):
        import_weights(ImportJob(files=[tmp_path / "x.pt"]))
    torch.save({"image_proj": [1, 2]}, tmp_path / "y.pt")
    with pytest.raises(WeightsFileError, match="it holds no tensors, only image_proj"):
        read_tensors(tmp_path / "y.pt")


def test_torchs_older_file_format_is_readable(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "old.pt")["a"].tolist() == [0.0, 1.0, 2.0]


def test_two_files_for_one_part_are_refused(golden, write_files) -> None:  # type: ignore[no-untyped-def]
    files, _ = write_files()
    shutil.copy(files[0], files[0].with_name("adapter_ckpt.pt"))
    with pytest.raises(ValueError, match=r"adapter.pt and adapter_ckpt.pt, both for the perceptor"):
        find_files(files[0].parent)
    with pytest.raises(ValueError, match=r"looked for adapter\.pt, adapter_ckpt\.pt"):
        find_files(files[0].parent.parent / "dino")


def test_sizes_are_checked_by_name_and_type() -> None:
    assert check_sizes({"resampler": {"dim": 48.0}, "lora": {"alpha": 2}}) == {
        "resampler": {"dim": 48},
        "lora": {"alpha": 2.0},
    }
    with pytest.raises(ValueError, match=r'Did you mean "resampler\.num_queries"'):
        check_sizes({"resampler": {"num_querys": 3}})
    with pytest.raises(ValueError, match=r"lora\.rank must be positive"):
        check_sizes({"lora": {"rank": 0}})


# -- models trained here -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model with random weights, and an alpha that the released file cannot hold."""
    network = InstantIR(
        load_prior("nano"), RESAMPLER, lora={"rank": 8, "alpha": 12.0}, aggregator=True, perceptor_scale=0.5
    )
    generator = torch.Generator().manual_seed(0)
    parts = {
        part: {k: torch.randn(v.shape, generator=generator) * 0.05 for k, v in tensors.items()}
        for part, tensors in network.parts().items()
    }
    network.load_parts(parts)
    prior = network.prior
    folder = tmp_path_factory.mktemp("trained") / "model"
    recipe = {"name": "mine", "stage": "aggregator", "steps_at_restore": 4, "cfg_scale": 1.0}
    card = ModelCard(
        name="mine", system="instantir", recipe=recipe, prior=prior.source, config=network.config(), licence="mine"
    )
    save_model(folder, card, network.parts())
    return folder


def test_a_trained_model_computes_the_same_after_export_and_import(model_folder: Path, tmp_path: Path) -> None:
    report = export_weights(model_folder, tmp_path / "out")
    assert "alpha 12 was multiplied" in report.notes[0] and "rank is 8" in report.notes[1]
    assert "perceptor_scale is 0.5" in report.notes[2]
    import_weights(ImportJob(files=find_files(tmp_path / "out"), out=tmp_path / "back"))
    info = load_model(tmp_path / "back").info
    assert (info["name"], info["licence"], info["recipe"]["steps_at_restore"]) == ("mine", "mine", 4)
    assert info["prior"] == load_model(model_folder).info["prior"] and info["config"]["lora"]["alpha"] == 1
    config = load_model(model_folder).info["config"]
    assert info["config"] == {**config, "lora": {**config["lora"], "alpha": 1}}

    def network(folder: Path) -> InstantIR:
        model = load_model(folder)
        return InstantIR.from_parts(load_prior("nano"), model.info["config"], model.parts())

    before, after = network(model_folder), network(tmp_path / "back")
    old, new = previewer_deltas(before.unet), previewer_deltas(after.unet)
    assert set(old) == set(new)
    for name, delta in old.items():
        torch.testing.assert_close(new[name], delta, atol=1e-6, rtol=1e-5)
    assert same(*({k: v for k, v in n.parts().items() if k != "previewer"} for n in (before, after)))
    # with alpha 1, another export gives equal bytes
    export_weights(tmp_path / "back", tmp_path / "out2")
    for path in (tmp_path / "out").glob("*.[pb]*"):
        if path.suffix in (".pt", ".bin"):
            assert same({"x": read_tensors(path)}, {"x": read_tensors(tmp_path / "out2" / path.name)})


def test_the_import_ignores_the_sidecar_of_another_models_export(model_folder: Path, tmp_path: Path) -> None:
    """A sidecar next to other weights of the same sizes does not give them its licence, recipe or metrics."""
    export_weights(model_folder, tmp_path / "out")
    adapter = tmp_path / "out" / "adapter.pt"
    content = torch.load(adapter, weights_only=True)
    content["image_proj"] = {key: value + 1 for key, value in content["image_proj"].items()}
    torch.save(content, adapter)
    report = import_weights(ImportJob(files=find_files(tmp_path / "out"), out=tmp_path / "back"))
    assert "describes another adapter.pt" in report.notes[0]
    info = load_model(tmp_path / "back").info
    release = {"restore_options": {"view": "crop", "resize": "released", "color": "none"}}
    assert (info["name"], info["licence"], info["recipe"]) == ("back", "unstated", release)
    assert info["config"]["perceptor_scale"] == 0.5


def test_half_precision_gives_nearly_the_same_results_in_float32(model_folder: Path) -> None:
    from components.priors.opening import open_recorded_prior
    from components.systems.instantir.build import network_of
    from components.systems.instantir.network import Conditions

    model = load_model(model_folder)
    answers = {}
    for precision in ("fp32", "bf16"):
        prior = open_recorded_prior("nano", model.info["prior"], "cpu", precision)  # type: ignore[arg-type]
        network = network_of(model, prior)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert {p.dtype for p in network.unet.parameters()} == {dtype}  # also LoRA and perceptor
        assert {p.dtype for p in network.aggregator.parameters()} == {dtype}  # type: ignore[union-attr]
        assert {p.dtype for p in prior.autoencoder.parameters()} == {torch.float32}
        with torch.no_grad():
            images = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
            latents, times = prior.encode(images), torch.tensor([500])
            text, pooled = prior.embed_prompts(["red"])
            ids = prior.time_ids(torch.tensor([[1023, 64, 0, 0, 64, 64]]))
            tokens = prior.embed_images(images)
            conditions = Conditions(text=text, pooled=pooled, time_ids=ids, image_tokens=tokens)
            preview = network.preview(latents, times, conditions)
            residuals = network.residuals(latents, times, preview, conditions).scale_by(torch.ones(1))
            eps = network.denoise_eps(latents, times, conditions, residuals)
            assert {t.dtype for t in (latents, preview, eps, prior.decode(latents))} == {torch.float32}
        answers[precision] = torch.cat([preview, eps])
    gap = (answers["bf16"] - answers["fp32"]).square().mean().sqrt() / answers["fp32"].square().mean().sqrt()
    assert 0 < gap < 0.05, gap


# -- priors by name ----------------------------------------------------------------------------------------------------


def test_the_shape_of_sdxl_needs_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path))
    shape = prior_shape(SDXL)
    assert (shape.id, shape.image_encoder, shape.image_token_dim) == (SDXL, DINOV2, 1024)
    assert shape.unet["transformer_layers_per_block"] == [1, 2, 10] and "not on this machine" in shape.note
    with pytest.raises(ModelError) as error:
        load_prior(SDXL)
    message = str(error.value)
    for place in (
        f"{tmp_path}/weights/{SDXL}",
        f"{tmp_path}/weights/{SDXL.split('/')[1]}",
        "hub's cache",
        "HF_HUB_OFFLINE",
    ):
        assert place in message
    with pytest.raises(ModelError, match="owner/name"):
        prior_shape("sdxl")


def test_models_and_priors_in_restoray_home_open_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path))
    folder = tmp_path / "weights" / "mine"
    shutil.copytree(load_model("nano", prior=True).path, folder)
    assert load_model("mine").path == folder and prior_shape("mine").id == str(folder.resolve())
    with pytest.raises(ModelError, match='Did you mean "mine"'):
        load_model("mime")
    unet = tmp_path / "weights" / "xl" / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text("{}")
    path, name = find_folder("somebody/xl", ("unet/config.json",), (), {})
    assert path == unet.parent and name == str(unet.parent.resolve())
    with pytest.raises(ModelError, match=r"xl lacks vae/config.json"):
        find_folder("xl", ("vae/config.json",), (), {})


def test_the_variant_depends_on_the_precision_and_the_files(tmp_path: Path) -> None:
    for names, variants in (
        (["m.safetensors"], {"fp32": "", "fp16": "", "bf16": ""}),
        (["m.fp16.safetensors"], {"fp32": "fp16", "fp16": "fp16", "bf16": "fp16"}),
        (["m.safetensors", "m.fp16.safetensors"], {"fp32": "", "fp16": "fp16", "bf16": ""}),
        (["m.safetensors.index.json"], {"fp32": "", "fp16": ""}),
    ):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        assert {p: variant_of(folder, "m", p) for p in variants} == variants  # type: ignore[arg-type]
    (tmp_path / "m.bin").touch()
    with pytest.raises(ModelError, match=r"looked for m.safetensors, .*m.bin is not read"):
        variant_of(tmp_path, "m", "fp32")
