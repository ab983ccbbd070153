"""The order of preference, and that a kernel is found by its place alone."""

import importlib.metadata
import sys
import types

import pytest
import torch

from tokenmill import kernels
from tokenmill.errors import ConfigError
from tokenmill.kernels import cpu
from tokenmill.kernels.dispatch import Op


def double(x):
    """The reference of the operation under test."""
    return x * 2


@pytest.fixture
def plugins(monkeypatch):
    """Installs modules as plugins for the operation `double`."""
    installed = []

    class EntryPoint:
        def __init__(self, module):
            self.module, self.value = module, module.__name__

        def load(self):
            return self.module

    def entry_points(*, group, name):
        return [EntryPoint(module) for module in installed if (group, name) == ("tokenmill.kernels", "double")]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    def install(name, **attributes):
        module = types.ModuleType(name)
        vars(module).update(attributes)
        installed.append(module)

    return install


@pytest.fixture
def native(monkeypatch, tmp_path):
    """Puts files into a folder of native kernels, as if `tokenmill/kernels` had it."""
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    monkeypatch.setattr(cpu, "__path__", [*cpu.__path__, str(tmp_path / "cpu")])
    yield lambda backend, source: (
        (tmp_path / backend).mkdir(exist_ok=True),
        (tmp_path / backend / "double.py").write_text(source),
    )
    made = [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__spec__", ""))]
    for name in made:
        del sys.modules[name]


def sources(op):
    return [implementation.source for implementation in op.implementations()]


def test_the_reference_runs_when_there_is_nothing_else():
    op = Op("double", double)
    assert sources(op) == ["reference"]
    assert op.active("cuda:1").function is double
    assert op(torch.tensor(3)).item() == 6
    assert op(x=torch.tensor(4)).item() == 8


def test_a_file_in_the_backend_folder_is_a_kernel(native):
    native("cpu", "def double(x):\n    return x + x + 0.5\n")
    op = Op("double", double)
    assert sources(op) == ["tokenmill.kernels.cpu.double", "reference"]
    assert op(torch.tensor(3.0)).item() == 6.5
    assert op.active("cuda").source == "reference"
    assert Op("triple", double).active("cpu").source == "reference"


def test_a_kernel_that_was_not_compiled_is_left_out(native):
    native("cpu", "from tokenmill.kernels.cpu import _never_compiled\n")
    assert sources(Op("double", double)) == ["reference"]


def test_cuda_tensors_go_to_triton(native):
    native("triton", "def double(x):\n    return x\n")
    op = Op("double", double)
    assert op.active("cuda").source == "tokenmill.kernels.triton.double"
    assert op.active(torch.device("cpu")).source == "reference"


def test_a_plugin_goes_before_native_kernels_on_its_devices(native, plugins):
    native("cpu", "def double(x):\n    return x\n")
    plugins("fast", DEVICES=("cpu",), double=lambda x: x * 2 + 1)
    plugins("elsewhere", DEVICES=("cuda",), double=lambda x: x)
    op = Op("double", double)
    assert sources(op) == ["fast", "elsewhere", "tokenmill.kernels.cpu.double", "reference"]
    assert op(torch.tensor(3)).item() == 7
    assert op.active("cuda").source == "elsewhere"
    assert op.active("meta").source == "reference"


@pytest.mark.parametrize("attributes", [{"double": double}, {"DEVICES": ("cpu",)}])
def test_a_plugin_must_define_its_devices_and_the_operation(plugins, attributes):
    plugins("broken", **attributes)
    with pytest.raises(ConfigError, match="broken") as raised:
        Op("double", double)(torch.tensor(1))
    assert raised.value.code == "broken_plugin"


def test_every_operation_is_public_under_its_own_name():
    assert all(getattr(kernels, op.name) is op and op.name in kernels.__all__ for op in kernels.OPS)
