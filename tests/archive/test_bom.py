from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

import marwright
from marwright.archive.bom import DataSet, make_bom, parse_requirements
from marwright.archive.run import Run
from marwright.errors import ArchiveError

DIGEST = hashlib.sha256(b"weights").hexdigest()
REPORT: dict[str, Any] = {
    "accuracy": 0.975,
    "validation_accuracy": 1,
    "train_accuracy": 0.99,
    "classes": {"7": {"precision": 0.9, "recall": None, "support": 4}},
    "parameters": 315_722,
    "seed": 0,
    "git": {"commit": "c" * 40, "dirty": True},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
}
FULL: dict[str, Any] = {
    "weights_sha256": DIGEST,
    "licence": "Apache-2.0",
    "description": "reads digits",
    "task": "classification",
    "architecture": "cnn",
    "inputs": ["image/png", "image/jpeg"],
    "outputs": ["application/json"],
    "data_set": DataSet("digits", digest="d" * 64, licence="CC-BY-4.0"),
    "report": REPORT,
    "requirements": [Requirement("numpy==2.4.6"), Requirement("pillow>=10")],
    "created": 1_700_000_000,
}


def make(**options: Any) -> dict[str, Any]:
    """Return the document, once it is known to obey its schema."""
    text = make_bom(**{"name": "cnn", "version": "1.0", **options}).decode()
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert error is None, error
    document: dict[str, Any] = json.loads(text)
    return document


def model_of(document: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = document["metadata"]["component"]
    return model


def properties_of(component: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["value"] for item in component.get("properties", [])}


@pytest.mark.parametrize("options", [{}, FULL, *({key: FULL[key]} for key in FULL)])
def test_every_bill_obeys_the_schema(options: dict[str, Any]) -> None:
    document = make(**options)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")


def test_the_model_is_what_the_bill_is_about() -> None:
    model = model_of(make(**FULL))
    assert (
        model.items()
        >= {
            "type": "machine-learning-model",
            "name": "cnn",
            "version": "1.0",
            "description": "reads digits",
            "hashes": [{"alg": "SHA-256", "content": DIGEST}],
            "licenses": [{"license": {"id": "Apache-2.0"}}],
        }.items()
    )


def test_the_model_card_says_what_goes_in_and_out() -> None:
    card = model_of(make(**FULL))["modelCard"]
    assert card["modelParameters"] == {
        "task": "classification",
        "modelArchitecture": "cnn",
        "datasets": [{"ref": "data-set"}],
        "inputs": [{"format": "image/png"}, {"format": "image/jpeg"}],
        "outputs": [{"format": "application/json"}],
    }


def test_the_model_card_holds_the_figures_of_the_report() -> None:
    card = model_of(make(report=REPORT))["modelCard"]
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "accuracy", "slice": "test", "value": "0.975"},
        {"type": "accuracy", "slice": "train", "value": "0.99"},
        {"type": "accuracy", "slice": "validation", "value": "1"},
        {"type": "precision", "slice": "7", "value": "0.9"},
    ]


def test_the_training_is_told_in_properties() -> None:
    assert properties_of(model_of(make(report=REPORT))) == {
        "marwright:training:commit": "c" * 40,
        "marwright:training:dirty": "true",
        "marwright:training:parameters": "315722",
        "marwright:training:seed": "0",
        "marwright:training:version:python": "3.11.7",
        "marwright:training:version:torch": "2.13.0",
    }


@pytest.mark.parametrize(
    "report",
    [
        {"accuracy": True},
        {"accuracy": "high"},
        {"accuracy": float("nan"), "train_accuracy": float("inf")},
        {"classes": {"7": 3}, "versions": ["torch"], "git": "main", "seed": [1]},
        {"loss": 0.3},
    ],
)
def test_a_report_without_figures_gives_no_card(report: dict[str, Any]) -> None:
    model = model_of(make(report=report))
    assert "modelCard" not in model
    assert "properties" not in model


