"""A git work tree: the commit that a folder stands at, and the files that differ from it.

A folder may come from anywhere, and git runs what a repository's configuration names: file system
monitors, filters, hooks, transports. So git reads that configuration only to find the commit, which
runs nothing. Files are compared in a repository of our own, with no such configuration, that
borrows the other's objects and index.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from marwright.archive.digests import digest_stream

__all__ = ["WorkTree"]

GIT_SECONDS = 30.0
"""For all that git is asked about one folder; it takes some 30 ms."""
POINTER_BYTES = 1024
"""The most that a Git LFS pointer holds (git-lfs, docs/spec.md)."""
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n.*?oid sha256:([0-9a-f]{64})\n", re.DOTALL
)

# Built anew, so that neither a hook's GIT_DIR nor the user's own settings decide what is found.
_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ALLOW_PROTOCOL": "",  # nothing is fetched, whatever a partial clone lacks
    "GIT_OPTIONAL_LOCKS": "0",  # the index is read, never written
    "HOME": os.devnull,
    "LC_ALL": "C",
}
# Otherwise the owner of the files would decide whether they give the same archive. That refusal
# guards against configurations that run programs; here none does.
_ANY_OWNER = ["-c", "safe.directory=*", "-c", "safe.bareRepository=explicit"]

_log = logging.getLogger(__name__)


class _GitError(Exception):
    """Git is missing, refused, or gave no answer in time."""


@dataclass(frozen=True)
class WorkTree:
    """What git knows of a folder that stands at a commit."""

    root: Path
    commit: str
    tracked: frozenset[str]
    """Names of the commit's files, relative to the root."""
    changed: frozenset[str]
    """Names of files that hold something else now, are gone, or are only in the index."""

    @classmethod
    def find(cls, folder: Path, *, timeout: float = GIT_SECONDS) -> WorkTree | None:
        """Ask git about the work tree around a folder; `timeout` is in seconds.

        Returns None where git is missing, knows no commit there, or does not answer.
        """
        git = _Git(folder, deadline=time.monotonic() + timeout)
        try:
            answer = git.run(
                *_ANY_OWNER,
                *("rev-parse", "--path-format=absolute", "--show-object-format"),
                *("--show-toplevel", "--git-path", "index", "--git-path", "objects", "HEAD"),
            )
        except _GitError as exc:
            _log.debug("no commit is known for %s: %s", folder, exc)
            return None
        try:
            form, root, index, objects, commit, _ = os.fsdecode(answer).split("\n")
            with tempfile.TemporaryDirectory(prefix="marwright-git-") as private:
                _write_repository(Path(private), commit=commit, form=form)
                borrowed = _Git(
                    Path(root),
                    deadline=git.deadline,
                    environment={
                        "GIT_DIR": private,
                        "GIT_WORK_TREE": root,
                        "GIT_INDEX_FILE": index,
                        "GIT_OBJECT_DIRECTORY": objects,
                    },
                )
                listed = borrowed.run("ls-tree", "-r", "-z", "--name-only", commit)
                return cls(
                    root=Path(root).resolve(),
                    commit=commit,
                    tracked=frozenset(os.fsdecode(listed).split("\0")[:-1]),
                    changed=frozenset(_list_changed(borrowed)),
                )
        except (_GitError, OSError, ValueError) as exc:
            _log.warning("the commit of %s is left out: %s", folder, exc)
            return None

    def name_of(self, path: Path) -> str | None:
        """Return a file's name relative to the root; None where it lies elsewhere."""
        real = path.resolve()
        return real.relative_to(self.root).as_posix() if real.is_relative_to(self.root) else None


@dataclass(frozen=True)
class _Git:
    """Git in one folder, with one deadline for all that it is asked."""

    folder: Path
    deadline: float
    environment: Mapping[str, str] | None = None

    def run(self, *arguments: str) -> bytes:
        """Return what git prints.

        Raises:
            _GitError: it is missing, failed, or the deadline passed.
        """
        try:
            done = subprocess.run(
                ["git", "--no-pager", "-C", str(self.folder), *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=max(0.0, self.deadline - time.monotonic()),
                env={
                    "PATH": os.environ.get("PATH", os.defpath),
                    **_ENVIRONMENT,
                    **(self.environment or {}),
                },
                check=True,
            )
        except subprocess.CalledProcessError as exc:
            reason = exc.stderr.decode("utf-8", "replace").strip()
            raise _GitError(reason.splitlines()[0] if reason else "git failed") from exc
        except subprocess.TimeoutExpired as exc:
            _log.warning("git gave no answer about %s in time", self.folder)
            raise _GitError("git gave no answer in time") from exc
        except (OSError, ValueError) as exc:
            raise _GitError(f"git did not start: {exc}") from exc
        return done.stdout


def _write_repository(folder: Path, *, commit: str, form: str) -> None:
    """Make a folder a git repository that stands at a commit and has no settings but these."""
    (folder / "HEAD").write_text(f"{commit}\n", encoding="utf-8")
    (folder / "refs").mkdir()
    (folder / "config").write_text(
        "[core]\nrepositoryformatversion = 1\nfileMode = false\n"  # archives hold one mode anyway
        f"[extensions]\nobjectFormat = {form}\n",
        encoding="utf-8",
    )


def _list_changed(git: _Git) -> Iterator[str]:
    """Yield the names of tracked files that differ from the commit."""
    # git-status(1), porcelain format version 2: "1 XY sub mH mI mW hH hI path" is a change,
    # "u XY sub m1 m2 m3 mW h1 h2 h3 path" a conflict.
    options = ("-z", "--no-renames", "--untracked-files=no", "--ignore-submodules=all")
    answer = git.run("status", "--porcelain=v2", *options)
    for line in os.fsdecode(answer).split("\0")[:-1]:
        if line.startswith("u"):
            yield line.split(" ", 10)[-1]
        else:
            *_, blob, _, name = line.split(" ", 8)
            if not _is_pointer_to(git, blob, git.folder / name):
                yield name


def _is_pointer_to(git: _Git, blob: str, path: Path) -> bool:
    """Return whether a commit holds a Git LFS pointer where the file itself stands.

    LFS is a filter, so git without settings calls such a file changed once its times have changed.
    """
    if set(blob) == {"0"} or not path.is_file():  # the commit or the folder has no such file
        return False
    if int(git.run("cat-file", "-s", blob)) > POINTER_BYTES:
        return False
    pointer = _POINTER.match(git.run("cat-file", "blob", blob))
    if pointer is None:
        return False
    with path.open("rb") as stream:
        return digest_stream(stream) == pointer[1].decode()
