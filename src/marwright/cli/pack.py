"""`marwright pack`: a run, a spec, or torch-model-archiver's arguments become an archive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand

from marwright.cli.options import Json, Samples, Trial, TrialSeconds
from marwright.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from marwright.archive import Packed
    from marwright.archive.archiver import ArchiveFormat, Runtime
    from marwright.archive.pack import Preflight

__all__ = ["pack", "PackCommand"]

ARCHIVER_OPTIONS = (
    "--archive-format",
    "--config-file",
    "--export-path",
    "--extra-files",
    "--force",
    "--handler",
    "--help",
    "--model-file",
    "--model-name",
    "--requirements-file",
    "--runtime",
    "--serialized-file",
    "--version",
)


class PackCommand(TyperCommand):
    """Takes torch-model-archiver's options also cut short, as argparse does: `--extra a.txt`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell options out before they are parsed."""
        return super().parse_args(ctx, [self._spell_out(arg) for arg in args])

    def _spell_out(self, arg: str) -> str:
        name, equals, value = arg.partition("=")
        own = {option for parameter in self.params for option in parameter.opts}
        if not name.startswith("--") or len(name) < 3 or name in own:
            return arg
        meant = [option for option in ARCHIVER_OPTIONS if option.startswith(name)]
        return f"{meant[0]}{equals}{value}" if len(meant) == 1 else arg


COMMAND_CLASS = PackCommand
"""What main.py makes the command of."""


