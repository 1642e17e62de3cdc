"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from marwright.errors import MarwrightError, StorageError

__all__ = ["hold_path", "lock_file", "translate_os_errors", "write_file", "write_folder"]


@contextlib.contextmanager
def translate_os_errors(doing: str) -> Iterator[None]:
    """Raise StorageError for an OSError: full disk, read-only folder, missing rights.

    `doing` completes the sentence "cannot ...": "write the archive cnn.mar".
    """
    try:
        yield
    except MarwrightError:  # some of ours are OSErrors too, such as a timeout
        raise
    except OSError as exc:
        # A temporary file's name would only puzzle; `doing` names the one that was meant.
        shown = exc.filename and not Path(str(exc.filename)).name.startswith(".")
        where = f" ({exc.filename})" if shown else ""
        raise StorageError(
            f"cannot {doing}",
            found=f"{exc.strerror or exc}{where}",
            remedy="free space, or choose a folder you may write to"
            if not doing.startswith("read")
            else "check that it is there, of the right kind, and yours to read",
        ) from exc


@contextlib.contextmanager
def write_file(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yield a temporary file beside `path` that takes its name once the block ends well.

    Readers see the old file or the new one, never half of one; a failure leaves the old as it was.
    `durable` waits until the disk has the bytes, so that this holds after a power failure too.
    """
    with translate_os_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_read_umask())  # mkstemp's 0600 is not what others expect
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def write_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its name once the block ends well.

    Raises StorageError when `path` exists and `replace` is false, before anything is written.
    """
    with translate_os_errors(f"write {path}"):
        if path.exists() and not replace:
            raise StorageError(
                f"{path} exists", remedy="choose another folder, or pass --force to replace it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_read_umask())
            if path.exists():
                # Two renames, the old one first: POSIX renames no folder onto a full one.
                with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as old:
                    kept = path.rename(Path(old) / path.name)
                    try:
                        temporary.rename(path)
                    except BaseException:
                        kept.rename(path)
                        raise
            else:
                temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def hold_path(path: Path) -> Iterator[None]:
    """Keep a file or folder for this process while the block runs; it need not exist yet.

    The kernel lets go of the lock with the process, however that ends.

    Raises:
        StorageError: another process holds it.
    """
    lock = path.with_name(f".{path.name}.lock")
    with translate_os_errors(f"write {path}"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = _lock(lock, path)
    with stream:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _lock(lock: Path, path: Path) -> IO[bytes]:
    """Return the lock's file, held, with this process's number in it."""
    stream = lock_file(lock)
    if stream is None:
        holder = lock.read_text(errors="replace") if lock.exists() else ""
        raise StorageError(
            f"{path} is in use",
            found=f"process {holder or 'unknown'} writes it",
            remedy="wait until that has ended, or choose another folder",
        )
    try:
        stream.truncate(0)
        stream.write(str(os.getpid()).encode())
    except OSError:  # a full disk
        stream.close()
        raise
    return stream


def lock_file(path: Path) -> IO[bytes] | None:
    """Return a file, made where there is none, that no other process can lock until it is closed.

    None where another one has it. Its text stands as the last holder left it; whoever removes the
    file does so before closing it.
    """
    while True:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(path.open("a+b", buffering=0))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            # Whoever held it may have removed the file between our two calls.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                    stack.pop_all()
                    return stream


def _read_umask() -> int:
    """Return the process's umask, which the operating system only tells by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask
