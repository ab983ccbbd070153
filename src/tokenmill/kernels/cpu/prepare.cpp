// Activations made ready for a weight; see linear.h.
#include "linear.h"
#include "linear_rows.h"
#include "linear_tiles.h"
#include "threads.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr std::size_t kAlign = 64;

// Whether the weight takes rows of bf16 without preparation.
bool as_they_are(const Weight& w, int m) { return w.format == Format::bf16 && w.k == w.depth && !in_tiles(w, m); }

std::size_t row_stride(const Weight& w) {
    const std::size_t bytes = w.format == Format::bf16 ? 2 * static_cast<std::size_t>(w.depth) : w.depth;
    return (bytes + kAlign - 1) / kAlign * kAlign;
}

// Bytes of the prepared rows.
std::size_t data_bytes(const Weight& w, int m) {
#if defined(__AMX_TILE__)
    if (in_tiles(w, m)) return std::size_t{kBlockRows} * row_blocks(m) * TileSteps(w).row_bytes();
#endif
    return m * row_stride(w);
}

std::size_t numbers_bytes(int m) { return (4 * static_cast<std::size_t>(m) + kAlign - 1) / kAlign * kAlign; }

void quantize_row(const bf16* x, int k, int depth, std::int8_t* out, float& scale, std::int32_t& sum) {
    const int whole = k / 16 * 16;
    const auto at = [&](int i) { return i < whole ? load(x + i) : get_some(x + i, k - i); };
    F most = zero(), bad = zero();
    for (int i = 0; i < k; i += 16) {
        const F value = at(i);
        most = max(most, abs(value));
        bad = fma(value, zero(), bad);  // NaN if the value is NaN or infinite
    }
    const float invalid = tokenmill::TOKENMILL_ISA::sum(bad), range = largest(most);
    const bool finite = invalid == 0.0f;
    scale = finite ? range / 127.0f : invalid;
    // The inverse of the smallest subnormal numbers is infinite: rows that small become zero.
    const float inverse = finite && range > 1e-35f ? 127.0f / range : 0.0f;
    I total = izero();
    for (int i = 0; i < depth; i += 16) {
        const I q = i < k && inverse != 0.0f ? to_int(at(i) * set(inverse)) : izero();
        total = total + q;
        store_int8(out + i, q);
    }
    std::int32_t lanes[16];
    store(lanes, total);
    sum = 0;
    for (std::int32_t lane : lanes) sum += lane;
}

}  // namespace

std::size_t rows_bytes(const Weight& weight, int m) {
    const Weight w = as_rows_see(weight);
    if (as_they_are(w, m)) return 0;
    return data_bytes(w, m) + (w.format == Format::bf16 ? 0 : 2 * numbers_bytes(m));
}

Rows prepare_rows(const Weight& weight, const bf16* x, std::int64_t stride, int m, void* memory) {
    const Weight w = as_rows_see(weight);
    if (as_they_are(w, m)) return {x, 2 * stride, nullptr, nullptr, m, false};
    auto* data = static_cast<char*>(memory);
    const auto row_bytes = static_cast<std::int64_t>(row_stride(w));
    auto* scales = reinterpret_cast<float*>(data + data_bytes(w, m));
    auto* sums = reinterpret_cast<std::int32_t*>(data + data_bytes(w, m) + numbers_bytes(m));
    const bool tiled = in_tiles(w, m);
    constexpr int some = 16;
    parallel((m + some - 1) / some, [&](int task, int thread) {
        const int end = (task + 1) * some < m ? (task + 1) * some : m;
        for (int r = task * some; r < end; ++r) {
            char* out = tiled ? static_cast<char*>(scratch(thread, row_bytes)) : data + r * row_bytes;
            [[maybe_unused]] const char* row = out;
            if (w.format != Format::bf16) {
                quantize_row(x + r * stride, w.k, w.depth, reinterpret_cast<std::int8_t*>(out), scales[r], sums[r]);
            } else if (tiled && w.k == w.depth) {
                row = reinterpret_cast<const char*>(x + r * stride);
            } else {
                const std::size_t bytes = 2 * static_cast<std::size_t>(w.k);
                std::memcpy(out, x + r * stride, bytes);
                std::memset(out + bytes, 0, 2 * static_cast<std::size_t>(w.depth) - bytes);
            }
#if defined(__AMX_TILE__)
            if (tiled) put_in_tiles(row, r, m, TileSteps(w), data);
#endif
        }
    });
    if (w.format == Format::bf16) return {data, row_bytes, nullptr, nullptr, m, tiled};
    return {data, row_bytes, scales, sums, m, tiled};
}

}  // namespace tokenmill::TOKENMILL_ISA
