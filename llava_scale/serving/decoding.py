"""Many answers at once: requests join and leave a running batch at any token (continuous batching)."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llava_scale.errors import ConfigError
from llava_scale.model.attention import PACKED
from llava_scale.serving.sampling import Chooser, Sampling, choose_tokens
from llava_scale.serving.slots import LayerStates, Slots, cache_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llava_scale.model import LlavaScaleForConditionalGeneration
    from llava_scale.serving.prompts import Prompt

PREFILL_TOKENS = 4096
"""Tokens, padding included, of prompts that are read in one pass, so that running answers do not wait long."""

FinishReason = Literal["", "stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a finished conversation leaves behind, so that its next turn need not be read from the beginning.

    Attributes:
        signature: Of its tokens, as ``Prompt.signature``; the model's own tokens behind those of the prompt.
        states: Keys and values of each layer.
    """

    signature: tuple[int, ...]
    states: list[LayerStates]


@dataclass(eq=False, slots=True, kw_only=True)
class Answer:
    """One answer on its way.

    Attributes:
        prompt: What is answered.
        inputs: Its media as arguments of the model, by ``prompts.load_media``.
        max_new_tokens: Longest answer in tokens.
        chooser: How tokens are chosen.
        start: Conversation that this one may go on from.
        keep: Leave keys and values in ``kept`` at the end.
        new_ids: Tokens so far, without the one that ended it.
        finish: Why it ended; empty while it goes on.
        error: What went wrong, where ``finish`` is ``error``.
        kept: Keys and values, where asked for.
        num_prefilled: Tokens of the prompt that had to be read.
    """

    prompt: Prompt
    inputs: Callable[[int], dict[str, Tensor]]
    max_new_tokens: int
    chooser: Chooser = field(default_factory=lambda: Chooser(Sampling(), None))
    start: Kept | None = None
    keep: bool = False
    new_ids: list[int] = field(default_factory=list)
    finish: FinishReason = ""
    error: BaseException | None = None
    kept: Kept | None = None
    num_prefilled: int = 0


