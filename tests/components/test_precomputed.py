"""Batches with precomputed latents and embeddings: the same losses within float16, and no encoder runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from components.models import load_model
from components.objectives.precomputed import clean_latents, embed_batch_prompts, embed_empty_prompt
from components.priors.opening import load_prior
from components.priors.sdxl import Prior
from components.randomness import Noise
from components.synthetic import dead_leaves
from components.systems.instantir.network import InstantIR
from components.systems.instantir.objectives import AggregatorObjective, PerceptorObjective, PreviewerObjective
from components.systems.prior.system import PRIOR
from components.systems.recipes import load_recipe
from components.tensors import collate_rows
from components.types import Batch

SIDE, ROWS = 32, 4
PROMPTS = ("red, bright", "", "blue and white, dark", "green")
FLOAT16 = 2e-3
"""Largest relative difference of a loss. Inputs change by 2**-11 (5e-4), a squared distance by twice that; the rest is
a margin for the network."""
RESAMPLER = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4, "ff_mult": 2}


@pytest.fixture(scope="module")
def nano() -> Prior:
    return load_prior("nano")


def rows(prior: Prior, lacking: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """Stream rows with the columns of a spec's `precompute:`; `lacking` gives the row without latents or embeddings."""
    result = []
    for n, prompt in enumerate(PROMPTS):
        hq = dead_leaves(SIDE, 1, n)
        with torch.no_grad():
            latents = prior.encode(torch.from_numpy(hq).permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
            text, pooled = prior.embed_prompts([prompt])
        fields = {
            "latents": latents.half().numpy(),
            "embeddings_text": text[0].half().numpy(),
            "embeddings_pooled": pooled[0].half().numpy(),
        }
        for column in ("latents", "embeddings"):
            is_known = (lacking or {}).get(column) != n
            if not is_known:
                fields |= {name: np.zeros_like(value) for name, value in fields.items() if name.startswith(column)}
            fields[f"{column}_known"] = np.bool_(is_known)
        result.append(
            {
                "key": f"p{n}",
                "position": n,
                "hq": hq,
                "lq": hq[::-1].copy(),
                "prompt": prompt,
                "plan": json.dumps({}),
                "sizes": np.array([SIDE, SIDE, 0, 0, SIDE, SIDE]),
                **fields,
            }
        )
    return result


def batches(prior: Prior, lacking: Mapping[str, int] | None = None) -> tuple[Batch, Batch]:
    """The same batch with its precomputed values, and without."""
    whole = collate_rows(rows(prior, lacking))
    assert whole.latents is not None and whole.latents.dtype == torch.float32
    assert set(whole.embeddings) == {"text", "pooled"}
    return whole, replace(whole, latents=None, embeddings={}, latents_missing=(), embeddings_missing=())


class EncoderRan(AssertionError):
    """An encoder ran."""


def refuse(*_: Any, **__: Any) -> Any:
    raise EncoderRan


def shut(prior: Prior, monkeypatch: pytest.MonkeyPatch, *, vae: bool = True) -> None:
    """Makes the text encoders fail, and with `vae` the autoencoder's encoder too."""
    for encoder in prior.text_encoders:
        monkeypatch.setattr(encoder, "forward", refuse)
    if vae:
        monkeypatch.setattr(prior.autoencoder, "encode", refuse)


def loss(objective: Any, batch: Batch, seed: int = 3) -> float:
    with torch.no_grad():
        ((_, result),) = objective.phases(batch, Noise(seed, batch.positions))
    return float(result.value)


def instantir(make: Callable[[InstantIR], Any], lora: bool = False, aggregator: bool = False) -> Any:
    return make(InstantIR(load_prior("nano"), RESAMPLER, {"rank": 2, "alpha": 1} if lora else None, aggregator))


STAGES: dict[str, Callable[[], Any]] = {
    "dcp": lambda: instantir(lambda n: PerceptorObjective(n, image_dropout=0.1, text_dropout=0.4)),
    "previewer": lambda: instantir(lambda n: PreviewerObjective(n, text_dropout=0.4), lora=True),
    "aggregator": lambda: instantir(AggregatorObjective, lora=True, aggregator=True),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_the_same_loss_and_runs_no_text_encoder(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = STAGES[stage]()
    precomputed, plain = batches(objective.prior)
    expected = [loss(objective, plain, seed) for seed in range(3)]
    objective.empty_prompt  # noqa: B018  the empty prompt goes through the encoders once
    shut(objective.prior, monkeypatch, vae=stage != "aggregator")  # the aggregator encodes LQ
    assert [loss(objective, precomputed, seed) for seed in range(3)] == pytest.approx(expected, rel=FLOAT16)
    with pytest.raises(EncoderRan):
        loss(objective, plain)


def test_dropped_texts_are_the_empty_prompt(nano: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    precomputed, _ = batches(nano)
    empty = embed_empty_prompt(nano)
    shut(nano, monkeypatch)
    dropped = torch.tensor([True, False, False, True])
    text, pooled = embed_batch_prompts(nano, precomputed, dropped, empty)
    for n, is_dropped in enumerate(dropped.tolist()):
        assert torch.equal(text[n], empty[0][0] if is_dropped else precomputed.embeddings["text"][n])
        assert torch.equal(pooled[n], empty[1][0] if is_dropped else precomputed.embeddings["pooled"][n])


def test_the_empty_prompt_has_full_precision_under_autocast(nano: Prior) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text, pooled = embed_empty_prompt(nano)
    with torch.no_grad():
        expected = nano.embed_prompts([""])
    assert torch.equal(text, expected[0]) and torch.equal(pooled, expected[1])


@torch.no_grad()
def test_only_rows_without_precomputed_values_are_encoded(nano: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    precomputed, plain = batches(nano, {"latents": 1, "embeddings": 3})
    assert (list(precomputed.latents_missing), list(precomputed.embeddings_missing)) == ([1], [3])
    expected, words, empty = nano.encode(plain.hq), nano.embed_prompts(plain.prompts)[0], embed_empty_prompt(nano)
    calls: list[Any] = []
    encode, embed = nano.autoencoder.encode, nano.embed_prompts
    monkeypatch.setattr(nano.autoencoder, "encode", lambda images: calls.append(len(images)) or encode(images))
    monkeypatch.setattr(nano, "embed_prompts", lambda prompts: calls.append(list(prompts)) or embed(prompts))
    latents = clean_latents(nano, precomputed)
    text, _ = embed_batch_prompts(nano, precomputed, torch.zeros(ROWS, dtype=torch.bool), empty)
    assert calls == [1, [PROMPTS[3]]]
    assert torch.allclose(latents, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert torch.allclose(text, words, rtol=0, atol=1e-3 * float(words.abs().max()))
    assert torch.allclose(latents[1], expected[1], atol=1e-5)  # encoded here, without float16
    embed_batch_prompts(nano, precomputed, torch.ones(ROWS, dtype=torch.bool), empty)
    assert len(calls) == 2  # a dropped row needs no encoder


def test_a_batch_without_precomputed_values_is_a_plain_batch(nano: Prior) -> None:
    stream_rows = rows(nano)
    for row in stream_rows:
        row |= {"latents_known": np.False_, "embeddings_known": np.False_}
    batch = collate_rows(stream_rows)
    assert batch.latents is None and not batch.embeddings and not batch.latents_missing


def test_the_priors_denoiser_takes_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text encoders learn, so it embeds all prompts, also if a batch has embeddings."""
    recipe: Any = load_recipe("prior-denoiser-nano", ["warm_start=nano"])
    objective: Any = PRIOR.build_objective(recipe, {"encoder": load_model("nano", prior=True)})
    precomputed, plain = batches(objective.prior)
    expected = loss(objective, plain)
    monkeypatch.setattr(objective.prior.autoencoder, "encode", refuse)
    assert loss(objective, precomputed) == pytest.approx(expected, rel=FLOAT16)
    with pytest.raises(EncoderRan):
        loss(objective, plain)
