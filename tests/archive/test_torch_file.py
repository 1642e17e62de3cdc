from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marwright.archive.tensors import Tensor, Weights, read_weights
from marwright.errors import ArchiveError


def save(value: Any, write: Callable[..., None] = torch.save) -> io.BytesIO:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        write(value, stream)
    stream.seek(0)
    return stream


def save_script(module: torch.nn.Module) -> io.BytesIO:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(module)
    return save(script, torch.jit.save)


def rewrite(stream: io.BytesIO, **members: bytes | None) -> io.BytesIO:
    """Return the file with other members: `data_pkl=` for data.pkl, None to leave one out."""
    changed = {name.replace("_", "."): content for name, content in members.items()}
    result = io.BytesIO()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(result, "w") as new:
        for info in old.infolist():
            key = info.filename.partition("/")[2]
            content = changed.get(key, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return result


def read(weights: Weights, name: str) -> torch.Tensor:
    """Return a tensor as this reading places it."""
    tensor = weights.tensors[name]
    weights.stream.seek(tensor.offset)
    numbers = torch.frombuffer(
        bytearray(weights.stream.read(tensor.span_bytes)), dtype=getattr(torch, tensor.dtype)
    )
    return numbers.as_strided(tensor.shape, tensor.stride)


def test_a_state_dict_is_read_as_torch_reads_it() -> None:
    base = torch.arange(12, dtype=torch.float32)
    state = {
        "layer.weight": base.view(3, 4),
        "transposed": base.view(3, 4).t(),
        "part": base[3:7],
        "half": torch.randn(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
        "nested": {"list": [torch.tensor(7)]},
        "epoch": 3,
    }
    weights = read_weights(save(state), "model.pt")
    assert weights.format == "torch.save"
    assert weights.values == {"epoch": 3}
    flat: dict[str, Any] = {**state, "nested.list.0": torch.tensor(7)}
    assert set(weights.tensors) == set(flat) - {"nested", "epoch"}
    for name in weights.tensors:
        assert torch.equal(read(weights, name).double(), flat[name].detach().double())


def test_torchscript_shows_the_tensors_of_its_state_dict_and_its_code() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    weights = read_weights(save_script(module), "model.pt")
    assert weights.format == "TorchScript"
    assert set(weights.tensors) == set(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(read(weights, name), tensor)
    assert "code/__torch__/torch/nn/modules/batchnorm.py" in weights.parts


def test_an_exported_program_shows_the_tensors_of_its_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    torch.export.save(torch.export.export(module, (torch.ones(4, 3),)), tmp_path / "m.pt2")
    with (tmp_path / "m.pt2").open("rb") as stream:
        weights = read_weights(stream, "m.pt2")
        assert weights.format == "exported program"
        assert torch.equal(read(weights, "weight"), module.weight)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantised_tensor_comes_with_its_scale() -> None:
    tensor = torch.quantize_per_tensor(torch.randn(2, 3), 0.25, 7, torch.qint8)
    weights = read_weights(save({"w": tensor}), "model.pt")
    assert str(weights.tensors["w"]) == "qint8 [2, 3]"
    assert list(weights.values.values()) == ["torch.per_tensor_affine", 0.25, 7]


def test_a_pickled_module_is_read_without_its_class() -> None:
    weights = read_weights(save(torch.nn.Linear(3, 2)), "model.pt")
    assert weights.tensors["_parameters.weight"].shape == (2, 3)
    assert weights.values["in_features"] == 3


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_of_a_pickle_is_run(tmp_path: Path) -> None:
    content = pickle.dumps({"bomb": Bomb(tmp_path / "made")}, protocol=2)
    weights = read_weights(rewrite(save({}), data_pkl=content), "model.pt")
    assert not weights.tensors
    assert not (tmp_path / "made").exists()


def nest(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def rebuild(storage: Any, *arguments: Any) -> bytes:
    """Return a pickle of one tensor, with the arguments that torch would rebuild it from."""

    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (storage, *arguments)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"w": Call()})
    return stream.getvalue()


STORAGE = ("storage", torch.FloatStorage, "0", "cpu", 4)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "pickle exhausted"),
        (b"\x80\x02}", "pickle exhausted"),
        (pickle.dumps({"w": 1}, protocol=4), "protocol 4"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "remembers 2,147,483,647 things"),
        (nest(100_000), "lies too deep"),
        (b"\x80\x02](" + b"N" * 300_000 + b"e.", "one of too many"),
        (rebuild(STORAGE, 0, (4,), (2,)), "beyond data/0"),
        (rebuild(STORAGE, 1, (4,), (1,)), "beyond data/0"),
        (rebuild(STORAGE, -1, (1,), (1,)), "beyond data/0"),
        (rebuild(STORAGE, 0, (1 << 40,), (0,)), "more numbers than the file holds"),
        (rebuild(STORAGE, 0, ("4",), (1,)), "no sizes"),
        (rebuild(("storage", torch.FloatStorage, "9", "cpu", 4), 0, (4,), (1,)), "data/9"),
        (rebuild(("storage",), 0, (4,), (1,)), "unpack"),
    ],
)
def test_a_pickle_that_leads_astray_is_refused(content: bytes, found: str) -> None:
    file = rewrite(save({"w": torch.zeros(4)}), data_pkl=content)
    with pytest.raises(ArchiveError, match=r"tensors of model\.pt cannot be read") as caught:
        read_weights(file, "model.pt")
    assert found in caught.value.found


def test_a_pickle_that_names_itself_a_billion_times_is_read_once() -> None:
    tree: list[Any] = [torch.zeros(1)]
    for _ in range(40):
        tree = [tree, tree]
    weights = read_weights(save(tree), "model.pt")
    assert (len(weights.tensors), len(weights.values)) == (1, 0)


def test_a_zip_file_of_something_else_is_refused() -> None:
    with pytest.raises(ArchiveError, match="torch did not write"):
        read_weights(rewrite(save({}), data_pkl=None), "model.pt")


def test_numbers_in_another_order_of_bytes_are_refused() -> None:
    with pytest.raises(ArchiveError, match="order of bytes"):
        read_weights(rewrite(save({}), byteorder=b"big"), "model.pt")


def test_compressed_numbers_are_refused() -> None:
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(save({"w": torch.zeros(4)})) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ArchiveError, match="compressed"):
        read_weights(packed, "model.pt")


WHOLE = save({"a": torch.arange(6).view(2, 3), "b": [torch.ones(2)], "c": "text"}).getvalue()


@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=300)
def test_a_damaged_file_is_read_or_refused(position: float, value: int) -> None:
    content = bytearray(WHOLE)
    content[int(position * len(content))] = value
    try:
        weights = read_weights(io.BytesIO(content), "model.pt")
    except ArchiveError:
        return
    assert all(isinstance(tensor, Tensor) for tensor in weights.tensors.values())


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(WHOLE)
    script = (
        "import sys; from marwright.archive.tensors import read_weights\n"
        "weights = read_weights(open(sys.argv[1], 'rb'), 'model.pt')\n"
        "print(sorted(weights.tensors), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, tmp_path / "model.pt"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "['a', 'b.0'] False False\n"
