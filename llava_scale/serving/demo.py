"""A web page to try a model (extra ``[demo]``): media and questions in, streamed answers out.

Beside the conversation stand the tokens before and after compression, what became of the last picture's tokens, and a
slider for the compressor's ratio. One process, one answer at a time.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_scale.data.names import EXTENSIONS
from llava_scale.errors import LlavaScaleError, MissingExtraError, SampleError
from llava_scale.serving.chat import AnswerSettings, ChatSession

if TYPE_CHECKING:
    from torch import Tensor

    from llava_scale.serving.engine import Engine

_log = logging.getLogger(__name__)

DrawMap = Callable[["Tensor", tuple[int, int, int], "Tensor", "Tensor"], bytes]
"""Pixels ``(3, S, S)``, grid, group of each token ``(N,)`` and place of each output ``(M,)`` to a PNG file."""

MOST_REMOVED = 0.9
"""End of the slider."""

_CSS = """
.gradio-container {max-width: 1280px !important}
#counts table {width: 100%}
footer {display: none !important}
#chat button[title="Share"] {display: none !important}
"""


class Demo:
    """What happens behind the page.

    Args:
        engine: Who answers.
        settings: How answers are written.
        draw_map: Makes the picture of what became of the tokens.
    """

    def __init__(self, engine: Engine, settings: AnswerSettings, draw_map: DrawMap) -> None:
        self._engine, self._settings, self._draw_map = engine, settings, draw_map

    def answer(
        self, message: dict[str, Any], history: list[dict[str, Any]], session: ChatSession | None, ratio: float | None
    ) -> Generator[tuple[list[dict[str, Any]], ChatSession, str, Any], None, None]:
        """Yield the conversation as the answer grows, and at the end the counts and the map."""
        session = session or ChatSession(self._engine, self._settings)
        text, files = str(message.get("text") or "").strip(), list(message.get("files") or ())
        shown = [*history, *({"role": "user", "content": {"path": file}} for file in files)]
        shown += [{"role": "user", "content": text}] if text else []
        waiting = dict(session.waiting)
        try:
            if not text:
                raise SampleError("write a question to go with the files" if files else "write a question")
            if self._engine.ratio is not None and ratio is not None:
                self._engine.set_ratio(ratio)
            for file in files:
                session.add(_kind(file), file)
            written = ""
            with closing(session.ask(text)) as pieces:
                for piece in pieces:
                    written += piece
                    yield [*shown, _said(written)], session, "", None
        except LlavaScaleError as error:
            session.waiting = waiting
            yield [*shown, _said(f"⚠️ {_reason(error)}")], session, "", None
            return
        except Exception:
            _log.exception("an answer failed")
            session.waiting = waiting
            yield [*shown, _said("⚠️ the model failed at this question; the server's log tells more")], session, "", None
            return
        yield [*shown, _said(written or "(no answer)")], session, self.counts(session), self.merge_map(session)

    def counts(self, session: ChatSession) -> str:
        """Tokens of the conversation before and after compression, as a table in Markdown."""
        assert session.last is not None
        prompt = session.last.prompt
        visual = prompt.num_media_tokens
        share = f" ({1 - visual / prompt.num_features:.0%} fewer)" if visual < prompt.num_features else ""
        rows = (
            ("media, before compression", f"{prompt.num_features:,}"),
            ("media, as the model reads them", f"{visual:,}{share}"),
            ("text", f"{len(prompt.input_ids) - visual:,}"),
            ("read for this answer", f"{session.last.num_prefilled:,}"),
            ("answer", f"{len(session.last.new_ids):,}"),
        )
        return "\n".join(["| tokens | |", "|:--|--:|", *(f"| {name} | {count} |" for name, count in rows)])

    @torch.no_grad()
    def merge_map(self, session: ChatSession) -> Any:
        """Pillow picture of what became of the last picture's tokens; None where there is nothing to show."""
        from PIL import Image

        pictures = session.media.get("image", ())
        if not pictures or self._engine.ratio is None:
            return None
        processor, model = self._engine.processor, self._engine.model
        pixels = processor.image_transform(pictures[-1].data)
        tokens = model.visual_tokens(pixels[None].to(model.device), 1)
        if tokens.group is None:
            return None
        grid = (1, *processor.image_grid)
        png = self._draw_map(pixels, grid, tokens.group[0].cpu(), tokens.positions[0].cpu())  # type: ignore[arg-type]
        return Image.open(io.BytesIO(png))


