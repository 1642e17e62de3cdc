"""`marwright export`: a run's model in another form, checked once it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table, say

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    form: Annotated[
        str,
        typer.Option(
            "--to",
            help="torchscript, onnx, exported (torch.export), aotinductor, openvino, savedmodel "
            "(TensorFlow) or tflite.",
        ),
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="The file or folder to write; RUN/exported/ if not given.")
    ] = None,
    data_root: Annotated[
        str, typer.Option(help="The folder of MNIST, FashionMNIST and CIFAR-10.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run's model in another form, load it in a fresh process, and compare the answers.

    Nothing is left where the answers on the validation part differ.
    """
    from marwright.archive import Run

    opened = Run.open(run)
    say("loading torch")
    from marwright.training.optimise.export import export_run

    exported = export_run(opened, form, out=out, data_root=data_root, force=force)
    if as_json:
        print_json(exported.to_json())
        return
    print_table(
        ["file", "bytes", "accuracy", "as trained", "worst difference", "mean", "agreement"],
        [
            [
                exported.path,
                f"{exported.size_bytes:,}",
                f"{exported.accuracy:.4f}",
                f"{exported.accuracy_before:.4f}",
                f"{exported.parity.worst:.2g}",
                f"{exported.parity.mean:.2g}",
                f"{exported.parity.agreement:.2%}",
            ]
        ],
    )
