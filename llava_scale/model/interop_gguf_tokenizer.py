"""A tokenizer as GGUF metadata: byte-level BPE (``gpt2``) and SentencePiece-like BPE (``llama``)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llava_scale.errors import ConfigError

if TYPE_CHECKING:
    from llava_scale.model.processing import LlavaScaleProcessor

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_QWEN2: "qwen2", _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe"}
"""Regular expressions that cut texts before BPE, and what llama.cpp calls them."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""


def write_tokenizer(writer: Any, processor: LlavaScaleProcessor, *, num_rows: int) -> None:
    """Describe the tokenizer of ``processor`` for a model with ``num_rows`` embeddings.

    Raises:
        ConfigError: llama.cpp has no tokenizer like it.
    """
    tokenizer = processor.tokenizer
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    model = fields["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            f"llama.cpp has no tokenizers of type {model['type']} of this kind; GGUF needs a BPE tokenizer"
        )
    tokens = _tokens(fields, num_rows)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(fields["pre_tokenizer"]))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(_kinds(fields, tokens))
    _write_special(writer, processor)


def _tokens(fields: dict[str, Any], num_rows: int) -> list[str]:
    """Text of every row of the embeddings; rows without a token get a name."""
    tokens = [f"[PAD{number}]" for number in range(num_rows)]
    for text, number in fields["model"]["vocab"].items():
        tokens[number] = text
    for added in fields["added_tokens"]:
        tokens[added["id"]] = added["content"]
    return tokens


def _kinds(fields: dict[str, Any], tokens: list[str]) -> list[int]:
    known = set(fields["model"]["vocab"].values())
    kinds = [_NORMAL if number in known else _UNUSED for number in range(len(tokens))]
    if fields["model"].get("byte_fallback"):
        for number, text in enumerate(tokens):
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                kinds[number] = _BYTE
    for added in fields["added_tokens"]:
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
        if added["content"] == fields["model"].get("unk_token"):
            kinds[added["id"]] = _UNKNOWN
    return kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """A piece's score is minus the number of the merge that makes it, so that merges come in the same order."""
    ranks: dict[str, int] = {}
    for number, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), number)
    return [-float(ranks.get(text, len(merges))) for text in tokens]


def _adds_space(tokenizer: Any) -> bool:
    plain = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    return bool(plain and plain[0].startswith("▁"))


def _pre_tokenizer(fields: dict[str, Any] | None) -> str:
    """llama.cpp's name of how a text is cut before merging.

    Raises:
        ConfigError: a way that is not known here; llama.cpp would cut texts otherwise than the model was trained.
    """
    parts = (fields or {}).get("pretokenizers", [fields] if fields else [])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = parts[0]["pattern"].get("Regex", "")
        if pattern in _PATTERNS:
            return _PATTERNS[pattern]
    raise ConfigError(
        "this tokenizer cuts texts in a way that is not known here under a llama.cpp name; "
        "known: gpt-2, smollm, qwen2, llama-bpe, and SentencePiece-like BPE"
    )


def _write_special(writer: Any, processor: LlavaScaleProcessor) -> None:
    tokenizer = processor.tokenizer
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id")
        if isinstance(number, int):
            add(number)
    ends = [number for number in processor.chat_encoder.eos_ids if number != tokenizer.eos_token_id]
    if ends:
        writer.add_eot_token_id(ends[0])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    writer.add_chat_template(str(processor.chat_template))
