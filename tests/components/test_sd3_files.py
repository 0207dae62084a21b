"""Single files of SD3: key by key as diffusers' own conversion, with and without text encoders and autoencoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from helper_modules import load_helper
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from components.models import ModelError
from components.priors.sd3 import SD3Prior, generate_latents
from components.priors.sd3_config import CLIP_G, CLIP_L, SD3_AUTOENCODER, SD3_TRANSFORMER, T5_XXL
from components.priors.sd3_files import load_sd3_prior
from components.priors.sd3_keys import AUTOENCODER, TEXTS, TRANSFORMER, transformer_sizes, transformer_to_diffusers
from components.priors.sdxl_keys import autoencoder_table, checkpoint_shape, inverse, translate
from components.samplers.schedules import FlowSchedule

tiny = load_helper("components/_tiny_sd3.py")


@pytest.mark.parametrize(("dual", "qk_norm"), [((), False), ((0, 1), True)])
def test_the_transformer_is_converted_as_by_diffusers(dual: tuple[int, ...], qk_norm: bool) -> None:
    """SD3 medium's kind, and SD3.5 medium's with a second attention and normalised queries."""
    state = tiny.transformer_file(dual=dual, qk_norm=qk_norm)
    expected = convert_sd3_transformer_checkpoint_to_diffusers({f"{TRANSFORMER}{k}": v for k, v in state.items()})
    converted = transformer_to_diffusers(state)
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name
    sizes = transformer_sizes(state, head=8)
    assert sizes == {
        **{k: v for k, v in tiny.TRANSFORMER.items() if k != "sample_size"},
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if qk_norm else None,
    }
    SD3Transformer2DModel(**sizes, sample_size=8).load_state_dict(converted)


def test_published_heads_are_64_wide_unless_normalised_queries_show_another_width() -> None:
    assert SD3_TRANSFORMER["attention_head_dim"] == 64
    state = tiny.transformer_file(width=128)
    assert (transformer_sizes(state)["attention_head_dim"], transformer_sizes(state)["num_attention_heads"]) == (64, 2)
    assert transformer_sizes(tiny.transformer_file(qk_norm=True))["attention_head_dim"] == 8


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A pipeline whose transformer has the weights of the file."""
    own = tiny.pipeline()
    own.transformer.load_state_dict(transformer_to_diffusers(tiny.transformer_file()))
    return own


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd3") / "base"
    pipe.save_pretrained(path)
    return path


def autoencoder_file(pipe: Any) -> dict[str, Tensor]:
    """The pipeline's autoencoder under the names of a single file, its attention as 1 x 1 convolutions."""
    state, others = translate(pipe.vae.state_dict(), inverse(autoencoder_table(pipe.vae.config)))
    assert others == []
    return {f"{AUTOENCODER}{k}": v.reshape(checkpoint_shape(k, v.shape)).contiguous() for k, v in state.items()}


def text_file(pipe: Any) -> dict[str, Tensor]:
    """The text encoders as files hold them: no projection of CLIP-L (an identity), T5's embedding once."""
    tensors = {}
    for part, prefix in TEXTS.items():
        tensors |= {f"{prefix}{k}": v.clone() for k, v in getattr(pipe, part).state_dict().items()}
    del tensors[f"{TEXTS['text_encoder']}text_projection.weight"]
    del tensors[f"{TEXTS['text_encoder_3']}encoder.embed_tokens.weight"]
    tensors[f"{TEXTS['text_encoder']}text_model.embeddings.position_ids"] = torch.arange(7)[None]
    tensors[f"{TEXTS['text_encoder_2']}logit_scale"] = torch.tensor(4.6)
    return tensors


def with_identity(pipe: Any) -> Any:
    """The pipeline with the projection that files leave out."""
    pipe = copy.copy(pipe)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        pipe.text_encoder.text_projection.weight.copy_(torch.eye(16))
    return pipe


def write(path: Path, tensors: dict[str, Tensor], form: str) -> Path:
    file = path / f"sd3.{form}"
    if form == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return file


def transformer_part() -> dict[str, Tensor]:
    return {f"{TRANSFORMER}{k}": v.contiguous() for k, v in tiny.transformer_file().items()}


