"""Import and export of SUPIR's released layout: equal to the byte, and messages for every fault."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from helper_modules import load_helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.models import ModelCard, ModelError, load_model, save_model
from components.priors.hub import prior_shape
from components.priors.opening import load_prior
from components.priors.parameters import copy_strictly
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl_config import SDXL, SDXL_AUTOENCODER
from components.randomness import seeded_init
from components.systems.supir import weights
from components.systems.supir.config import AdaptorConfig
from components.systems.supir.network import Adaptor, Supir
from components.systems.supir.released import LICENCE, check_sizes, find_files
from components.systems.supir.weights import expected_layout, export_weights, import_weights
from components.systems.weights_io import ImportJob

files = load_helper("components/_golden_supir.py")

UNET: Mapping[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36,
}
VAE: Mapping[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}
CONTROL = "model.control_model."
CONNECTORS = "model.diffusion_model.project_modules."
ENCODER = "first_stage_model.denoise_encoder."

SAME = {
    f"{CONTROL}input_hint_block.0.weight": ("adaptor", "control.hint_conv.weight"),
    f"{CONTROL}input_blocks.0.0.bias": ("adaptor", "control.conv_in.bias"),
    f"{CONTROL}input_blocks.3.0.op.weight": ("adaptor", "control.down_blocks.0.downsamplers.0.conv.weight"),
    f"{CONTROL}input_blocks.7.0.in_layers.2.weight": ("adaptor", "control.down_blocks.2.resnets.0.conv1.weight"),
    f"{CONTROL}middle_block.1.transformer_blocks.2.attn2.to_k.weight": (
        "adaptor",
        "control.mid_block.attentions.0.transformer_blocks.2.attn2.to_k.weight",
    ),
    f"{CONTROL}label_emb.0.2.weight": ("adaptor", "control.add_embedding.linear_2.weight"),
    f"{CONNECTORS}7.attn.to_out.0.bias": ("adaptor", "connectors.7.attn.to_out.0.bias"),
    f"{CONNECTORS}11.param_free_norm.weight": ("adaptor", "connectors.11.param_free_norm.weight"),
    f"{ENCODER}mid.attn_1.q.weight": ("encoder", "encoder.mid_block.attentions.0.to_q.weight"),
    f"{ENCODER}down.1.block.0.nin_shortcut.weight": ("encoder", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"),
    f"{ENCODER}norm_out.bias": ("encoder", "encoder.conv_norm_out.bias"),
}
"""Released keys with their part and key of a model folder, written by hand from supir.md, section 1.5."""


def save_prior(folder: Path, unet: Mapping[str, Any] = UNET, vae: Mapping[str, Any] | None = VAE) -> str:
    """A diffusers folder with the configurations alone."""
    for part, config in (("unet", unet), ("vae", vae)):
        if config is not None:
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def prior(tmp_path: Path) -> str:
    return save_prior(tmp_path / "prior")


def released_tensors(prior: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Tensor]:
    """A released file's tensors for a prior, with different numbers in each."""
    (shapes,) = expected_layout(prior, sizes=sizes).values()
    generator = torch.Generator().manual_seed(7)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def save_checkpoint(folder: Path, tensors: Any, name: str = "SUPIR-v0F.ckpt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_round_trip_is_equal_to_the_byte(dtype: torch.dtype, prior: str, tmp_path: Path) -> None:
    tensors = released_tensors(prior, dtype)
    tensors[f"{CONTROL}input_blocks.0.0.weight"] = tensors[f"{CONTROL}input_blocks.0.0.weight"].float()  # a mixture
    assert tensors[f"{ENCODER}mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    save_checkpoint(tmp_path / "in", {"state_dict": tensors, "epoch": 3})
    report = import_weights(ImportJob(files=find_files(tmp_path / "in"), out=tmp_path / "model", prior=prior))
    info = load_model(str(report.model)).info
    assert info["config"] == {"adaptor": AdaptorConfig().to_dict()} and info["prior"]["id"] == prior
    assert info["parents"] == {"SUPIR-v0F.ckpt": f"sha256:{report.sources[0].sha256}"}
    assert [source.part for source in report.sources] == ["adaptor", "encoder"]
    assert sum(source.tensors for source in report.sources) == len(tensors)
    for form in ("pt", "safetensors"):
        out = export_weights(tmp_path / "model", tmp_path / form, form=form)
        (name,) = out.files
        assert name == ("SUPIR-v0F.ckpt" if form == "pt" else "SUPIR-v0F.safetensors")
        path = tmp_path / form / name
        tensors_again = torch.load(path, weights_only=True) if form == "pt" else load_file(path)
        assert set(tensors_again) == set(tensors)
        for key, value in tensors.items():
            assert tensors_again[key].dtype == value.dtype and torch.equal(tensors_again[key], value), key
        # the sidecar names the prior
        again = import_weights(ImportJob(files=find_files(tmp_path / form), out=tmp_path / f"{form}-model"))
        parts = load_model(str(again.model)).info["parts"]
        assert parts == info["parts"] and again.config == report.config and again.prior == report.prior
    assert export_weights(tmp_path / "pt-model", tmp_path / "again").files == out_files(tmp_path / "pt")


def out_files(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / "restoray.json").read_text())["files"])


