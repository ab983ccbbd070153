"""What torch sees, and the choice of a device."""

import types

import pytest
import torch

from tokenmill.errors import ConfigError
from tokenmill.kernels.probe import choose_device, probe


@pytest.fixture
def two_gpus(monkeypatch):
    properties = types.SimpleNamespace(name="Imaginary", total_memory=8 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_probe_without_a_gpu():
    found = probe()
    assert found.accelerators == ()
    assert found.threads == torch.get_num_threads()
    assert found.torch_version == torch.__version__
    assert found.cpu_capability


@pytest.mark.usefixtures("two_gpus")
def test_probe_lists_every_gpu():
    first, second = probe().accelerators
    assert (first.device, second.device) == ("cuda:0", "cuda:1")
    assert (first.name, first.memory_bytes, first.capability, first.bf16) == ("Imaginary", 8 << 30, (9, 0), True)


@pytest.mark.usefixtures("two_gpus")
def test_auto_prefers_a_gpu():
    assert choose_device().type == "cuda"
    assert choose_device("cpu").type == "cpu"
    assert choose_device("cuda:1").index == 1


@pytest.mark.usefixtures("no_gpu")
def test_auto_falls_back_to_the_cpu():
    assert choose_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("name", "code"),
    [("gpu", "unknown_device"), ("mps", "unknown_device"), ("cuda:2", "no_such_device"), ("", "unknown_device")],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_device_that_cannot_be_used_is_refused(name, code):
    with pytest.raises(ConfigError) as raised:
        choose_device(name)
    assert (raised.value.code, raised.value.field) == (code, "device")


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="0 CUDA devices"):
        choose_device("cuda")
