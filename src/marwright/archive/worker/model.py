"""A model: an archive loaded in this process as a TorchServe worker loads it."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from marwright.archive.worker.answer import Answer
from marwright.archive.worker.form import FormError
from marwright.archive.worker.frontend import TOO_LARGE, make_error
from marwright.archive.worker.isolation import Isolation
from marwright.archive.worker.loader import Assignment
from marwright.archive.worker.profile import Profile
from marwright.archive.worker.request import Message, Request
from marwright.archive.worker.worker import Debugger, Worker
from marwright.errors import ArchiveError, HandlerError, UsageError
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from marwright.archive.reader import Archive

__all__ = ["Model"]

MAX_BYTES = 6_553_500
"""TorchServe's defaults of max_request_size and max_response_size."""
NO_GPU = -1


class Model:
    """A loaded model; use it in a `with` block.

    Example:
        with Model(Path("cnn.mar")) as model:
            print(model.predict([Path("seven.png")])[0].json())

    `source` may also be a folder with an unpacked archive, which is used in place. `handler` is a
    file that is used instead of the archive's own, where it stands. `batch_size` is what the
    handler reads in its context; None means the archive's own. `gpu` None means what TorchServe
    would choose: the first one, where there is any; NO_GPU means none. `debugger` is called with
    the traceback of what the handler raises, while its modules are in place. One call into a
    handler runs at a time, also of several models in several threads.
    """

    def __init__(
        self,
        source: Archive | Path,
        *,
        handler: Path | None = None,
        batch_size: int | None = None,
        gpu: int | None = None,
        max_request_bytes: int = MAX_BYTES,
        max_response_bytes: int = MAX_BYTES,
        debugger: Debugger | None = None,
    ) -> None:
        """Unpack, import, initialize.

        Raises:
            ArchiveError: no archive that can be unpacked, or one that only a server can run.
            HandlerError: a worker could not load it; `detail` is the handler's traceback.
        """
        self.profile: Profile | None = None
        """Set one to have the stages of each batch timed."""
        self.unpack_seconds = 0.0
        """0 for a folder."""
        self._max_request_bytes = max_request_bytes
        self._max_response_bytes = max_response_bytes
        self._debugger = debugger
        self._closed = False
        self._lock = threading.RLock()
        self._temporary = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self._temporary.close)
            with _opened(source) as archive:
                self.manifest = archive.manifest
                self.folder = self._unpack(archive)
                """The unpacked archive: the handler's model_dir."""
            own = _find_handler(handler)
            self._assignment = _assign(archive, self.folder, own, batch_size, gpu)
            roots = [own.parent, self.folder] if own else [self.folder]
            self._isolation = Isolation(roots, handler_module=self._assignment.module)
            undo.callback(self._isolation.forget)
            self._worker = self._start()
            undo.pop_all()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the handler and its modules, and remove the temporary folder."""
        with self._lock:
            self._closed = True
            self._worker.end()
            self._isolation.forget()
            self._temporary.close()

    @property
    def import_seconds(self) -> float:
        """Seconds that the handler's module and what it imports took."""
        return self._worker.import_seconds

    @property
    def initialize_seconds(self) -> float:
        """Seconds of making the handler and its `initialize`."""
        return self._worker.initialize_seconds

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files of the handler and of those modules of its own that it imported so far."""
        return self._isolation.sources

    def predict(self, inputs: Sequence[Path | bytes | Request]) -> list[Answer]:
        """Answer a batch: one call of the handler, one answer for each input, in order.

        A handler that fails is an answer, as from a server; `failure` says what went wrong. Where a
        worker would have died, the next call loads the model again, as TorchServe does.

        Raises:
            StorageError: an input cannot be read.
            HandlerError: the model died before, and could not be loaded again.
        """
        prepared = [self._prepare(Request.of(item)) for item in inputs]
        batch = {str(uuid.uuid4()): item for item in prepared if isinstance(item, Message)}
        answers = iter(self._ask(batch) if batch else ())
        return [item if isinstance(item, Answer) else next(answers) for item in prepared]

    def _unpack(self, archive: Archive) -> Path:
        if archive.container.format == "folder":
            return archive.path.resolve()
        started = time.perf_counter()
        with translate_os_errors("make a temporary folder"):
            temporary = self._temporary.enter_context(
                tempfile.TemporaryDirectory(prefix="marwright-", ignore_cleanup_errors=True)
            )
        folder = archive.extract(Path(temporary).resolve() / "model")
        self.unpack_seconds = time.perf_counter() - started
        return folder

    def _start(self) -> Worker:
        self._isolation.forget()
        return Worker(self._assignment, self._isolation, debugger=self._debugger)

    def _prepare(self, request: Request) -> Message | Answer:
        """Return what reaches the worker, or the answer that the frontend gives by itself."""
        try:
            message = request.to_message()
        except FormError as exc:
            return make_error(500, str(exc), kind="ErrorDataDecoderException")
        return TOO_LARGE if message.body_bytes > self._max_request_bytes else message

    def _ask(self, batch: Mapping[str, Message]) -> list[Answer]:
        with self._lock:
            if self._closed:
                raise UsageError("the model is closed", remedy="use it within its `with` block")
            if not self._worker.alive:
                self._worker = self._start()
            limit = self._max_response_bytes
            return self._worker.answer(batch, max_bytes=limit, profile=self.profile)


@contextlib.contextmanager
def _opened(source: Archive | Path) -> Iterator[Archive]:
    """Open a path; leave an archive that somebody else opened open."""
    from marwright.archive.reader import Archive  # which loads this module only where it is wanted

    if isinstance(source, Archive):
        yield source
    else:
        with Archive.open(source) as archive:
            yield archive


def _find_handler(handler: Path | None) -> Path | None:
    if handler is None:
        return None
    with translate_os_errors(f"read {handler}"):
        if not handler.is_file():
            raise HandlerError(f"there is no handler file {handler}")
        return handler.resolve()


def _assign(
    archive: Archive, folder: Path, handler: Path | None, batch_size: int | None, gpu: int | None
) -> Assignment:
    config = _read_config(folder, archive)
    if gpu is None:
        gpu = _choose_gpu(config)
    return Assignment(
        source=archive.path,
        folder=folder,
        name=archive.manifest.name,
        handler=str(handler) if handler else archive.manifest.handler,
        gpu=None if gpu == NO_GPU else gpu,
        batch_size=batch_size or _read_batch_size(config),
    )


def _read_config(folder: Path, archive: Archive) -> Mapping[str, Any]:
    """Read model-config.yaml; a broken one is TorchServe's to refuse."""
    config = None
    if name := archive.manifest.config_file:
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            config = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
    config = config if isinstance(config, dict) else {}
    if config.get("asyncCommunication"):
        raise ArchiveError(
            f"{archive.path} answers asynchronously, which only a server can",
            remedy="serve it, or pack it without asyncCommunication",
        )
    return config


def _read_batch_size(config: Mapping[str, Any]) -> int:
    value = config.get("batchSize", 1)
    return value if isinstance(value, int) and value > 0 else 1


def _choose_gpu(config: Mapping[str, Any]) -> int:
    if str(config.get("deviceType", "")).lower() == "cpu" or not torch.cuda.is_available():
        return NO_GPU
    match config.get("deviceIds"):
        case [int(first), *_]:
            return first
    return 0
