from __future__ import annotations

import json
import pickle
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Import = Callable[[str], Any]

# ts leaves its version file open when imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

TOLERANCE = 1e-4
"""Absolute, of probabilities: what docs/handlers.md promises."""
CPU = torch.device("cpu")
SOURCE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
            torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(128, 5))

    def forward(self, pixels):
        return torch.softmax(self.body(pixels) * 9, dim=1)  # what rounds too much shows
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one network's class and weights, and what each test makes of them."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "net.py").write_text(SOURCE)
    torch.save(make_network().state_dict(), folder / "eager.pt")
    return folder


def make_network() -> torch.nn.Module:
    """Return the network with weights that are the same each time, and with a history."""
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    network: torch.nn.Module = scope["Net"]().train()
    with torch.no_grad():
        network(torch.rand(16, 3, 8, 8) * 3)  # batch norm learns a mean that is not 0
    return network.eval()


def make_images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def write_torchscript(network: torch.nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.trace(network, make_images(2)), str(path))
    return path


def write_exported(network: torch.nn.Module, path: Path) -> Path:
    torch.export.save(export(network), str(path))
    return path


def export(network: torch.nn.Module) -> torch.export.ExportedProgram:
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1, max=64)}}
    return torch.export.export(network, (make_images(2),), dynamic_shapes=shapes)


def write_onnx(network: torch.nn.Module, path: Path) -> Path:
    pytest.importorskip("onnxscript", reason="exports ONNX: pip install onnxscript")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.onnx.export(
        network,
        (make_images(2),),
        dynamo=True,
        verbose=False,
        dynamic_shapes=shapes,
        input_names=["pixels"],
    )
    assert program is not None
    program.save(path)
    return path


def write_openvino(network: torch.nn.Module, path: Path) -> Path:
    openvino = pytest.importorskip("openvino", reason="heavy, so no part of dev: pip install it")
    onnx = path.with_name("onnx.onnx")
    if not onnx.exists():
        write_onnx(network, onnx)
    openvino.save_model(openvino.convert_model(str(onnx)), str(path), compress_to_fp16=False)
    return path


def write_aotinductor(network: torch.nn.Module, path: Path) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor compiles C++: there is no g++")
    torch._inductor.aoti_compile_and_package(export(network), package_path=str(path))
    return path


WRITERS: dict[str, tuple[Callable[[torch.nn.Module, Path], Path], str]] = {
    "torchscript": (write_torchscript, ".pt"),
    "exported": (write_exported, ".pt2"),
    "onnx": (write_onnx, ".onnx"),
    "openvino": (write_openvino, ".xml"),
    "aotinductor": (write_aotinductor, "-aoti.pt2"),
    "eager": (lambda network, path: path, ".pt"),
}
SLOW = pytest.mark.slow
EVERY = [
    pytest.param(name, marks=SLOW if name == "aotinductor" else ()) for name in sorted(WRITERS)
]