def test_a_model_folder_has_the_names_of_our_networks(prior: str, tmp_path: Path) -> None:
    tensors = released_tensors(prior)
    model = load_model(
        str(
            import_weights(ImportJob(files=[save_checkpoint(tmp_path, tensors)], out=tmp_path / "m", prior=prior)).model
        )
    )
    parts = {part: model.part(part) for part in ("adaptor", "encoder")}
    for released, (part, key) in SAME.items():
        assert torch.equal(parts[part][key].flatten(), tensors[released].flatten()), released
    with seeded_init(0, "unet"):
        unet = UNet2DConditionModel(**{k: tuple(v) if isinstance(v, list) else v for k, v in UNET.items()})
        autoencoder = AutoencoderKL(**VAE)
    networks = {"adaptor": Adaptor(unet, AdaptorConfig()), "encoder": RobustEncoder(autoencoder)}
    for part, network in networks.items():
        copy_strictly(dict(network.named_parameters()), parts[part], part)


def test_the_authors_own_tiny_networks_are_imported(golden_dir: Path, tmp_path: Path) -> None:
    unet = files.loaded_unet(golden_dir)
    adaptor = files.loaded_adaptor(golden_dir, unet)
    autoencoder, encoder = files.loaded_autoencoder(golden_dir)
    prior = save_prior(tmp_path / "prior", dict(unet.config), dict(autoencoder.config))
    control = files.Golden.open(golden_dir, "glvcontrol").weights()
    connectors = files.Golden.open(golden_dir, "unet_connectors").weights()
    stage1 = files.Golden.open(golden_dir, "stage1").weights()
    tensors = {f"model.control_model.{key}": value for key, value in control.items()}
    tensors |= {f"model.diffusion_model.{key}": value for key, value in connectors.items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in stage1.items()}  # the autoencoder too
    report = import_weights(ImportJob(files=[save_checkpoint(tmp_path, tensors)], out=tmp_path / "model", prior=prior))
    left_out = sum("denoise_encoder." not in key for key in stage1)
    assert f"left out {left_out} tensors of the prior itself ({left_out} of the autoencoder)" in report.notes[0]
    model = load_model(str(report.model))
    for part, network in (("adaptor", adaptor), ("encoder", encoder)):
        state = model.part(part)
        assert {key: value.shape for key, value in network.named_parameters()} == {
            key: value.shape for key, value in state.items()
        }
        assert all(torch.equal(value, state[key]) for key, value in network.named_parameters())


def test_models_of_the_nano_prior_are_exported_and_imported(tmp_path: Path) -> None:
    prior = load_prior("nano")
    adaptor = Adaptor(prior.unet, AdaptorConfig(transformer_depth=[1, 1, 1], connector="zero_conv"))
    network = Supir(prior, RobustEncoder(prior.autoencoder), adaptor)
    card = ModelCard(
        name="mine",
        system="supir",
        recipe={"restore_options": {"steps": 7}},
        prior=prior.source,
        config=network.config(),
        licence="ours",
    )
    model = save_model(tmp_path / "model", card, network.parts())
    out = export_weights(model.path, tmp_path / "out", form="safetensors")
    assert set(out.files) == {"SUPIR-v0Q.safetensors"}
    assert any("nano" in note for note in out.notes) and any("transformer_depth=[1, 1, 1]" in n for n in out.notes)
    keys = load_file(tmp_path / "out" / "SUPIR-v0Q.safetensors")
    assert f"{ENCODER}residual.blocks.1.conv2.bias" in keys and f"{CONTROL}middle_block.1.proj_in.weight" in keys
    report = import_weights(ImportJob(files=find_files(tmp_path / "out"), out=tmp_path / "again"))
    again = load_model(str(report.model))
    assert again.info["parts"] == model.info["parts"]
    assert (report.licence, report.defaults) == ("ours", {"steps": 7})
    (tmp_path / "out" / "restoray.json").unlink()  # prior and nothing else: the sizes follow from the keys
    report = import_weights(ImportJob(files=find_files(tmp_path / "out"), out=tmp_path / "third", prior="nano"))
    assert report.config == model.info["config"] and report.licence == "unstated"
    third = load_model(str(report.model))
    restored = Supir.from_parts(load_prior("nano"), third.info["config"], third.parts())
    for part, state in network.parts().items():
        assert all(torch.equal(value, restored.parts()[part][key]) for key, value in state.items())


