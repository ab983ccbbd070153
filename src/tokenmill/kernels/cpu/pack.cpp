#include "pack.h"

#include "threads.h"
#include "vec.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int kPanel = 32;
constexpr int kLevels = 15;      // the largest q
constexpr float kFloor = 0.47f;  // what (q * m >> 4) loses to q * m / 16 on average

// The row of the matrix in one lane of a panel, or -1 for padding.
int row_of(const Weight& w, int panel, int lane) {
    const int width = w.gated ? w.n / 2 : w.n;
    const int row = (w.gated ? panel / 2 : panel) * kPanel + lane;
    if (row >= width) return -1;
    return w.gated && panel % 2 == 1 ? width + row : row;
}

// One row as floats, with zeros up to `depth` and to the next 16.
void read_row(const Matrix& from, int row, const Weight& w, float* out) {
    const std::int64_t start = row * from.stride;
    if (from.is_float) {
        std::memcpy(out, static_cast<const float*>(from.data) + start, sizeof(float) * w.k);
    } else {
        const bf16* in = static_cast<const bf16*>(from.data) + start;
        for (int i = 0; i < w.k; ++i) out[i] = to_float(in[i]);
    }
    for (int i = w.k; i < (w.depth + 15) / 16 * 16; ++i) out[i] = 0.0f;
}

bool finite(const float* x, int count) {
    F bad = zero();
    for (int i = 0; i < count; i += 16) bad = fma(load(x + i), zero(), bad);
    return sum(bad) == 0.0f;
}

// ---- bf16 and int8 ----

void put_bf16(const float* x, const Weight& w, int panel, int lane) {
    bf16* out = static_cast<bf16*>(w.data) + std::int64_t{panel} * w.depth * kPanel + 2 * lane;
    for (int i = 0; i < w.depth; i += 2, out += 2 * kPanel) {
        out[0] = to_bf16(x[i]);
        out[1] = to_bf16(x[i + 1]);
    }
}

void put_int8(const float* x, const Weight& w, int panel, int lane) {
    F most = zero();
    for (int i = 0; i < w.depth; i += 16) most = max(most, abs(load(x + i)));
    const float range = largest(most);
    const bool usable = finite(x, w.depth);
    w.scales[panel * kPanel + lane] = usable ? range / 127.0f : NAN;
    const F inverse = set(usable && range > 1e-35f ? 127.0f / range : 0.0f);
    auto* out = static_cast<std::uint8_t*>(w.data) + std::int64_t{panel} * w.depth * kPanel + 4 * lane;
    for (int i = 0; i < w.depth; i += 16) {
        std::int8_t q[16];
        store_int8(q, usable ? to_int(load(x + i) * inverse) : izero());
        for (int j = 0; j < 16 && i + j < w.depth; ++j) {
            out[(i + j) / 4 * 4 * kPanel + j % 4] = static_cast<std::uint8_t>(q[j] + 128);
        }
    }
}

// ---- int4 ----

// The levels low + q * step of a group.
struct Levels {
    float low, step;
};

F floor(F x) {
    const F nearest = round(x);
    return choose_less(x, nearest, nearest - set(1.0f), nearest);
}

F clamp_level(F q) { return min(set(kLevels), max(zero(), q)); }

float squared_error(const float* x, const float* importance, int count, Levels levels) {
    const F low = set(levels.low), step = set(levels.step), inverse = set(1.0f / levels.step);
    F total = zero();
    for (int i = 0; i < count; i += 16) {
        const F value = load(x + i);
        const F error = value - fma(clamp_level(round((value - low) * inverse)), step, low);
        total = fma(importance != nullptr ? error * load(importance + i) : error, error, total);
    }
    return sum(total);
}

Levels best_levels(const float* x, const float* importance, int count, bool symmetric) {
    F highest = zero(), lowest = zero();
    for (int i = 0; i < count; i += 16) {
        highest = max(highest, load(x + i));
        lowest = max(lowest, zero() - load(x + i));
    }
    const float high = largest(highest), low = -largest(lowest);
    const float widest = symmetric ? (high / 7 > -low / 8 ? high / 7 : -low / 8) : (high - low) / kLevels;
    if (widest < 1e-30f) return {0.0f, 0.0f};
    Levels best{};
    float least = INFINITY;
    for (int percent = 100; percent >= 60; percent -= 4) {
        const float step = widest * static_cast<float>(percent) / 100;
        const float start = symmetric ? -8 * step : (high + low) / 2 - step * kLevels / 2;
        // Zero lies within the levels of a group, so that its offset is not negative.
        const Levels tried{start > 0 ? 0 : start + kLevels * step < 0 ? -kLevels * step : start, step};
        const float error = squared_error(x, importance, count, tried);
        if (error < least) {
            least = error;
            best = tried;
        }
    }
    return best;
}

