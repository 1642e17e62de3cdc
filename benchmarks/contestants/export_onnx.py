"""Export a TorchScript model to ONNX and quantise it to int8: QDQ, static, per channel.

export_onnx.py MODEL.pt CALIBRATION.npy OUT.onnx, with (N, 3, H, W) float32 in the second.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
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
    """Export, quantise, write."""
    source, calibration, target = map(Path, sys.argv[1:])
    images = np.load(calibration)
    plain, prepared = target.with_suffix(".fp32.onnx"), target.with_suffix(".prepared.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter that takes TorchScript
        torch.onnx.export(
            torch.jit.load(str(source)).eval(),
            (torch.from_numpy(images[:1]),),
            str(plain),
            dynamo=False,
            opset_version=17,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_axes={"pixels": {0: "batch"}, "logits": {0: "batch"}},
        )
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