@pytest.fixture(scope="module")
def load(handlers: Import, folder: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that loads the network with a backend, from a file written once."""
    threads = torch.get_num_threads()

    def load_written(name: str, *, threads: int = 1) -> Any:
        writer, suffix = WRITERS[name]
        path = folder / f"{name}{suffix}"
        if not path.exists():
            writer(make_network(), path)
        return handlers("backend").load_backend(
            name, path, device=CPU, threads=threads, architecture=folder / "net.py"
        )

    yield load_written
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", EVERY)
def test_every_backend_gives_the_same_answers(load: Callable[..., Any], name: str) -> None:
    network, backend = make_network(), load(name)
    assert backend.name == name
    for count in (1, 2, 3, 8, 64):
        images = make_images(count)
        with torch.inference_mode():
            expected, found = network(images), backend.run(images)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < TOLERANCE
        assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("form", ["trace", "script"])
def test_a_quantised_file_stays_on_the_cpu_where_there_is_a_gpu(
    handlers: Import, folder: Path, form: str
) -> None:
    """On a GPU its operators would end the process; so no GPU is needed to see that it stays."""
    path = folder / f"int8-{form}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)).eval()
        small = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear})
        if form == "trace":
            write_torchscript(small, path)
        else:  # its operators then stand below an `if`
            torch.jit.save(torch.jit.script(small), str(path))
    load = handlers("backend").load_backend
    backend = load("torchscript", path, device=torch.device("cuda:0"), threads=1)
    assert backend.device == CPU
    assert backend.run(make_images(3)).shape == (3, 5)


@pytest.mark.parametrize("made_for", ["cpu", "cuda"])
def test_a_compiled_program_runs_on_what_it_was_compiled_for(
    handlers: Import, folder: Path, monkeypatch: pytest.MonkeyPatch, made_for: str
) -> None:
    path = folder / f"{made_for}.pt2"
    with zipfile.ZipFile(path, "w") as package:
        said = json.dumps({"AOTI_DEVICE_KEY": made_for})
        package.writestr("x/data/aotinductor/model/c.wrapper_metadata.json", said)
    monkeypatch.setattr(
        torch._inductor, "aoti_load_package", lambda path, device_index=-1: device_index
    )
    load = handlers("backend").load_backend
    on_gpu = load("aotinductor", path, device=torch.device("cuda:1"), threads=1)
    assert (str(on_gpu.device), on_gpu.run) == (("cpu", -1) if made_for == "cpu" else ("cuda:1", 1))
    if made_for == "cuda":
        with pytest.raises(ValueError, match="expected a worker with a GPU"):
            load("aotinductor", path, device=CPU, threads=1)


@pytest.fixture
def start_tensor(handlers: Import, load: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Return a function that starts the tensor handler with a backend."""
    from ts.context import Context

    def start_handler(name: str, **settings: Any) -> Any:
        load(name)  # writes the file
        suffix = WRITERS[name][1]
        model = {"serializedFile": f"{name}{suffix}", "modelFile": "net.py"}
        handler = handlers("tensor").TensorHandler()
        config = {"handler": {"backend": name, **settings}}
        handler.initialize(
            Context("m", str(folder), {"model": model}, 4, None, "0.12.0", model_yaml_config=config)
        )
        return handler

    return start_handler


@pytest.mark.parametrize("name", EVERY)
def test_every_backend_answers_through_the_handler(
    handlers: Import, start_tensor: Callable[..., Any], name: str
) -> None:
    inputs = [{"name": "pixels", "shape": [3, 8, 8], "datatype": "FP32"}]
    handler = start_tensor(name, inputs=inputs)
    bodies = [json.dumps(image.tolist()).encode() for image in make_images(3)]
    incoming = handlers("inference_request").Incoming
    fields = [[("body", body, "application/json")] for body in bodies]
    answers = handler.answer([incoming(str(n), row) for n, row in enumerate(fields)])
    found = torch.tensor([json.loads(answer.body) for answer in answers])
    assert (found - make_network()(make_images(3))).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["torchscript", "exported", "onnx", "openvino", "eager"])
def test_answers_stay_when_the_next_batch_is_inferred(load: Callable[..., Any], name: str) -> None:
    # A runtime may hand out its own memory, which the next inference overwrites.
    backend = load(name)
    with torch.inference_mode():
        first = backend.run(make_images(4))
        kept = first.clone()
        backend.run(make_images(4) * 5)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", ["torchscript", "exported", "onnx", "openvino", "eager"])
def test_inputs_have_the_names_of_the_file(load: Callable[..., Any], name: str) -> None:
    assert [item.name for item in load(name).inputs] == ["pixels"]


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_shapes_and_types_are_those_of_the_file(load: Callable[..., Any], name: str) -> None:
    (found,) = load(name).inputs
    assert (found.shape, found.dtype) == ((3, 8, 8), "float32")


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_what_the_file_says_is_asked_of_the_client(
    start_tensor: Callable[[str], Any], post: Callable[..., Any], name: str
) -> None:
    image = make_images(1)[0].tolist()
    requests = [post(image), post([image, image]), post(image[0]), post([[1.0], [2.0]])]
    one, two, *wrong = start_tensor(name).answer(requests)
    assert (one.status, two.status) == (200, 200)
    assert json.loads(two.body) == [json.loads(one.body)] * 2
    for answer in wrong:
        assert answer.status == 422
        assert "pixels of shape [3, 8, 8]" in json.loads(answer.body)["detail"]


def test_onnx_without_memory_is_told_as_such(
    handlers: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    made = onnx.helper
    huge = made.make_tensor("size", onnx.TensorProto.INT64, [3], [1 << 40, 1, 1])
    ends = [made.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("x", "y")]
    ends[0] = made.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2])
    node = made.make_node("Expand", ["x", "size"], ["y"])
    graph = made.make_graph([node], "huge", [ends[0]], [ends[1]], [huge])
    model = made.make_model(graph, opset_imports=[made.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "huge.onnx")
    backend = handlers("backend").load_backend(
        "onnx", tmp_path / "huge.onnx", device=CPU, threads=1
    )
    with pytest.raises(Exception, match="allocate") as caught:
        backend.run(torch.zeros(1, 2))
    assert handlers("batch_handler")._is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("name", "flows"),
    [("torchscript", True), ("exported", True), ("eager", True), ("onnx", False)],
)
def test_gradients_flow_where_the_backend_says_so(
    load: Callable[..., Any], name: str, flows: bool
) -> None:
    module = load(name).module
    assert (module is not None) == flows
    if module is not None:
        images = make_images(2).requires_grad_()
        module(images)[:, 0].sum().backward()
        assert images.grad is not None
        assert images.grad.abs().sum() > 0


