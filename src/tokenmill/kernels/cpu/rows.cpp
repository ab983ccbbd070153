#include "rows.h"

#include <cmath>
#include <cstring>

#include "threads.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// The next n elements, where n may be less than a vector: then the other lanes are zeros and not read or written.
template <class T>
F load_some(const T* p, int n) {
    if (n >= 16) return load(p);
    T lanes[16] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}

void store_some(bf16* p, F x, int n) {
    if (n >= 16) return store(p, x);
    bf16 lanes[16];
    store(lanes, x);
    std::memcpy(p, lanes, n * sizeof(bf16));
}

template <class Row>
void for_rows(int m, Row&& row) {
    constexpr int at_once = 16;  // rows of a task: waking a thread costs more than a few rows
    parallel((m + at_once - 1) / at_once, [&](int task, int) {
        const int end = m < (task + 1) * at_once ? m : (task + 1) * at_once;
        for (int r = task * at_once; r < end; ++r) row(static_cast<std::int64_t>(r));
    });
}

}  // namespace

float rms_scale(const bf16* x, int n, float eps) {
    F squares = zero();
    for (int i = 0; i < n; i += 16) {
        const F part = load_some(x + i, n - i);
        squares = fma(part, part, squares);
    }
    return 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
}

void rms_norm(const bf16* x, const float* weight, float eps, int m, int n, bf16* out) {
    for_rows(m, [=](std::int64_t r) {
        const bf16* from = x + r * n;
        const F scale = set(rms_scale(from, n, eps));
        for (int i = 0; i < n; i += 16) {
            store_some(out + r * n + i, load_some(from + i, n - i) * scale * load_some(weight + i, n - i), n - i);
        }
    });
}

void rms_norm_add(const bf16* x, const float* weight, float eps, int m, int n, bf16* out) {
    for_rows(m, [=](std::int64_t r) {
        const bf16* from = x + r * n;
        bf16* to = out + r * n;
        const F scale = set(rms_scale(from, n, eps));
        for (int i = 0; i < n; i += 16) {
            const F normed = load_some(from + i, n - i) * scale * load_some(weight + i, n - i);
            store_some(to + i, load_some(to + i, n - i) + normed, n - i);
        }
    });
}

void gate(const bf16* x, Gate activation, int m, int n, bf16* out) {
    for_rows(m, [=](std::int64_t r) {
        const bf16* from = x + 2 * r * n;
        for (int i = 0; i < n; i += 16) {
            const F gated = load_some(from + i, n - i), up = load_some(from + n + i, n - i);
            store_some(out + r * n + i, (activation == Gate::silu ? silu(gated) : gelu(gated)) * up, n - i);
        }
    });
}

void norm_and_rotate(const bf16* x, float scale, const float* weight, const float* cos, const float* sin, int half,
                     int width, bf16* out) {
    const auto normed = [&](int i, int n) {
        const F part = load_some(x + i, n);
        return weight == nullptr ? part : part * set(scale) * load_some(weight + i, n);
    };
    for (int i = 0; i < half; i += 16) {
        const int n = half - i;
        const F first = normed(i, n), second = normed(half + i, n), c = load_some(cos + i, n), s = load_some(sin + i, n);
        store_some(out + i, first * c - second * s, n);
        store_some(out + half + i, second * c + first * s, n);
    }
    for (int i = 2 * half; i < width; i += 16) store_some(out + i, normed(i, width - i), width - i);
}

void rope(const bf16* x, const float* cos, const float* sin, int half, int tokens, int heads, int width, bf16* out) {
    for_rows(tokens, [=](std::int64_t t) {
        for (int head = 0; head < heads; ++head) {
            const std::int64_t at = (t * heads + head) * width;
            norm_and_rotate(x + at, 1.0f, nullptr, cos + t * half, sin + t * half, half, width, out + at);
        }
    });
}

}  // namespace tokenmill::TOKENMILL_ISA
