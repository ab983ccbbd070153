"""What a call from Python into C++ costs: nanobind with addresses, beside torch's stable ABI with tensors.

    python benchmarks/bindings.py [--repeats 7]

Both calls take what a layer's call takes, six tensors, and compute nothing. Needs a C++ compiler; builds in a temporary
folder. Both sides take turns in one process; a repeat is the mean of 20,000 calls.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import nanobind
import torch
from common import save, spread

CALLS = 20_000
TENSORS = 6

STABLE = r"""
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
static int64_t sink;
void nothing(StableIValue* stack, uint64_t, uint64_t) {
    for (int i = 0; i < 6; ++i) {
        sink += reinterpret_cast<int64_t>(torch::stable::detail::to<torch::stable::Tensor>(stack[i]).data_ptr());
    }
}
STABLE_TORCH_LIBRARY(probe, m) {
    m.def("nothing(Tensor a, Tensor b, Tensor c, Tensor d, Tensor e, Tensor(x!) f) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(probe, CPU, m) { m.impl("nothing", &nothing); }
"""

ADDRESSES = r"""
#include <nanobind/nanobind.h>
namespace nb = nanobind;
static std::uintptr_t sink;
struct Layer {
    using A = std::uintptr_t;
    void operator()(A a, A b, A c, A d, A e, A f) { sink += a + b + c + d + e + f; }
};
NB_MODULE(probe, m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<Layer>(m, "Layer").def(nb::init<>()).def("__call__", &Layer::operator(), Release());
}
"""


def compile_to(folder: Path, name: str, source: str, *arguments: str) -> Path:
    (folder / f"{name}.cpp").write_text(source)
    library = folder / f"{name}.so"
    command = ["c++", "-std=c++20", "-O2", "-shared", "-fPIC", str(folder / f"{name}.cpp"), "-o", str(library)]
    subprocess.run([*command, *arguments], check=True)
    return library


def nanobind_layer(folder: Path) -> Any:
    include = Path(nanobind.include_dir())
    library = compile_to(
        folder, "probe", ADDRESSES, f"-I{include}", f"-I{include.parent / 'ext/robin_map/include'}",
        f"-I{sysconfig.get_paths()['include']}", str(include.parent / "src/nb_combined.cpp"), "-fvisibility=hidden",
    )  # fmt: skip
    found = importlib.util.spec_from_file_location("probe", library)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.Layer()


def stable_op(folder: Path) -> Any:
    home = Path(torch.__file__).parent
    libraries = [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    torch.ops.load_library(compile_to(folder, "stable", STABLE, f"-I{home / 'include'}", *libraries))
    return torch.ops.probe.nothing.default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    tensors = [torch.zeros(4, 64) for _ in range(TENSORS)]
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        op, layer = stable_op(Path(name)), nanobind_layer(Path(name))
        calls = {
            "torch stable ABI": lambda: op(*tensors),
            "nanobind and data_ptr": lambda: layer(*[tensor.data_ptr() for tensor in tensors]),
        }
        microseconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                began = time.perf_counter()
                for _ in range(CALLS):
                    call()
                microseconds[name].append((time.perf_counter() - began) / CALLS * 1e6)
    save("bindings", {"microseconds per call": {name: spread(values) for name, values in microseconds.items()}})


if __name__ == "__main__":
    main()
