// What this machine can do at best, measured: the lines that the other kernels are compared with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace tokenmill {

// Reads the memory once on all threads, four streams each. Returns a sum of it, so that the reading is not optimized
// away.
TOKENMILL_KERNEL(read_memory, std::int64_t(const void* data, std::size_t bytes));

// Dot products of registers, `rounds` times 24 * 16 lanes per thread: pairs of bf16, or quads of int8.
TOKENMILL_KERNEL(peak_bf16, float(int rounds));
TOKENMILL_KERNEL(peak_int8, std::int32_t(int rounds));

}  // namespace tokenmill
