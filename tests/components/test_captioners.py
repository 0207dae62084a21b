"""Captioners: captions are the model's greedy text in any batch, and identities name the captioner."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from hypothesis import given
from hypothesis import strategies as st

from components.captions import presets, tags
from components.captions.identity import CaptionerError, identity_digest
from components.captions.presets import DEFAULT_PROMPT, PRESETS, build_captioner, open_captioner, resolve_captioner
from components.captions.text import tidy
from components.captions.views import VIEWS, find_view
from components.images import resize_short_side, to_float
from components.synthetic import dead_leaves
from components.types import Image, SampleError

tiny = load_helper("components/_captioners.py")
PICTURES = [
    *(dead_leaves(24, 0, index) for index in range(5)),
    *(dead_leaves(64, 1, index)[:16] for index in range(3)),  # wide: more tiles
    *(dead_leaves(64, 2, index)[:, :30] for index in range(3)),
]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.save_llava(tmp_path_factory.mktemp("llava") / "model")
    return folder


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.save_tiles(tmp_path_factory.mktemp("tiles") / "model")
    return folder


@pytest.fixture(scope="module")
def next_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.save_next(tmp_path_factory.mktemp("next") / "model")
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.save_blip(tmp_path_factory.mktemp("blip") / "model")
    return folder


def greedy(step: Any, prompt: list[int], end: int, limit: int) -> list[int]:
    """Generate new tokens slowly: the whole text again for each token, without cache and batch."""
    ids = list(prompt)
    while len(ids) - len(prompt) < limit:
        ids.append(int(step(ids).argmax()))
        if ids[-1] == end:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def llava_by_hand(captioner: Any, picture: Image, text: str, limit: int) -> str:
    import torch
    from PIL import Image as Pillow

    vocabulary = [*tiny.SPECIALS, *tiny.WORDS]
    ids = [vocabulary.index(word) for word in text.split()]
    pixels = captioner.image_processor(images=Pillow.fromarray(picture), return_tensors="pt")["pixel_values"]

    model = captioner.model
    places = [place for place, token in enumerate(ids) if vocabulary[token] == "<image>"]
    with torch.no_grad():
        image_features = model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state[:, 1:])[
            0
        ]  # without CLS

    def step(tokens: list[int]) -> Any:
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(torch.tensor([tokens]))
            embeddings[0, places] = image_features
            return model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state)[0, -1]

    new = greedy(step, ids, tiny.END, limit)
    return " ".join(vocabulary[token] for token in new if token >= len(tiny.SPECIALS))


def blip_by_hand(captioner: Any, picture: Image, prompt: str, limit: int) -> str:
    import torch
    from PIL import Image as Pillow

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *tiny.WORDS]
    pixels = captioner.image_processor(images=Pillow.fromarray(picture), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        image_features = captioner.model.vision_model(pixel_values=pixels)[0]

    def step(tokens: list[int]) -> Any:
        with torch.no_grad():
            return captioner.model.text_decoder(torch.tensor([tokens]), encoder_hidden_states=image_features).logits[
                0, -1
            ]

    new = greedy(
        step, [vocabulary.index(word) for word in ["[DEC]", *prompt.split()]], vocabulary.index("[SEP]"), limit
    )
    return " ".join(vocabulary[token] for token in new if token >= 6)


def test_a_chat_model_writes_its_greedy_answer_without_the_question(llava: Path) -> None:
    captioner = build_captioner(str(llava), prompt="describe this picture", max_tokens=8)
    question = f"user {'<image> ' * 4} describe this picture assistant"
    expected = [llava_by_hand(captioner, picture, question, 8) for picture in PICTURES]
    assert captioner.caption(PICTURES) == expected
    assert len(set(expected)) > 3 and min(map(len, expected)) < max(map(len, expected))
    assert captioner.caption([to_float(picture) for picture in PICTURES]) == expected
    assert captioner.caption([]) == []
    with pytest.raises(ValueError, match=r"expected \[H, W, 3\]"):
        captioner.caption([PICTURES[0][..., 0]])


def test_a_system_message_comes_first(llava: Path) -> None:
    plan = resolve_captioner(str(llava), prompt="describe this picture", max_tokens=6)
    plan = dataclasses.replace(plan, system="the old dog")
    captioner = open_captioner(plan)
    question = f"system the old dog user {'<image> ' * 4} describe this picture assistant".replace("system", "<unk>")
    assert captioner.caption(PICTURES[:3]) == [llava_by_hand(captioner, p, question, 6) for p in PICTURES[:3]]


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_a_model_without_template_continues_its_prompt(blip: Path, prompt: str) -> None:
    captioner = build_captioner(str(blip), prompt=prompt, max_tokens=6)
    expected = [blip_by_hand(captioner, picture, prompt, 6) for picture in PICTURES]
    assert captioner.caption(PICTURES) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("kind", ["llava", "next_llava", "tiles", "blip"])
def test_a_caption_does_not_depend_on_its_batch(kind: str, request: pytest.FixtureRequest) -> None:
    captioner = build_captioner(str(request.getfixturevalue(kind)), max_tokens=10)
    alone = [captioner.caption([picture])[0] for picture in PICTURES]
    assert captioner.caption(PICTURES) == alone
    assert captioner.caption(PICTURES[::-1]) == alone[::-1]
    assert captioner.caption(PICTURES[2:4]) == alone[2:4]


@pytest.mark.parametrize("kind", ["next_llava", "tiles"])
def test_prompts_of_different_lengths_are_padded_on_the_left(kind: str, request: pytest.FixtureRequest) -> None:
    """Without padding, the test above would prove nothing."""
    captioner: Any = build_captioner(str(request.getfixturevalue(kind)))
    ids = captioner._inputs([captioner._shrink(picture) for picture in PICTURES])["input_ids"]
    assert (ids[:, 0] == tiny.PAD).any() and (ids[:, -1] != tiny.PAD).all()


@pytest.mark.parametrize("kind", ["llava", "blip"])
def test_a_model_that_makes_nan_writes_no_caption(kind: str, request: pytest.FixtureRequest) -> None:
    """The greedy choice among NaN is the vocabulary's first token: "!!!!" with many models."""
    captioner: Any = build_captioner(str(request.getfixturevalue(kind)), max_tokens=4)
    with torch.no_grad():
        next(p for p in reversed(list(captioner.model.parameters())) if p.ndim > 1).view(-1)[0] = torch.nan
    with pytest.raises(SampleError, match="the captioner made NaN") as error:
        captioner.caption(PICTURES[:2])
    assert error.value.code == "not_finite"


