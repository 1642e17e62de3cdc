from __future__ import annotations

import dataclasses
import socket

import pytest

from marwright.errors import PortTakenError, UsageError
from marwright.server import Ports
from marwright.server.deployment import Deployment
from marwright.server.rendering import render_deployment

NAMES = [item.name for item in dataclasses.fields(Ports)]


def test_free_ports_are_five_different_ones_that_can_be_bound() -> None:
    ports = Ports.find_free()
    assert len(set(dataclasses.astuple(ports))) == 5
    ports.check_free()


@pytest.mark.parametrize("name", NAMES)
def test_a_taken_port_is_named_with_its_api(taken_port: int, name: str) -> None:
    ports = dataclasses.replace(Ports.find_free(), **{name: taken_port})
    with pytest.raises(PortTakenError, match="--free-ports") as caught:
        ports.check_free()
    assert caught.value.message == f"port {taken_port} ({name}) is taken"


def test_every_taken_port_is_named(taken_port: int) -> None:
    with socket.create_server(("0.0.0.0", 0)) as second:
        other = second.getsockname()[1]
        ports = dataclasses.replace(Ports.find_free(), inference=taken_port, grpc_management=other)
        with pytest.raises(PortTakenError) as caught:
            ports.check_free()
    expected = f"port {taken_port} (inference), {other} (grpc_management) is taken"
    assert caught.value.message == expected


def test_checking_leaves_the_ports_free() -> None:
    ports = Ports.find_free()
    ports.check_free()
    ports.check_free()
    with socket.create_server(("127.0.0.1", ports.inference)):
        pass


def test_the_defaults_give_torchserves_ports() -> None:
    assert (
        Ports.from_properties(render_deployment(Deployment()))
        == Ports.from_properties({})
        == Ports()
    )


def test_ports_survive_the_way_through_properties() -> None:
    ports = Ports(9000, 9001, 9002, 7000, 7001)
    assert Ports.from_properties(ports.to_properties()) == ports


def test_every_address_is_on_loopback() -> None:
    properties = Ports().to_properties()
    assert len(properties) == 7
    assert all("127.0.0.1" in text for key, text in properties.items() if "address" in key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inference_address", "garbage"),
        ("inference_address", ""),
        ("inference_address", "127.0.0.1:8080"),
        ("inference_address", "http://127.0.0.1"),
        ("inference_address", "http://127.0.0.1:"),
        ("management_address", "http://127.0.0.1:0"),
        ("management_address", "http://127.0.0.1:65536"),
        ("management_address", "http://127.0.0.1:-1"),
        ("metrics_address", "http://127.0.0.1:eight"),
        ("metrics_address", "http://[::1"),
        ("metrics_address", "unix:/tmp/metrics.sock"),
        ("grpc_inference_port", ""),
        ("grpc_inference_port", "seven"),
        ("grpc_inference_port", "0"),
        ("grpc_management_port", "70000"),
        ("grpc_management_port", "-7071"),
    ],
)
def test_an_address_without_a_usable_port_is_a_usage_error(key: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        Ports.from_properties({**render_deployment(Deployment()), key: value})
    assert key.split("_")[0] in str(caught.value)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port_is_a_usage_error(port: int) -> None:
    with pytest.raises(UsageError, match="1 to 65535"):
        Ports(metrics=port)
