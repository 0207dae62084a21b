"""The fast path equals the plain one at a tiny size, and it saves the calls and copies that it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from components import cuda_graphs
from components.priors import fast_unet as fast_module
from components.priors.nano import NANO, build_prior, build_tokenizer_json
from components.priors.sdxl import Prior
from components.priors.unet_walk import check_walkable, transformers_of
from components.randomness import Noise, generator
from components.samplers.ddim import sample_ddim
from components.samplers.schedules import Schedule
from components.systems.instantir.denoiser import InstantIRDenoiser
from components.systems.instantir.fast import FastInstantIR, Speed, merged_bytes
from components.systems.instantir.network import Conditions, InstantIR, LoopNetworks
from components.systems.instantir.objectives import AggregatorObjective
from components.systems.instantir.options import LoopSettings, Options, check_options
from components.systems.instantir.previewer import lora_layers
from components.systems.instantir.restorer import InstantIRRestorer
from components.types import Batch, Request

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [1, 2],
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
TINY = {
    **NANO,
    "autoencoder": {"factor": 4, "latent_channels": 4, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1},
    "unet": UNET,
    "text_encoder": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "text_length": 6,
    "image_encoder": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 8,
        "image_size": 16,
    },
    "view": {"shortest_edge_px": 16, "crop_px": 16, "fit": "squash"},
}
RESAMPLER = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4, "ff_mult": 2}
EVERY_SPEED = {
    "merged": Speed(merge_previewer="on"),
    "toggled": Speed(merge_previewer="off"),
    "apart": Speed(merge_previewer="on", join=False),
    "channels-last": Speed(merge_previewer="on", channels_last="on"),
}


def build(lora: dict[str, Any] | None = None, **unet: Any) -> InstantIR:
    """A network with all parts, where layers that start at zero have other values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior: Prior = build_prior({**TINY, "unet": {**UNET, **unet}}, build_tokenizer_json(["red", "sky"], 6))
    network = InstantIR(prior, RESAMPLER, lora or {"rank": 2, "alpha": 1}, aggregator=True)
    assert network.aggregator is not None
    with torch.no_grad():
        for module in (network.unet, network.aggregator):
            for name, parameter in module.named_parameters():
                if not bool(parameter.any()):
                    values = generator(5, name).standard_normal(tuple(parameter.shape), dtype=np.float32)
                    parameter.copy_(0.1 * torch.from_numpy(values))
    return network.freeze()


@pytest.fixture
def network() -> InstantIR:
    return build()


def tensor(*shape: int, name: str = "x") -> Tensor:
    return torch.from_numpy(generator(1, name).standard_normal(shape, dtype=np.float32))


def make_conditions(rows: int, name: str = "") -> Conditions:
    return Conditions(
        text=tensor(rows, 6, 16, name=f"text{name}"),
        pooled=tensor(rows, 8, name=f"pooled{name}"),
        time_ids=torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(rows, -1),
        image_tokens=tensor(rows, 5, 16, name=f"tokens{name}"),
    )


def call_all(networks: LoopNetworks, conditions: Conditions, steps: int = 1) -> list[Tensor]:
    """All results of a step, for two rows at different time steps."""
    results: list[Tensor] = []
    for step in range(steps):
        latents, lq = tensor(2, 4, 4, 6, name=f"z{step}"), tensor(2, 4, 4, 6, name="lq")
        timesteps = torch.tensor([3 + step, 900])
        preview = networks.preview(latents, timesteps, conditions)
        residuals = networks.residuals(lq, timesteps, preview, conditions)
        results += [preview, *residuals.down, residuals.mid]
        results += [networks.denoise_eps(latents, timesteps, conditions, residuals)]
        results += [networks.denoise_eps(latents, timesteps, conditions)]
    return results


def assert_equal(ours: list[Tensor], theirs: list[Tensor], atol: float = 2e-5) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("speed", EVERY_SPEED)
def test_the_fast_path_equals_the_plain_one(network: InstantIR, speed: str) -> None:
    """Over several steps, and when conditions change and return: the cache must not mix conditions up."""
    one, other = make_conditions(2), make_conditions(2, "other")
    with torch.no_grad():
        plain = [call_all(network, conditions, 2) for conditions in (one, other, one)]
        run = FastInstantIR(network, EVERY_SPEED[speed]).run()
        for conditions, expected in zip((one, other, one), plain, strict=True):
            assert_equal(call_all(run, conditions, 2), expected)
    assert not torch.allclose(plain[0][0], plain[1][0]), "the conditions must have an effect"