class Decoder:
    """Answers in one batch, a token of each at every step. Used from one thread.

    Args:
        model: In evaluation mode.
        end_ids: Tokens that end an answer.
        pad_id: Fills prompts of a pass to one length.
        max_batch: Answers that run at once.

    Raises:
        ConfigError: the language model does not keep keys and values of attention alone.
    """

    def __init__(
        self, model: LlavaScaleForConditionalGeneration, end_ids: Sequence[int], pad_id: int, max_batch: int
    ) -> None:
        self.model = model
        self.max_batch = max_batch
        self._end_ids = frozenset(end_ids)
        self._pad_id = pad_id
        self._slots = Slots()
        self._running: list[Answer] = []
        self._waiting: deque[Answer] = deque()
        self._window, self._kinds = _attention(model.config.text_config)
        self._settings = _score_settings(model, end_ids, pad_id)

    @property
    def num_running(self) -> int:
        """Answers in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Answers that wait for room."""
        return len(self._waiting)

    @property
    def room(self) -> int:
        """Answers that could join at the next step."""
        return self.max_batch - len(self._running) - len(self._waiting)

    def add(self, answer: Answer) -> None:
        """Let ``answer`` join as soon as there is room."""
        self._waiting.append(answer)

    def cancel(self, answer: Answer) -> None:
        """Take ``answer`` out; it keeps what it has got. Nothing happens if it has ended."""
        if answer in self._waiting:
            self._waiting.remove(answer)
            answer.finish = "cancelled"
        elif answer in self._running:
            self._end(self._running.index(answer), "cancelled")

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Read waiting prompts that fit, then give every running answer a token; return the answers that changed."""
        changed: list[Answer] = []
        while self._waiting and len(self._running) < self.max_batch:
            changed += self._admit(self._next_group())
        if self._running:
            changed += self._advance()
        return list(dict.fromkeys(changed))

    def fail(self, error: BaseException) -> list[Answer]:
        """End everything with ``error``; return the answers it hits."""
        hit = [*self._running, *self._waiting]
        for answer in hit:
            answer.finish, answer.error = "error", error
        self._running, self._waiting = [], deque()
        self._slots.clear()
        return hit

    def _next_group(self) -> list[Answer]:
        """Waiting answers, in order, that are read in one pass; those that go on from another are alone."""
        group = [self._waiting.popleft()]
        longest = len(group[0].prompt.input_ids)
        while self._waiting and len(self._running) + len(group) < self.max_batch:
            candidate = self._waiting[0]
            longest = max(longest, len(candidate.prompt.input_ids))
            if group[0].start or candidate.start or longest * (len(group) + 1) > PREFILL_TOKENS:
                break
            group.append(self._waiting.popleft())
        return group

    def _admit(self, group: list[Answer]) -> list[Answer]:
        """Read the prompts of ``group``; one that fails does not take the others with it."""
        try:
            cache, scores = self._prefill(group)
        except Exception as error:
            if len(group) > 1:
                return [answer for alone in group for answer in self._admit([alone])]
            group[0].finish, group[0].error = "error", error
            return group
        for number, answer in enumerate(group):
            self._slots.join(cache, number, len(answer.prompt.input_ids))
            self._running.append(answer)
        self._take(range(len(self._running) - len(group), len(self._running)), scores)
        return group

    def _prefill(self, group: list[Answer]) -> tuple[DynamicCache, Tensor]:
        """Keys and values of the prompts, padded on the left, and the scores ``(B, V)`` of the tokens behind them."""
        done = _common(group[0].start, group[0].prompt) if group[0].start else 0
        start = group[0].start
        cache = cache_of(start.states, done) if start and done else DynamicCache()
        rows = [answer.prompt.input_ids[done:] for answer in group]
        longest = max(map(len, rows))
        device = self.model.device
        padded = [[self._pad_id] * (longest - len(row)) + row for row in rows]
        inputs = join_inputs([answer.inputs(done) for answer in group], device)
        position_ids = torch.arange(done, done + longest, device=device)[None]
        mask = None
        if len(set(map(len, rows))) > 1:
            lengths = torch.tensor([[len(row)] for row in rows], device=device)
            position_ids = (position_ids - (longest - lengths)).clamp(min=0)
            mask = (torch.arange(longest, device=device) >= longest - lengths).long()
        output = self.model(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=mask,
            position_ids=position_ids.expand(len(rows), -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        for answer, row in zip(group, rows, strict=True):
            answer.num_prefilled = len(row)
        return cache, output.logits[:, -1]

    def _advance(self) -> list[Answer]:
        """One token more for every running answer."""
        device, slots = self.model.device, self._slots
        slots.open_step(device)
        dtype = slots.layers[0].keys.dtype
        masks = {kind: slots.mask(dtype, self._window if kind == "sliding_attention" else None) for kind in self._kinds}
        output = self.model(
            input_ids=torch.tensor([[answer.new_ids[-1]] for answer in self._running], device=device),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=slots.ends[:, None],
            past_key_values=slots,
            use_cache=True,
            logits_to_keep=1,
        )
        slots.close_step()
        changed = list(self._running)
        self._take(range(len(changed)), output.logits[:, -1])
        return changed

    def _take(self, places: range, scores: Tensor) -> None:
        """Give the running answers at ``places`` the tokens that ``scores`` ``(B, V)`` ask for; end what is done."""
        answers = [self._running[place] for place in places]
        if self._settings is not None:
            scores = self._processed(scores, answers)
        tokens = choose_tokens(scores, [answer.chooser for answer in answers])
        for place, answer, token in reversed(list(zip(places, answers, tokens, strict=True))):
            if token in self._end_ids:
                self._end(place, "stop")
                continue
            answer.new_ids.append(token)
            if len(answer.new_ids) >= answer.max_new_tokens:
                self._end(place, "length")

    def _end(self, place: int, reason: FinishReason) -> None:
        answer = self._running[place]
        answer.finish = reason
        if answer.keep:
            signature = (*answer.prompt.signature, *answer.new_ids)[: self._slots.lengths[place]]
            answer.kept = Kept(signature, self._slots.states(place))
        last = self._slots.leave(place)
        self._running[place] = self._running[last]
        self._running.pop()

    def _processed(self, scores: Tensor, answers: Sequence[Answer]) -> Tensor:
        """Scores after what the checkpoint's generation config asks for, such as a repetition penalty."""
        rows = []
        for answer, row in zip(answers, scores, strict=True):
            length = len(answer.prompt.input_ids)
            settings = copy.copy(self._settings)
            settings.max_new_tokens = answer.max_new_tokens
            processors = self.model._get_logits_processor(settings, length, device=str(scores.device))
            ids = torch.tensor([[*answer.prompt.input_ids, *answer.new_ids]], device=scores.device)
            rows.append(processors(ids, row[None].float())[0])
        return torch.stack(rows)


