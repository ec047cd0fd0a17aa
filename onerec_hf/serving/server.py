"""uvicorn around the application: stops without losing requests, and waits for nobody who sends nothing."""

import asyncio
import json
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits
from .metrics import log

_SLOW = json.dumps({"error": {"code": "slow_head", "message": "no whole request arrived in time: send it at once."}})


class _Protocol(H11Protocol):
    """Closes a connection on which no head of a request arrives in time; uvicorn itself waits for ever."""

    seconds = 10.0
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(self.seconds, self._too_slow)

    def data_received(self, data: bytes) -> None:
        if self._head is None:  # the next request of the connection
            self._head = self.loop.call_later(self.seconds, self._too_slow)
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            head = f"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: {len(_SLOW)}"
            self.transport.write(f"{head}\r\nconnection: close\r\n\r\n{_SLOW}".encode())
            self.transport.close()


class Server(uvicorn.Server):
    """On SIGTERM new requests get 503 and those that are there are answered; then the process ends."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        app: Any = self.config.app
        if not app.state.service.draining:
            app.state.service.draining = True
            log("draining", rows=app.state.service.batcher.rows)
        super().handle_exit(sig, frame)


def server(app: FastAPI, host: str, port: int, limits: Limits) -> Server:
    """
    A server for an application; `.run()` serves until SIGTERM or SIGINT.

    Args:
        app: Of `create_app`.
        host, port: Where it listens; port 0 takes a free one.
        limits: Of the application: a head may take as long as a body, and a stop as long as a request.
    """
    protocol = type("Protocol", (_Protocol,), {"seconds": limits.body_timeout_s})
    config = uvicorn.Config(
        app,
        host,
        port,
        http=protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=75,  # longer than clients and proxies keep a connection that they do not use
        limit_concurrency=2 * limits.max_queue + 64,  # connections; those without a request count, too
        timeout_graceful_shutdown=int(limits.timeout_s + limits.body_timeout_s) + 1,
    )
    return Server(config)


__all__ = ["Server", "server"]
