"""TorchServe's own model loader, with a clock, and without hiding a handler's ImportError."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ts
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import TsModelLoader

__all__ = ["Assignment", "load_service", "Loaded"]


class Assignment(NamedTuple):
    """What the frontend tells a worker to load."""

    source: Path
    """The archive, as errors name it."""
    folder: Path
    """The unpacked archive."""
    name: str
    handler: str
    """`file.py`, `file.py:function`, or the name of one of TorchServe's own."""
    gpu: int | None
    batch_size: int

    @property
    def module(self) -> str:
        """The top-level name under which the handler is imported."""
        return self.handler.split(":")[0].removesuffix(".py").split("/")[-1]


class Loaded(NamedTuple):
    """A loaded handler in TorchServe's service, with what the loading took."""

    service: Any
    """ts.service.Service."""
    import_seconds: float
    initialize_seconds: float


def load_service(assignment: Assignment) -> Loaded:
    """Import the handler and call its initialize, as ts/model_service_worker.py does.

    Raises:
        BaseException: whatever the handler raises; TorchServe's ValueError for no entry point.
    """
    loader = TsModelLoader()
    importer = _Importer(loader)
    started = time.perf_counter()
    try:
        service = loader.load(
            assignment.name,
            str(assignment.folder),
            assignment.handler,
            assignment.gpu,
            assignment.batch_size,
            metrics_cache=_make_metrics(assignment.name),
        )
    except _Carrier as carrier:
        raise carrier.error from None
    seconds = time.perf_counter() - started
    return Loaded(service, importer.seconds, seconds - importer.seconds)


class _Importer:
    """Stands before the two methods by which TorchServe's loader imports a handler."""

    def __init__(self, loader: Any) -> None:
        self.seconds = 0.0
        self._import_file = loader._load_handler_file
        self._import_stock = loader._load_default_handler
        loader._load_handler_file = self.import_file
        loader._load_default_handler = self.import_stock

    def import_file(self, handler: str) -> Any:
        """Return the handler's module and the name of a function in it, or None."""
        try:
            return self._timed(self._import_file, handler)
        except ImportError as exc:
            if handler.split(":")[0].endswith(".py"):
                raise _Carrier(exc) from exc
            raise

    def import_stock(self, handler: str) -> Any:
        """Return the module of one of TorchServe's own handlers."""
        try:
            return self._timed(self._import_stock, handler)
        except ImportError as exc:
            exc.__suppress_context__ = True  # that no file has the stock handler's name
            raise

    def _timed(self, load: Callable[[str], Any], handler: str) -> Any:
        started = time.perf_counter()
        try:
            return load(handler)
        finally:
            self.seconds += time.perf_counter() - started


class _Carrier(Exception):
    """Carries an ImportError past TorchServe, which would take it for a stock handler's name."""

    def __init__(self, error: ImportError) -> None:
        self.error = error


def _make_metrics(model: str) -> Any:
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = model
    return metrics