def test_large_pictures_are_shrunk_first(blip: Path) -> None:
    captioner = build_captioner(str(blip), max_tokens=6)
    large = np.random.default_rng(0).integers(0, 256, (1100, 1030, 3), np.uint8)
    assert captioner.caption([large]) == captioner.caption([resize_short_side(large, 512)])


def test_an_image_encoder_with_a_text_decoder(tmp_path: Path) -> None:
    """The oldest kind of captioner: it has no joint processor."""
    import torch
    from transformers import GPT2Config, VisionEncoderDecoderConfig, ViTConfig, ViTImageProcessor
    from transformers import VisionEncoderDecoderModel as Model

    tokenizer = tiny.word_tokenizer()
    torch.manual_seed(0)
    encoder = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.8,
    )
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.8,
    )
    model = Model(config=VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)).eval()
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = tiny.BEGIN, tiny.PAD
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    captioner = build_captioner(str(tmp_path), max_tokens=6)
    alone = [captioner.caption([picture])[0] for picture in PICTURES]
    assert captioner.caption(PICTURES) == alone
    assert any(alone) and all(set(text.split()) <= set(tiny.WORDS) for text in alone)
    with pytest.raises(CaptionerError, match="takes no prompt"):
        build_captioner(str(tmp_path), prompt="a photo of")


def test_prompt_ids_are_those_that_the_captioner_uses(llava: Path) -> None:
    from components.captions.transformer import prompt_ids

    plan = resolve_captioner(str(llava), prompt="describe the cat")
    captioner: Any = open_captioner(plan)
    ids = captioner._inputs([captioner._shrink(PICTURES[0])])["input_ids"][0].tolist()
    image = tiny.SPECIALS.index("<image>")
    expected = [token for place, token in enumerate(ids) if token != image or ids[place - 1] != image]
    assert prompt_ids(llava, plan.identity) == expected


def test_an_engine_needs_a_chat_template(blip: Path) -> None:
    from components.captions.transformer import prompt_ids

    with pytest.raises(CaptionerError, match="no chat template"):
        prompt_ids(blip, resolve_captioner(str(blip)).identity)


# --- identities -------------------------------------------------------------------------------------------------------


def test_identity_names_model_prompt_and_files(llava: Path, blip: Path) -> None:
    identity = resolve_captioner(str(llava), max_tokens=9).identity
    assert {name: identity[name] for name in ("model", "revision", "prompt", "max_tokens", "short_side_px")} == {
        "model": "model",
        "revision": "",
        "prompt": DEFAULT_PROMPT,
        "max_tokens": 9,
        "short_side_px": 512,
    }
    names = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    names += ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    lines = [f"{name} {hashlib.sha256((llava / name).read_bytes()).hexdigest()}\n" for name in names]
    assert identity["digest"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert resolve_captioner(str(blip)).identity["prompt"] == ""
    assert resolve_captioner(str(blip), max_tokens=0).identity["max_tokens"] == presets.DEFAULT_TOKENS
    assert dict(build_captioner(str(llava), max_tokens=9).identity) == dict(identity)


def test_prompt_limit_and_weights_change_the_identity(llava: Path, tmp_path: Path) -> None:
    base = identity_digest(resolve_captioner(str(llava)).identity)
    assert base == identity_digest(resolve_captioner(str(llava)).identity)
    assert base != identity_digest(resolve_captioner(str(llava), prompt="a photo of").identity)
    assert base != identity_digest(resolve_captioner(str(llava), max_tokens=5).identity)
    other = tmp_path / "model"
    shutil.copytree(llava, other)
    assert base == identity_digest(resolve_captioner(str(other)).identity)
    (other / "README.md").write_text("words for people change no caption")
    assert base == identity_digest(resolve_captioner(str(other)).identity)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(weights))
    assert base != identity_digest(resolve_captioner(str(other)).identity)