def join_inputs(inputs: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Media of several prompts as the arguments of one pass: tensors behind each other, lists likewise."""
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for item in inputs for name in item):
        parts = [item[name] for item in inputs if name in item]
        if isinstance(parts[0], Tensor):
            joined[name] = torch.cat(_equally_wide(parts)).to(device)
        else:
            joined[name] = [value for part in parts for value in part]
    return joined


def _equally_wide(parts: list[Tensor]) -> list[Tensor]:
    """Rows of token ids, and windows of sound, filled up with zeros to the longest; pictures are equal as they are."""
    if parts[0].ndim < 2:
        return parts
    width = max(part.shape[1] for part in parts)
    behind = (0, 0) * (parts[0].ndim - 2)
    return [torch.nn.functional.pad(part, (*behind, 0, width - part.shape[1])) for part in parts]


def _common(kept: Kept, prompt: Prompt) -> int:
    """Tokens that ``prompt`` begins with and ``kept`` holds; at least one is left to read, and no medium is cut."""
    limit = min(len(kept.signature), len(prompt.signature) - 1)
    count = next((n for n in range(limit) if kept.signature[n] != prompt.signature[n]), limit)
    inside = (start for start, length in prompt.media_spans if start < count < start + length)
    return next(inside, count)


def _attention(config: Any) -> tuple[int | None, tuple[str, ...]]:
    """Width of the sliding window and the kinds of layers of a language model.

    Raises:
        ConfigError: a kind of layer that keeps something else than keys and values by position.
    """
    if "flash" in str(config._attn_implementation):
        config._attn_implementation = PACKED  # rows of unequal length need a mask, which those kernels do not take
    window = getattr(config, "sliding_window", None)
    kinds = tuple(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if not kinds:
        kinds = ("sliding_attention",) if window else ("full_attention",)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or config._attn_implementation not in (None, PACKED, "sdpa", "eager"):
        what = f"{', '.join(unknown)} layers" if unknown else f"attn_implementation={config._attn_implementation}"
        raise ConfigError(
            f"answers cannot be batched with {what}; use a language model with full or sliding attention and "
            "attn_implementation sdpa or eager"
        )
    return window, kinds


def _score_settings(model: LlavaScaleForConditionalGeneration, end_ids: Sequence[int], pad_id: int) -> Any:
    """The checkpoint's generation config, if it changes scores; drawing is ours to decide."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        max_length=None, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
        eos_token_id=list(end_ids), pad_token_id=pad_id, max_new_tokens=1,
    )  # fmt: skip
    # the processors look for these, which generate would have made
    settings._eos_token_tensor = torch.tensor(list(end_ids), device=model.device)
    return settings if len(model._get_logits_processor(settings, 1, device=str(model.device))) else None
