from __future__ import annotations

import pytest
import torch

from marwright.archive.worker import profile as module
from marwright.archive.worker.profile import Profile


class Clock:
    """Time that passes only where somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "_read_clock", lambda: clock.now)
    return clock


class Inner(torch.nn.Module):
    def __init__(self, clock: Clock, *, broken: bool = False) -> None:
        super().__init__()
        self.clock, self.broken = clock, broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.work(5)
        if self.broken:
            raise ValueError("no luck")
        return x


class Outer(torch.nn.Module):
    def __init__(self, clock: Clock, *, broken: bool = False) -> None:
        super().__init__()
        self.inner = Inner(clock, broken=broken)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.inner(x)
        return inner


class Conventional:
    """After TorchServe's BaseHandler."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def preprocess(self, value: int) -> int:
        self.clock.work(1)
        return value

    def inference(self, value: int) -> int:
        Outer(self.clock)(torch.zeros(1))
        return value

    def postprocess(self, value: int) -> int:
        self.clock.work(2)
        return value

    def handle(self, value: int) -> int:
        self.clock.work(0.5)
        return self.postprocess(self.inference(self.preprocess(value)))


def test_methods_are_timed_where_there_are_some(clock: Clock) -> None:
    profile, handler = Profile(), Conventional(clock)
    for _ in range(2):
        with profile.handling(handler):
            assert handler.handle(7) == 7
    assert profile.measured_by == "methods"
    assert profile.seconds == {"preprocess": 2, "infer": 10, "postprocess": 4, "other": 1}
    assert vars(handler) == {"clock": clock}  # as it was


def test_torch_modules_tell_the_stages_apart_otherwise(clock: Clock) -> None:
    profile, model = Profile(), Outer(clock)
    with profile.handling(None):
        clock.work(1)
        model(torch.zeros(1))
        clock.work(0.5)
        model(torch.zeros(1))
        clock.work(2)
    assert profile.measured_by == "torch modules"
    # The module inside the other is not counted again.
    assert profile.seconds == {"preprocess": 1, "infer": 10, "postprocess": 2.5, "other": 0}


def test_methods_that_are_not_called_tell_nothing(clock: Clock) -> None:
    profile = Profile()
    with profile.handling(Conventional(clock)):
        Outer(clock)(torch.zeros(1))
    assert profile.measured_by == "torch modules"


def test_without_a_torch_module_all_is_other(clock: Clock) -> None:
    profile = Profile()
    with profile.handling(None):
        clock.work(3)
    assert profile.measured_by == ""
    assert profile.seconds["other"] == 3


def test_a_module_that_raises_is_timed_and_the_hooks_go(clock: Clock) -> None:
    profile = Profile()
    with pytest.raises(ValueError, match="no luck"), profile.handling(None):
        Outer(clock, broken=True)(torch.zeros(1))
    assert profile.seconds["infer"] == 5
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