def build_page(engine: Engine, settings: AnswerSettings, draw_map: DrawMap, *, title: str) -> Any:
    """The page as Gradio blocks.

    Raises:
        MissingExtraError: the extra ``[demo]`` is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError:
        raise MissingExtraError("gradio", "demo") from None
    demo = Demo(engine, settings, draw_map)
    with gr.Blocks(analytics_enabled=False, title=title) as page:
        gr.Markdown(f"## {title}")
        session = gr.State(None)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(height=460, show_label=False, elem_id="chat", feedback_options=None, buttons=["copy"])
                box = gr.MultimodalTextbox(
                    file_types=["image", "video", "audio"], file_count="multiple", sources=["upload"], show_label=False,
                    placeholder="Drop pictures, videos or sounds here, and ask", elem_id="question", autofocus=True,
                )  # fmt: skip
                reset = gr.Button("New conversation", elem_id="reset")
            with gr.Column(scale=2, min_width=300):
                ratio = gr.Slider(
                    0.0, max(MOST_REMOVED, engine.ratio or 0.0), value=engine.ratio or 0.0, step=0.05, elem_id="ratio",
                    label="Share of the visual tokens that is removed", visible=engine.ratio is not None,
                )  # fmt: skip
                counts = gr.Markdown("Token counts appear with the first answer.", elem_id="counts")
                gr.Markdown("What became of the last picture's tokens", visible=engine.ratio is not None)
                shown_map = gr.Image(
                    show_label=False, elem_id="map", interactive=False, visible=engine.ratio is not None,
                    buttons=["fullscreen"],
                )  # fmt: skip

        def ask(message: Any, history: Any, state: Any, share: float) -> Any:
            for now, kept, table, picture in demo.answer(message, history, state, share):
                yield now, kept, table or gr.skip(), gr.skip() if not table else picture, gr.skip()
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), {"text": "", "files": []}

        box.submit(ask, [box, chat, session, ratio], [chat, session, counts, shown_map, box], api_visibility="private")
        reset.click(lambda: ([], None, "", None), None, [chat, session, counts, shown_map], api_visibility="private")
        chat.clear(lambda: (None, "", None), None, [session, counts, shown_map], api_visibility="private")
    return page


def launch(page: Any, *, host: str, port: int, max_file_mb: float, block: bool = True) -> str:
    """Serve ``page``; returns its URL once it is up, or when it ends if ``block``.

    Files of this machine are not served, but for what visitors have sent.
    """
    page.queue(default_concurrency_limit=1, max_size=32)
    _, url, _ = page.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=not block, css=_CSS,
        max_file_size=int(max_file_mb * 1e6), show_error=True, footer_links=[], inbrowser=False, ssr_mode=False,
        mcp_server=False, pwa=False, enable_monitoring=False,
    )  # fmt: skip
    return str(url)


def _kind(path: str) -> Any:
    """Kind of medium of a file, by its extension.

    Raises:
        SampleError: none of ours.
    """
    ext = Path(path).suffix.removeprefix(".").lower()
    if ext not in EXTENSIONS:
        raise SampleError(f"{Path(path).name} is no picture, video or sound that can be read")
    return EXTENSIONS[ext]


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _reason(error: LlavaScaleError) -> str:
    """What went wrong, without the place where an upload lies."""
    reason = error.reason if isinstance(error, SampleError) else str(error)
    head, colon, rest = reason.partition(": ")
    return f"{Path(head).name}: {rest}" if colon and head.startswith("/") else reason
