"""How likely a model finds each choice of a question, media and all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from llava_scale.data.decoding import medium_info
from llava_scale.data.records import encoded_media, fields_of
from llava_scale.errors import SampleError
from llava_scale.eval.likelihood import RowMaker, caption_scores
from llava_scale.eval.scorers import Response
from llava_scale.types import MEDIA_KINDS, MediaInfo, Sample, Turn

if TYPE_CHECKING:
    from llava_scale.data.dataset import ShardedDataset
    from llava_scale.eval.task_data import TaskItem
    from llava_scale.model import LlavaScaleForConditionalGeneration, LlavaScaleProcessor

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class OneSample:
    """A data set of one sample, which is in memory."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def samples(self, numbers: Sequence[int]) -> list[Sample]:
        """The sample, as often as asked."""
        return [self._sample for _ in numbers]

    def media_infos(self, _: int) -> tuple[MediaInfo, ...]:
        """What is known of its media."""
        media = encoded_media(self._sample)
        return tuple(medium_info(kind, medium) for kind in MEDIA_KINDS for medium in media.get(kind, ()))

    def locate(self, number: int) -> tuple[int, int]:
        """Shard and place."""
        return 0, number

    def shard_name(self, _: int) -> str:
        """Where it came from."""
        return self._sample.shard

    def key(self, _: int) -> str:
        """Its key."""
        return self._sample.key


class Chooser:
    """Scores the choices of items with one model.

    Args:
        model: In evaluation mode.
        processor: Its processor.
        with_letters: The letters A, B, ... of the choices are compared instead of their texts.
    """

    def __init__(
        self, model: LlavaScaleForConditionalGeneration, processor: LlavaScaleProcessor, *, with_letters: bool
    ) -> None:
        self._model, self._processor, self._with_letters = model, processor, with_letters
        limit = getattr(model.config.text_config, "max_position_embeddings", None)
        self._limit: int = limit or 1 << 30

    def __call__(self, item: TaskItem) -> Response:
        """Log-likelihood of each choice after the question, end marker included, and its tokens.

        Raises:
            SampleError: the model cannot take the question.
        """
        texts = list(_LETTERS[: len(item.choices)]) if self._with_letters else list(item.choices)
        if len(texts) < len(item.choices):
            raise SampleError(f"has {len(item.choices)} choices, and there are {len(_LETTERS)} letters")
        turns = item.question.turns
        sample = Sample(
            key=item.key,
            shard="",
            turns=(*turns, Turn("assistant", texts[0])),
            media=item.files,
            extra=fields_of(item.question.media),
        )
        dataset = cast("ShardedDataset", OneSample(sample))
        row, skipped = RowMaker(dataset, self._processor, max_length=self._limit).row([0])
        if skipped[0] is not None:
            raise SampleError(skipped[0].reason)
        choices = [self._ids(turns, text) for text in texts]
        order = sorted(range(len(choices)), key=lambda place: len(choices[place]))
        found = caption_scores(self._model, row, [choices[place] for place in order])
        scores = dict(zip(order, found, strict=True))
        return Response(
            scores=tuple(float(scores[place]) for place in range(len(choices))), lengths=tuple(map(len, choices))
        )

    def _ids(self, turns: Sequence[Turn], text: str) -> tuple[int, ...]:
        encoded = self._processor.chat_encoder.encode((*turns, Turn("assistant", text)))
        return tuple(token for token, counts in zip(encoded.input_ids, encoded.supervised, strict=True) if counts)