def test_torchscript_is_frozen(load: Callable[..., Any]) -> None:
    backend = load("torchscript")
    assert not list(backend.run.parameters())
    kinds = {node.kind() for node in backend.run.graph.nodes()}
    assert "aten::batch_norm" not in kinds  # it became a part of the convolution


def test_a_frozen_torchscript_file_is_read_too(handlers: Import, tmp_path: Path) -> None:
    network = make_network()
    frozen = torch.jit.freeze(torch.jit.trace(network, make_images(2)))
    torch.jit.save(frozen, str(tmp_path / "frozen.pt"))
    backend = handlers("backend").load_backend(
        "torchscript", tmp_path / "frozen.pt", device=CPU, threads=1
    )
    assert torch.allclose(backend.run(make_images(3)), network(make_images(3)), atol=TOLERANCE)


def test_a_quantised_torchscript_file_answers_as_before_it_was_saved(
    handlers: Import, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(torch.nn.Linear(6, 4)).eval(), {torch.nn.Linear}
        )
    values = torch.rand(3, 6)
    torch.jit.save(torch.jit.trace(network, values), str(tmp_path / "int8.pt"))
    backend = handlers("backend").load_backend(
        "torchscript", tmp_path / "int8.pt", device=CPU, threads=1
    )
    assert torch.equal(backend.run(values), network(values))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["torchscript", "onnx"])
def test_one_inference_computes_with_the_threads_it_was_given(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, threads: int
) -> None:
    given = []
    if name == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession

        def start(path: str, options: Any, **more: Any) -> Any:
            given.append(options.intra_op_num_threads)
            return session(path, options, **more)

        monkeypatch.setattr(runtime, "InferenceSession", start)
    load(name, threads=threads)
    assert torch.get_num_threads() == threads
    assert given == ([threads] if name == "onnx" else [])


def test_several_inputs_and_outputs_keep_their_order(handlers: Import, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    assert runtime
    floats = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"])
        for name in ("left", "right", "difference", "quotient")
    }
    nodes = [
        onnx.helper.make_node("Sub", ["left", "right"], ["difference"]),
        onnx.helper.make_node("Div", ["left", "right"], ["quotient"]),
    ]
    names = list(floats.values())
    graph = onnx.helper.make_graph(nodes, "two", names[:2], names[2:])
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, str(tmp_path / "two.onnx"))
    load = handlers("backend").load_backend
    backend = load("onnx", tmp_path / "two.onnx", device=CPU, threads=1)
    difference, quotient = backend.run(torch.tensor([6.0]), torch.tensor([3.0]))
    assert (difference.item(), quotient.item()) == (3, 2)
    with pytest.raises(ValueError, match="shorter"):
        backend.run(torch.tensor([6.0]))


def test_an_unknown_backend_is_told_with_those_there_are(handlers: Import, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torchscript, onnx, .* found 'caffe'"):
        handlers("backend").load_backend("caffe", tmp_path / "m", device=CPU, threads=1)


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_library_is_told_with_how_to_install_it(
    handlers: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}") as caught:
        handlers("backend").load_backend(name, tmp_path / "m", device=CPU, threads=1)
    assert caught.value.name == package


def test_eager_needs_one_class_and_its_file(handlers: Import, folder: Path, tmp_path: Path) -> None:
    load = handlers("backend").load_backend
    with pytest.raises(ValueError, match="needs the Python file"):
        load("eager", folder / "eager.pt", device=CPU, threads=1)
    (tmp_path / "two_nets.py").write_text(SOURCE + "\nclass Other(torch.nn.Module): pass\n")
    with pytest.raises(ValueError, match=r"one torch.nn.Module in two_nets.py, found \['Net'"):
        load(
            "eager",
            folder / "eager.pt",
            device=CPU,
            threads=1,
            architecture=tmp_path / "two_nets.py",
        )


def test_eager_runs_no_code_from_a_weights_file(
    handlers: Import, folder: Path, tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        handlers("backend").load_backend(
            "eager",
            tmp_path / "bomb.pt",
            device=CPU,
            threads=1,
            architecture=folder / "net.py",
        )
    assert not (tmp_path / "exploded").exists()


def test_a_dropout_of_a_file_saved_while_training_is_off(handlers: Import, tmp_path: Path) -> None:
    script = torch.jit.script(torch.nn.Sequential(torch.nn.Dropout(0.9)).train())
    torch.jit.save(script, str(tmp_path / "m.pt"))
    backend = handlers("backend").load_backend(
        "torchscript", tmp_path / "m.pt", device=CPU, threads=1
    )
    assert torch.equal(backend.run(torch.ones(2, 9)), torch.ones(2, 9))
