// What this machine can do at best, measured with all threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace tokenmill {

// Reads memory, whole MiB of it, in four streams per thread.
TOKENMILL_KERNEL(read_memory, void(const void* data, std::size_t bytes));

// Dot products of bf16 or int8 in registers, by the fastest instructions that the kernels of this instruction set use.
// Return the operations done, a multiplication and an addition being two.
TOKENMILL_KERNEL(peak_bf16, std::int64_t(int rounds));
TOKENMILL_KERNEL(peak_int8, std::int64_t(int rounds));

}  // namespace tokenmill
