"""Whether a model file answers like the network it was made from."""

from __future__ import annotations

import torch

from marwright.errors import ExportError

from .result import Parity

__all__ = ["check_parity"]

TOLERANCE = 1e-3
"""Of a float file's logits, as a share of the largest logit: other kernels round otherwise."""
AGREEMENT = 0.9
"""Share of classes that a quantised file may not fall below."""


def check_parity(
    reference: torch.Tensor, answers: torch.Tensor, labels: torch.Tensor, *, quantised: bool
) -> Parity:
    """Compare a file's (N, classes) logits with the network's own, and refuse what is too far.

    The answers have to come from a process that loaded the file afresh: some forms answer well
    where they were made and wrongly once they are loaded, without any error.

    Raises:
        ExportError: another shape, no numbers, one answer for all inputs, or too far away.
    """
    if answers.shape != reference.shape:
        raise _refuse("of another shape", expected=list(reference.shape), found=list(answers.shape))
    broken = int((~answers.isfinite()).any(dim=1).sum())
    if broken:
        raise _refuse("that are no numbers", found=f"{broken} of {len(answers)} rows")
    _check_variety(reference, answers)
    difference = (answers.double() - reference.double()).abs()
    same = answers.argmax(1) == reference.argmax(1)
    parity = Parity(
        worst=difference.max().item(),
        mean=difference.mean().item(),
        agreement=same.double().mean().item(),
    )
    if quantised and parity.agreement < AGREEMENT:
        raise _refuse(
            "of other classes than the network's",
            expected=f"{AGREEMENT:.0%} or more alike",
            found=f"{parity.agreement:.1%}, accuracy {_compare(reference, answers, labels)}",
        )
    limit = TOLERANCE * reference.abs().max().item()
    if not quantised and parity.worst > limit:
        raise _refuse(
            "too far from the network's",
            expected=f"a difference of {limit:.3g} at most ({TOLERANCE:g} of the largest logit)",
            found=f"{parity.worst:.3g}, accuracy {_compare(reference, answers, labels)}",
        )
    return parity


def _check_variety(reference: torch.Tensor, answers: torch.Tensor) -> None:
    """Refuse one answer to everything: what a file answers whose weights were lost."""
    alike = len(answers) > 1 and bool((answers == answers[0]).all())
    if alike and not bool((reference == reference[0]).all()):
        raise _refuse(
            "that are the same for every input",
            expected="logits that depend on the input",
            found=f"{len(answers)} equal rows: the file has lost weights",
        )


def _compare(reference: torch.Tensor, answers: torch.Tensor, labels: torch.Tensor) -> str:
    before, after = (
        (logits.argmax(1) == labels).double().mean() for logits in (reference, answers)
    )
    return f"{before:.1%} before and {after:.1%} after"


def _refuse(what: str, *, expected: object = "", found: object) -> ExportError:
    return ExportError(
        f"the model file gives answers {what}",
        expected=str(expected),
        found=str(found),
        remedy="leave this variant out, or choose another backend",
    )
