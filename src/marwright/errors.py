"""The one family of errors; each says what was expected, what was found, and what to do next.

MarwrightError                  every error a user can cause; exit status 1
├── UsageError                  a call or command line that cannot be meant; exit status 2
├── StorageError                a file or folder cannot be written or read: disk, permissions
├── DataError                   a data set cannot be used
├── RunError                    a run folder is missing or broken
├── ExportError                 a network cannot be written in some form, or not to the same answers
├── ConfigurationError          a deploy.yaml or config.properties cannot be used
├── ArchiveError                an archive is missing or broken
│   └── HandlerError            a handler that no worker could load
├── ReleaseError                a release cannot be made, or went back
├── ServerError                 the server process
│   ├── JavaError               no Java 17 or newer
│   ├── PortTakenError          another process listens where the server should
│   ├── ServerDiedError         the process ended by itself
│   ├── NotReadyError           the deadline passed before every model had its workers
│   └── ModelLoadError          a worker ended while loading; carries the worker's own traceback
└── ClientError                 talking to a server
    ├── NoServerError           no running server is known here
    ├── ConnectionFailedError   no answer: refused, reset, or not HTTP
    ├── RequestTimeoutError     no answer in time
    └── AnswerError             an answer with an error status
        ├── TokenRejectedError  the token is wrong or has expired
        ├── ModelNotFoundError  no such model, or no such version of it
        ├── ConflictError       the server's state forbids it: already registered, default version
        ├── InputRejectedError  the handler refused this input (4xx)
        ├── WorkerLostError     the worker that held the request died, or was scaled away
        └── OverloadedError     503 or 429: the queue is full, or there are no workers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AnswerError",
    "ArchiveError",
    "ClientError",
    "ConfigurationError",
    "ConflictError",
    "ConnectionFailedError",
    "DataError",
    "ExportError",
    "HandlerError",
    "InputRejectedError",
    "JavaError",
    "MarwrightError",
    "ModelLoadError",
    "ModelNotFoundError",
    "NoServerError",
    "NotReadyError",
    "OverloadedError",
    "PortTakenError",
    "ReleaseError",
    "RequestTimeoutError",
    "RunError",
    "ServerDiedError",
    "ServerError",
    "StorageError",
    "TokenRejectedError",
    "UsageError",
    "WorkerLostError",
]


class MarwrightError(Exception):
    """An error a user can cause, and can mend by reading it."""

    exit_status = 1

    def __init__(
        self,
        message: str,
        *,
        expected: str = "",
        found: str = "",
        remedy: str = "",
        detail: str = "",
    ) -> None:
        self.message = message
        self.expected = expected
        self.found = found
        self.remedy = remedy
        self.detail = detail
        """Several lines that belong under the message, such as a worker's traceback."""
        super().__init__(message)

    def __str__(self) -> str:
        """Return the one line a user reads: message, expected, found, what to do."""
        facts = [f"expected {self.expected}"] if self.expected else []
        facts += [f"found {self.found}"] if self.found else []
        line = self.message + (": " + ", ".join(facts) if facts else "")
        return f"{line}; {self.remedy}" if self.remedy else line

    def to_json(self) -> dict[str, Any]:
        """Return the error as `--json` prints it."""
        fields = {
            "error": type(self).__name__,
            "message": self.message,
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
            "detail": self.detail,
        }
        return {key: value for key, value in fields.items() if value}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Return the error that `to_json` told of, as one of this class.

        Raises:
            KeyError, TypeError: it is nothing of ours.
        """
        keys = ("expected", "found", "remedy", "detail")
        return cls(said["message"], **{key: said[key] for key in keys if key in said})


class UsageError(MarwrightError, ValueError):
    """A call or a command line that cannot be meant."""

    exit_status = 2


class StorageError(MarwrightError, OSError):
    """A file or folder cannot be written or read."""


class DataError(MarwrightError, ValueError):
    """A data set cannot be used."""


class RunError(MarwrightError, ValueError):
    """A run folder is missing or broken."""


class ExportError(MarwrightError, ValueError):
    """A network cannot be written in some form, or answers differently once it is."""


class ConfigurationError(MarwrightError, ValueError):
    """A deploy.yaml or config.properties cannot be used; `detail` lists all that is wrong."""


class ArchiveError(MarwrightError, ValueError):
    """An archive is missing or broken."""


class HandlerError(ArchiveError):
    """A handler that no worker could load."""


class ReleaseError(MarwrightError):
    """A release cannot be made, or a gate has failed and it went back."""


class ServerError(MarwrightError, RuntimeError):
    """The server process could not do what was asked."""


class JavaError(ServerError):
    """There is no Java that can run TorchServe."""


class PortTakenError(ServerError):
    """Another process listens where the server should."""


class ServerDiedError(ServerError):
    """The server process ended by itself."""


class NotReadyError(ServerError, TimeoutError):
    """The deadline passed before every model had its workers."""


class ModelLoadError(ServerError):
    """A worker ended while it loaded a model; `detail` is the worker's own traceback."""


class ClientError(MarwrightError):
    """Talking to a server failed."""


class NoServerError(ClientError, LookupError):
    """No running server is known here."""


class ConnectionFailedError(ClientError, ConnectionError):
    """The request got no answer: refused, reset, or not HTTP."""


class RequestTimeoutError(ClientError, TimeoutError):
    """The request got no answer in time."""


class AnswerError(ClientError):
    """The server answered with an error status."""

    def __init__(
        self, message: str, *, status: int, body: bytes = b"", remedy: str = "", detail: str = ""
    ) -> None:
        super().__init__(message, remedy=remedy, detail=detail)
        self.status = status
        """HTTP status code."""
        self.body = body
        """The answer's body as it came."""

    def to_json(self) -> dict[str, Any]:
        """Return the error as `--json` prints it, with the HTTP status."""
        return {**super().to_json(), "status": self.status}


class TokenRejectedError(AnswerError, PermissionError):
    """The token is wrong, has expired, or was not sent."""


class ModelNotFoundError(AnswerError, LookupError):
    """There is no such model, or no such version of it."""


class ConflictError(AnswerError):
    """The server's state forbids it."""


class InputRejectedError(AnswerError, ValueError):
    """The handler refused this input."""


class WorkerLostError(AnswerError):
    """The worker that held the request died, or was scaled away; the input is not to blame."""


class OverloadedError(AnswerError):
    """The server has no room or no worker for the request now."""
