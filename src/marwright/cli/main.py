"""The command `marwright`: its commands, and the one place where errors become exit statuses."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer

import marwright
from marwright.cli.output import print_error, say
from marwright.errors import MarwrightError

__all__ = ["build_app", "COMMANDS", "main"]

COMMANDS = {
    "demo": "demo.run_demo",
    "train": "train.train",
    "federate": "federate.federate",
    "optimize": "optimize.optimize",
    "export": "export.export",
    "pack": "pack.pack",
    "serve": "serve.serve",
    "status": "servers.status",
    "restart": "servers.restart",
    "stop": "servers.stop",
    "apply": "apply.apply",
    "release": "release.release",
    "rollback": "release.rollback",
    "releases": "release.releases",
    "config": "config.app",
    "tune": "tune.tune",
    "logs": "logs.show_logs",
    "top": "top.top",
    "dashboard": "dashboard.dashboard",
    "monitor": "monitor.app",
    "drift": "drift.drift",
    "quality": "quality.quality",
    "feedback": "feedback.feedback",
    "harden": "harden.harden",
    "predict": "predict.predict",
    "run": "run.run",
    "inspect": "inspect.inspect",
    "diff": "diff.diff",
    "extract": "extract.extract",
    "repack": "repack.repack",
    "store": "store.app",
    "sign": "sign.sign",
    "check": "check.check",
    "verify": "verify.verify",
    "models": "models.app",
    "schema": "schema.schema",
    "doctor": "doctor.doctor",
}
"""Each command's function, or the Typer of its own commands, below marwright.cli."""


def build_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Return the command line, with some commands only: each costs some milliseconds."""
    app = typer.Typer(
        name="marwright",
        help="Train, pack, serve and manage PyTorch models on TorchServe.",
        no_args_is_help=True,
        rich_markup_mode=None,  # plain text: the same in a terminal, a pipe and the docs
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in names:
        place, _, member = COMMANDS[name].partition(".")
        module = import_module(f"marwright.cli.{place}")
        command = getattr(module, member)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name, cls=getattr(module, "COMMAND_CLASS", None))(command)
    return app


def __getattr__(name: str) -> Any:
    """Build the whole command line for who asks for `app`: tests, tools that document it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build_app()


def _choose_commands() -> Iterable[str]:
    """Return the one command that is called; all where it is help or completion that is wanted."""
    called = sys.argv[1] if len(sys.argv) > 1 else ""
    is_completing = any(name.endswith("_COMPLETE") for name in os.environ)
    return [called] if called in COMMANDS and not is_completing else COMMANDS


def _print_version(wanted: bool) -> None:
    if wanted:
        print(marwright.__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Train, pack, serve and manage PyTorch models on TorchServe."""


def main() -> None:
    """Run the command line; exit 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        build_app(_choose_commands())()
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