int to_multiplier(float step, float scale) {
    const int m = static_cast<int>(16 * step / scale + 0.5f);
    return step == 0 ? 0 : m < 1 ? 1 : m > 255 ? 255 : m;
}

// The offset that puts the lowest level at `low`, within what keeps all of them between -127 and 127.
int to_offset(int m, float low, float scale) {
    const int wanted = static_cast<int>(-low / scale - kFloor + 0.5f), least = (kLevels * m >> 4) - 127;
    return wanted < least ? least : wanted < 0 ? 0 : wanted > 127 ? 127 : wanted;
}

// The nearest of the levels (q * m >> 4) - b to each x / scale.
void nearest_levels(const float* x, int count, float scale, int m, int b, std::int32_t* q) {
    const F inverse = set(1.0f / scale), offset = set(static_cast<float>(b));
    const F step = set(static_cast<float>(m) / 16), per_step = set(m == 0 ? 0.0f : 16.0f / static_cast<float>(m));
    for (int i = 0; i < count; i += 16) {
        const F target = fma(load(x + i), inverse, offset);
        const F below = clamp_level(floor((target + set(kFloor)) * per_step)), above = clamp_level(below + set(1.0f));
        const F error_below = abs(target - floor(below * step)), error_above = abs(target - floor(above * step));
        store(q + i, to_int(choose_less(error_above, error_below, above, below)));
    }
}

// The places of four-bit numbers: see `unpack` in linear.cpp. Two bytes hold the inputs 1, 5, 0, 4 and two more 3, 7,
// 2, 6 of every eight, from the lowest bits up.
void put_nibbles(const std::int32_t* q, const Weight& w, int panel, int lane) {
    auto* out = static_cast<std::uint8_t*>(w.data) + std::int64_t{panel} * w.depth * (kPanel / 2) + 4 * lane;
    for (int i = 0; i < w.depth; i += 8, out += 4 * kPanel) {
        for (int byte = 0; byte < 4; ++byte) {
            const int input = i + byte / 2 * 2 + 1 - byte % 2;
            out[byte] = static_cast<std::uint8_t>(q[input] | q[input + 4] << 4);
        }
    }
}

int get_nibble(const Weight& w, int panel, int lane, int input) {
    const auto* bytes = static_cast<const std::uint8_t*>(w.data) + std::int64_t{panel} * w.depth * (kPanel / 2);
    const int byte = input % 4 / 2 * 2 + 1 - input % 2;
    return bytes[input / 8 * 4 * kPanel + 4 * lane + byte] >> (input % 8 / 4 * 4) & 15;
}

std::int64_t group_place(const Weight& w, int panel, int group, int lane) {
    return (std::int64_t{panel} * (w.depth / w.group) + group) * kPanel + lane;
}

void put_int4(const float* x, const float* importance, const Weight& w, int panel, int lane, Levels* levels,
              std::int32_t* q) {
    const bool symmetric = w.offsets == nullptr;
    const bool usable = finite(x, w.depth);
    float scale = 0;
    for (int group = 0; group < w.depth / w.group; ++group) {
        const int start = group * w.group;
        const float* counts = importance != nullptr ? importance + start : nullptr;
        const Levels one = usable ? best_levels(x + start, counts, w.group, symmetric) : Levels{};
        levels[group] = one;
        const float high = one.low + kLevels * one.step;
        const float most = high > -one.low ? high : -one.low;
        scale = std::fmax(scale, std::fmax(most / 127, one.step * 16 / 255));
    }
    w.scales[panel * kPanel + lane] = usable ? scale : NAN;
    if (scale == 0) scale = 1;
    for (int group = 0; group < w.depth / w.group; ++group) {
        const std::int64_t place = group_place(w, panel, group, lane);
        const int m = to_multiplier(levels[group].step, scale);
        const int b = symmetric ? m / 2 : to_offset(m, levels[group].low, scale);
        w.multipliers[place] = static_cast<std::uint8_t>(m);
        if (!symmetric) w.offsets[place] = static_cast<std::uint8_t>(b);
        nearest_levels(x + group * w.group, w.group, scale, m, b, q + group * w.group);
    }
    put_nibbles(q, w, panel, lane);
}

