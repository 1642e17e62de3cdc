"""The command `marwright`: its commands, and the one place where errors become exit statuses."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer

import marwright
from marwright.cli import (
    apply,
    check,
    config,
    demo,
    diff,
    doctor,
    export,
    extract,
    federate,
    harden,
    inspect,
    logs,
    models,
    optimize,
    pack,
    predict,
    repack,
    run,
    schema,
    serve,
    servers,
    sign,
    store,
    train,
    tune,
    verify,
)
from marwright.cli.output import print_error, say
from marwright.errors import MarwrightError

__all__ = ["app", "main"]

app = typer.Typer(
    name="marwright",
    help="Train, pack, serve and manage PyTorch models on TorchServe.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text: the same in a terminal, a pipe and the docs
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(marwright.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Train, pack, serve and manage PyTorch models on TorchServe."""


app.command("demo")(demo.run_demo)
app.command("train")(train.train)
app.command("federate")(federate.federate)
app.command("optimize")(optimize.optimize)
app.command("export")(export.export)
app.command("pack", cls=pack.PackCommand)(pack.pack)
app.command("serve")(serve.serve)
app.command("status")(servers.status)
app.command("restart")(servers.restart)
app.command("stop")(servers.stop)
app.command("apply")(apply.apply)
app.add_typer(config.app, name="config")
app.command("tune")(tune.tune)
app.command("logs")(logs.show_logs)
app.command("harden")(harden.harden)
app.command("predict")(predict.predict)
app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("diff")(diff.diff)
app.command("extract")(extract.extract)
app.command("repack")(repack.repack)
app.add_typer(store.app, name="store")
app.command("sign")(sign.sign)
app.command("check")(check.check)
app.command("verify")(verify.verify)
app.add_typer(models.app, name="models")
app.command("schema")(schema.schema)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; exit 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except SystemExit as exc:
        if exc.code == 130:
            say("interrupted")
        raise
    except MarwrightError as exc:
        print_error(exc, as_json="--json" in sys.argv)
        sys.exit(exc.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as exc:  # a mistake of ours: say so, and spare the user the traceback
        if os.environ.get("MARWRIGHT_DEBUG"):
            traceback.print_exc()
        print_error(
            MarwrightError(
                "marwright itself failed",
                found=f"{type(exc).__name__}: {exc}",
                remedy="run again with MARWRIGHT_DEBUG=1 and report the traceback",
            ),
            as_json="--json" in sys.argv,
        )
        sys.exit(1)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave through every `with` block and `finally`, as Ctrl-C does."""
    raise SystemExit(128 + number)
