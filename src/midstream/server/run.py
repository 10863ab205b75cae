"""Running the server: loading, TLS, signals, and an end that finishes or refuses every request."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from midstream.config import ServerConfig
from midstream.errors import InputError
from midstream.server import logs, tracing
from midstream.server.app import create_app
from midstream.server.opening import Opened, open_engine
from midstream.server.service import Service

log = logging.getLogger("midstream.server")

# What uvicorn gives connections beyond our own limit to write their last bytes.
_LAST_BYTES_S = 5


def serve(config: ServerConfig, *, progress: bool = False) -> None:
    """Make the backend ready and serve until a signal comes. Raises InputError for what cannot be served."""
    try:
        logs.set_up(config.log_file)
    except OSError as error:
        raise InputError(f"the log file cannot be opened: {error}") from error
    tracing.set_up()
    asyncio.run(_serve(open_engine(config, progress=progress), config))


async def _serve(opened: Opened, config: ServerConfig) -> None:
    async with opened.engine as engine:
        if isinstance(engine.fault, InputError):
            raise engine.fault  # waiting will not mend it
        app = create_app(engine, config)
        server = GracefulServer(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                timeout_keep_alive=int(max(5, config.stall_timeout_s)),
                timeout_graceful_shutdown=int(config.shutdown_timeout_s) + _LAST_BYTES_S,
            ),
            app.state.service,
        )
        if opened.child is not None:
            opened.child.when_dead(server.stop)
        await server.serve()
    if opened.child is not None and opened.child.death is not None:
        raise opened.child.death


class GracefulServer(uvicorn.Server):
    """On the first signal: no new requests, running ones may finish for a while, the rest get an error."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._ending: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)

    def stop(self) -> None:
        """As on a signal: end well. May be called in any thread."""
        self._service.draining = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                scheme = "https" if self.config.is_ssl else "http"
                shown = f"[{host}]" if ":" in host else host
                log.info("serving %s at %s://%s:%d", self._service.model_name, scheme, shown, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending = asyncio.create_task(self._end_engine())
        try:
            await super().shutdown(sockets)
        finally:
            self._ending.cancel()

    async def _end_engine(self) -> None:
        """When the time is over, every request that still runs gets its error and so ends."""
        await asyncio.sleep(self._service.config.shutdown_timeout_s)
        log.warning("ending %d requests that did not finish in time", sum(self._service.open_requests.values()))
        await self._service.engine.aclose()
