"""Export a TorchScript model to ONNX and quantise it to int8: QDQ, static, per channel.

export_onnx.py MODEL.pt DATA.npz FOLDER writes float32.onnx and int8.onnx, and prints the accuracy
of all three forms. DATA: calibration and test (N, 3, H, W) float32, labels (N,) int64.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from onnxruntime import InferenceSession
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

BATCH = 32


class Batches(CalibrationDataReader):
    """What ONNX Runtime reads its ranges from."""

    def __init__(self, images: np.ndarray) -> None:
        self.batches: Iterator[np.ndarray] = iter(
            [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"pixels": batch}


def main() -> None:
    """Export, quantise, compare."""
    source, data, folder = map(Path, sys.argv[1:])
    arrays = np.load(data)
    model = torch.jit.load(str(source)).eval()
    plain, small = folder / "float32.onnx", folder / "int8.onnx"
    export(model, arrays["calibration"], plain)
    quantise(plain, arrays["calibration"], small)
    with torch.inference_mode():
        found = {"torchscript": model(torch.from_numpy(arrays["test"])).numpy()}
    for path in (plain, small):
        session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (found[path.stem],) = session.run(None, {"pixels": arrays["test"]})
    hits = {name: logits.argmax(1) == arrays["labels"] for name, logits in found.items()}
    print(json.dumps({name: round(float(hit.mean()), 4) for name, hit in hits.items()}))


def export(model: torch.jit.ScriptModule, images: np.ndarray, target: Path) -> None:
    """Write ONNX with a batch axis of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter that takes TorchScript
        torch.onnx.export(
            model,
            (torch.from_numpy(images[:1]),),
            str(target),
            dynamo=False,
            opset_version=17,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_axes={"pixels": {0: "batch"}, "logits": {0: "batch"}},
        )


def quantise(plain: Path, images: np.ndarray, target: Path) -> None:
    """Write int8 with ranges from the images."""
    prepared = plain.with_suffix(".prepared.onnx")
    quant_pre_process(str(plain), str(prepared))
    quantize_static(
        str(prepared),
        str(target),
        Batches(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


if __name__ == "__main__":
    main()
