"""Answers from a model: many at once in batches, or one as it is written."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_scale.errors import CheckpointError, ConfigError, SampleError
from llava_scale.model import load_model
from llava_scale.serving.prompts import GenerationRequest, Medium, Prompt, decode_pictures, make_prompt
from llava_scale.serving.sampling import Sampling, TokenSampler
from llava_scale.serving.streaming import TokenQueue, text_pieces, token_ids

if TYPE_CHECKING:
    from torch import Tensor

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

        Requests of similar length share a batch. An answer does not depend on its neighbours, also when tokens are
        drawn, but for rounding: exact in float32 as far as two tokens do not tie.

        Args:
            requests: What to answer.
            max_new_tokens: Longest answer in tokens.
            batch_size: Most requests in one batch.
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
        prompt = self._prompt(request, max_new_tokens)
        pixels = decode_pictures(prompt, self.processor)

        def work(tokens: TokenQueue) -> None:
            self._run([prompt], pixels, max_new_tokens, sampling, [0], streamer=tokens)

        # closed by name: at an exception in the reader nothing else would stop the thread in time
        with closing(token_ids(work)) as ids:
            yield from text_pieces(ids, self._decode, self._end_ids)

    def _outcomes(
        self, requests: Sequence[GenerationRequest], max_new_tokens: int, batch_size: int, sampling: Sampling
    ) -> Iterator[tuple[int, str | SampleError]]:
        """Yield (number of the request, answer or why there is none) as batches are done, longest prompts first."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}")
        prompts: dict[int, Prompt] = {}
        for number, request in enumerate(requests):
            try:
                prompts[number] = self._prompt(request, max_new_tokens)
            except SampleError as error:
                yield number, error
        order = sorted(prompts, key=lambda number: -len(prompts[number].input_ids))
        for start in range(0, len(order), batch_size):
            pixels: list[Tensor] = []
            usable: list[int] = []
            for number in order[start : start + batch_size]:
                try:
                    pixels += decode_pictures(prompts[number], self.processor)
                    usable.append(number)
                except SampleError as error:
                    yield number, error
            if usable:
                batch = [prompts[number] for number in usable]
                rows = self._run(batch, pixels, max_new_tokens, sampling, usable)
                yield from zip(usable, map(self._text, rows), strict=True)

    def _prompt(self, request: GenerationRequest, max_new_tokens: int) -> Prompt:
        """The request as token ids, refused if the answer could not follow it."""
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        prompt = make_prompt(request, self.processor)
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        length = len(prompt.input_ids)
        if limit and length + max_new_tokens > limit:
            raise SampleError(
                f"the conversation takes {length:,} tokens; with {max_new_tokens:,} for the answer that is more than "
                f"the model's {limit:,}; shorten it, leave pictures out, or ask for a shorter answer"
            )
        return prompt

    @torch.no_grad()
    def _run(
        self,
        prompts: Sequence[Prompt],
        pixels: Sequence[Tensor],
        max_new_tokens: int,
        sampling: Sampling,
        numbers: Sequence[int],
        streamer: TokenQueue | None = None,
    ) -> list[list[int]]:
        """New token ids of each prompt of one batch."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        pad_id = self.processor.tokenizer.pad_token_id
        rows = [[pad_id] * (longest - len(prompt.input_ids)) + prompt.input_ids for prompt in prompts]
        masks = [[0] * (longest - len(prompt.input_ids)) + [1] * len(prompt.input_ids) for prompt in prompts]
        device = self.model.device
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": torch.tensor(masks, device=device),
        }
        if pixels:
            inputs["pixel_values"] = torch.stack(list(pixels)).to(device)
            questions = [prompt.question for prompt in prompts for _ in prompt.pictures]
            inputs |= {name: ids.to(device) for name, ids in self.processor.question_inputs(questions).items()}
        if sampling.temperature:
            inputs["logits_processor"] = [TokenSampler(sampling, sampling.generators(numbers))]
        output = self.model.generate(
            **inputs, generation_config=self._settings(max_new_tokens, pad_id), streamer=streamer
        )
        new_ids: list[list[int]] = output[:, longest:].tolist()
        return new_ids

    def _settings(self, max_new_tokens: int, pad_id: int) -> Any:
        """The checkpoint's generation config with what is ours to decide: length, ends, and no drawing of its own."""
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(
            max_new_tokens=max_new_tokens,
            max_length=None,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            return_dict_in_generate=False,
            eos_token_id=list(self._end_ids),
            pad_token_id=pad_id,
        )
        return settings

    def _text(self, ids: list[int]) -> str:
        end = next((place for place, token_id in enumerate(ids) if token_id in self._end_ids), len(ids))
        return self._decode(ids[:end]).strip()

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