def pack(
    source: Annotated[
        Path | None,
        typer.Argument(help="A run folder or a model.yaml; or name the files with the options."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option("--model-name", "--name", help="Model name; it becomes part of URLs."),
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", "-v", help="Model version; 1.0 for a run.")
    ] = None,
    handler: Annotated[
        str | None,
        typer.Option(
            help="A handler file, or a name: with a run one of ours, else TorchServe's own."
        ),
    ] = None,
    serialized_file: Annotated[
        str | None, typer.Option(help="The weights: .pt, .pth, .onnx.")
    ] = None,
    model_file: Annotated[
        str | None, typer.Option(help="The Python file with the network, for a state dict.")
    ] = None,
    extra_files: Annotated[
        str | None, typer.Option(help="Further files, folders and wildcards, comma-separated.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="python, python3 or LSP.")] = "python",
    export_path: Annotated[
        Path | None,
        typer.Option(
            "--export-path",
            "--out",
            help="The folder to write to; for a run or a spec also the file itself.",
        ),
    ] = None,
    archive_format: Annotated[
        str, typer.Option(help="default, zip-store, tgz or no-archive.")
    ] = "default",
    requirements_file: Annotated[
        str | None, typer.Option("--requirements-file", "-r", help="A requirements.txt.")
    ] = None,
    config_file: Annotated[
        str | None, typer.Option("--config-file", "-c", help="A model-config.yaml.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the archive.")] = False,
    as_trained: Annotated[
        bool,
        typer.Option(
            "--as-trained", help="A run's own model, not the one that `marwright optimize` chose."
        ),
    ] = False,
    preflight: Trial = True,
    sample: Samples = None,
    timeout: TrialSeconds = 120.0,
    as_json: Json = False,
) -> None:
    """Pack a run, a model.yaml, or what torch-model-archiver takes, into an archive.

    Every option of torch-model-archiver 0.12 has its name, meaning and default. The same inputs
    give the same bytes, and the archive runs on a stock TorchServe.
    """
    from marwright.archive.pack import Preflight

    trial = Preflight(samples=tuple(sample or ()), timeout=timeout) if preflight else None
    options = {
        "--serialized-file": serialized_file,
        "--model-file": model_file,
        "--extra-files": extra_files,
        "--requirements-file": requirements_file,
    }
    _check_choice("--runtime", runtime, ("LSP", "python", "python3"))
    _check_choice("--archive-format", archive_format, tuple(FORMAT_NAMES))
    if source is not None:
        _refuse_options(options, runtime, archive_format)
        packed = _pack_source(
            source,
            name=model_name,
            version=version,
            handler=handler,
            config_file=config_file,
            as_trained=as_trained,
            out=export_path,
            force=force,
            preflight=trial,
        )
    else:
        packed = _pack_arguments(
            {"--model-name": model_name, "--version": version, "--handler": handler},
            {**options, "--config-file": config_file},
            runtime=runtime,
            archive_format=archive_format,
            export_path=export_path,
            force=force,
            preflight=trial,
        )
    _print(packed, as_json=as_json, digest=source is not None)


FORMAT_NAMES = ("default", "no-archive", "tgz", "zip-store")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    from marwright.errors import UsageError

    if value not in choices:
        raise UsageError(f"{option} {value!r}", expected=f"one of {', '.join(choices)}")


def _refuse_options(options: dict[str, str | None], runtime: str, archive_format: str) -> None:
    from marwright.errors import UsageError

    given = [name for name, value in options.items() if value is not None]
    given += ["--runtime"] if runtime != "python" else []
    given += ["--archive-format"] if archive_format != "default" else []
    if given:
        raise UsageError(
            f"{given[0]} does not go with a run or a spec",
            remedy="name it in a model.yaml, or leave the run out and name all files",
        )


def _pack_source(
    source: Path,
    *,
    name: str | None,
    version: str | None,
    handler: str | None,
    config_file: str | None,
    as_trained: bool,
    out: Path | None,
    force: bool,
    preflight: Preflight | None,
) -> Packed:
    from marwright.archive import ModelSettings, Run, Spec, pack_run, pack_spec
    from marwright.errors import UsageError

    out = out or Path("model_store")
    if source.suffix in (".yaml", ".yml") and not source.is_dir():
        if config_file or handler:
            raise UsageError(
                "--config-file and --handler go with a run", remedy=f"write them into {source}"
            )
        changes = {"name": name, "version": version}
        spec = Spec.read(source).override(
            **{key: value for key, value in changes.items() if value is not None}
        )
        return pack_spec(
            spec, folder=source.parent, path=source, out=out, force=force, preflight=preflight
        )
    settings = ModelSettings.read(Path(config_file)) if config_file else None
    return pack_run(
        Run.open(source),
        out=out,
        name=name or "cnn",
        version=version or "1.0",
        handler=handler,
        optimised=not as_trained,
        settings=settings.model_dump(exclude_none=True) if settings else None,
        force=force,
        preflight=preflight,
    )


def _pack_arguments(
    required: dict[str, str | None],
    optional: dict[str, str | None],
    *,
    runtime: str,
    archive_format: str,
    export_path: Path | None,
    force: bool,
    preflight: Preflight | None,
) -> Packed:
    from marwright.archive import Arguments, pack_arguments
    from marwright.errors import UsageError

    missing = [name for name, value in required.items() if value is None]
    if missing:
        raise UsageError(
            f"pack needs {', '.join(missing)}",
            expected="a run folder, a model.yaml, or torch-model-archiver's options",
        )
    keys = {name.removeprefix("--").replace("-", "_"): value for name, value in optional.items()}
    arguments = Arguments(
        model_name=required["--model-name"] or "",
        version=required["--version"] or "",
        handler=required["--handler"] or "",
        runtime=cast("Runtime", runtime),
        archive_format=cast("ArchiveFormat", archive_format),
        export_path=str(export_path) if export_path else ".",
        **keys,
    )
    return pack_arguments(arguments, force=force, preflight=preflight)


def _print(packed: Packed, *, as_json: bool, digest: bool) -> None:
    """Print what was written; the file's digest only where nobody waits for a drop-in's speed."""
    if as_json:
        print_json(packed.to_json())
        return
    for finding in packed.findings:
        say(str(finding))
    facts = {
        "archive": packed.path,
        "model": packed.name,
        "version": packed.version,
        "bytes": f"{packed.size_bytes:,}",
        **({"sha256": packed.sha256} if digest else {"root digest": packed.root_digest}),
    }
    print_table(list(facts), [list(facts.values())])
