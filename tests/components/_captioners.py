"""Tiny random captioners as save_pretrained writes them: LLaVA, LLaVA-NeXT, InternVL, and BLIP.

Their tokenizers have whole words as tokens, so that tests can read the captions. Tests load this file by path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ["a", "the", "cat", "dog", "red", "blue", "tree", "on", "sky", "photo", "of", "river", "old", "house"]
WORDS += ["describe", "this", "picture", "user", "assistant"]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<img>", "</img>", "<video>"]
PAD, BEGIN, END = 0, 1, 2
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def word_tokenizer(**extra: Any) -> Any:
    """Make a tokenizer with the tokens SPECIALS and then WORDS, split at blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIALS)
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks, **extra)


def save_llava(folder: Path, seed: int = 0) -> Path:
    """Save a LLaVA: a chat template, and four picture tokens in the text."""
    import torch
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=word_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(seed)
    return _save(folder, LlavaForConditionalGeneration(LlavaConfig(**_llava_settings(), image_seq_length=4)), processor)


def save_next(folder: Path, seed: int = 1) -> Path:
    """Save a LLaVA-NeXT: the aspect ratio sets the number of picture tokens; its processor pads on the right."""
    import torch
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    grid = [[16, 32], [32, 16], [32, 32], [16, 64]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=grid
        ),
        tokenizer=word_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(seed)
    config = LlavaNextConfig(**_llava_settings(), image_grid_pinpoints=grid)
    return _save(folder, LlavaNextForConditionalGeneration(config), processor)


def _llava_settings() -> dict[str, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(SPECIALS) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
        initializer_range=0.6,
    )
    settings: dict[str, Any] = {"vision_config": vision, "text_config": text, "vision_feature_layer": -1}
    return {**settings, "image_token_index": SPECIALS.index("<image>")}


def save_tiles(folder: Path, seed: int = 3) -> Path:
    """Save an InternVL: longer pictures have more tiles and so more tokens."""
    import torch
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2Config,
    )

    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<image>", "video_token": "<video>"}
    tokenizer = word_tokenizer(extra_special_tokens=names)
    side = {"height": 16, "width": 16}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=side, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=side),
        image_seq_length=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(seed)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.6,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config={**vision, "image_size": [16, 16], "patch_size": [8, 8]},
            text_config=text.to_dict(),
            image_token_id=SPECIALS.index("<image>"),
            image_seq_length=1,
            downsample_ratio=0.5,
            vision_feature_layer=-1,
        )
    )
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, END
    return _save(folder, model, processor)


def save_blip(folder: Path, seed: int = 0) -> Path:
    """Save a BLIP: no chat template; a prompt is the beginning of the caption."""
    import torch
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = {word: number for number, word in enumerate([*marks, *WORDS])}
    processor = BlipProcessor(
        image_processor=BlipImageProcessor(size={"height": 16, "width": 16}),
        tokenizer=BertTokenizer(vocab=vocabulary),
    )
    torch.manual_seed(seed)
    common = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    text = {
        "vocab_size": len(vocabulary),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 64,
        "bos_token_id": marks.index("[DEC]"),
        "eos_token_id": marks.index("[SEP]"),
        "sep_token_id": marks.index("[SEP]"),
        "pad_token_id": marks.index("[PAD]"),
        "initializer_range": 0.8,
    }
    config = BlipConfig(
        vision_config={**common, "image_size": 16, "patch_size": 8, "initializer_range": 0.8},
        text_config={**common, **text},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    return _save(folder, BlipForConditionalGeneration(config), processor)


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
