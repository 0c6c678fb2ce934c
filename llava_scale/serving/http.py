"""A real server around the application, in this thread or in another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llava_scale.errors import MissingExtraError
from llava_scale.serving.server import ServerSettings, create_app

if TYPE_CHECKING:
    from llava_scale.serving.engine import Engine


@contextmanager
def running_server(engine: Engine, settings: ServerSettings, *, host: str = "127.0.0.1", port: int) -> Iterator[str]:
    """Serve in a thread for as long as the context is open; yields the URL. Port 0 takes any that is free.

    Raises:
        MissingExtraError: the extra ``[serve]`` is not installed.
    """
    server = make_server(engine, settings, host=host, port=port)
    thread = threading.Thread(target=server.run, name="llava-scale-http", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise OSError(f"no server could be started at {host}:{port}")
            time.sleep(0.01)
        yield f"http://{host}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def make_server(engine: Engine, settings: ServerSettings, *, host: str, port: int) -> Any:
    """A uvicorn server for ``create_app``.

    Raises:
        MissingExtraError: the extra ``[serve]`` is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise MissingExtraError("uvicorn", "serve") from None
    app = create_app(engine, settings)
    # h11 limits the size of headers; websockets are nobody's business here
    config = uvicorn.Config(
        app, host=host, port=port, http="h11", ws="none", log_level="warning", server_header=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    return uvicorn.Server(config)