def test_a_report_of_a_run_is_taken_as_it_is(run: Run) -> None:
    metrics = model_of(make(report=run.report))["modelCard"]["quantitativeAnalysis"]
    assert {"type": "accuracy", "slice": "test", "value": str(run.report["accuracy"])} in metrics[
        "performanceMetrics"
    ]


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("apache-2.0", {"license": {"id": "Apache-2.0"}}),
        ("MIT OR Apache-2.0", {"expression": "MIT OR Apache-2.0"}),
        ("Our own, ask Ann", {"license": {"name": "Our own, ask Ann"}}),
        ("several\nlines (c)", {"license": {"name": "several\nlines (c)"}}),
    ],
)
def test_a_licence_is_an_id_an_expression_or_a_name(licence: str, expected: dict[str, Any]) -> None:
    assert model_of(make(licence=licence))["licenses"] == [expected]


@pytest.mark.parametrize("licence", [None, "", "  "])
def test_no_licence_is_none(licence: str | None) -> None:
    assert "licenses" not in model_of(make(licence=licence))


def test_a_data_set_is_a_component_that_the_model_depends_on() -> None:
    document = make(data_set=FULL["data_set"])
    assert document["components"] == [
        {
            "type": "data",
            "bom-ref": "data-set",
            "name": "digits",
            "hashes": [{"alg": "SHA-256", "content": "d" * 64}],
            "licenses": [{"license": {"id": "CC-BY-4.0"}}],
            "data": [{"type": "dataset", "name": "digits"}],
        }
    ]
    assert {"ref": "model", "dependsOn": ["data-set"]} in document["dependencies"]


def test_another_digest_of_a_data_set_is_a_property() -> None:
    (data,) = make(data_set=DataSet("digits", digest="md5:0f"))["components"]
    assert "hashes" not in data
    assert properties_of(data) == {"marwright:digest": "md5:0f"}


@pytest.mark.parametrize(
    ("requirement", "version", "purl"),
    [
        ("numpy==2.4.6", "2.4.6", "pkg:pypi/numpy@2.4.6"),
        ("torch==2.13.0+cpu", "2.13.0+cpu", "pkg:pypi/torch@2.13.0%2Bcpu"),
        ("Ruamel.Yaml===0.18", "0.18", "pkg:pypi/ruamel-yaml@0.18"),
        ("numpy", None, "pkg:pypi/numpy"),
        ("numpy>=2,<3", None, "pkg:pypi/numpy"),
        ("numpy==2.*", None, "pkg:pypi/numpy"),
    ],
)
def test_a_requirement_is_a_library(requirement: str, version: str | None, purl: str) -> None:
    document = make(requirements=[Requirement(requirement)])
    (library,) = document["components"]
    assert (library["type"], library["purl"], library["bom-ref"]) == ("library", purl, purl)
    assert library.get("version") == version
    assert "data" not in library
    assert {"ref": "model", "dependsOn": [purl]} in document["dependencies"]


def test_two_lines_for_one_package_are_one_library() -> None:
    lines = ["pillow ; python_version < '3.11'", "Pillow[avif]>=10 ; python_version >= '3.11'"]
    (library,) = make(requirements=map(Requirement, lines))["components"]
    assert [item["value"] for item in library["properties"]] == [
        'Pillow[avif]>=10 ; python_version >= "3.11"',
        'pillow ; python_version < "3.11"',
    ]


def test_the_address_of_a_package_stays_out() -> None:
    requirement = Requirement("numpy @ https://ann:token@example.org/numpy-2.4.6.zip")
    text = make_bom(name="cnn", version="1.0", requirements=[requirement]).decode()
    assert "token" not in text
    assert "example.org" not in text
    (library,) = json.loads(text)["components"]
    assert "purl" not in library
    assert properties_of(library) == {"marwright:requirement": "numpy @ an address"}


def test_the_same_arguments_give_the_same_bytes_in_every_process() -> None:
    program = (
        "from marwright.archive.bom import make_bom, parse_requirements\n"
        "lines = ['b==1,>=0.5,==1.0,!=2', 'a[z,y,x]', 'c', 'd @ file:///d.zip']\n"
        "bom = make_bom(name='m', version='1', requirements=parse_requirements(lines, source=''))\n"
        "print(bom.decode())\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone},
            capture_output=True,
            check=True,
        ).stdout
        for seed, zone in [("1", "UTC"), ("2", "Pacific/Kiritimati"), ("3", "America/Adak")]
    }
    assert len(found) == 1


