"""Whether an archive may be loaded: judged by a policy, or by what is dangerous in any case.

Policies and scans are imported when there is something to judge, for the sake of commands that
mostly find nothing to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from marwright.errors import UsageError
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from marwright.archive.policy import Policy

__all__ = ["admit", "find_policy", "POLICY_NAME", "read_policy"]

POLICY_NAME = "marwright-policy.yaml"
"""Of the file in a store that is obeyed without being asked for."""


def admit(path: Path, policy: Policy | None, *, shown: Path | None = None) -> None:
    """Refuse an archive that the policy does not bear, or that is dangerous where there is none.

    `shown` is what errors call it, where `path` is a copy.

    Raises:
        ArchiveError: it says why.
    """
    from marwright.archive.checks import scan
    from marwright.archive.checks.findings import refuse

    refuse(scan(path) if policy is None else policy.judge(path), shown or path)


def find_policy(store: Path, given: Policy | None = None) -> Policy | None:
    """Return the policy for a store: its own file's, or the one given where it has none.

    Raises:
        UsageError: there are two, and they differ.
        ArchiveError: the store's is broken.
    """
    path = store / POLICY_NAME
    with translate_os_errors(f"read {path}"):
        if not path.exists() and not path.is_symlink():
            return given
    own = read_policy(path)
    if given is not None and given != own:
        raise UsageError(
            "there are two policies for one store",
            found=f"{path} and the one given",
            remedy="change the store's own, or remove it",
        )
    return own


def read_policy(path: Path) -> Policy:
    """Read a policy; raises what Policy.read raises."""
    from marwright.archive.policy import Policy

    return Policy.read(path)
