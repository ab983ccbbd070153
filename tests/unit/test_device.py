import pytest

from tokenmill import device
from tokenmill.device import machine


@pytest.fixture
def files(monkeypatch):
    """The files of the operating system, replaced by texts; one that is not set is missing."""
    texts: dict[str, str] = {}
    monkeypatch.setattr(device, "_read", lambda path: texts.get(path, ""))
    return texts


def test_the_facts_are_those_of_a_machine():
    here = machine()
    assert here.processor
    assert here.cores >= 1
    assert 0 < here.available_bytes <= here.memory_bytes
    assert machine().memory_bytes == here.memory_bytes


def test_a_container_quota_lowers_the_cores(files, monkeypatch):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine().cores == 8
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert machine().cores == 8
    files["/sys/fs/cgroup/cpu.max"] = "250000 100000"
    assert machine().cores == 2
    files["/sys/fs/cgroup/cpu.max"] = "10000 100000"
    assert machine().cores == 1


def test_affinity_lowers_the_cores(files, monkeypatch):
    files["/sys/fs/cgroup/cpu.max"] = "800000 100000"
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert machine().cores == 2


@pytest.mark.parametrize(
    "file", ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"], ids=["cgroup-v2", "cgroup-v1"]
)
def test_a_container_limit_lowers_the_memory(files, file):
    files[file] = str(2**20)
    assert machine().memory_bytes == 2**20
    assert machine().available_bytes <= 2**20


def test_what_a_container_uses_is_not_free_but_its_cached_files_are(files):
    files["/sys/fs/cgroup/memory.max"] = "1000"
    files["/sys/fs/cgroup/memory.current"] = "700"
    files["/sys/fs/cgroup/memory.stat"] = "anon 500\ninactive_file 200\n"
    assert machine().available_bytes == 500


def test_an_unlimited_container_has_the_memory_of_the_machine(files):
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert machine().memory_bytes > 2**20


def test_instruction_sets_are_read_where_the_system_lists_them(monkeypatch):
    monkeypatch.setattr(device, "_cpuinfo", lambda: {"model name": "Test CPU", "flags": "fpu avx2 fma sse amx_bf16"})
    assert machine().processor == "Test CPU"
    assert machine().instruction_sets == ("avx2", "fma", "amx_bf16")
    monkeypatch.setattr(device, "_cpuinfo", dict)
    assert machine().instruction_sets == ()
