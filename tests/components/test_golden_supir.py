"""SUPIR against tensors from the official code; each test builds its networks from the json's configuration.

The tests take every supir_*.json of the golden folder by name, so that another set with other sizes and seeds can
replace it. A check must compare every output tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from helper_modules import load_helper
from torch import Tensor, nn

from components.color import adain, wavelet, wavelet_blur, wavelet_split
from components.priors.conditions import SizedConditions
from components.priors.encoder_copy import embed_step, unet_skeleton
from components.priors.fast_unet import Speed
from components.priors.layer_tiles import LayerTiles, run_decoder, run_encoder
from components.priors.parameters import copy_strictly
from components.priors.robust_encoder import encode_restoration, first_restoration
from components.priors.sdxl import Prior
from components.priors.sdxl_config import SDXL, SDXL_AUTOENCODER, SDXL_UNET
from components.priors.sdxl_keys import (
    KL_ATTENTION,
    KL_RESNET,
    RESNET,
    autoencoder_table,
    unet_table,
)
from components.priors.tile_layouts import released_boxes
from components.priors.unet_walk import Joins, text_inputs, walk_unet
from components.samplers.edm import (
    Churn,
    Pull,
    edm_sigmas,
    level_table,
    sample_edm,
)
from components.samplers.schedules import Schedule
from components.systems.supir.connectors import ConnectorJoins, ZeroConv, ZeroCrossAttn, ZeroSFT, places_of
from components.systems.supir.control import ControlEncoder, walk_control
from components.systems.supir.denoiser import Ramp, SupirDenoiser
from components.systems.supir.fast import FastSupir
from components.systems.supir.network import Supir, control_features, predict_eps
from components.systems.supir.preprocess import (
    fixed_sizes,
    page_fix,
    page_resize,
    released_sizes,
    resize,
    resize_result,
    to_tensor,
)
from components.systems.supir.weights import expected_layout

WEIGHTS_ONLY = {"unet_output_blocks", "unet_connectors"}
"""Files with weights of supir_unet."""
files = load_helper("components/_golden_supir.py")
samplers = load_helper("components/_golden_supir_samplers.py")
Golden, SIGMA_MAX = files.Golden, files.SIGMA_MAX


# --- checks -----------------------------------------------------------------------------------------------------------


def check_blocks(golden: Golden) -> None:
    config = golden.config
    size = config["resblock"]
    resnet = ResnetBlock2D(
        in_channels=size["channels"], out_channels=size["out_channels"], temb_channels=size["emb"], eps=size["eps"]
    )
    files.load(resnet, golden.weights("resblock."), RESNET, "resblock")
    golden.check("resblock", resnet(golden.input("resblock.0"), golden.input("resblock.1")))
    size = config["transformer"]
    transformer = Transformer2DModel(
        num_attention_heads=size["heads"],
        attention_head_dim=size["dim_head"],
        in_channels=size["channels"],
        num_layers=size["depth"],
        cross_attention_dim=size["context_dim"],
        use_linear_projection=True,
    )
    copy_strictly(dict(transformer.named_parameters()), golden.weights("transformer."), "transformer")
    hidden = transformer(golden.input("transformer.0"), golden.input("transformer.1"), return_dict=False)[0]
    golden.check("transformer", hidden)
    eps, weights = config["vae"]["eps"], golden.weights("vae_resnet.")
    width, inputs = weights["conv1.weight"].shape[:2]
    vae = ResnetBlock2D(in_channels=inputs, out_channels=width, temb_channels=None, eps=eps)  # type: ignore[arg-type]
    files.load(vae, weights, KL_RESNET, "vae_resnet")
    golden.check("vae_resnet", vae(golden.input("vae_resnet.0"), None))
    weights = golden.weights("vae_attn.")
    width = weights["q.weight"].shape[0]
    attention = Attention(
        width, heads=1, dim_head=width, eps=eps, norm_num_groups=32, residual_connection=True, bias=True
    )
    files.load(attention, weights, KL_ATTENTION, "vae_attn")
    golden.check("vae_attn", attention(golden.input("vae_attn.0")))
    for name, module, key in (("downsample", Downsample2D, "op"), ("upsample", Upsample2D, "conv")):
        weights = golden.weights(f"{name}.")
        width = weights[f"{key}.weight"].shape[0]
        resampler = module(width, use_conv=True, **({"padding": 1, "name": "op"} if key == "op" else {}))
        files.load(resampler, weights, {key: "conv"}, name)
        golden.check(name, resampler(golden.input(f"{name}.0")))


def check_connectors(golden: Golden) -> None:
    modules: dict[str, nn.Module] = {}
    for name, size in golden.config.items():
        if size["cls"] == "ZeroCrossAttn":
            module: nn.Module = ZeroCrossAttn(size["context_dim"], size["query_dim"], 32)
        elif size["cls"] == "ZeroSFT":
            module = ZeroSFT(size["label_nc"], size["norm_nc"], size["concat_channels"], 32)
        else:
            module = ZeroConv(size["label_nc"], size["norm_nc"])
        weights = golden.weights(f"{name}.")
        if name == "init":  # a new connector is this one, but for the random part of the zeroed transform
            for key, value in weights.items():
                if not key.startswith("mlp_shared"):
                    assert torch.equal(dict(module.named_parameters())[key], value), key
        copy_strictly(dict(module.named_parameters()), weights, name)
        modules[name] = module
    for output in [name.removeprefix("output/") for name in golden.tensors if name.startswith("output/")]:
        name, case = output.split(".", 1)
        scale = golden.description["cases"].get(case, {"control_scale": 1})["control_scale"]
        tensors = "lowvar" if case == "lowvar" else name if name in ("crossattn", "noconcat") else "concat"
        if name == "crossattn":
            arguments = (golden.input(f"{tensors}.context"), golden.input(f"{tensors}.x"))
        else:
            arguments = tuple(
                golden.input(f"{tensors}.{n}") for n in ("c", "h", "h_ori") if not (name == "noconcat" and n == "h_ori")
            )  # type: ignore[assignment]
        golden.check(output, modules[name](*arguments, scale=scale))


def check_glvcontrol(golden: Golden) -> None:
    unet = files.unet_of(golden.config)
    control = ControlEncoder.from_unet(unet, tuple(golden.config["transformer_depth"]))
    files.load_control(control, golden.weights(), dict(unet.config))
    timesteps = golden.input("timesteps")
    golden.check("t_emb", control.time_proj(timesteps))  # type: ignore[operator]
    embedding = files.vector_embedding(control, timesteps, golden.input("y"))
    inputs = text_inputs(control, embedding, golden.input("context"))
    for number, feature in enumerate(walk_control(control, golden.input("x"), golden.input("xt"), inputs)):
        golden.check(f"h.{number}", feature)


def check_unet(golden: Golden) -> None:
    unet = files.loaded_unet(golden.folder)
    connectors = files.loaded_adaptor(golden.folder, unet).connectors
    embedding = files.vector_embedding(unet, golden.input("timesteps"), golden.input("y"))
    inputs = text_inputs(unet, embedding, golden.input("context"))
    places = places_of(unet)
    features = [golden.input(f"control.{number}") for number in range(1 + places[0].feature)]
    for scale in golden.description["scales"]:
        if scale == 1:
            for number, connector in enumerate(connectors):
                connector.register_forward_hook(
                    lambda _, __, output, number=number: golden.check(f"project_modules.{number}", output)
                )
        joins = ConnectorJoins(connectors, places, features, scale)
        golden.check(f"eps.cs{scale}", walk_unet(unet, golden.input("xt"), inputs, joins))
        for connector in connectors:
            connector._forward_hooks.clear()


def check_tiny_sdxl(golden: Golden) -> None:
    unet = files.loaded_unet(golden.folder)
    time_ids, pooled = golden.input("time_ids"), golden.input("text_embeds")
    embedding = embed_step(unet, golden.input("timesteps"), pooled, time_ids, torch.float32)
    torch.testing.assert_close(embedding, files.vector_embedding(unet, golden.input("timesteps"), golden.input("y")))
    inputs = text_inputs(unet, embedding, golden.input("context"))
    golden.check("eps", walk_unet(unet, golden.input("x"), inputs, Joins()))
    added = {"text_embeds": pooled, "time_ids": time_ids}
    eps = unet(golden.input("x"), golden.input("timesteps"), golden.input("context"), added_cond_kwargs=added)
    golden.check("eps", eps.sample)


def check_stage1(golden: Golden) -> None:
    autoencoder, encoder = files.loaded_autoencoder(golden.folder)
    images, scale = golden.input("x"), golden.config["scale_factor"]
    golden.check("denoise_encoder.h", encoder.encoder(images))
    golden.check("moments", encoder.moments(images))
    golden.check("z_lq", encoder(images))
    restored = first_restoration(encoder, images)
    golden.check("x_stage1", restored)
    golden.check("z_stage1.mode", encode_restoration(encoder, restored))
    golden.check("z_stage1", encode_restoration(encoder, restored, golden.input("noise")))
    golden.check("encoder.mode_of_input", scale * autoencoder.encode(images).latent_dist.mode())


def check_colorfix(golden: Golden) -> None:
    content, style = golden.input("content"), golden.input("style")
    levels = golden.config["levels"]
    golden.check("wavelet", wavelet(content, style, levels))
    golden.check("adain", adain(content, style, golden.config["adain_eps"]))
    high, low = wavelet_split(content, levels)
    golden.check("content_high", high)
    golden.check("content_low", low)
    for name in [n.removeprefix("output/") for n in golden.tensors if n.startswith("output/blur_r")]:
        golden.check(name, wavelet_blur(style, int(name.removeprefix("blur_r"))))


def check_conditioner(golden: Golden) -> None:
    """A UNet's own embedding of the sizes; the vector joins it to the pooled text."""
    from diffusers.models.embeddings import Timesteps

    project = Timesteps(golden.config["outdim"], flip_sin_to_cos=True, downscale_freq_shift=0)
    sizes, pooled = golden.input("sizes"), golden.input("pooled")
    golden.check("size_embedding", project(sizes.flatten()).view(len(sizes), -1))
    # the corner is no input of the file: the slowest wave of its embedding tells it
    width = golden.config["outdim"]
    waves = golden.tensors["output/crop_embedding"].view(-1, width).double()
    slowest = 10000 ** (-(width // 2 - 1) / (width // 2))
    corner = (torch.atan2(waves[:, -1], waves[:, width // 2 - 1]) / slowest).round()
    golden.check("crop_embedding", project(corner).view(len(sizes), -1))
    ids = torch.cat([sizes, torch.zeros_like(sizes), sizes], dim=1)
    golden.check("vector_layout", torch.cat([pooled, project(ids.flatten()).view(len(ids), -1)], dim=1))


def check_pipeline(golden: Golden) -> None:
    """The sampler over tiny networks: the embedding of the official vector replaces pooled text and sizes."""
    unet = files.loaded_unet(golden.folder)
    adaptor = files.loaded_adaptor(golden.folder, unet)
    table = level_table(Schedule())

    def predict(x: Tensor, t: Tensor, lq: Tensor, conditions: SizedConditions, scale: float | Tensor) -> Tensor:
        control = adaptor.control
        inputs = text_inputs(control, files.vector_embedding(control, t, conditions.pooled), conditions.text)
        features = walk_control(control, lq, x, inputs)
        joins = ConnectorJoins(adaptor.connectors, adaptor.places, features, scale)
        return walk_unet(
            unet, x, text_inputs(unet, files.vector_embedding(unet, t, conditions.pooled), conditions.text), joins
        )

    for name, noise_name in (("main", ""), ("lowctl", "_lowctl")):
        settings, call = golden.config[f"sampler{noise_name}"], golden.config[f"call_{name}"]
        guider, scale = settings["guider_config"]["params"], call["control_scale"]
        first = call["control_scale_start"] if call.get("use_linear_control_scale") else scale
        nothing = torch.zeros(1, 6)
        denoiser = SupirDenoiser(
            predict=predict,
            table=table,
            lq=golden.input("control"),
            conditions=SizedConditions(
                text=torch.cat([golden.input("crossattn_uc"), golden.input("crossattn")]),
                pooled=torch.cat([golden.input("vector_uc"), golden.input("vector")]),
                time_ids=nothing.expand(2, -1),
            ),
            guided=True,
            cfg_scale=Ramp(start=guider["scale"], end=guider["scale_min"]),
            control_scale=Ramp(start=first, end=scale),
            sigma_max=SIGMA_MAX,
        )
        sigmas, tau = edm_sigmas(table, settings["num_steps"]), settings["restore_cfg"]
        churn = Churn(amount=settings["s_churn"], noise_scale=settings["s_noise"])
        pull = Pull(target=golden.input("x_center"), tau=tau, sigma_max=SIGMA_MAX) if tau > 0 else None
        noise = golden.tensors.get(f"input/noise.{name}")
        latents, steps = samplers.start(golden, sigmas[0]), []
        per_step = Churn(amount=churn.amount / settings["num_steps"], noise_scale=churn.noise_scale)
        for step in range(settings["num_steps"]):
            own = None if noise is None else lambda _, step=step, noise=noise: noise[step]
            latents = sample_edm(denoiser, latents, sigmas[step : step + 2], own, per_step, pull)
            steps.append(latents)
        golden.check(f"steps.{name}", torch.stack(steps))
        golden.check(f"final.{name}", steps[-1])


def check_prepost(golden: Golden) -> None:
    image = golden.input("image").numpy()
    for name, size in golden.config["returned_h0_w0"].items():
        if name.startswith("fix"):
            work, result = fixed_sizes(image.shape[:2], int(name.removeprefix("fix")))
        else:
            factor = int(name[2]) if name.startswith("up") else 1
            least = int(name.rpartition("min")[2])
            work, result = released_sizes((image.shape[0] * factor, image.shape[1] * factor), least)
        assert list(result) == size
        golden.check(f"pil2tensor.{name}", to_tensor(resize(image, work)))
        golden.check_levels(f"tensor2pil.{name}", resize_result(golden.tensors[f"output/pil2tensor.{name}"], result))
    for name in [n.removeprefix("output/") for n in golden.tensors if n.startswith("output/upscale_image.")]:
        factor, unit, least = (int(part.lstrip("xunitm")) for part in name.removeprefix("upscale_image.").split("_"))
        golden.check_levels(name, page_resize(image, factor, least, unit))
    for name in [n.removeprefix("output/") for n in golden.tensors if n.startswith("output/fix_resize.")]:
        golden.check_levels(name, page_fix(image, int(name.rpartition(".")[2])))


def check_state_dict_keys(golden: Golden) -> None:
    """Names and shapes of SDXL's and SUPIR's checkpoints, one to one."""
    unet = unet_skeleton(SDXL_UNET)
    layout = files.checkpoint_layout(unet, unet_table(dict(unet.config)), "model.diffusion_model.")
    assert layout == golden.description["sdxl_unet_keys"]
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(dict(SDXL_AUTOENCODER))
    layout = files.checkpoint_layout(autoencoder, autoencoder_table(dict(autoencoder.config)), "first_stage_model.")
    assert layout == golden.description["vae_keys"]
    assert sum(value.numel() for value in autoencoder.parameters()) == 83_653_863
    (released,) = expected_layout(SDXL).values()
    assert {key: list(shape) for key, shape in released.items()} == golden.description["supir_keys"]


def check_tile_vae(golden: Golden) -> None:
    """The released way, its boxes, and the exact way with the same tiles against the untiled network."""
    autoencoder, _ = files.loaded_autoencoder(golden.folder)
    config, factor = golden.config, 2 ** (len(golden.config["ddconfig"]["ch_mult"]) - 1)
    sizes = {f"{part}_tile": config[f"{part}_tile_size"] for part in ("encoder", "decoder")}
    sizes |= {f"{part}_pad": config[f"{part}_pad"] for part in ("encoder", "decoder")}
    for part, run, network, inputs in (
        ("encoder", run_encoder, autoencoder.encoder, golden.input("x")),
        ("decoder", run_decoder, autoencoder.decoder, autoencoder.post_quant_conv(golden.input("z"))),
    ):
        golden.check(f"{part}.tiled", run(network, inputs, LayerTiles(how="released", **sizes)))
        golden.check(f"{part}.full", run(network, inputs, LayerTiles(how="exact", **sizes)))
        height, width = inputs.shape[-2:]
        boxes = released_boxes(height, width, sizes[f"{part}_tile"], sizes[f"{part}_pad"])
        scale = (lambda n: n * factor) if part == "decoder" else (lambda n: n // factor)
        for name, rows in (
            ("in_boxes", [(left, left + w, top, top + h) for (top, left, h, w), _ in boxes]),
            ("out_boxes", [tuple(map(scale, (left, left + w, top, top + h))) for _, (top, left, h, w) in boxes]),
        ):
            golden.check(f"{part}.{name}", torch.tensor(rows))


CHECKS: Mapping[str, Callable[[Golden], None]] = {
    "connectors": check_connectors,
    "blocks": check_blocks,
    "glvcontrol": check_glvcontrol,
    "unet": check_unet,
    "tiny_sdxl": check_tiny_sdxl,
    "schedule": samplers.check_schedule,
    "edm_sampler": samplers.check_edm_sampler,
    "dpmpp2m_sampler": samplers.check_dpmpp2m_sampler,
    "substep_sampler": samplers.check_substep_sampler,
    "tile_weights": samplers.check_tile_weights,
    "tiled_samplers": samplers.check_tiled_samplers,
    "stage1": check_stage1,
    "colorfix": check_colorfix,
    "conditioner": check_conditioner,
    "pipeline": check_pipeline,
    "prepost": check_prepost,
    "state_dict_keys": check_state_dict_keys,
    "tile_vae": check_tile_vae,
}


def modules_in(folder: Path) -> set[str]:
    return {path.stem.removeprefix("supir_") for path in folder.glob("supir_*.json")}


def test_every_golden_file_has_a_check(golden_dir: Path) -> None:
    assert modules_in(golden_dir) == set(CHECKS) | WEIGHTS_ONLY


@pytest.mark.parametrize("module", CHECKS)
@torch.no_grad()
def test_golden(module: str, golden_dir: Path) -> None:
    golden = Golden.open(golden_dir, module)
    CHECKS[module](golden)
    assert not golden.missing(), f"outputs without a check: {sorted(golden.missing())}"


def test_the_bundle_computes_what_its_parts_do(golden_dir: Path) -> None:
    """Supir.predict_eps on the golden networks, with conditions of its own form."""
    golden = Golden.open(golden_dir, "tiny_sdxl")
    unet = files.loaded_unet(golden_dir)
    adaptor = files.loaded_adaptor(golden_dir, unet)
    autoencoder, encoder = files.loaded_autoencoder(golden_dir)
    prior = Prior(
        name="golden",
        digest="",
        unet=unet,
        autoencoder=autoencoder,
        text_encoders=(nn.Identity(), nn.Identity()),
        tokenizers=(),
        image_encoder=nn.Identity(),
        schedule=Schedule(),
    )
    network = Supir(prior, encoder, adaptor)
    conditions = SizedConditions(
        text=golden.input("context"), pooled=golden.input("text_embeds"), time_ids=golden.input("time_ids")
    )
    latents, timesteps = golden.input("x"), golden.input("timesteps")
    with torch.no_grad():
        plain = network.predict_eps(latents, timesteps, latents, conditions, 0.0)
        golden.check("eps", plain)
        features = control_features(adaptor, latents, timesteps, latents * 0.5, conditions)
        whole = network.predict_eps(latents, timesteps, latents * 0.5, conditions, 0.9)
        assert torch.equal(whole, predict_eps(unet, adaptor, latents, timesteps, features, conditions, 0.9))
        assert not torch.allclose(whole, plain, atol=1e-3)
    again = Supir.from_parts(prior, network.config(), network.parts())
    with torch.no_grad():
        assert torch.equal(again.predict_eps(latents, timesteps, latents * 0.5, conditions, 0.9), whole)
    with torch.no_grad():
        for speed in (Speed(), Speed(join=False), Speed(channels_last="on")):
            run = FastSupir(network, speed).run()
            for scale in (0.9, torch.tensor(0.9)):
                for _ in range(2):  # the second call takes its keys from the cache
                    fast = run.predict_eps(latents, timesteps, latents * 0.5, conditions, scale)
                    torch.testing.assert_close(fast, whole, rtol=1e-4, atol=2e-5)
            other = replace(conditions, text=conditions.text * 0.5)
            mine = run.predict_eps(latents, timesteps, latents * 0.5, other, 0.9)
            torch.testing.assert_close(
                mine, network.predict_eps(latents, timesteps, latents * 0.5, other, 0.9), rtol=1e-4, atol=2e-5
            )