def test_the_order_of_requirements_does_not_matter() -> None:
    lines = [Requirement(name) for name in ("a", "b==1", "c")]
    assert make(requirements=lines) == make(requirements=lines[::-1])
    one, other = Requirement("b==1.0,>0.5,==1"), Requirement("b==1,==1.0,>0.5")
    assert make(requirements=[one]) == make(requirements=[other])


def test_the_file_is_sorted_json_that_ends_in_a_newline() -> None:
    text = make_bom(name="cnn", version="1.0", **FULL)
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True).encode() + b"\n"


def test_the_serial_number_follows_the_content() -> None:
    numbers = {make(**options)["serialNumber"] for options in ({}, {}, {"licence": "MIT"}, FULL)}
    assert len(numbers) == 3


def test_the_only_time_is_the_one_given() -> None:
    assert "timestamp" not in make()["metadata"]
    assert make(created=1_700_000_000)["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"


def test_the_toolkit_is_named() -> None:
    (tool,) = make()["metadata"]["tools"]["components"]
    assert (tool["name"], tool["version"]) == ("marwright", marwright.__version__)


def test_the_library_reads_its_bill_again() -> None:
    bom = Bom.from_json(make(**FULL))  # type: ignore[attr-defined]  # added by a decorator
    assert bom.validate()
    assert {component.name for component in bom.components} == {"digits", "numpy", "pillow"}


@settings(max_examples=40, deadline=None)
@given(name=st.text(min_size=1), text=st.text(), part=st.dictionaries(st.text(), st.floats()))
def test_any_text_gives_a_valid_bill(name: str, text: str, part: dict[str, float]) -> None:
    make(
        name=name,
        licence=text,
        description=text,
        task=text,
        inputs=[text],
        data_set=DataSet(name, digest=text, licence=text),
        report={"classes": {text: part}, "versions": {text: name}, "git": part},
    )


def test_a_requirements_file_is_read_as_pip_reads_it() -> None:
    text = (
        "# what the handler needs\r\n"
        "--index-url https://ann:token@example.org/simple\n"
        "-c constraints.txt\n"
        "--require-hashes\n"
        "\n"
        "numpy==2.4.6 \\\n"
        "    --hash=sha256:00 \\\n"
        "    --hash=sha256:01  # checked\n"
        "pillow >= 10 ; python_version > '3.8'# not a comment, but in the marker\n"
    )
    with pytest.raises(ArchiveError, match="line 9"):
        parse_requirements(text.splitlines(), source="requirements.txt")
    found = parse_requirements(text.splitlines()[:-1], source="requirements.txt")
    assert [str(requirement) for requirement in found] == ["numpy==2.4.6"]


@pytest.mark.parametrize(
    "line",
    [
        "numpy=2",
        "numpy==",
        "numpy[",
        "a b",
        "\0",
        "./net.whl",
        "https://example.org/net.whl",
        "-r more.txt",
        "--requirement=more.txt",
        "-e .",
        "--editable .",
    ],
)
def test_a_line_that_names_no_package_is_refused(line: str) -> None:
    with pytest.raises(ArchiveError) as caught:
        parse_requirements(["numpy", line], source="requirements.txt")
    assert f"line 2: {line!r}" in caught.value.found
    assert str(caught.value).startswith("requirements.txt has lines that name no package: expected")


def test_all_broken_lines_are_named_at_once() -> None:
    lines = ["numpy=1", "pillow", "a \\", "  b", "-e ."]
    with pytest.raises(ArchiveError) as caught:
        parse_requirements(lines, source="model.yaml")
    assert caught.value.found == "line 1: 'numpy=1'; line 3: 'a   b'; line 5: '-e .'"


def test_a_last_line_that_promises_more_is_read() -> None:
    assert parse_requirements(["numpy \\"], source="r") == [Requirement("numpy")]