def check_same(prior: SD3Prior, pipe: Any) -> None:
    """The prior encodes, embeds and samples as the pipeline does."""
    noise = tiny.normal(2, 16, 8, 8)
    expected = pipe(
        prompt=tiny.PROMPTS,
        negative_prompt=tiny.NEGATIVES,
        height=16,
        width=16,
        num_inference_steps=2,
        latents=noise,
        max_sequence_length=tiny.T5_LENGTH,
        output_type="latent",
    ).images
    with torch.no_grad():
        latents = generate_latents(prior, noise, tiny.PROMPTS, tiny.NEGATIVES, steps=2)
        torch.testing.assert_close(latents, expected, atol=2e-5, rtol=2e-5)
        images = tiny.normal(1, 3, 8, 8)
        mode = (pipe.vae.encode(images).latent_dist.mode() - 0.0609) * 1.5305
        torch.testing.assert_close(prior.encode(images), mode)


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_a_file_with_everything(form: str, pipe: Any, folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {**transformer_part(), **autoencoder_file(pipe), **text_file(pipe)}, form)
    prior = load_sd3_prior(str(file), base=str(folder), t5_tokens=tiny.T5_LENGTH)
    assert prior.source == {"id": str(file), "digest": ""} and prior.absent == ()
    assert prior.schedule == FlowSchedule(shift=3.0)
    assert not any(p.requires_grad for module in prior.modules.values() for p in module.parameters())
    check_same(prior, with_identity(pipe))


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "module."])
def test_a_file_may_hold_the_transformer_alone(prefix: str, folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {f"{prefix}{k}": v.contiguous() for k, v in tiny.transformer_file().items()}, "safetensors")
    prior = load_sd3_prior(str(file), base=str(folder), with_text=False)
    expected = transformer_to_diffusers(tiny.transformer_file())
    state = prior.network.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())


def test_what_a_file_lacks_comes_from_the_base(pipe: Any, folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path, transformer_part(), "safetensors")
    prior = load_sd3_prior(str(file), base=str(folder), t5_tokens=tiny.T5_LENGTH)
    assert prior.absent == ()
    check_same(prior, pipe)
    half = load_sd3_prior(str(file), "bf16", base=str(folder), t5="none")
    assert half.absent == ("text_encoder_3",)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.autoencoder.parameters()} == {torch.float32}
    bare = load_sd3_prior(str(file), base=str(folder), with_text=False, with_network=False)
    assert len(bare.absent) == 3 and bare.network.device.type == "meta"


def test_t5_in_float16_is_as_from_a_folder(pipe: Any, folder: Path, tmp_path: Path) -> None:
    """transformers keeps the layers in float32 whose outputs exceed 65,504 in T5-XXL."""
    file = write(tmp_path, {**transformer_part(), **text_file(pipe)}, "safetensors")
    opened = [
        load_sd3_prior(name, "fp16", base=base, t5_tokens=tiny.T5_LENGTH)
        for name, base in ((str(file), str(folder)), (str(folder), ""))
    ]
    kinds = [{k: p.dtype for k, p in prior.text_encoders[2].named_parameters()} for prior in opened]  # type: ignore[union-attr]
    assert kinds[0] == kinds[1] and {v for k, v in kinds[0].items() if ".wo." in k} == {torch.float32}
    with torch.no_grad():
        t5_tokens = [prior.embed_prompts(tiny.PROMPTS)[0][:, tiny.LENGTH :] for prior in opened]
    assert torch.equal(*t5_tokens)


