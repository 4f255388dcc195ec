# SPDX-License-Identifier: MIT
"""How long a command waits for the Hub, whose client alone would wait for hours where a server says so."""

import importlib
import logging
import os
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from huggingface_hub import set_client_factory
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import _http

# httpx, or the client's own copy of it.
_HTTPX: Any = importlib.import_module(HTTPError.__module__.partition(".")[0])

logger = logging.getLogger(__name__)

# Seconds until an answer begins, and for which a server that fails is tried again.
_ANSWER, _TROUBLE = 10.0, 20.0
# Bytes a second, below which a download is given up after `_TROUBLE`.
_SLOWEST = 1000
# The Xet protocol has a client of its own, which reads these when its first download begins.
_XET_SETTINGS = {
    "HF_XET_CLIENT_CONNECT_TIMEOUT": f"{_ANSWER:.0f}s",
    "HF_XET_CLIENT_READ_TIMEOUT": f"{_ANSWER:.0f}s",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": f"{_TROUBLE:.0f}s",
}
_TRY_AGAIN = "nothing incomplete is kept: try again later"


@cache
def limit_waiting() -> None:
    """Let no request of this process to the Hub hang, trickle, or wait as long as the server pleases."""
    for name, value in _XET_SETTINGS.items():
        os.environ.setdefault(name, value)
    factory = _http._GLOBAL_CLIENT_FACTORY  # the default, or the user's own

    def make_client() -> Any:
        client = factory()
        client._transport = _Impatient(client._transport)
        # Those of proxies.
        client._mounts = {url: transport and _Impatient(transport) for url, transport in client._mounts.items()}
        return client

    set_client_factory(make_client)


class _Impatient(_HTTPX.BaseTransport):
    """A transport that gives up, with a `ConnectionError`, which no client tries again.

    Where no server could ever be reached there is no network, and the error is that of the offline mode, for which
    the clients look into their cache.
    """

    def __init__(self, transport: Any):
        self._transport = transport
        self._first_failure = self._last_failure = -float("inf")
        self._ever_reached = False
        self._unreachable: Exception | None = None

    def handle_request(self, request: Any) -> Any:
        # Without the query, which may hold a signature.
        place = f"{request.url.host}{request.url.path}"
        if self._unreachable is not None and time.monotonic() - self._last_failure < _TROUBLE:
            raise OfflineModeIsEnabled(f"{request.url.host} cannot be reached.") from self._unreachable
        if self._troubled():
            raise ConnectionError(f"The Hub does not answer for {place}; {_TRY_AGAIN}.")
        given = request.extensions.get("timeout", {})
        limits = {kind: min(given.get(kind) or _ANSWER, _ANSWER) for kind in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": limits}
        try:
            response = self._transport.handle_request(request)
        except (_HTTPX.ConnectError, _HTTPX.ConnectTimeout) as error:
            if self._ever_reached:
                self._fail(place, error)
                raise
            self._unreachable, self._last_failure = error, time.monotonic()
            raise OfflineModeIsEnabled(f"{request.url.host} cannot be reached.") from error
        except HTTPError as error:
            self._fail(place, error)
            raise
        self._ever_reached, self._unreachable = True, None
        if response.status_code == 429 or response.status_code >= 500:
            wait = response.headers.get("Retry-After", "0")
            if not wait.isdigit() or int(wait) > _ANSWER:
                self.give_up()
                raise ConnectionError(f"The Hub asks to wait {wait} seconds for {place}; {_TRY_AGAIN}.")
            self._fail(place, f"status {response.status_code}")
        else:
            self._first_failure = -float("inf")
        response.stream = _Timed(response.stream, place, self)
        return response

    def close(self) -> None:
        self._transport.close()

    def give_up(self) -> None:
        """Let what is asked for next fail at once, for there are callers that go on without an answer."""
        self._last_failure = time.monotonic()
        self._first_failure = self._last_failure - 2 * _TROUBLE

    def _troubled(self) -> bool:
        """Whether failures have gone on for long, the last of them just now."""
        recent = time.monotonic() - self._last_failure < _TROUBLE
        return recent and self._last_failure - self._first_failure > _TROUBLE

    def _fail(self, place: str, reason: object) -> None:
        now = time.monotonic()
        if now - self._last_failure > _TROUBLE or self._first_failure == -float("inf"):
            self._first_failure = now - _ANSWER
        self._last_failure = now
        logger.warning("Waiting for the Hub: %s (%s).", place, reason)
        if self._troubled():
            raise ConnectionError(f"The Hub does not answer for {place} ({reason}); {_TRY_AGAIN}.")


class _Timed(_HTTPX.SyncByteStream):
    """The bytes of an answer, as long as they come fast enough."""

    def __init__(self, stream: Any, place: str, transport: _Impatient):
        self._stream, self._place, self._transport = stream, place, transport

    def __iter__(self) -> Iterator[bytes]:
        started, received = time.monotonic(), 0
        for content in self._stream:
            yield content
            received += len(content)
            seconds = time.monotonic() - started
            if seconds > _TROUBLE and received < _SLOWEST * seconds:
                self._transport.give_up()
                raise ConnectionError(
                    f"The Hub sent {received} bytes of {self._place} in {seconds:.0f} seconds; {_TRY_AGAIN}."
                )

    def close(self) -> None:
        self._stream.close()
