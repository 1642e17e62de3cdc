"""Which imports a pickle may ask for: tensors' own, anything else, and what no model needs.

A pickle names what it imports, and calls it with what it likes. picklescan keeps the list of names
that attacks use; what it does not know is not thereby safe, so the standard library counts as
dangerous but for the plain values in it (docs/decisions/0006-pickle-scanner.md).
"""

from __future__ import annotations

import enum
import functools
import io
import logging
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

from marwright.archive.checks.opcodes import UNKNOWN

__all__ = ["judge", "Verdict"]


class Verdict(enum.IntEnum):
    """What an import is good for."""

    TENSORS = 1
    """torch.load(weights_only=True) takes it: tensors and plain containers."""
    VALUES = 2
    """A plain value: numbers, dates, NumPy arrays."""
    OBJECTS = 3
    """A class or function that may be anything, such as the model's own."""
    DANGER = 4
    """It runs, reads or writes what it likes, or fetches what does."""


_STORAGES = r"torch(\.cuda)?(\.sparse)?\.[A-Z]\w*(Storage|Tensor)"
_DTYPES = (
    r"torch\.(q?u?int\d\w*|b?float\d\w*|complex\d+|bool|bits\d\w*"
    r"|per_(tensor|channel)_(affine|symmetric|affine_float_qparams))"
)
_REBUILT = (
    r"torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?|qtensor|sparse_tensor"
    r"|nested_tensor|wrapper_subclass|meta_tensor_no_storage"
    r"|device_tensor_from_(numpy|cpu_tensor))"
)
_TENSORS = re.compile(
    rf"{_STORAGES}|{_DTYPES}|{_REBUILT}"
    r"|torch\.(Size|Tensor|device|nn\.parameter\.Parameter|_tensor\._rebuild_from_type_v2"
    r"|serialization\._get_layout|storage\.(Typed|Untyped)Storage)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|set|complex)"
)
"""What torch.load(weights_only=True) takes (torch/_weights_only_unpickler.py)."""

_VALUES = re.compile(
    r"numpy\.(_?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)"
    r"|ndarray|dtype|dtypes\.\w+|bool_?|u?int\d+|float\d+|complex\d+|ma\.core\._mareconstruct)"
    r"|builtins\.(object|bool|int|float|str|bytes|list|tuple|dict|frozenset|slice|range)"
    r"|collections\.(deque|defaultdict)|copyreg\._reconstructor"
    r"|datetime\.(date|datetime|time|timedelta|timezone)|decimal\.Decimal|fractions\.Fraction"
    r"|uuid\.UUID|ipaddress\.IPv[46](Address|Network)|array\._array_reconstructor|random\.Random"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path|argparse\.Namespace|types\.SimpleNamespace"
    r"|joblib\.numpy_pickle\.NumpyArrayWrapper"
)
"""What only makes the value that it is given."""

# picklescan warns of functools.partial; it calls only what the pickle names as well.
_OBJECTS = re.compile(r"functools\.partial|logging\.(getLogger|Logger)|re\._compile|enum\.\w+")

_DANGER = re.compile(
    # What loads other files or code.
    r"torch\.(load|save|from_file|compile|hub|package|jit|export|ops|classes|library|_C|_ops"
    r"|_inductor|_dynamo|multiprocessing|distributed|onnx|testing|utils\.(cpp_extension|model_zoo"
    r"|collect_env|bottleneck|_config_module|data\.datapipes)|serialization\.(load|save))\b.*"
    r"|torch\.storage\._load_from_bytes"
    r"|(joblib|dill|cloudpickle|pip|setuptools|pkg_resources|distutils|cffi|IPython|requests"
    r"|urllib3|httpx|paramiko|fabric|sh|pexpect|psutil|py)\b.*"
    r"|numpy\.(load|fromfile|memmap|save\w*|f2py|distutils|testing|ctypeslib|lib)\b.*"
    r"|pandas\.(eval|read_\w+|io\b.*|core\.computation\b.*)"
)

_MODULES = re.compile(
    r"(.*\.)?_*(os|sys|io|subprocess|builtins|importlib|shutil|socket|ctypes|pickle|runpy|pty|posix"
    r"|nt|marshal|types|inspect|operator|code|pdb|asyncio|multiprocessing|threading)_*(\..*)?"
)
"""Modules that others import, and so are attributes of them: torch.serialization.os."""


def judge(module: str, name: str, *, protocol: int = 4) -> Verdict:
    """Say what an import is good for; `protocol` is the pickle's."""
    if (module, name) == UNKNOWN:
        return Verdict.DANGER
    if protocol < 3:  # pickle's own table from Python 2's names to Python 3's
        module, name = NAME_MAPPING.get((module, name), (module, name))
        module = IMPORT_MAPPING.get(module, module)
    full = f"{module}.{name}"
    if "." not in name and _TENSORS.fullmatch(full):
        return Verdict.TENSORS
    if "." not in name and _VALUES.fullmatch(full):
        return Verdict.VALUES
    if _OBJECTS.fullmatch(full):
        return Verdict.OBJECTS
    dangerous = (
        module.partition(".")[0] in sys.stdlib_module_names
        or _DANGER.fullmatch(full)
        or _MODULES.fullmatch(name)
        or _walks(name)
        or _is_known_attack(module, name)
    )
    return Verdict.DANGER if dangerous else Verdict.OBJECTS


def _walks(name: str) -> bool:
    """Tell whether a name leads from attribute to attribute, other than to a class in a class."""
    parts = name.split(".")
    return any(part.startswith("__") for part in parts) or (
        len(parts) > 1 and not parts[0][:1].isupper()
    )


@functools.lru_cache(maxsize=4096)
def _is_known_attack(module: str, name: str) -> bool:
    """Ask picklescan for its opinion on one import, as the pickle that only does that."""
    from picklescan.scanner import SafetyLevel, scan_pickle_bytes  # 30 ms: only where it is needed

    if "\n" in module + name:
        return True
    logging.getLogger("picklescan").setLevel(logging.CRITICAL + 1)  # what it finds we say
    text = f"c{module}\n{name}\n.".encode("utf-8", "backslashreplace")
    found = scan_pickle_bytes(io.BytesIO(text), module).globals
    return any(entry.safety is SafetyLevel.Dangerous for entry in found)
