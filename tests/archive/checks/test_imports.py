from __future__ import annotations

import logging

import pytest

from marwright.archive.checks.imports import Verdict, judge
from marwright.archive.checks.opcodes import UNKNOWN


@pytest.mark.parametrize(
    ("path", "verdict"),
    [
        ("torch._utils._rebuild_tensor_v2", Verdict.TENSORS),
        ("torch.FloatStorage", Verdict.TENSORS),
        ("torch.cuda.sparse.HalfTensor", Verdict.TENSORS),
        ("torch.float8_e4m3fn", Verdict.TENSORS),
        ("collections.OrderedDict", Verdict.TENSORS),
        ("numpy.core.multiarray._reconstruct", Verdict.VALUES),
        ("numpy._core.multiarray.scalar", Verdict.VALUES),
        ("datetime.datetime", Verdict.VALUES),
        ("torch.nn.modules.linear.Linear", Verdict.OBJECTS),
        ("functools.partial", Verdict.OBJECTS),
        ("__main__.Net", Verdict.OBJECTS),
        ("sklearn.linear_model._logistic.LogisticRegression", Verdict.OBJECTS),
        ("torch.float_power", Verdict.OBJECTS),
        ("torch.load", Verdict.DANGER),
        ("torch.hub.load", Verdict.DANGER),
        ("torch._C._jit_pass_inline", Verdict.DANGER),
        ("os.system", Verdict.DANGER),
        ("collections.namedtuple", Verdict.DANGER),
        ("builtins.getattr", Verdict.DANGER),
        ("antigravity.fly", Verdict.DANGER),
        ("numpy.lib.npyio.load", Verdict.DANGER),
        ("sklearn.utils.sys", Verdict.DANGER),
        ("timm.models._os", Verdict.DANGER),
        ("idlelib.pyshell.ModifiedInterpreter", Verdict.DANGER),
        ("requests.get", Verdict.DANGER),
    ],
)
def test_a_name_is_judged(path: str, verdict: Verdict) -> None:
    assert judge(*path.rsplit(".", 1)) is verdict


def test_a_name_that_walks_from_attribute_to_attribute_is_dangerous() -> None:
    assert judge("net", "Outer.Inner") is Verdict.OBJECTS
    assert judge("net", "Outer.__init__.__globals__") is Verdict.DANGER
    assert judge("net", "helpers.run") is Verdict.DANGER
    assert judge("torch", "FloatStorage.x") is Verdict.OBJECTS


def test_an_unknown_name_is_dangerous() -> None:
    assert judge(*UNKNOWN) is Verdict.DANGER
    assert judge("a\nb", "c") is Verdict.DANGER


def test_python_2s_names_count_where_pickle_translates_them() -> None:
    assert judge("__builtin__", "set", protocol=2) is Verdict.TENSORS
    assert judge("copy_reg", "_reconstructor", protocol=2) is Verdict.VALUES
    assert judge("commands", "getoutput", protocol=2) is Verdict.DANGER
    assert judge("UserDict", "UserDict", protocol=2) is Verdict.DANGER  # collections.UserDict


def test_what_picklescan_knows_is_dangerous() -> None:
    assert judge("aiohttp", "request") is Verdict.DANGER  # in no list of ours
    assert judge("lib2to3.pgen2.grammar", "Grammar.loads") is Verdict.DANGER


def test_picklescan_says_nothing_itself(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert judge("aiohttp", "unheard_of") is Verdict.DANGER
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