def test_tags_are_a_captioner_too() -> None:
    captioner = build_captioner("tags")
    assert captioner.caption(PICTURES) == tags.Tags().caption(PICTURES)
    assert captioner.identity["model"] == "tags" and len(captioner.identity["digest"]) == 64
    with pytest.raises(CaptionerError, match="neither a revision nor a prompt"):
        build_captioner("tags", prompt="a photo of")


def test_presets_match_the_papers() -> None:
    """SUPIR A.2 states the prompt; InstaRevive's code names the model; the adapter paper names InternVL."""
    llava, blip, internvl = (PRESETS[name] for name in ("llava", "blip", "internvl"))
    assert llava and "1.5-13b" in llava.model and llava.max_tokens == 512
    assert llava.prompt == "Describe this image and its style in a very detailed manner."
    assert blip and blip.model == "Salesforce/blip-image-captioning-base" and blip.prompt == ""
    assert internvl and "InternVL" in internvl.model and "short" in internvl.prompt


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lava", 'Did you mean "llava"'),
        ("no such thing", "no preset, folder or hub id"),
        ("../nowhere/at/all", "no preset, folder or hub id"),
        ("owner/name", "cannot be fetched"),
    ],
)
def test_an_unknown_captioner_raises_one_sentence(name: str, message: str) -> None:
    with pytest.raises(CaptionerError, match=message) as error:
        build_captioner(name)
    assert "\n" not in str(error.value)


def test_a_folder_has_no_revisions(llava: Path) -> None:
    with pytest.raises(CaptionerError, match="has no revisions"):
        resolve_captioner(str(llava), revision="main")


def test_folders_without_a_captioner_are_refused(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(CaptionerError, match=r"config\.json"):
        resolve_captioner(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CaptionerError, match=r"no \.safetensors weights"):
        resolve_captioner(str(tmp_path))
    shutil.copy(llava / "model.safetensors", tmp_path)
    with pytest.raises(CaptionerError, match="'bert' model, and transformers has no image-to-text model"):
        build_captioner(str(tmp_path))


def test_a_model_without_some_weights_is_refused(llava: Path, tmp_path: Path) -> None:
    """transformers alone would fill them with random values."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(llava, folder)
    tensors = load_file(folder / "model.safetensors")
    missing = sorted(name for name in tensors if "mlp.down_proj" in name)
    save_file({k: v for k, v in tensors.items() if k not in missing}, folder / "model.safetensors", {"format": "pt"})
    assert missing
    with pytest.raises(CaptionerError, match=f"lacks {len(missing)} of its weights"):
        build_captioner(str(folder))


def test_broken_weights_raise_one_sentence(blip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(blip, folder)
    (folder / "model.safetensors").write_bytes((blip / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CaptionerError, match="cannot be loaded") as error:
        build_captioner(str(folder))
    assert "\n" not in str(error.value)


# --- text and views ---------------------------------------------------------------------------------------------------


def test_tidy() -> None:
    assert tidy("  a cat\n\n on\ta  mat \r\n") == "a cat on a mat"
    assert tidy("a\x00b\x1b[31mred\x7f") == "a b [31mred"
    assert tidy("evil \u202etxt.exe\u2066 cut\ufffd") == "evil txt.exe cut"
    assert tidy("می\u200cخواهم 👩\u200d🎨") == "می\u200cخواهم 👩\u200d🎨"


@given(st.text())
def test_tidy_text_is_one_printable_line(text: str) -> None:
    line = tidy(text)
    assert line == tidy(line) and line == line.strip() and "  " not in line
    assert not any(unicodedata.category(c) in ("Cc", "Cs") or c in "\u2028\u2029" for c in line)
    assert [c for c in line if c.isalnum()] == [c for c in text if c.isalnum()]
    line.encode()


def test_views_select_the_picture() -> None:
    hq, lq = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)
    assert find_view("hq")(hq=hq, lq=lq, preview=None) is hq
    assert find_view("lq")(hq=None, lq=lq, preview=None) is lq
    with pytest.raises(SampleError, match="no hq picture"):
        VIEWS["hq"](hq=None, lq=lq, preview=None)

    def coarse(hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        assert preview is not None
        return preview

    assert find_view("coarse", {"coarse": coarse})(hq=None, lq=None, preview=lq) is lq
    with pytest.raises(ValueError, match='Did you mean "coarse"'):
        find_view("course", {"coarse": coarse})