void put_quantized(const Quantized& from, int row, const Weight& w, int panel, int lane, std::int32_t* q) {
    const int groups = w.depth / w.group;
    const std::int64_t first = std::int64_t{row} * groups;
    const float* scales = from.scales + first;
    const auto zero_of = [&](int group) { return from.zeros != nullptr ? from.zeros[first + group] : 8.0f; };
    float scale = 0;
    for (int group = 0; group < groups; ++group) {
        const float z = zero_of(group), s = scales[group];
        scale = std::fmax(scale, std::fmax(std::fmax(z * s / 127, (kLevels - z) * s / 126), s * 16 / 255));
    }
    w.scales[panel * kPanel + lane] = scale;
    for (int group = 0; group < groups; ++group) {
        const std::int64_t place = group_place(w, panel, group, lane);
        const int m = scale == 0 ? 0 : to_multiplier(scales[group], scale);
        w.multipliers[place] = static_cast<std::uint8_t>(m);
        if (w.offsets != nullptr) w.offsets[place] = static_cast<std::uint8_t>(zero_of(group) * m / 16);
    }
    for (int i = 0; i < w.depth; ++i) q[i] = i < w.k ? from.q[std::int64_t{row} * w.k + i] : 0;
    put_nibbles(q, w, panel, lane);
}

// Lanes of padding keep the zeros of their scale; bytes that stand for w = 0 are 128 in int8.
void put_padding(const Weight& w, int panel, int lane) {
    if (w.format != Format::int8) return;
    auto* out = static_cast<std::uint8_t*>(w.data) + std::int64_t{panel} * w.depth * kPanel + 4 * lane;
    for (int i = 0; i < w.depth; i += 4, out += 4 * kPanel) std::memset(out, 128, 4);
}

}  // namespace

void pack(const Matrix& from, const float* importance, const Weight& to) {
    const std::size_t length = (static_cast<std::size_t>(to.depth) + 63) / 64 * 64;
    parallel(to.panels, [&](int panel, int thread) {
        auto* x = static_cast<float*>(scratch(thread, 4 * length * sizeof(float)));
        auto* q = reinterpret_cast<std::int32_t*>(x + length);
        auto* levels = reinterpret_cast<Levels*>(x + 2 * length);
        for (int lane = 0; lane < kPanel; ++lane) {
            const int row = row_of(to, panel, lane);
            if (row < 0) {
                put_padding(to, panel, lane);
                continue;
            }
            read_row(from, row, to, x);
            switch (to.format) {
                case Format::bf16:
                    put_bf16(x, to, panel, lane);
                    break;
                case Format::int8:
                    put_int8(x, to, panel, lane);
                    break;
                case Format::int4:
                    put_int4(x, importance, to, panel, lane, levels, q);
            }
        }
    });
}

void pack_quantized(const Quantized& from, const Weight& to) {
    parallel(to.panels, [&](int panel, int thread) {
        auto* q = static_cast<std::int32_t*>(scratch(thread, to.depth * sizeof(std::int32_t)));
        for (int lane = 0; lane < kPanel; ++lane) {
            const int row = row_of(to, panel, lane);
            if (row >= 0) put_quantized(from, row, to, panel, lane, q);
        }
    });
}

void unpack(const Weight& from, float* to) {
    parallel(from.panels, [&](int panel, int) {
        for (int lane = 0; lane < kPanel; ++lane) {
            const int row = row_of(from, panel, lane);
            if (row < 0) continue;
            float* out = to + std::int64_t{row} * from.k;
            const std::int64_t start = std::int64_t{panel} * from.depth * kPanel;
            for (int i = 0; i < from.k; ++i) {
                if (from.format == Format::bf16) {
                    const bf16* data = static_cast<const bf16*>(from.data);
                    out[i] = to_float(data[start + i / 2 * 2 * kPanel + 2 * lane + i % 2]);
                    continue;
                }
                int w = 0;
                if (from.format == Format::int8) {
                    const auto* data = static_cast<const std::uint8_t*>(from.data);
                    w = data[start + i / 4 * 4 * kPanel + 4 * lane + i % 4] - 128;
                } else {
                    const std::int64_t place = group_place(from, panel, i / from.group, lane);
                    const int m = from.multipliers[place], b = from.offsets != nullptr ? from.offsets[place] : m / 2;
                    w = (get_nibble(from, panel, lane, i) * m >> 4) - b;
                }
                out[i] = static_cast<float>(w) * from.scales[panel * kPanel + lane];
            }
        }
    });
}

}  // namespace tokenmill::TOKENMILL_ISA
