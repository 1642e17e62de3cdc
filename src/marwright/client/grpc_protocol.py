"""The server's gRPC protocol, read from the server: no generated code that could disagree with it.

TorchServe carries its .proto files in model-server.jar. They are compiled once for each process,
into a descriptor pool of their own: whoever has classes generated from the same files in the same
process meets no second definition.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from marwright.client.tokens import Purpose
from marwright.errors import ClientError, UsageError

if TYPE_CHECKING:
    from google.protobuf.message import Message

__all__ = ["Method", "Protocol", "read_protocol"]

FILES = ("inference.proto", "management.proto")
FOLDER = "proto/"
"""Where they lie in the jar."""
IMPORTED = ("google/rpc/status.proto",)
"""What they import and protoc does not bring along; the jar has it too."""
INSTALL = "install it: pip install 'marwright[grpc]'"


@dataclass(frozen=True)
class Method:
    """One remote procedure."""

    path: str
    """As gRPC addresses it: /package.Service/Method."""
    purpose: Purpose
    """Which of the server's two ports has it, and which token it wants."""
    request: type[Message]
    response: type[Message]
    streams_requests: bool
    streams_responses: bool


@dataclass(frozen=True)
class Protocol:
    """Every remote procedure of the inference and the management service."""

    methods: MappingProxyType[str, Method]

    def find(self, name: str) -> Method:
        """Return the method of this name.

        Raises:
            UsageError: this TorchServe has no such method.
        """
        try:
            return self.methods[name]
        except KeyError as exc:
            raise UsageError(
                f"the installed TorchServe has no gRPC method {name}",
                found=", ".join(sorted(self.methods)),
                remedy="install the server's version: pip install 'torchserve==0.12.0'",
            ) from exc


def read_protocol(jar: Path | None = None) -> Protocol:
    """Return the protocol of a model-server.jar: without one, of the TorchServe installed here.

    Raises:
        UsageError: the extra `grpc` is not installed, or there is no TorchServe.
        ClientError: the jar holds no protocol that can be compiled.
    """
    return _compile((jar or _find_jar()).resolve())


def _find_jar() -> Path:
    spec = importlib.util.find_spec("ts")
    jar = (
        Path(spec.origin).parent / "frontend" / "model-server.jar" if spec and spec.origin else None
    )
    if jar is None or not jar.is_file():
        raise UsageError(
            "there is no TorchServe here whose gRPC protocol could be read",
            remedy="pip install --no-deps 'torchserve==0.12.0', or copy "
            "ts/frontend/model-server.jar from the server and pass it as jar=PATH",
        )
    return jar


@functools.lru_cache(maxsize=4)
def _compile(jar: Path) -> Protocol:
    """Return the jar's protocol; protoc runs once for each jar and process."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as exc:
        raise UsageError("gRPC needs the package protobuf", remedy=INSTALL) from exc
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(_run_protoc(jar))
    for file in files.file:  # protoc writes what is imported before what imports it
        pool.Add(file)
    classes = message_factory.GetMessageClass
    methods = {}
    purposes: tuple[Purpose, ...] = ("inference", "management")
    for name, purpose in zip(FILES, purposes, strict=True):
        for service in pool.FindFileByName(name).services_by_name.values():
            for method in service.methods:
                methods[method.name] = Method(
                    path=f"/{service.full_name}/{method.name}",
                    purpose=purpose,
                    request=classes(method.input_type),
                    response=classes(method.output_type),
                    streams_requests=method.client_streaming,
                    streams_responses=method.server_streaming,
                )
    return Protocol(MappingProxyType(methods))


def _run_protoc(jar: Path) -> bytes:
    """Return the compiled files and all they import, as a serialised FileDescriptorSet."""
    try:
        from grpc_tools import protoc
    except ImportError as exc:
        raise UsageError("gRPC needs the package grpcio-tools", remedy=INSTALL) from exc
    with _unpack(jar) as folder, resources.as_file(resources.files("grpc_tools")) as tools:
        out = folder / "protocol.binpb"
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={folder}",
                f"--proto_path={tools / '_proto'}",
                "--include_imports",
                f"--descriptor_set_out={out}",
                *FILES,
            ]
        )
        if status:
            raise ClientError(
                f"the gRPC protocol in {jar} cannot be compiled",
                found=f"protoc's status {status}",
                remedy="take the jar of TorchServe 0.12.0",
            )
        return out.read_bytes()


@contextlib.contextmanager
def _unpack(jar: Path) -> Iterator[Path]:
    """Lay the .proto files into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="marwright-grpc-") as name:
        folder = Path(name)
        try:
            with zipfile.ZipFile(jar) as archive:
                names = {file: FOLDER + file for file in FILES} | {file: file for file in IMPORTED}
                for file, source in names.items():
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file).write_bytes(archive.read(source))
        except (OSError, zipfile.BadZipFile, KeyError) as exc:
            raise ClientError(
                f"no gRPC protocol can be read from {jar}",
                found=f"{type(exc).__name__}: {exc}",
                remedy="take the jar of TorchServe 0.12.0",
            ) from exc
        yield folder