@pytest.mark.parametrize(
    "sizes",
    [
        {"transformer_depth": [1, 1, 2]},
        {"transformer_depth": [1, 2, 1], "connector": "zero_conv"},
        {"cross_attention": False},
        {"connector": "zero_conv", "cross_attention": False},
        {"transformer_depth": []},
    ],
)
def test_sizes_follow_from_the_keys(sizes: dict[str, Any], prior: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, released_tensors(prior, **sizes))
    assert import_weights(ImportJob(files=[path], prior=prior)).config == {
        "adaptor": {**AdaptorConfig().to_dict(), **sizes}
    }


def test_sizes_that_are_given_go_first(prior: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, released_tensors(prior, transformer_depth=[1, 1, 2]))
    assert import_weights(ImportJob(files=[path], prior=prior, sizes={"transformer_depth": [1, 1, 2]})).sources
    with pytest.raises(ModelError, match=r"missing: .*keys look like transformer_depth=\[1, 1, 2\]"):
        import_weights(ImportJob(files=[path], prior=prior, sizes={"transformer_depth": []}))
    with pytest.raises(ValueError, match=r"\[1, 1, 4\] is more than the prior's own \[0, 2, 3\]"):
        import_weights(ImportJob(files=[path], prior=prior, sizes={"transformer_depth": [1, 1, 4]}))
    with pytest.raises(ValueError, match="needs 3 numbers"):
        expected_layout(prior, sizes={"transformer_depth": [1, 1]})


def test_deeper_transformers_than_the_priors_are_unexpected(prior: str, tmp_path: Path) -> None:
    tensors = released_tensors(prior)
    key = f"{CONTROL}middle_block.1.transformer_blocks.3.norm1.weight"
    path = save_checkpoint(tmp_path, {**tensors, key: torch.ones(16)})
    with pytest.raises(ModelError, match=f"1 unexpected: {re.escape(key)}"):
        import_weights(ImportJob(files=[path], prior=prior))


def test_every_fault_is_named_at_once(prior: str, tmp_path: Path) -> None:
    tensors = released_tensors(prior)
    del tensors[f"{CONTROL}time_embed.0.bias"]
    del tensors[f"{CONNECTORS}3.attn.to_q.weight"]
    tensors["model.extra.weight"] = torch.zeros(1)
    tensors["first_stage_model.denoise_encoder_s1.conv_in.bias"] = torch.zeros(8)
    tensors[f"{ENCODER}mid.attn_1.k.weight"] = torch.zeros(16, 16)
    tensors[f"{CONNECTORS}0.zero_add.bias"] = torch.zeros(16, dtype=torch.int64)
    tensors[f"{CONTROL}input_hint_block.0.bias"][2] = torch.nan
    path = save_checkpoint(tmp_path, tensors)
    with pytest.raises(ModelError) as error:
        import_weights(ImportJob(files=[path], out=tmp_path / "model", prior=prior))
    for words in (
        f"2 missing: {CONTROL}time_embed.0.bias, {CONNECTORS}3.attn.to_q.weight",
        "2 unexpected: model.extra.weight, first_stage_model.denoise_encoder_s1.conv_in.bias",
        f"1 of the wrong shape: {ENCODER}mid.attn_1.k.weight is [16, 16] instead of [16, 16, 1, 1]",
        f"1 not floating point: {CONNECTORS}0.zero_add.bias is torch.int64",
        f"1 with values that are not finite: {CONTROL}input_hint_block.0.bias",
        f"({len(tensors)} tensors",
    ):
        assert words in str(error.value), words
    assert len(str(error.value)) <= 2000 and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("beginnings", "words"),
    [
        ((ENCODER,), "no robust encoder (first_stage_model.denoise_encoder.*), and all"),
        ((CONTROL,), "no control encoder (model.control_model.*), and all"),
        (
            (CONTROL, CONNECTORS),
            "no control encoder (model.control_model.*) and no connectors (model.diffusion_model.p",
        ),
        ((ENCODER, CONTROL), "no control encoder (model.control_model.*) and no robust encoder"),
        ((ENCODER, CONNECTORS), "no connectors (model.diffusion_model.project_modules.*) and no robust encoder"),
    ],
)
def test_a_missing_part_is_named(beginnings: tuple[str, ...], words: str, prior: str, tmp_path: Path) -> None:
    tensors = released_tensors(prior)
    rest = {key: value for key, value in tensors.items() if not key.startswith(beginnings)}
    with pytest.raises(ModelError) as error:
        import_weights(ImportJob(files=[save_checkpoint(tmp_path, rest)], prior=prior))
    assert words in str(error.value) and f"{len(tensors) - len(rest)} missing: " in str(error.value)
    assert "unexpected" not in str(error.value)


