"""`marwright sign`: a signature beside an archive."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from marwright.archive.signature import Signature

__all__ = ["sign"]


def sign(
    archive: Annotated[
        Path | None, typer.Argument(help="A .mar or .tar.gz file, or a folder.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="A private key: PEM, elliptic curve, best with a password.")
    ] = None,
    password: Annotated[
        str | None,
        typer.Option(
            envvar="MARWRIGHT_KEY_PASSWORD",
            help="The key's; better in that variable: others see a command line.",
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="The certificate for that key, which names its owner.")
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option(help="Certificates between that one and a root; may be repeated."),
    ] = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="Sign in your own name through sigstore.dev.")
    ] = False,
    identity_token: Annotated[
        str | None,
        typer.Option(
            envvar="SIGSTORE_IDENTITY_TOKEN",
            help="For --sigstore; else a CI job's token, or the browser.",
        ),
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option(help="Make this folder, with a new private.pem and its public.pem."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign an archive in the OpenSSF model signing format; the signature stands beside it.

    `marwright verify` and `model_signing verify` both accept it. Signing needs
    `pip install 'marwright[sign]'`.
    """
    from marwright.archive.keys import is_exposed, make_key_pair
    from marwright.errors import UsageError

    if new_key is not None:
        if archive or key or sigstore:
            raise UsageError("--new-key goes alone", remedy="sign with the key once it is there")
        private, public = make_key_pair(new_key, password=password)
        _print({"private key": private, "public key": public}, as_json=as_json)
        return
    if archive is None:
        raise UsageError("sign needs an archive, or --new-key")
    _check_options(key, certificate, chain, sigstore=sigstore)
    if key is not None and is_exposed(key):
        say(f"warning: others than you may read {key}: chmod 600 {key}")
    _refuse_altered(archive)
    signature = _sign(archive, key, password, certificate, chain or [], identity_token)
    facts = {"archive": archive, "signature": signature.path, "signer": signature.signer}
    _print(facts, as_json=as_json)


def _check_options(
    key: Path | None, certificate: Path | None, chain: list[Path] | None, *, sigstore: bool
) -> None:
    from marwright.errors import UsageError

    if (key is None) == (not sigstore):
        raise UsageError(
            "sign needs --key or --sigstore",
            found="both" if sigstore else "neither",
            remedy="marwright sign --new-key FOLDER makes a key",
        )
    if certificate and key is None:
        raise UsageError("--certificate goes with --key")
    if chain and certificate is None:
        raise UsageError("--chain goes with --certificate")


def _refuse_altered(archive: Path) -> None:
    """Nobody shall vouch for an archive that is damaged."""
    from marwright.archive import Archive
    from marwright.archive.checks.findings import refuse
    from marwright.archive.checks.integrity import verify_digests

    with Archive.open(archive) as opened:
        refuse(verify_digests(opened), archive)


def _sign(
    archive: Path,
    key: Path | None,
    password: str | None,
    certificate: Path | None,
    chain: list[Path],
    identity_token: str | None,
) -> Signature:
    from marwright.archive import signing

    if key is None:
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # each try without a network
        return signing.sign_with_sigstore(archive, identity_token=identity_token)
    if certificate is None:
        return signing.sign_with_key(archive, key=key, password=password)
    return signing.sign_with_certificate(
        archive, key=key, certificate=certificate, chain=chain, password=password
    )


def _print(facts: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        print_table(list(facts), [list(facts.values())])
