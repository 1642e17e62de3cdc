from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from marwright.errors import ExportError, UsageError
from marwright.training.forms import ONNX_OPSET, SUFFIXES, check_compiler, export_model
from marwright.training.models import Exported

Answer = Callable[..., torch.Tensor]
Items = tuple[torch.Tensor, torch.Tensor]


@pytest.mark.parametrize(
    "backend",
    [
        "torchscript",
        "onnx",
        "exported",
        "openvino",
        pytest.param("aotinductor", marks=pytest.mark.slow),  # half a minute of compiling
    ],
)
def test_a_file_answers_as_the_network_does_in_batches_of_any_size(
    backend: str, trained: Exported, items: Items, answer: Answer, tmp_path: Path
) -> None:
    if backend in ("onnx", "openvino"):
        pytest.importorskip({"onnx": "onnxscript", "openvino": "nncf"}[backend])
    path, inputs = tmp_path / f"model{SUFFIXES[backend]}", items[0][:11]
    export_model(trained, backend, path, inputs[:1])
    companions = ["model.bin"] if backend == "openvino" else []
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([path.name, *companions])
    with torch.no_grad():
        wanted = trained(inputs)
    answers = answer(backend, path, inputs, batch=5)  # eleven items: of 5, 5 and 1
    torch.testing.assert_close(answers, wanted, atol=1e-4, rtol=1e-4)


def test_an_onnx_file_says_its_opset_and_its_free_batch(trained: Exported, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    export_model(trained, "onnx", tmp_path / "model.onnx", torch.rand(1, 3, 12, 12))
    model = onnx.load(tmp_path / "model.onnx")
    assert [each.version for each in model.opset_import if not each.domain] == [ONNX_OPSET]
    assert [each.name for each in model.graph.input] == ["inputs"]
    assert [each.name for each in model.graph.output] == ["logits"]
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    assert [each.dim_value for each in sizes] == [0, 3, 12, 12]


def test_no_item_of_the_example_travels_in_a_program(trained: Exported, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    export_model(trained, "exported", path, torch.full((512, 3, 12, 12), 0.1)[:2])
    program = torch.export.load(path)
    assert program.example_inputs is not None
    assert not program.example_inputs[0][0].any()
    assert path.stat().st_size < 100_000


class Inside(nn.Module):
    """A network whose second layer is what a test is about."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = second

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.second(self.first(rows))
        return logits


class Bessel(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(rows)


class Branching(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if rows.sum() > 0 else -rows


class Numpy(nn.Module):
    """What no exporter can follow: it leaves torch."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rows.detach().numpy() * 2)


class Star(nn.Module):
    """What TorchScript's compiler cannot read, and its tracer can follow."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([*(part for part in rows.split(1, dim=1))], dim=1)


@pytest.mark.parametrize(
    ("backend", "second", "message"),
    [
        ("onnx", Bessel(), r"ONNX has no operator prims\.bessel_j0, used by layer second "),
        ("onnx", Branching(), r"torch\.export cannot follow this network, used by layer second "),
        ("exported", Branching(), r"cannot follow this network, used by layer second "),
        ("exported", Numpy(), r"cannot follow this network, used by layer second "),
        ("torchscript", Numpy(), r"TorchScript has no operator numpy, used by layer second "),
    ],
)
def test_what_a_backend_lacks_is_named_with_its_layer_and_leaves_no_file(
    backend: str,
    second: nn.Module,
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model").write_bytes(b"the old one")
    with pytest.raises(ExportError, match=message + r"\(test_forms\.py:\d+\): found ") as caught:
        export_model(Inside(second), backend, tmp_path / "model", torch.rand(2, 4))
    assert "\n" not in str(caught.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old one"]
    assert capfd.readouterr() == ("", "")


def test_openvino_names_what_it_lacks(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    with pytest.raises(ExportError, match=r"OpenVINO .*bessel_j0.*layer second \(test_forms\.py"):
        export_model(Inside(Bessel()), "openvino", tmp_path / "model.xml", torch.rand(2, 4))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_scripted_is_traced_and_that_is_said(
    tmp_path: Path, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = Inside(Star()), torch.rand(7, 4)
    with caplog.at_level(logging.INFO):
        export_model(model, "torchscript", tmp_path / "model.pt", rows)
    assert "traced instead" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(
            answer("torchscript", tmp_path / "model.pt", rows, batch=3), model(rows)
        )


def test_without_a_compiler_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler.*apt install g\+\+"):
        check_compiler()


def test_an_unknown_backend_is_refused(trained: Exported, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torchscript, onnx, exported, aotinductor, openvino"):
        export_model(trained, "eager", tmp_path / "model", torch.rand(1, 3, 12, 12))


def test_there_is_a_suffix_for_each_backend_that_can_be_written() -> None:
    assert list(SUFFIXES) == ["torchscript", "onnx", "exported", "aotinductor", "openvino"]


TELL = """
import torch, sys
from pathlib import Path
from marwright.training.forms import export_model
from marwright.training.extras import import_extra
export_model(torch.nn.Linear(4, 2), "openvino", Path(sys.argv[1]) / "model.xml", torch.rand(2, 4))
import_extra("nncf", "this test")
"""


def test_openvino_reports_nothing_to_its_maker(tmp_path: Path) -> None:
    pytest.importorskip("openvino_telemetry")
    (tmp_path / "home").mkdir()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TELL, str(tmp_path)],
        check=True,
        timeout=100,
        env={"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"},
    )
    # Where it means to report, it leaves an identifier of the user there first.
    assert not list((tmp_path / "home").rglob("openvino*"))
