"""What frouros says of windows: run by the Python of its own environment (benchmarks/drift.py).

Reads a .npz of windows, prints one JSON list: for each window and comparison the statistic, the
p-value and the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any

import numpy as np
from frouros.callbacks import PermutationTestDistanceBased
from frouros.detectors.data_drift import MMD, PSI, ChiSquareTest, KSTest
from frouros.utils.kernels import rbf_kernel


def measure(detector: Any, reference: Any, window: Any) -> dict[str, Any]:
    """Fit a detector and compare; the p-value is none where it has no test."""
    began = time.perf_counter()
    detector.fit(X=reference)
    result, log = detector.compare(X=window)
    seconds = time.perf_counter() - began
    statistic = result.statistic if hasattr(result, "statistic") else result.distance
    p = getattr(result, "p_value", None)
    for entry in log.values():
        p = entry["p_value"]
    return {"statistic": float(statistic), "p": p if p is None else float(p), "seconds": seconds}


def permute(permutations: int) -> PermutationTestDistanceBased:
    """Return frouros' permutation test, in one process."""
    return PermutationTestDistanceBased(
        num_permutations=permutations, num_jobs=1, method="conservative", random_state=0
    )


def main() -> None:
    """Compare every window."""
    found = []
    with np.load(sys.argv[1], allow_pickle=False) as data:
        permutations = int(data["permutations"])
        for number in range(int(data["windows"])):
            first, second = f"{number}.reference.", f"{number}.window."
            rows: dict[str, Any] = {}
            for column in range(data[first + "features"].shape[1]):
                pair = [data[part + "features"][:, column] for part in (first, second)]
                rows[f"psi {column}"] = measure(PSI(), *pair)
                rows[f"psi permuted {column}"] = measure(
                    PSI(callbacks=permute(permutations)), *pair
                )
                rows[f"ks {column}"] = measure(KSTest(), *pair)
            classes = [data[part + "prediction"] for part in (first, second)]
            rows["chi_square"] = measure(ChiSquareTest(), *classes)
            kernel = partial(rbf_kernel, sigma=float(data[f"{number}.sigma"]))
            points = [data[part + "embedding"] for part in (first, second)]
            rows["mmd"] = measure(MMD(kernel=kernel, callbacks=permute(permutations)), *points)
            found.append(rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