def test_recorded_calls_equal_the_plain_ones(network: InstantIR, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in CUDA graphs, calls read tensors at fixed addresses: a call must depend only on its arguments."""
    recordings: list[Any] = []

    class InPlace:
        def __init__(self, function: Any, changing: Any, constant: Any) -> None:
            recordings.append(function)
            self.function, self.source = function, constant
            self.changing, self.constant = [t.clone() for t in changing], [t.clone() for t in constant]

        def fits(self, constant: Any) -> bool:
            return len(constant) == len(self.constant)

        def __call__(self, changing: Any, constant: Any) -> Any:
            torch._foreach_copy_(self.changing, list(changing))
            if constant is not self.source:
                torch._foreach_copy_(self.constant, list(constant))
                self.source = constant
            return [t.clone() for t in self.function(self.changing, self.constant)]

    monkeypatch.setattr(cuda_graphs, "_Recording", InPlace)
    monkeypatch.setattr(fast_module, "can_record", lambda device: not torch.is_grad_enabled())
    one, other = make_conditions(2), make_conditions(2, "other")
    with torch.no_grad():
        fast = FastInstantIR(network, Speed(merge_previewer="on", graphs="on"))
        for conditions in (one, other, one):
            run = fast.run()  # a run of another picture: the bundle holds the recordings
            assert_equal(call_all(run, conditions, steps=2), call_all(network, conditions, steps=2))
        assert len(recordings) == 4  # preview, aggregator, and the base with and without residuals


def test_projections_by_convolution_and_odd_sides_work() -> None:
    network, conditions = build(use_linear_projection=False), make_conditions(1)
    latents, timesteps = tensor(1, 4, 5, 7), torch.tensor([500])
    with torch.no_grad():
        run = FastInstantIR(network).run()
        assert_equal(
            [run.denoise_eps(latents, timesteps, conditions)], [network.denoise_eps(latents, timesteps, conditions)]
        )


def test_a_lora_on_text_keys_and_embeddings_is_not_shared() -> None:
    """Other LoRA targets are valid; the Previewer must then compute the layers with the LoRA separately."""
    lora = {"rank": 2, "alpha": 8, "targets": ["attn2.to_k", "attn2.to_v", "time_embedding.linear_1", "conv1"]}
    network, conditions = build(lora), make_conditions(2)
    for merge in ("on", "off"):
        with torch.no_grad():
            run = FastInstantIR(network, Speed(merge_previewer=merge)).run()  # type: ignore[arg-type]
            assert_equal(call_all(run, conditions), call_all(network, conditions))


def test_only_layers_with_the_lora_are_copied(network: InstantIR) -> None:
    fast = FastInstantIR(network, Speed(merge_previewer="on", join=False))
    own = {id(p) for p in network.unet.parameters()}
    assert {id(p) for p in fast.base.network.parameters()} <= own
    assert fast.previewer is not None
    copies = [p for p in fast.previewer.network.parameters() if id(p) not in own]
    assert len(copies) == len(lora_layers(network.unet))
    assert sum(p.numel() * p.element_size() for p in copies) == merged_bytes(network.unet)


@pytest.mark.parametrize(("spare", "merged"), [(0, False), (10**12, True)])
def test_merging_depends_on_free_memory(
    network: InstantIR, monkeypatch: pytest.MonkeyPatch, spare: int, merged: bool
) -> None:
    monkeypatch.setattr("components.systems.instantir.fast.memory_to_spare", lambda device: spare)
    assert FastInstantIR(network).merged is merged
    assert FastInstantIR(network, Speed(merge_previewer="on")).merged
    assert not FastInstantIR(network, Speed(merge_previewer="off")).merged


class Calls:
    """Count the forward calls of modules."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.count = 0
        self.handles = [m.register_forward_hook(self._count_call) for m in modules]

    def _count_call(self, *_: Any) -> None:
        self.count += 1


def test_values_of_the_conditions_are_computed_once_in_a_run(network: InstantIR) -> None:
    """In three steps the text keys are computed once for both UNets, the Resampler's queries once for each UNet."""
    fast = FastInstantIR(network, Speed(merge_previewer="on"))
    assert fast.previewer is not None
    texts, resamplers = [], []
    for unet in (fast.base.network, fast.previewer.network):
        texts += [block.attn2.to_k for block in transformers_of(unet)]
        resamplers.append(unet.encoder_hid_proj.image_projection_layers[0])
    layers, text, tokens = len(texts) // 2, Calls(texts), Calls(resamplers)
    times = Calls([unet.time_embedding for unet in (fast.base.network, fast.previewer.network)])
    run, conditions = fast.run(), make_conditions(2)
    with torch.no_grad():
        call_all(run, conditions, 3)
        assert (text.count, tokens.count) == (layers, 2)
        assert times.count == 3, "Previewer and UNet must share the embedding in a step"
        call_all(fast.run(), conditions, 1)
    assert (text.count, tokens.count) == (2 * layers, 4), "another run must start with empty caches"


class NoWaiting(TorchDispatchMode):
    """Fail if the host reads a tensor's value, which on a GPU waits for the queue."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket._qualified_op_name not in ("aten::_local_scalar_dense", "aten::equal"), func
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(network: InstantIR) -> None:
    sigmas = Schedule().sampling_sigmas(Schedule().timesteps(4))
    run, lq = FastInstantIR(network).run(), tensor(1, 4, 4, 4)
    settings = LoopSettings(aggregator_scale=0.7, preview_start=0.3, aggregator_stop=0.8)
    denoise = InstantIRDenoiser(run, lq, make_conditions(1), make_conditions(1, "no"), 4, settings)
    with torch.no_grad(), NoWaiting():
        for sigma in sigmas[:-1]:
            denoise(lq, sigma.expand(1))
    adaptive = InstantIRDenoiser(
        run, lq, make_conditions(1), make_conditions(1, "no"), 4, replace(settings, adaptive="released")
    )
    with torch.no_grad(), pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        adaptive(lq, sigmas[:1])


# ---------------------------------------------------------------------------------------------------------------- reuse


@pytest.mark.parametrize(("previews", "features", "start"), [(1, 1, 0.0), (2, 1, 0.0), (3, 2, 0.0), (2, 2, 0.4)])
def test_reuse_skips_calls(network: InstantIR, previews: int, features: int, start: float) -> None:
    """Six steps: the Aggregator runs every `features` steps, the Previewer at most every `previews` steps."""
    run, calls = FastInstantIR(network).run(), {"preview": 0, "residuals": 0}

    class Counting:
        prior = network.prior
        denoise_eps = staticmethod(run.denoise_eps)
        unconditional = staticmethod(run.unconditional)

        def preview(self, *arguments: Any) -> Tensor:
            calls["preview"] += 1
            return run.preview(*arguments)

        def residuals(self, *arguments: Any) -> Any:
            calls["residuals"] += 1
            return run.residuals(*arguments)

    def restore(networks: Any, **settings: Any) -> Tensor:
        lq, sigmas = tensor(1, 4, 4, 4), Schedule().sampling_sigmas(Schedule().timesteps(6))
        loop = LoopSettings(cfg_scale=2.0, preview_start=start, **settings)
        denoise = InstantIRDenoiser(networks, lq, make_conditions(1), make_conditions(1, "no"), 6, loop)
        return sample_ddim(denoise, lq + sigmas[0] * tensor(1, 4, 4, 4, name="noise"), sigmas)

    with torch.no_grad():
        result = restore(Counting(), preview_every=previews, aggregator_every=features)
        exact = restore(network)
    previews_at: list[int] = []
    for step in range(0, 6, features):
        if step >= start * 6 and (not previews_at or step >= previews_at[-1] + previews):
            previews_at.append(step)
    assert calls == {"preview": len(previews_at), "residuals": -(-6 // features)}
    same = previews == features == 1
    assert torch.allclose(result, exact, atol=1e-4) is same


def test_reuse_is_an_option_and_off_by_default() -> None:
    assert (Options().preview_every, Options().aggregator_every) == (1, 1)
    assert check_options({"preview_every": 2}) == {"preview_every": 2}
    assert Options(preview_every=3).loop.preview_every == 3
    for name in ("preview_every", "aggregator_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            check_options({name: 0})


# ----------------------------------------------------------------------------------------------------------- whole runs


def request() -> Request:
    image = generator(0, "picture").integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return Request(key="a", image=image, options={"steps": 3, "cfg_scale": 3.0})


def test_restorers_agree_for_every_speed(network: InstantIR) -> None:
    pictures = [
        InstantIRRestorer(network, speed=speed).restore([request()])[0].image.astype(int)
        for speed in EVERY_SPEED.values()
    ]
    for picture in pictures[1:]:
        assert np.abs(picture - pictures[0]).max() <= 1  # rounding to 8 bit may differ by one level


def test_bf16_networks_take_float32_latents(network: InstantIR) -> None:
    """The loop's state stays float32; results differ from the float32 networks' by bf16's eight bits."""
    conditions = make_conditions(2)
    with torch.no_grad():
        exact = call_all(network, conditions)
        network.to("cpu", torch.bfloat16)
        assert next(network.prior.autoencoder.parameters()).dtype == torch.float32
        rough = call_all(FastInstantIR(network, Speed(merge_previewer="on")).run(), conditions)
    assert rough[0].dtype == rough[-1].dtype == torch.float32
    for one, other in zip(rough, exact, strict=True):
        assert float((one.float() - other).abs().max()) < 0.1 * float(other.abs().max())
    assert InstantIRRestorer(network).restore([request()])[0].image.shape == (16, 24, 3)


@pytest.mark.parametrize("speed", [Speed(merge_previewer="on"), Speed(merge_previewer="off", checkpoint=True)])
def test_the_aggregator_trains_equally_on_the_fast_path(speed: Speed) -> None:
    """Loss and all gradients of the fast and the plain objective are equal, also after an optimizer step."""
    batch = Batch(
        keys=["a", "b"],
        positions=np.arange(2),
        hq=tensor(2, 3, 16, 16, name="hq").clamp(-1, 1),
        lq=tensor(2, 3, 16, 16, name="lq").clamp(-1, 1),
        prompts=["red", ""],
        sizes=torch.tensor([[16, 16, 0, 0, 16, 16]]).expand(2, -1),
    )

    def train(speed: Speed | None) -> list[Tensor]:
        network = build()
        objective = AggregatorObjective(network, speed=speed)
        assert network.aggregator is not None
        parameters = list(network.aggregator.parameters())
        results: list[Tensor] = []
        for _ in range(2):
            ((_, loss),) = objective.phases(batch, Noise(0, batch.positions))
            gradients = torch.autograd.grad(loss.value, parameters)
            results += [loss.value.detach(), *gradients]
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.1 * gradient
        return results

    ours, theirs = train(speed), train(None)
    assert_equal(ours, theirs)
    assert any(bool(g.any()) for g in theirs[1:])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blocks", "whole"])
def test_torch_compile_captures_the_networks_without_a_graph_break(
    network: InstantIR, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    """torch.compile with fullgraph and without code generation: a graph break would raise."""
    monkeypatch.setattr(torch, "compile", _capture_only(torch.compile))
    conditions = make_conditions(2)
    with torch.no_grad():
        run = FastInstantIR(network, Speed(merge_previewer="on", compile=form)).run()
        assert_equal(call_all(run, conditions), call_all(network, conditions))


def _capture_only(real: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with the backend "eager", which only captures."""

    def compile_eagerly(function: Any, *, fullgraph: bool, dynamic: bool, mode: Any) -> Any:
        return real(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    return compile_eagerly


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("form", ["blocks", "whole"])
def test_compiled_networks_agree(network: InstantIR, form: Any) -> None:
    conditions = make_conditions(2)
    with torch.no_grad():
        run = FastInstantIR(network, Speed(merge_previewer="on", compile=form)).run()
        assert_equal(call_all(run, conditions), call_all(network, conditions))


def test_wrong_settings_are_refused() -> None:
    assert Speed.of({"merge_previewer": "off"}) == Speed(merge_previewer="off")
    with pytest.raises(ValueError, match='Did you mean "merge_previewer"'):
        Speed.of({"merge_preview": "on"})
    with pytest.raises(ValueError, match="merge_previewer must be one of auto, on, off"):
        Speed.of({"merge_previewer": "yes"})
    with pytest.raises(ValueError, match="join must be true or false"):
        Speed.of({"join": 1})
    with pytest.raises(ValueError, match="compile whole"):
        Speed(checkpoint=True, compile="whole")


def test_networks_of_another_build_are_refused(network: InstantIR) -> None:
    resnet: Any = network.unet.mid_block.resnets[0]  # type: ignore[union-attr, index]
    resnet.output_scale_factor = 2.0
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0"):
        check_walkable(network.unet)
