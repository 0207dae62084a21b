"""The shipped nano prior: it loads, it is small, and it reaches the metrics on its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from components.models import ModelError, load_model, resolve_model
from components.places import SHIPPED_PRIORS
from components.priors.autoencoder import SpaceToDepthAutoencoder
from components.priors.opening import load_prior, open_recorded_prior
from components.priors.sdxl_config import ImageView


def test_principal_components_reconstruct_pictures_in_their_span() -> None:
    generator = torch.Generator().manual_seed(0)
    # pictures whose 2 x 2 patches live in four dimensions: four channels are enough, three are not
    basis = torch.randn(12, 4, generator=generator)
    patches = basis @ torch.randn(4, 8 * 64, generator=generator)
    images = torch.nn.functional.pixel_shuffle(patches.view(12, 8, 8, 8).transpose(0, 1), 2)
    for channels, exact in ((4, True), (3, False)):
        autoencoder = SpaceToDepthAutoencoder(factor=2, latent_channels=channels, width=8)
        autoencoder.set_principal_components(images)
        with torch.no_grad():
            error = float((autoencoder.decode(autoencoder.encode(images)) - images).abs().max())
        assert (error < 1e-3) == exact


def test_a_side_that_is_not_a_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        SpaceToDepthAutoencoder().encode(torch.zeros(1, 3, 10, 12))


@pytest.fixture(scope="module")
def nano():  # type: ignore[no-untyped-def]
    return load_prior("nano")


def test_the_shipped_prior_is_at_most_8_mb() -> None:
    assert sum(p.stat().st_size for p in (SHIPPED_PRIORS / "nano").rglob("*") if p.is_file()) <= 8_000_000


def test_shapes_meet_the_prior_contract(nano) -> None:  # type: ignore[no-untyped-def]
    images = torch.zeros(2, 3, 64, 96)
    with torch.no_grad():
        latents = nano.encode(images)
        text, pooled = nano.embed_prompts(["a red, dark thing", ""])
        tokens = nano.embed_images(images)
    assert latents.shape == (2, nano.latent_channels, 64 // nano.factor, 96 // nano.factor)
    assert text.shape[-1] == nano.unet.config["cross_attention_dim"] and pooled.ndim == 2
    assert tokens.shape[-1] == nano.image_token_dim and tokens.shape == nano.null_image_tokens(2).shape
    assert not any(p.requires_grad for m in nano.modules.values() for p in m.parameters())


def test_another_prompt_gives_another_embedding(nano) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        _, pooled = nano.embed_prompts(["red", "blue"])
    assert float((pooled[0] - pooled[1]).abs().max()) > 1e-3


def test_the_centre_crop_hides_the_border_and_squash_does_not(nano) -> None:  # type: ignore[no-untyped-def]
    images = torch.zeros(1, 3, 64, 256)
    images[..., :32] = 1.0
    view, nano.view = nano.view, ImageView(shortest_edge_px=64, crop_px=64, fit="crop")
    try:
        assert float(nano.view_images(images).std(dim=(2, 3)).max()) < 1e-4
        nano.view = ImageView(shortest_edge_px=64, crop_px=64, fit="squash")
        assert float(nano.view_images(images).std(dim=(2, 3)).max()) > 0.1
    finally:
        nano.view = view


def test_a_missing_prior_is_refused() -> None:
    with pytest.raises(ModelError, match="no SDXL pipeline"):
        load_prior("no-such-folder")


def test_a_models_record_finds_its_prior_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(resolve_model("nano", prior=True), folder)
    prior = load_prior(folder)
    record = {"id": prior.name, "digest": prior.digest}
    assert load_prior("nano").name == "nano" and prior.name == str(folder.resolve())
    assert open_recorded_prior(record["id"], record, "cpu").digest == prior.digest
    folder.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"was trained on prior .*mine.* bring it back"):
        open_recorded_prior(record["id"], record, "cpu")


def test_a_config_that_builds_no_prior_is_refused_with_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(resolve_model("nano", prior=True), folder)
    document = json.loads((folder / "model.json").read_text())
    document["config"]["schedule"] = {"num_train_timesteps": 1000, "shift": 3.0}  # keys of a FlowSchedule
    (folder / "model.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"mine: its config builds no prior .*shift"):
        load_prior(folder)


def test_a_restoration_model_is_not_a_prior(tmp_path: Path) -> None:
    from components.models import ModelCard, save_model

    save_model(tmp_path / "m", ModelCard(name="x", system="instantir"), {"a": {"w": torch.zeros(1)}})
    with pytest.raises(ModelError, match="not a prior"):
        load_prior(str(tmp_path / "m"))


def test_sizes_become_floats_in_order(nano) -> None:  # type: ignore[no-untyped-def]
    sizes = torch.from_numpy(np.array([[1, 2, 3, 4, 5, 6]]))
    assert nano.time_ids(sizes).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]


def test_the_card_holds_the_required_metrics() -> None:
    metrics = load_model("nano", prior=True).info["metrics"]
    assert metrics["autoencoder_psnr_heldout"] >= 32.0
    assert metrics["encoder_found_among_64"] > 0.5


@pytest.fixture(scope="module")
def heldout() -> np.ndarray:
    """Shipped photographs outside the prior's training data, uint8 [N, 256, 256, 3]."""
    from components.images import center_crop, decode, resize_short_side

    corpus = Path(__file__).resolve().parents[2] / "pipelines" / "demo_corpus"
    names = ("oakland-zoo-otters", "casa-mila", "blue-periwinkle", "solaris-grapes", "ryan-schroeder")
    pictures = [decode((corpus / f"{name}.jpg").read_bytes()) for name in names]
    return np.stack([center_crop(resize_short_side(picture, 256), 256, 256) for picture in pictures])


