"""What a request passes before the application: token, size, time to arrive; and the line that is logged behind it."""

import asyncio
import hmac
import time
import uuid
from collections.abc import Sequence
from typing import Any

from .errors import Refused
from .limits import Limits
from .metrics import Metrics, log

OPEN = ("/health", "/ready", "/docs", "/openapi.json")  # without a token
DISCARDED = 64  # times the limit of a body that is read and thrown away, so that its sender gets to read the answer


class Gate:
    """
    An ASGI middleware.

    Args:
        app: The application behind it.
        limits: Of bodies.
        metrics: Counts every request.
        token: What `Authorization: Bearer` must name; None for everybody.
        paths: Those of the application; others are counted together.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, token: str | None, paths: Sequence[str]):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, set(paths)
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        scope["onerec_log"] = {"request": uuid.uuid4().hex[:12]}

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = message | {
                    "headers": [*message["headers"], (b"x-request-id", scope["onerec_log"]["request"].encode())]
                }
            await send(message)

        try:
            headers = dict(scope["headers"])
            body = _Body(receive, self._most(scope["path"]), self.limits.body_timeout_s)
            try:
                self._check_token(scope["path"], headers)
                await body.check_length(headers.get(b"content-length"))
            except Refused as error:
                scope["onerec_code"] = error.code
                await error.response()(scope, receive, watched)
                return
            await self.app(scope, body.receive, watched)
        finally:
            self._note(scope, status, time.perf_counter() - start)

    def _most(self, path: str) -> int:
        small = path not in ("/catalogue", "/model")
        return self.limits.max_body_bytes if small else self.limits.max_bundle_bytes

    def _check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.token is None or path in OPEN:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
            raise Refused(401, "token", "send the service's token: `Authorization: Bearer ...`.")

    def _note(self, scope: Any, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        code = scope.get("onerec_code")
        if code is not None:
            self.metrics.refused.labels(code).inc()
            scope["onerec_log"]["code"] = code
        if path not in ("/health", "/ready", "/metrics"):  # asked every second
            log("request", path=path, status=status, ms=round(1000 * seconds, 2), **scope["onerec_log"])


class _Body:
    """The body of a request as it arrives: at most so many bytes, in at most so many seconds."""

    def __init__(self, receive: Any, most: int, seconds: float):
        self._receive, self.most, self.seconds = receive, most, seconds
        self.size, self.complete = 0, False
        self.until = asyncio.get_running_loop().time() + seconds

    async def check_length(self, length: bytes | None) -> None:
        """Refuses by the header, once the body has been thrown away."""
        if length is None:
            return
        if not length.isdigit():
            raise Refused(400, "content_length", "content-length is no number: send the size of the body in bytes.")
        if int(length) > self.most:
            await self._too_large(int(length))

    async def receive(self) -> Any:
        """As the application receives; behind the body it waits for the client to go, without a limit of time."""
        if self.complete:
            return await self._receive()
        message = await self._next()
        self.size += len(message.get("body", b""))
        if self.size > self.most:
            await self._too_large(self.size)
        return message

    async def _next(self) -> Any:
        left = self.until - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0))
        except TimeoutError:
            what = f"the body did not arrive within {self.seconds:g} seconds: send it at once."
            raise Refused(408, "slow_body", what) from None
        self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def _too_large(self, size: int) -> None:
        read = self.size
        while not self.complete and read < self.most * DISCARDED:
            read += len((await self._next()).get("body", b""))
        what = f"the body has {size} bytes or more, at most {self.most} are allowed: send fewer histories."
        raise Refused(413, "body_too_large", what)


__all__ = ["Gate"]
