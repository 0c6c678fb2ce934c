"""Answers from a model: many at once in batches, or one as it is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llava_scale.errors import CheckpointError, ConfigError, SampleError
from llava_scale.model import load_model
from llava_scale.serving.decoding import Answer, Decoder, Kept
from llava_scale.serving.prompts import GenerationRequest, Medium, Prompt, load_media, make_prompt
from llava_scale.serving.sampling import Sampling
from llava_scale.serving.streaming import text_pieces

if TYPE_CHECKING:
    from llava_scale.model import LlavaScaleForConditionalGeneration, LlavaScaleProcessor

__all__ = ["Engine", "GenerationRequest", "Medium", "choose_device", "load_engine"]


def load_engine(checkpoint: str | Path, *, device: str = "auto", dtype: str = "auto") -> Engine:
    """Load a checkpoint and return an engine for it.

    Args:
        checkpoint: Folder written by training (``RUN/final``) or by ``save_pretrained``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``auto`` as saved, or ``float32``, ``bfloat16``, ``float16``.

    Raises:
        CheckpointError: no complete checkpoint there.
        ConfigError: unknown device or type.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"unknown dtype {dtype!r}; choose auto, float32, bfloat16 or float16")
    place = choose_device(device)
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        inside = folder / "final"
        hint = f"; the model of this run is {inside}" if inside.is_dir() else "; give a folder such as RUN/final"
        raise CheckpointError(f"{folder} holds no model (config.json){hint}")
    model, processor = load_model(checkpoint, dtype=None if dtype == "auto" else getattr(torch, dtype), device=place)
    return Engine(model, processor)


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA where there is any.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; choose auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: found {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


class Engine:
    """Answers requests with one model.

    Args:
        model: In evaluation mode from here on.
        processor: Its processor.
        device: Where to move the model; None leaves it where it is.
    """

    def __init__(
        self,
        model: LlavaScaleForConditionalGeneration,
        processor: LlavaScaleProcessor,
        device: torch.device | str | None = None,
    ) -> None:
        self.model = model.eval() if device is None else model.to(device).eval()
        self.processor = processor
        self._end_ids = tuple(processor.chat_encoder.eos_ids)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        max_new_tokens: int = 256,
        batch_size: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[str]:
        """Answers in the order of the requests.

        Answers join and leave one running batch, the longest prompts first. An answer does not depend on its
        neighbours, also when tokens are drawn, but for rounding: exact in float32 as far as two tokens do not tie.

        Args:
            requests: What to answer.
            max_new_tokens: Longest answer in tokens.
            batch_size: Answers that run at once.
            temperature: 0 always takes the likeliest token.
            top_p: Draw from the likeliest tokens that together hold this share.
            seed: Makes draws repeatable.

        Raises:
            SampleError: a request cannot be used (the first of them that was met).
            ConfigError: a setting out of range.
        """
        answers = [""] * len(requests)
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        for number, answer in self._outcomes(requests, max_new_tokens, batch_size, sampling):
            if isinstance(answer, SampleError):
                raise answer
            answers[number] = answer
        return answers

    def try_generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        max_new_tokens: int = 256,
        batch_size: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[str | SampleError]:
        """As ``generate``, but a request that cannot be used gives its error instead of an answer."""
        answers: list[str | SampleError] = [""] * len(requests)
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        for number, answer in self._outcomes(requests, max_new_tokens, batch_size, sampling):
            answers[number] = answer
        return answers

    def stream(
        self,
        request: GenerationRequest,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces as it is written; together they are the answer of ``generate``.

        Closing the iterator stops the work. The request is checked when the first piece is asked for.

        Raises:
            SampleError: the request cannot be used.
            ConfigError: a setting out of range.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        answer = self.answer(self.prompt(request, max_new_tokens), max_new_tokens, sampling)
        yield from text_pieces(self.tokens(answer), self.decode)

    def prompt(self, request: GenerationRequest, max_new_tokens: int) -> Prompt:
        """The request as token ids, refused if the answer could not follow it.

        Raises:
            SampleError: the request cannot be used.
            ConfigError: no token is asked for.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        prompt = make_prompt(request, self.processor)
        limit, length = self.context_length, len(prompt.input_ids)
        if limit and length + max_new_tokens > limit:
            raise SampleError(
                f"the conversation takes {length:,} tokens; with {max_new_tokens:,} for the answer that is more than "
                f"the model's {limit:,}; shorten it, leave pictures out, or ask for a shorter answer"
            )
        return prompt

    def answer(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: Sampling,
        *,
        number: int = 0,
        start: Kept | None = None,
        keep: bool = False,
    ) -> Answer:
        """An answer that a ``Decoder`` can work on; media are decoded here.

        Args:
            prompt: What is answered.
            max_new_tokens: Longest answer in tokens.
            sampling: How tokens are chosen.
            number: Tells apart answers that share a seed.
            start: Earlier turns of the conversation, which are not read again.
            keep: Leave the conversation in ``Answer.kept``.

        Raises:
            SampleError: a medium cannot be decoded.
        """
        return Answer(
            prompt=prompt,
            inputs=load_media(prompt, self.processor),
            max_new_tokens=max_new_tokens,
            chooser=sampling.choosers([number])[0],
            start=start,
            keep=keep,
        )

    def decoder(self, max_batch: int) -> Decoder:
        """A batch of at most ``max_batch`` answers.

        Raises:
            ConfigError: the language model's layers are of a kind that cannot be batched.
        """
        return Decoder(self.model, self._end_ids, self.processor.tokenizer.pad_token_id, max_batch)

    def tokens(self, answer: Answer) -> Generator[int, None, None]:
        """Yield the tokens of one answer as they are chosen; closing the iterator ends the work."""
        decoder, given = self.decoder(1), 0
        decoder.add(answer)
        try:
            while not answer.finish:
                decoder.step()
                yield from answer.new_ids[given:]
                given = len(answer.new_ids)
        finally:
            decoder.cancel(answer)
        if answer.error is not None:
            raise answer.error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        text: str = self.processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def ratio(self) -> float | None:
        """Share of the visual tokens that the compressor removes; None where there is none that has a share."""
        section = self.processor.compressor or {}
        return section.get("ratio")

    def set_ratio(self, ratio: float) -> None:
        """Remove another share of the visual tokens from now on; never while answers are on their way.

        Raises:
            ConfigError: the compressor has no ratio, or this is none.
        """
        self.model.set_ratio(ratio)
        self.processor.compressor = self.model.config.compressor

    @property
    def context_length(self) -> int:
        """Most tokens of conversation and answer; 0 where the language model names none."""
        return getattr(self.model.config.text_config, "max_position_embeddings", None) or 0

    def _outcomes(
        self, requests: Sequence[GenerationRequest], max_new_tokens: int, batch_size: int, sampling: Sampling
    ) -> Iterator[tuple[int, str | SampleError]]:
        """Yield (number of the request, answer or why there is none) as they are done, longest prompts first."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}")
        prompts: dict[int, Prompt] = {}
        for number, request in enumerate(requests):
            try:
                prompts[number] = self.prompt(request, max_new_tokens)
            except SampleError as error:
                yield number, error
        waiting = deque(sorted(prompts, key=lambda number: -len(prompts[number].input_ids)))
        choosers = dict(zip(prompts, sampling.choosers(list(prompts)), strict=True))
        decoder = self.decoder(batch_size)
        numbers: dict[Answer, int] = {}
        while waiting or numbers:
            while waiting and decoder.room:
                number = waiting.popleft()
                try:
                    answer = self.answer(prompts[number], max_new_tokens, Sampling())
                except SampleError as error:
                    yield number, error
                    continue
                answer.chooser = choosers[number]
                numbers[answer] = number
                decoder.add(answer)
            for answer in decoder.step():
                if answer.error is not None:
                    raise answer.error
                if answer.finish:
                    yield numbers.pop(answer), self.decode(answer.new_ids).strip()