def test_the_autoencoder_reconstructs_held_out_photographs(nano, heldout: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    from components.tensors import images_to_tensor

    images = images_to_tensor(list(heldout))
    with torch.no_grad():
        restored = nano.decode(nano.encode(images)).clamp(-1, 1)
    psnr = -10 * torch.log10((restored - images).square().mean(dim=(1, 2, 3)) / 4)
    assert float(psnr.mean()) >= 32.0, psnr.tolist()


def test_degraded_crops_find_their_originals(nano, heldout: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    from components.degradations import build_degradation
    from components.images import to_float, to_uint8
    from components.systems.prior.training import retrieval_share
    from components.tensors import images_to_tensor

    degradation = build_degradation("realesrgan-nano")
    hq, lq = [], []
    for number in range(60):  # twelve overlapping crops of each picture: crops of one picture are the hard negatives
        top, left = 32 * (number // 5 // 4), 32 * (number // 5 % 4)
        crop = np.ascontiguousarray(heldout[number % 5][top : top + 128, left : left + 128])
        hq.append(crop)
        lq.append(to_uint8(degradation.apply(to_float(crop), degradation.draw(9, str(number), number))))
    with torch.no_grad():
        share = retrieval_share(nano, images_to_tensor(lq), images_to_tensor(hq))
    assert share >= 0.9


def test_the_denoiser_beats_guessing_at_every_noise_level(nano, heldout: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    """Its clean latents are nearer to the truth than the noisy latents and the mean of the latents."""
    from components.randomness import Noise
    from components.tensors import images_to_tensor

    with torch.no_grad():
        clean = nano.encode(images_to_tensor([p[64:192, 64:192] for p in heldout]))
        text, pooled = nano.embed_prompts([""] * len(clean))
        sizes = torch.tensor([[256, 256, 64, 64, 128, 128]]).expand(len(clean), -1)
        eps = Noise(0, np.arange(len(clean))).normal("noise", tuple(clean.shape[1:]))
        for t in (100, 300, 500, 700):
            times = torch.full((len(clean),), t)
            noisy = nano.schedule.add_noise(clean, eps, times)
            conditions = {"text_embeds": pooled, "time_ids": nano.time_ids(sizes)}
            prediction = nano.unet(noisy, times, encoder_hidden_states=text, added_cond_kwargs=conditions).sample
            error = (nano.schedule.x0_from_eps(noisy, prediction, times) - clean).square().mean()
            spread = (clean - clean.mean(dim=(2, 3), keepdim=True)).square().mean()
            alpha = nano.schedule.alphas_cumprod[t]
            assert error < spread and error < 0.5 * (1 - alpha) / alpha, (t, float(error), float(spread))


def test_a_prompt_sets_the_hue(nano) -> None:  # type: ignore[no-untyped-def]
    """Four prompts with the same noise: each hue is strongest in the picture of its prompt."""
    from components.captions.tags import hue_share
    from components.randomness import Noise
    from components.systems.prior.training import generate
    from components.tensors import tensor_to_images

    hues = ("red", "green", "blue", "yellow")
    noise = Noise(3, np.array([0])).normal("start", (nano.latent_channels, 32, 32)).expand(len(hues), -1, -1, -1)
    prompts = [f"{hue}, bright, high contrast, smooth" for hue in hues]
    with torch.no_grad():
        pictures = tensor_to_images(nano.decode(generate(nano, noise, prompts, (128, 128), steps=15, cfg_scale=4.0)))
    for hue, picture in zip(hues, pictures, strict=True):
        shares = [hue_share(other, hue) for other in pictures]
        assert hue_share(picture, hue) == max(shares) and max(shares) > 1.5 * sorted(shares)[1], (hue, shares)