def test_the_priors_own_tensors_are_left_out(prior: str, tmp_path: Path) -> None:
    tensors = released_tensors(prior)
    theirs = {
        "model.diffusion_model.out.2.bias": torch.ones(4),
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2),
        "first_stage_model.quant_conv.bias": torch.ones(8),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77),
    }
    path = tmp_path / "SUPIR-v0Q_fp16.safetensors"
    save_file({**theirs, **tensors}, path)
    report = import_weights(ImportJob(files=find_files(tmp_path), prior=prior))
    assert report.notes == (
        f"{path.name}: left out 4 tensors of the prior itself (2 of the UNet, 1 of the autoencoder, 1 of the texts)",
    )
    assert sum(source.tensors for source in report.sources) == len(tensors)
    path.unlink()
    with pytest.raises(ModelError, match=r"not a SUPIR: no key begins with .*; it holds conditioner"):
        import_weights(ImportJob(files=[save_checkpoint(tmp_path, theirs)], prior=prior))


def test_a_file_under_another_name_is_read(prior: str, tmp_path: Path) -> None:
    tensors = released_tensors(prior)
    path = save_checkpoint(tmp_path, {"ours": {f"module.{k}": v for k, v in tensors.items()}, "loss": {"a.b": tensors}})
    with pytest.raises(ModelError, match="several such networks"):
        import_weights(ImportJob(files=[path], prior=prior))
    path = save_checkpoint(tmp_path, {"ours": {f"module.{key}": value for key, value in tensors.items()}})
    assert sum(source.tensors for source in import_weights(ImportJob(files=[path], prior=prior)).sources) == len(
        tensors
    )


def test_the_published_size_has_the_authors_licence(
    prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = released_tensors(prior)
    path = save_checkpoint(tmp_path, tensors)
    report = import_weights(ImportJob(files=[path], prior=prior))
    assert report.licence == "unstated" and report.permitted_use.startswith("as the licences allow")
    count = sum(value.numel() for value in tensors.values())
    monkeypatch.setattr(weights, "PUBLISHED_PARAMETERS", count)  # in place of 5 GB
    report = import_weights(ImportJob(files=[path], out=tmp_path / "model", prior=prior))
    assert report.licence == LICENCE and "non-commercial" in LICENCE
    assert report.permitted_use.startswith("non-commercial only")
    report = import_weights(ImportJob(files=[path], prior=prior, licence="mine"))
    assert report.licence == "mine" and report.permitted_use.startswith("as the licences allow")
    # the licence of another file is not taken over
    export_weights(tmp_path / "model", tmp_path / "out")
    tensors[f"{ENCODER}conv_in.bias"] += 1
    monkeypatch.undo()
    report = import_weights(ImportJob(files=[save_checkpoint(tmp_path / "out", tensors)]))
    assert report.licence == "unstated" and "restoray.json describes another SUPIR-v0F.ckpt" in report.notes[0]


def test_the_published_layout_has_the_sizes_of_the_reference() -> None:
    def count(beginning: str, **sizes: Any) -> tuple[int, int]:
        ((name, shapes),) = expected_layout(sizes=sizes).items()
        assert name == "SUPIR-v0Q.ckpt"
        own = [torch.Size(shape).numel() for key, shape in shapes.items() if key.startswith(beginning)]
        return len(own), sum(own)

    assert count("") == (1034, 1_332_339_912)
    assert count(CONTROL) == (810, 1_243_378_880)
    assert count(CONNECTORS) == (118, 54_797_440)
    assert count(ENCODER) == (106, 34_163_592)
    assert count(CONTROL, transformer_depth=[1, 1, 4])[1] == 597_763_520
    assert count(CONTROL, transformer_depth=[1, 1, 5])[1] == 702_031_040


def test_a_prior_without_its_autoencoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path))
    prior = save_prior(tmp_path / "prior", vae=None)
    assert prior_shape(prior, "").autoencoder == {} and prior_shape(prior, "").image_encoder == ""
    with pytest.raises(ModelError, match=r"no vae/config.json"):
        expected_layout(prior)
    shape = prior_shape(SDXL, "")
    assert shape.autoencoder == SDXL_AUTOENCODER and "dinov2" not in shape.note
    save_prior(tmp_path / "weights" / SDXL, vae=None)  # only the UNet of SDXL is on this machine
    shape = prior_shape(SDXL, "")
    assert shape.unet == UNET and shape.autoencoder == SDXL_AUTOENCODER and not shape.note
    assert prior_shape("nano").autoencoder["factor"] == 4


