"""`marwright pack`: a run becomes an archive."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table

__all__ = ["pack"]


def pack(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder; or name the files below.")
    ] = None,
    name: Annotated[str, typer.Option(help="Model name; it becomes part of URLs.")] = "cnn",
    version: Annotated[str, typer.Option(help="Model version.")] = "1.0",
    handler: Annotated[
        str, typer.Option(help="A handler file, or the name of one of ours.")
    ] = "image_classifier",
    out: Annotated[Path, typer.Option(help="The store, or the .mar file itself.")] = Path(
        "model_store"
    ),
    serialized_file: Annotated[
        Path | None, typer.Option(help="Without a run: the TorchScript file.")
    ] = None,
    extra_file: Annotated[
        list[Path] | None, typer.Option(help="Without a run: another file; may be repeated.")
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option(help="A model-config.yaml: workers, batch size, handler settings."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the archive.")] = False,
    as_json: Json = False,
) -> None:
    """Pack a run, or explicit files, into a .mar archive.

    The archive runs on a stock TorchServe; the same inputs give the same bytes.
    """
    from marwright.archive import ModelSettings, Run, pack_files, pack_run
    from marwright.errors import UsageError

    if (run is None) == (serialized_file is None):
        raise UsageError(
            "pack needs a run, or --serialized-file", found="both" if run else "neither"
        )
    settings = ModelSettings.read(config_file) if config_file else None
    if run is not None:
        if extra_file:
            raise UsageError("--extra-file goes with --serialized-file, not with a run")
        packed = pack_run(
            Run.open(run),
            out=out,
            name=name,
            version=version,
            handler=handler,
            settings=settings.model_dump(exclude_none=True) if settings else None,
            force=force,
        )
    else:
        assert serialized_file is not None  # one of the two is given: checked above
        packed = pack_files(
            name=name,
            version=version,
            handler=handler,
            serialized_file=serialized_file,
            extra_files=extra_file or (),
            settings=settings,
            out=out,
            force=force,
        )
    if as_json:
        print_json(asdict(packed))
        return
    print_table(
        ["archive", "model", "version", "bytes", "sha256"],
        [[packed.path, packed.name, packed.version, f"{packed.size_bytes:,}", packed.sha256]],
    )
