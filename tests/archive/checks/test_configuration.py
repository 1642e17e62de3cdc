from __future__ import annotations

from pathlib import Path

import pytest

from marwright.archive import Manifest
from marwright.archive.checks.source import check_source
from marwright.server import TorchServe

HANDLER = """\
class Handler:
    def initialize(self, context):
        self.own = context.model_yaml_config["own_key"]
    def handle(self, data, context): ...
"""


def check(folder: Path, settings: str = "", requirements: str = "") -> list[tuple[str, str, str]]:
    (folder / "handler.py").write_text(HANDLER)
    names = {}
    if settings:
        (folder / "model-config.yaml").write_text(settings, encoding="utf-8")
        names["config_file"] = "model-config.yaml"
    if requirements:
        (folder / "needs.txt").write_text(requirements, encoding="utf-8")
        names["requirements_file"] = "needs.txt"
    found = check_source(folder, Manifest("m", "1.0", "handler.py", **names))
    return [(str(item.severity), f"{item.rule.id} {item.place}", item.found) for item in found]


def test_an_unknown_setting_is_a_warning_with_the_one_that_was_meant(tmp_path: Path) -> None:
    found = check(tmp_path, "batchSize: 2\nmin_workers: 1\nnonsense: 3\n")
    assert [item[:2] for item in found] == [
        ("warning", "C402 model-config.yaml:2"),
        ("warning", "C402 model-config.yaml:3"),
    ]
    assert found[0][2].endswith("did you mean minWorkers?")
    assert "did you mean" not in found[1][2]


def test_a_setting_that_the_handler_mentions_is_its_own(tmp_path: Path) -> None:
    assert check(tmp_path, "own_key: 2\nhandler: {image_size: anything}\n") == []


@pytest.mark.parametrize(
    ("settings", "severity"),
    [
        ("batchSize: 0", "error"),
        ("batchSize: '8'", "error"),
        ("batchSize: 8.0", "error"),
        ("minWorkers: yes", "error"),
        ("minWorkers: 4\nmaxWorkers: 2", "error"),
        ("deviceIds: [a]", "error"),
        ("maxBatchDelay: 0", "warning"),
        ("minWorkers: 4", "warning"),
        ("minWorkers: 1", ""),
        ("minWorkers: 2\nmaxWorkers: 2", ""),
        ("minWorkers: 0", ""),
        ("minWorkers: -1", "error"),
        ("deviceIds: [0]\ndeviceType: gpu\npt2: {compile: {enable: true}}", ""),
    ],
)
def test_settings_are_judged_as_torchserve_reads_them(
    tmp_path: Path, settings: str, severity: str
) -> None:
    found = [(item[0], item[1][:4]) for item in check(tmp_path, settings)]
    assert found == ([(severity, "C403")] if severity else [])


@pytest.mark.slow  # three models boot
@pytest.mark.server
def test_torchserve_ignores_what_is_found(tmp_path: Path) -> None:
    settings = {
        "text": "batchSize: '8'\nminWorkers: 1\nmaxWorkers: 2",
        "zero": "batchSize: 8\nmaxBatchDelay: 0",
        "alone": "batchSize: 8\nminWorkers: 2",
    }
    for name, text in settings.items():
        folder = tmp_path / name
        (folder / "MAR-INF").mkdir(parents=True)
        manifest = Manifest(name, "1.0", "handler.py", config_file="model-config.yaml")
        (folder / "MAR-INF/MANIFEST.json").write_bytes(manifest.to_json())
        assert len(check(folder, text)) == 1
        (folder / "handler.py").write_text("def handle(data, context):\n    return ['x']\n")
    with TorchServe(tmp_path, models=list(settings)) as server:
        seen = {name: server.client.models.describe(name) for name in settings}
    assert (seen["text"].batch_size, seen["text"].max_workers) == (1, 2)
    assert (seen["zero"].batch_size, seen["zero"].max_batch_delay_ms) == (8, 100)
    assert (seen["alone"].batch_size, seen["alone"].min_workers) == (8, 1)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "settings",
    [
        "- a",
        "a: [",
        "# nothing",
        "a: b: c",
        "x: !!python/object/apply:os.getpid []",
        "? [1, 2]\n: 3\n? {a: b}\n: 4",
        "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [*a, *a]}}\n" for i in range(20)),
        "a: " + "[" * 100_000,
        "a: '" + "x" * (1 << 20) + "'",
    ],
    ids=["list", "torn", "empty", "nested", "tag", "keys", "aliases", "deep", "long"],
)
def test_settings_that_cannot_be_read_are_an_error(tmp_path: Path, settings: str) -> None:
    assert [item[:2] for item in check(tmp_path, settings)] == [("error", "C401 model-config.yaml")]


def test_a_requirement_on_torch_itself_is_a_warning(tmp_path: Path) -> None:
    found = check(tmp_path, requirements="# ours\ntorch==2.6\nTorchVision\nnvidia-cudnn-cu12\n")
    assert [item[:2] for item in found] == [
        ("note", "C412 needs.txt"),
        ("warning", "C411 needs.txt:2"),
        ("warning", "C411 needs.txt:3"),
        ("warning", "C411 needs.txt:4"),
    ]


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("pyyaml<2", "C414"),
        ("pyyaml>=5", ""),
        ("pyyaml<2; python_version < '3'", ""),
        ("pyyaml=5", "C413"),
        ("absent-distribution==1", ""),
        ("pyyaml>=5 --hash=sha256:ab", ""),
        ("./wheels/acme-1.0-py3-none-any.whl", ""),
        ("git+https://example.org/acme.git", ""),
    ],
)
def test_a_requirement_is_compared_with_what_is_installed(
    tmp_path: Path, requirement: str, expected: str
) -> None:
    found = [item[1][:4] for item in check(tmp_path, requirements=requirement)]
    assert found == ["C412", *([expected] if expected else [])]