def test_without_a_base_the_published_sizes_hold_and_there_are_no_tokenizers(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    normed = {f"{TRANSFORMER}{k}": v.contiguous() for k, v in tiny.transformer_file(qk_norm=True).items()}
    for tensors, words in (
        (transformer_part(), "the width 32 is no multiple of 64"),
        (normed, "holds no autoencoder"),
        ({**normed, **autoencoder_file(pipe)}, r"autoencoder: \d+ missing: .* of the wrong shape"),
        ({**normed, **autoencoder_file(pipe), **text_file(pipe)}, "holds no tokenizers: name a diffusers folder"),
    ):
        with pytest.raises(ModelError, match=words):
            load_sd3_prior(str(write(tmp_path, tensors, "safetensors")))
    with pytest.raises(ModelError, match="base: nothing-there: no such model"):
        load_sd3_prior(str(write(tmp_path, normed, "safetensors")), base="nothing-there")


@pytest.mark.parametrize(
    ("drop", "add", "words"),
    [
        (
            ["joint_blocks.1.x_block.attn.proj.bias", "y_embedder.mlp.2.weight"],
            [],
            r"2 missing: time_text_embed.*to_out",
        ),
        (["joint_blocks.0.x_block.attn.qkv.bias"], [], r"3 missing: .*to_k.bias, .*to_q.bias, .*to_v.bias"),
        (
            [],
            ["joint_blocks.0.x_block.extra.weight", "stray.bias"],
            "2 unexpected: joint_blocks.0.x_block.extra.*stray",
        ),
        (["x_embedder.proj.weight"], [], "not a single file of SD3"),
        (["final_layer.linear.weight"], [], "no readable sizes .*final_layer.linear.weight"),
    ],
)
def test_every_wrong_key_of_a_file_is_named(
    drop: list[str], add: list[str], words: str, folder: Path, tmp_path: Path
) -> None:
    tensors = transformer_part()
    for name in drop:
        del tensors[f"{TRANSFORMER}{name}"]
    file = write(tmp_path, {**tensors, **{f"{TRANSFORMER}{name}": torch.zeros(2, 2) for name in add}}, "safetensors")
    with pytest.raises(ModelError, match=words):
        load_sd3_prior(str(file), base=str(folder))


def test_wrong_keys_of_other_parts_are_named(pipe: Any, folder: Path, tmp_path: Path) -> None:
    parts = {**transformer_part(), **autoencoder_file(pipe), **text_file(pipe)}
    for changes, words in (
        ({"optimizer.state": torch.zeros(1)}, "1 unexpected: optimizer.state"),
        ({f"{AUTOENCODER}decoder.extra.weight": torch.zeros(1)}, "autoencoder: 1 unexpected: decoder.extra.weight"),
        ({f"{TEXTS['text_encoder_3']}extra": torch.zeros(1)}, "text_encoder_3: 1 unexpected: extra"),
        ({f"{TRANSFORMER}context_embedder.bias": torch.zeros(3)}, r"context_embedder.bias: \(3,\) instead of \(32,\)"),
    ):
        file = write(tmp_path, {**parts, **changes}, "safetensors")
        with pytest.raises(ModelError, match=words):
            load_sd3_prior(str(file), base=str(folder))


def test_a_file_of_the_hub_has_the_repositorys_name(
    pipe: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, calls = write(tmp_path, transformer_part(), "safetensors"), []

    def download(repository: str, name: str) -> str:
        calls.append((repository, name))
        if name != "deep/sd3.safetensors":
            raise OSError("no entry\nmore")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    prior = load_sd3_prior("owner/repository/deep/sd3.safetensors", base=str(folder), with_text=False)
    assert prior.source["id"] == "owner/repository/deep/sd3.safetensors"
    with pytest.raises(ModelError, match=r"the download from the hub failed \(no entry\)$"):
        load_sd3_prior("owner/repository/other.safetensors")
    assert calls == [("owner/repository", "deep/sd3.safetensors"), ("owner/repository", "other.safetensors")]


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file, and not owner/name/file of the hub"):
        load_sd3_prior(str(tmp_path / "none.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(ModelError, match="broken"):
        load_sd3_prior(str(broken))


def test_the_published_parts_have_their_numbers_of_parameters() -> None:
    """CLIPs: SDXL's, and CLIP-L's projection. Autoencoder: SDXL's with 16 channels, without its 1 x 1 ends."""
    extra = 24 * (512 * 9 + 1) + 12 * 512 * 9  # the encoder makes 32 channels instead of 8, the decoder takes 16
    with torch.device("meta"):
        parts = {
            123_060_480 + 768 * 768: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L)),
            694_659_840: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),
            4_762_310_656: T5EncoderModel(T5Config(**T5_XXL)),
            83_653_863 - (8 * 8 + 8 + 4 * 4 + 4) + extra: AutoencoderKL(**SD3_AUTOENCODER),
        }
    assert [sum(p.numel() for p in part.parameters()) for part in parts.values()] == list(parts)