def test_an_export_needs_an_adaptor_and_its_own_sizes(prior: str, tmp_path: Path) -> None:
    report = import_weights(
        ImportJob(files=[save_checkpoint(tmp_path, released_tensors(prior))], out=tmp_path / "model", prior=prior)
    )
    model = load_model(str(report.model))
    plan = export_weights(model.path, tmp_path / "out", write=False)
    assert plan.files == {"SUPIR-v0F.ckpt": ""} and not (tmp_path / "out").exists()
    card = {"name": "m", "system": "supir", "prior": model.info["prior"]}
    first = save_model(
        tmp_path / "first", ModelCard(**card, config={"adaptor": None}), {"encoder": model.part("encoder")}
    )
    with pytest.raises(ModelError, match="no adaptor yet"):
        export_weights(first.path, tmp_path / "out")
    config = {"adaptor": AdaptorConfig(connector="zero_conv").to_dict()}
    wrong = save_model(tmp_path / "wrong", ModelCard(**card, config=config), model.parts())
    with pytest.raises(ModelError, match="part adaptor does not fit"):
        export_weights(wrong.path, tmp_path / "out")
    with pytest.raises(ModelError, match="holds a unetres model"):
        export_weights("nano", tmp_path / "out")
    for spelling, form in (("peft", "pt"), ("released", "ckpt")):
        with pytest.raises(ValueError, match="spelling must be"):
            export_weights(model.path, tmp_path / "out", spelling=spelling, form=form)


def test_wrong_arguments_are_refused(prior: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, released_tensors(prior))
    with pytest.raises(ValueError, match=r"one file, got SUPIR-v0F.ckpt, SUPIR-v0F.ckpt"):
        import_weights(ImportJob(files=[path, path], prior=prior))
    with pytest.raises(ValueError, match="no picture encoder"):
        import_weights(ImportJob(files=[path], prior=prior, image_encoder="facebook/dinov2-large"))
    save_checkpoint(tmp_path, {}, "SUPIR-v0Q.ckpt")
    with pytest.raises(ValueError, match=r"holds SUPIR-v0Q.ckpt and SUPIR-v0F.ckpt"):
        find_files(tmp_path)
    for sizes, words in (
        ({"conector": "zero_sft"}, 'Did you mean "connector"'),
        ({"connector": "sft"}, "must be one of zero_sft, zero_conv"),
        ({"transformer_depth": 2}, "must be a list of whole numbers"),
        ({"transformer_depth": [1, 0, 1]}, "numbers from 1"),
        ({"cross_attention": "perhaps"}, "true or false"),
    ):
        with pytest.raises(ValueError, match=words):
            check_sizes(sizes)
    assert check_sizes({"cross_attention": "false", "transformer_depth": (1, 1, 4)}) == {
        "cross_attention": False,
        "transformer_depth": [1, 1, 4],
    }
    for text in ("[]", '{"system": "supir", "config": {"adaptor": null}}', '{"system": "swinir", "config": {}}'):
        (tmp_path / "restoray.json").write_text(text)
        with pytest.raises(ModelError, match=r"restoray.json: "):
            import_weights(ImportJob(files=[path], prior=prior))
