"""A Qdrant server: calls that are tried again, and errors that say what to do."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Sequence
from typing import Any

# Environment variable of the server's key.
API_KEY = "QDRANT_API_KEY"
# Collections say what they hold since then.
OLDEST = (1, 16)
TIMEOUT = 60  # seconds
# Seconds before a call is tried again.
PAUSES = (1.0, 4.0, 16.0)
PASSING = (408, 429, 500, 502, 503, 504)


def import_qdrant() -> Any:
    """The client, which not everybody needs.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import qdrant_client
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"An index on a server needs the package '{error.name}': "
            "pip install 'stellar-plugin[server]'",
            name=error.name,
        ) from error
    return qdrant_client


def new_client(url: str) -> Any:
    """A client of the server at a URL."""
    return import_qdrant().QdrantClient(
        url=url,
        api_key=os.environ.get(API_KEY),
        timeout=TIMEOUT,
        check_compatibility=False,  # `QdrantServer` does, where errors are shown
    )


class QdrantServer:
    """A server that holds collections.

    Args:
        url:
            Where it is, "http://host:6333". Its key is the environment variable
            QDRANT_API_KEY, where it asks for one.

    Raises:
        ModuleNotFoundError: If the client is not installed.
        ValueError: If the URL is none.
        OSError: If the server cannot be reached.
        RuntimeError: If the server is too old, or too far from the client.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"A server is named by its URL, --server http://host:6333, got '{url}'."
            )
        self._client = new_client(url)
        # At once: who mistypes the URL shall not wait.
        _check_versions(url, self._call("info", ()).version)

    def __call__(self, method: str, **arguments: Any) -> Any:
        """Calls a method of the client; what may pass is tried again.

        Only calls that may happen twice.

        Raises:
            OSError: If the server cannot be reached.
            RuntimeError: If it refuses.
        """
        return self._call(method, PAUSES, **arguments)

    def _call(self, method: str, pauses: Sequence[float], **arguments: Any) -> Any:
        for pause in (*pauses, None):
            try:
                return getattr(self._client, method)(**arguments)
            except _api_errors() as error:
                if pause is None or not _may_pass(error):
                    raise self._told(error) from error
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _told(self, error: Any) -> Exception:
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            return RuntimeError(
                f"The server at '{self.url}' asks for a key that may do this: set the "
                f"environment variable {API_KEY}."
            )
        if status is not None:
            return RuntimeError(f"The server at '{self.url}' refuses: {error}")
        if _may_pass(error):
            return ConnectionError(
                f"The server at '{self.url}' does not answer "
                f"({getattr(error, 'source', error)}): does it run, and is --server "
                "its URL? Run the same command again then: what was written stays."
            )
        return RuntimeError(
            f"'{self.url}' answers as no Qdrant server does that the client "
            f"{_client_version()} knows ({getattr(error, 'source', error)})."
        )


def _api_errors() -> tuple[type[Exception], ...]:
    from qdrant_client.common.client_exceptions import QdrantException
    from qdrant_client.http.exceptions import ApiException

    return ApiException, QdrantException


def _may_pass(error: Any) -> bool:
    import httpx
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse

    if isinstance(error, ResourceExhaustedResponse):
        return True
    source = getattr(error, "source", None)
    status = getattr(error, "status_code", None)
    return isinstance(source, httpx.TransportError) or status in PASSING


def _client_version() -> str:
    return importlib.metadata.version("qdrant-client")


def _check_versions(url: str, version: str) -> None:
    from qdrant_client.common.version_check import is_compatible, parse_version

    found = parse_version(version)
    if (found.major, found.minor) < OLDEST:
        raise RuntimeError(
            f"The server at '{url}' is Qdrant {version}: an index needs "
            f"{OLDEST[0]}.{OLDEST[1]} or newer."
        )
    if not is_compatible(_client_version(), version):
        raise RuntimeError(
            f"The server at '{url}' is Qdrant {version} and the client is "
            f"{_client_version()}, which may differ by one minor version: pip install "
            f"'qdrant-client=={found.major}.{found.minor}.*'"
        )
