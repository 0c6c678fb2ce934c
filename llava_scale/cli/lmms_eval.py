"""Our models in lmms-eval: ``lmms-eval --model llava_scale --model_args pretrained=RUN/final --tasks ...``.

Found by lmms-eval through the entry point group ``lmms_eval.models``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_scale.errors import MissingExtraError

try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
except ImportError:
    raise MissingExtraError("lmms-eval", "lmms") from None

from llava_scale.cli.common import Dtype, asking, load_engine
from llava_scale.errors import ConfigError
from llava_scale.eval.choosing import Chooser
from llava_scale.eval.lmms_eval import Answering, check_arguments

if TYPE_CHECKING:
    from llava_scale.eval.tasks import Generate

NAME = "llava_scale"


def manifest() -> Any:
    """What lmms-eval registers: one name for tasks with messages and, with ``--force_simple``, for all others."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=NAME,
        chat_class_path=f"{__name__}.LlavaScaleChat",
        simple_class_path=f"{__name__}.LlavaScaleSimple",
    )


class LlavaScaleSimple(lmms):  # type: ignore[misc]
    """Answers and scores texts with media before them.

    Args:
        pretrained: Folder of a model, such as RUN/final.
        device: ``auto``, ``cpu`` or ``cuda``; several processes take a device each.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        batch_size: Questions answered together.
        **unknown: Arguments that lmms-eval passes to every model; others are refused.
    """

    is_simple = True

    def __init__(
        self, pretrained: str = "", device: str = "auto", dtype: str = "auto", batch_size: int = 8, **unknown: Any
    ) -> None:
        super().__init__()
        check_arguments(unknown)
        if not pretrained:
            raise ConfigError("--model_args pretrained=FOLDER is missing")
        if dtype not in {item.value for item in Dtype}:
            raise ConfigError(f"unknown dtype {dtype!r}; choose {', '.join(item.value for item in Dtype)}")
        local_rank = os.environ.get("LOCAL_RANK")
        if device in ("auto", "cuda") and local_rank is not None and _has_cuda():
            device = f"cuda:{local_rank}"
        self._engine = load_engine(Path(pretrained), device or "auto", Dtype(dtype))
        self._batch_size = int(batch_size)
        self.device = self._engine.model.device

    @property
    def batch_size(self) -> int:
        """Questions answered together."""
        return self._batch_size

    def generate_until(self, requests: Any) -> list[str]:
        """Answers in the order of the requests."""
        return self._answering().generate_until(requests, chat=not self.is_simple)

    def loglikelihood(self, requests: Any) -> list[Any]:
        """Loss of each continuation in nats a token, and whether it is the greedy answer."""
        # lmms-eval 0.7 would turn pairs into texts, but hands on what a GenerationResult holds
        return [GenerationResult(text=pair) for pair in self._answering().loglikelihood(requests)]

    def generate_until_multi_round(self, requests: Any) -> list[str]:
        """Not offered.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("tasks of several rounds are not supported")

    def _answering(self) -> Answering:
        engine = self._engine

        def generate(longest: int) -> Generate:
            return asking(engine, max_new_tokens=longest, batch_size=self._batch_size)

        return Answering(generate, Chooser(engine.model, engine.processor, with_letters=False), self.task_dict)


class LlavaScaleChat(LlavaScaleSimple):
    """Answers chat messages with media inside them."""

    is_simple = False


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
