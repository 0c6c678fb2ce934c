"""The ``tiny`` preset: a small random model with a tokenizer of its own, for tests and the quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, WhisperConfig

from llava_scale.towers.audio import TransformersAudioTower

if TYPE_CHECKING:
    from torch import nn

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
END = "<|end|>"
PAD = "<pad>"
VOCABULARY_MULTIPLE = 64
WORD_SCORE, BYTE_SCORE = -1.0, -10.0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""One token before and one after each message: with short questions the markers would else be half of the text."""

WORDS = (
    "a an and answer any are assistant at background behind below beside between big black blue bottom by center "
    "circle closer color colors compare corner count cyan dark describe diamond different do does down each eight "
    "fewer first five four frame from front gray green has have heard high how hundred in inside is it large larger "
    "last left less light loud low many middle more most move moves name nine no none nothing object objects of on "
    "one or orange other outside over picture pink pitch position purple quiet rectangle red right same second see "
    "seven shape shapes show shown shows side six size small smaller sound square star system tell ten than that the "
    "there these thing things third this three to top triangle two under up user video was what where which white "
    "with word yellow yes you above circles cross crosses say squares stars triangles zero ring rings list place after "
    "appear appears before bell bounce bounces clarinet come comes drum end "
    "fall fast faster flute grow instrument jump makes plays rise shrink slow slower times trumpet way beeps"
)
"""Words that are one token each, with and without a space before them and with a capital letter; any other text
falls back to bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySizes:
    """All sizes of the preset.

    Attributes:
        image_size: Side of the picture in pixels.
        patch_size: Side of a patch in pixels.
        vision_width: Width of the vision tower.
        vision_layers: Blocks of the vision tower before it is cut.
        vision_heads: Attention heads of the vision tower.
        text_width: Width of the language model.
        text_layers: Layers of the language model.
        text_heads: Attention heads of the language model.
        text_kv_heads: Key/value heads of the language model.
        mlp_ratio: Width of the feed-forward layers over the width of the model.
        max_positions: Longest text in tokens.
        audio_width: Width of the audio tower.
        audio_layers: Layers of the audio tower.
        audio_heads: Attention heads of the audio tower.
        audio_bins: Mel bins that it hears.
        audio_window_s: Seconds of its window: those of a synthetic sound.
    """

    image_size: int = 48
    patch_size: int = 24
    vision_width: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_kv_heads: int = 4
    mlp_ratio: int = 3
    max_positions: int = 4096
    audio_width: int = 64
    audio_layers: int = 2
    audio_heads: int = 4
    audio_bins: int = 64
    audio_window_s: int = 2


TINY_AUDIO_POOL = 8
"""Features that become one token in the preset where no audio compressor is set: 12 tokens for 2 seconds."""

INITIALIZER_RANGE = 0.06
"""Larger than the usual 0.02: at these widths attention would else start uniform and take long to leave that."""

PATCH_SCALE = 0.4
"""Brings the embedded patches of the synthetic pictures to about 1."""

TINY = TinySizes()
TINY_IMAGE_MEAN, TINY_IMAGE_STD = (0.905, 0.887, 0.882), (0.143, 0.164, 0.182)
"""Channel statistics of the synthetic pictures: mostly background, which then comes out near zero."""


def tiny_vision_config(sizes: TinySizes = TINY) -> CLIPVisionConfig:
    """A small CLIP-like vision transformer."""
    return CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=sizes.vision_width * sizes.mlp_ratio,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        hidden_act="gelu",  # one kernel; CLIP's own quick_gelu is three
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
    )


def tiny_audio_tower(sizes: TinySizes = TINY) -> TransformersAudioTower:
    """A small Whisper-like encoder with fresh weights: 50 features a second, every frequency in each of them."""
    config = WhisperConfig(
        d_model=sizes.audio_width,
        encoder_layers=sizes.audio_layers,
        encoder_attention_heads=sizes.audio_heads,
        encoder_ffn_dim=sizes.audio_width * sizes.mlp_ratio,
        num_mel_bins=sizes.audio_bins,
        max_source_positions=50 * sizes.audio_window_s,
        decoder_layers=1,
        vocab_size=8,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        decoder_start_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    extractor = {"feature_size": sizes.audio_bins, "chunk_length": sizes.audio_window_s}
    return TransformersAudioTower(config, extractor=extractor, window_seconds=sizes.audio_window_s)


def tiny_instruction_config(vocab_size: int, sizes: TinySizes = TINY) -> CLIPTextConfig:
    """A small CLIP-like text encoder with room for ``vocab_size`` tokens."""
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.text_width,
        intermediate_size=sizes.text_width * sizes.mlp_ratio,
        num_hidden_layers=1,
        num_attention_heads=sizes.text_heads,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )


@torch.no_grad()
def spread_positions(tower: nn.Module) -> None:
    """Let fresh position embeddings count as much as the patches of a fresh CLIP-like tower.

    By CLIP's own initialisation they are a hundredth of a patch, and a small model takes long to see where things are.
    """
    embeddings = tower.get_submodule("model.embeddings")
    embeddings.get_parameter("patch_embedding.weight").mul_(PATCH_SCALE)
    embeddings.get_parameter("position_embedding.weight").normal_()


def tiny_text_config(vocab_size: int, sizes: TinySizes = TINY) -> LlamaConfig:
    """A small Llama-like decoder with grouped key/value heads, tied embeddings and room for ``vocab_size`` tokens."""
    return LlamaConfig(
        vocab_size=-(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        hidden_size=sizes.text_width,
        intermediate_size=sizes.text_width * sizes.mlp_ratio,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        num_key_value_heads=sizes.text_kv_heads,
        max_position_embeddings=sizes.max_positions,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer that knows ``WORDS`` as whole tokens and every other text as bytes; one token around each message.

    The most probable split of a text is taken (a unigram model), so a word never falls apart because a part of it is
    a word as well.
    """
    pieces = [(symbol, BYTE_SCORE) for symbol in sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [(word, WORD_SCORE) for word in dict.fromkeys(_spellings()) if len(word) > 1]
    tokenizer = Tokenizer(models.Unigram(vocab=pieces))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*ROLES, END, PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=TINY.max_positions,
        clean_up_tokenization_spaces=False,
    )


def _spellings() -> list[str]:
    """Each word plain, after a space and with a capital, in the byte alphabet, where a space is written ``Ġ``."""
    plain = WORDS.split()
    return [*plain, *(f"Ġ{word}" for word in plain), *(word.capitalize() for word in plain)]
