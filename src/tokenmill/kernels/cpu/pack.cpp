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

const void* row_at(const Matrix& from, int row) {
    const std::int64_t start = row * from.stride;
    return from.is_float ? static_cast<const void*>(static_cast<const float*>(from.data) + start)
                         : static_cast<const bf16*>(from.data) + start;
}

// One row as floats, with zeros up to `depth` and to the next 16.
void read_row(const Matrix& from, int row, const Weight& w, float* out) {
    if (from.is_float) {
        std::memcpy(out, row_at(from, row), sizeof(float) * w.k);
    } else {
        const bf16* in = static_cast<const bf16*>(row_at(from, row));
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

// A panel whose rows are all there, in pieces that stay in the cache while lanes are written side by side.
void put_bf16_panel(const Matrix& from, const Weight& w, int panel) {
    constexpr int kPairs = 64;
    auto* out = static_cast<std::uint32_t*>(w.data) + std::int64_t{panel} * (w.depth / 2) * kPanel;
    const int pairs = w.k / 2;
    for (int start = 0; start < pairs; start += kPairs) {
        const int stop = start + kPairs < pairs ? start + kPairs : pairs;
        for (int lane = 0; lane < kPanel; ++lane) {
            const auto* row = static_cast<const char*>(row_at(from, row_of(w, panel, lane)));
            for (int i = start; i < stop; ++i) std::memcpy(out + i * kPanel + lane, row + 4 * std::int64_t{i}, 4);
        }
    }
}

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
        for (int j = 0; j < 16 && i + j < w.depth; j += 4) {
            std::uint32_t quad;
            std::memcpy(&quad, q + j, 4);
            quad ^= 0x80808080u;  // each byte + 128
            std::memcpy(out + (i + j) * kPanel, &quad, 4);
        }
    }
}

// Lanes of padding keep the zeros of their scale; bytes that stand for w = 0 are 128 in int8.
void put_padding(const Weight& w, int panel, int lane) {
    if (w.format != Format::int8) return;
    auto* out = static_cast<std::uint8_t*>(w.data) + std::int64_t{panel} * w.depth * kPanel + 4 * lane;
    for (int i = 0; i < w.depth; i += 4, out += 4 * kPanel) std::memset(out, 128, 4);
}

// bf16 or int8; x is room for a row, with padding.
void put_panel(const Matrix& from, const Weight& w, int panel, float* x) {
    const bool whole = row_of(w, panel, kPanel - 1) >= 0;
    if (w.format == Format::bf16 && !from.is_float && whole && w.k == w.depth) {
        put_bf16_panel(from, w, panel);
        return;
    }
    for (int lane = 0; lane < kPanel; ++lane) {
        const int row = row_of(w, panel, lane);
        if (row < 0) {
            put_padding(w, panel, lane);
            continue;
        }
        read_row(from, row, w, x);
        if (w.format == Format::int8) {
            put_int8(x, w, panel, lane);
        } else {
            put_bf16(x, w, panel, lane);
        }
    }
}

// ---- int4 ----
//
// Sixteen outputs at a time, one to a lane, so that all that is particular to a group of inputs is a vector. The search
// is that of quant/formats/int4.py.

constexpr int kLanes = 16;
constexpr float kShares[] = {0.96f, 0.9f, 0.83f};  // of a group's range that the levels span at first
constexpr float kPlaces[] = {0.0f, 0.5f, 1.0f};  // of the part that they do not: how much lies below them
constexpr int kFits = 2;                         // after the first, of the best levels

// The levels low + q * step of a group, and by how much they lower its error.
struct Levels {
    F low, step, gain;
};

// A group of sixteen outputs: x[input][16], what an error of each input counts, and sums of both.
struct Group {
    const float* x;
    const float* importance;
    int inputs;
    F total, weighted;
};

F floor(F x) {
    const F nearest = round(x);
    return choose_less(x, nearest, nearest - set(1.0f), nearest);
}

F clamp(F x, float least, float most) { return min(set(most), max(set(least), x)); }

F inverse_of(F x) { return choose_less(zero(), x, set(1.0f) / x, zero()); }

// Assigns every weight to the nearest level; the regression of the weights on the q they got gives the best levels for
// these q.
Levels fit(const Group& group, const Levels& from, bool symmetric) {
    const F inverse = inverse_of(from.step), shift = zero() - from.low * inverse;
    F q1 = zero(), q2 = zero(), xq = zero();
    for (int i = 0; i < group.inputs; ++i) {
        const F x = load(group.x + kLanes * i), q = clamp(round(fma(x, inverse, shift)), 0, kLevels);
        const F counted = q * set(group.importance[i]);
        q1 = q1 + counted;
        q2 = fma(counted, q, q2);
        xq = fma(counted, x, xq);
    }
    if (symmetric) {  // of x on q - 8, through zero
        const F along = fma(set(-8.0f), group.weighted, xq);
        const F length = fma(set(64.0f), group.total, fma(set(-16.0f), q1, q2));
        const F step = max(zero(), along * inverse_of(length));
        return {set(-8.0f) * step, step, along * step};
    }
    const F inverse_total = inverse_of(group.total), mean = group.weighted * inverse_total, middle = q1 * inverse_total;
    const F along = xq - mean * q1, length = q2 - middle * q1;
    const F least = set(1e-4f) * group.total;  // below it all q are one
    const F step = choose_less(least, length, along * inverse_of(length), from.step);
    return {mean - middle * step, step, fma(along, step, mean * group.weighted)};
}

Levels best_levels(const Group& group, bool symmetric) {
    F high = zero(), low = zero();  // zero lies within the levels: offsets are not negative
    for (int i = 0; i < group.inputs; ++i) {
        const F x = load(group.x + kLanes * i);
        high = max(high, x);
        low = min(low, x);
    }
    Levels best{zero(), zero(), set(-1.0f)};
    for (const float share : kShares) {
        for (const float place : kPlaces) {
            if (symmetric && place != 0.5f) continue;
            Levels tried{fma((high - low) * set(1 - share), set(place), low), (high - low) * set(share / kLevels), {}};
            if (symmetric) tried.step = max(high * set(share / 7), low * set(-share / 8));
            if (symmetric) tried.low = set(-8.0f) * tried.step;
            tried = fit(group, tried, symmetric);
            best.low = choose_less(best.gain, tried.gain, tried.low, best.low);
            best.step = choose_less(best.gain, tried.gain, tried.step, best.step);
            best.gain = max(best.gain, tried.gain);
        }
    }
    for (int i = 0; i < kFits; ++i) best = fit(group, best, symmetric);
    return best;
}

// What is stored of a group: levels floor(q * m / 16) - b, and the error that they leave of x / scale.
struct Stored {
    F m, b, error;
};

// The q of the nearest level to x / scale, and that level.
struct Nearest {
    F q, level;
};

struct Rounding {
    F inverse, step, per_step, b;

    Rounding(const Stored& stored, F inverse_scale)
        : inverse(inverse_scale), step(stored.m * set(1.0f / 16)), per_step(inverse_of(step)), b(stored.b) {}

    Nearest operator()(F x) const {
        const F target = fma(x, inverse, b);
        const F below = clamp(floor((target + set(kFloor)) * per_step), 0, kLevels);
        const F above = min(set(kLevels), below + set(1.0f));
        const F low = floor(below * step), high = floor(above * step);
        const F error_below = abs(target - low), error_above = abs(target - high);
        return {choose_less(error_above, error_below, above, below),
                choose_less(error_above, error_below, high, low) - b};
    }
};

// Of the multipliers next to the step, the one with the least error: each rounds its levels in its own way. Offsets
// keep the middle level in its place, within what keeps all of them between -127 and 127.
Stored store_levels(const Group& group, const Levels& levels, F inverse_scale, bool symmetric) {
    const F wanted = round(set(16.0f) * levels.step * inverse_scale);
    Stored best{zero(), zero(), set(INFINITY)};
    for (const float change : {0.0f, -1.0f, 1.0f}) {
        Stored tried{clamp(wanted + set(change), 0, 255), zero(), zero()};
        if (symmetric) {
            tried.b = floor(tried.m * set(0.5f));
        } else {
            const F middle = fma(set(kLevels / 2.0f), levels.step, levels.low) * inverse_scale;
            const F least = floor(tried.m * set(kLevels / 16.0f)) - set(127.0f);
            tried.b = round(fma(tried.m, set(kLevels / 32.0f), zero() - middle - set(kFloor)));
            tried.b = max(clamp(tried.b, 0, 127), least);
        }
        const Rounding nearest(tried, inverse_scale);
        for (int i = 0; i < group.inputs; ++i) {
            const F x = load(group.x + kLanes * i), error = fma(x, inverse_scale, zero() - nearest(x).level);
            tried.error = fma(error * set(group.importance[i]), error, tried.error);
        }
        best.m = choose_less(tried.error, best.error, tried.m, best.m);
        best.b = choose_less(tried.error, best.error, tried.b, best.b);
        best.error = min(best.error, tried.error);
    }
    return best;
}

// The places of four-bit numbers q[input][16]: see `unpack` in linear.cpp. Two bytes hold the inputs 1, 5, 0, 4 and two
// more 3, 7, 2, 6 of every eight, from the lowest bits up.
void put_nibbles(const std::int32_t* q, const Weight& w, int panel, int first) {
    auto* out = static_cast<std::uint8_t*>(w.data) + std::int64_t{panel} * w.depth * (kPanel / 2) + 4 * first;
    for (int i = 0; i < w.depth; i += 8, out += 4 * kPanel, q += 8 * kLanes) {
        const auto at = [&](int input) { return load(q + kLanes * input); };
        const I low = at(1) | shift_left<4>(at(5)) | shift_left<8>(at(0)) | shift_left<12>(at(4));
        const I high = at(3) | shift_left<4>(at(7)) | shift_left<8>(at(2)) | shift_left<12>(at(6));
        store_bytes(out, low | shift_left<16>(high));
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

void put_bytes(F values, std::uint8_t* out) {
    std::int32_t whole[kLanes];
    store(whole, to_int(values));
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = static_cast<std::uint8_t>(whole[lane]);
}

// Sixteen rows from lane `first` on as x[depth][16], a few inputs at a time so that the lanes meet in the cache. Rows
// that are not there or not finite become zeros; returned is what their scales become instead, 0 for all others.
F read_tile(const Matrix& from, const Weight& w, int panel, int first, float* x) {
    constexpr int kInputs = 64;
    for (int start = 0; start < w.depth; start += kInputs) {
        const int stop = start + kInputs < w.depth ? start + kInputs : w.depth;
        for (int lane = 0; lane < kLanes; ++lane) {
            const int row = row_of(w, panel, first + lane), end = stop < w.k ? stop : w.k;
            if (row < 0) {
                for (int i = start; i < stop; ++i) x[kLanes * i + lane] = 0.0f;
            } else if (from.is_float) {
                const float* in = static_cast<const float*>(row_at(from, row));
                for (int i = start; i < end; ++i) x[kLanes * i + lane] = in[i];
            } else {
                const bf16* in = static_cast<const bf16*>(row_at(from, row));
                for (int i = start; i < end; ++i) x[kLanes * i + lane] = to_float(in[i]);
            }
        }
    }
    for (int i = w.k * kLanes; i < w.depth * kLanes; ++i) x[i] = 0.0f;
    F bad = zero();
    for (int i = 0; i < w.depth; ++i) bad = fma(load(x + kLanes * i), zero(), bad);
    float spoiled[kLanes];
    store(spoiled, bad);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (spoiled[lane] == 0.0f) continue;
        for (int i = 0; i < w.depth; ++i) x[kLanes * i + lane] = 0.0f;
    }
    return bad;
}

// Sixteen outputs from lane `first` on. There is room for x[depth][16], q[depth][16] and the levels of all groups.
void put_int4(const Matrix& from, const float* importance, const Weight& w, int panel, int first, Levels* levels,
              float* x, std::int32_t* q) {
    const F bad = read_tile(from, w, panel, first, x);
    const bool symmetric = w.offsets == nullptr;
    const int groups = w.depth / w.group;
    const auto group_at = [&](int index) {
        Group group{x + index * w.group * kLanes, importance + index * w.group, w.group, zero(), zero()};
        for (int i = 0; i < w.group; ++i) {
            const F counts = set(group.importance[i]);
            group.total = group.total + counts;
            group.weighted = fma(load(group.x + kLanes * i), counts, group.weighted);
        }
        return group;
    };
    F scale = zero();
    for (int index = 0; index < groups; ++index) {
        levels[index] = best_levels(group_at(index), symmetric);
        const F low = levels[index].low, step = levels[index].step;
        const F most = max(zero() - low, fma(set(kLevels), step, low));
        scale = max(scale, max(most * set(1.0f / 127), step * set(16.0f / 255)));
    }
    const F inverse_scale = inverse_of(scale);
    F along = zero(), length = zero();
    for (int index = 0; index < groups; ++index) {
        const Group group = group_at(index);
        const Stored stored = store_levels(group, levels[index], inverse_scale, symmetric);
        const std::int64_t place = group_place(w, panel, index, first);
        put_bytes(stored.m, w.multipliers + place);
        if (!symmetric) put_bytes(stored.b, w.offsets + place);
        const Rounding nearest(stored, inverse_scale);
        for (int i = 0; i < group.inputs; ++i) {
            const F value = load(group.x + kLanes * i);
            const Nearest found = nearest(value);
            const F counted = found.level * set(group.importance[i]);
            along = fma(counted, value, along);
            length = fma(counted, found.level, length);
            store(q + kLanes * (index * w.group + i), to_int(found.q));
        }
    }
    // The scale that fits the whole numbers of a row best.
    const F fitted = choose_less(zero(), length, along / length, scale);
    store(w.scales + panel * kPanel + first, fitted + bad);
    put_nibbles(q, w, panel, first);
}

}  // namespace

void pack(const Matrix& from, const float* importance, const Weight& to) {
    const int length = (to.depth + kLanes - 1) / kLanes * kLanes;
    const std::size_t tile = static_cast<std::size_t>(length) * kLanes;
    const std::size_t groups = to.format == Format::int4 ? to.depth / to.group : 0;
    parallel(to.panels, [&](int panel, int thread) {
        if (to.format != Format::int4) {
            put_panel(from, to, panel, static_cast<float*>(scratch(thread, length * sizeof(float))));
            return;
        }
        const std::size_t bytes = groups * sizeof(Levels) + (2 * tile + length) * sizeof(float);
        auto* levels = static_cast<Levels*>(scratch(thread, bytes));
        auto* x = reinterpret_cast<float*>(levels + groups);
        auto* counts = x + tile;
        auto* q = reinterpret_cast<std::int32_t*>(counts + length);
        for (int i = 0; i < length; ++i) counts[i] = importance != nullptr && i < to.depth ? importance[i] : 1.0f;
        for (int first = 0; first < kPanel; first += kLanes) put_int4(from, counts, to, panel, first, levels, x, q);
    });
}

namespace {

void unpack_row(const Weight& from, int panel, int lane, float* out) {
    const std::int64_t start = std::int64_t{panel} * from.depth * kPanel;
    if (from.format == Format::bf16) {
        const bf16* data = static_cast<const bf16*>(from.data) + start + 2 * lane;
        for (int i = 0; i < from.k; ++i) out[i] = to_float(data[i / 2 * 2 * kPanel + i % 2]);
        return;
    }
    const float scale = from.scales[panel * kPanel + lane];
    const auto* bytes = static_cast<const std::uint8_t*>(from.data) + start + 4 * lane;
    for (int i = 0; i < from.k; ++i) {
        int w = 0;
        if (from.format == Format::int8) {
            w = bytes[i / 4 * 4 * kPanel + i % 4] - 128;
        } else {
            const std::int64_t place = group_place(from, panel, i / from.group, lane);
            const int m = from.multipliers[place], b = from.offsets != nullptr ? from.offsets[place] : m / 2;
            w = (get_nibble(from, panel, lane, i) * m >> 4) - b;
        }
        out[i] = static_cast<float>(w) * scale;
    }
}

}  // namespace

void unpack(const Weight& from, float* to) {
    parallel(from.panels, [&](int panel, int) {
        for (int lane = 0; lane < kPanel; ++lane) {
            const int row = row_of(from, panel, lane);
            if (row >= 0) unpack_row(from, panel, lane, to + std::int64_t{row} * from.k);
        }
    });
}

void gather(const Weight& from, const std::int64_t* rows, int count, float scale, bf16* to) {
    parallel(count, [&](int index, int thread) {
        const auto row = static_cast<int>(rows[index]);
        auto* x = static_cast<float*>(scratch(thread, from.k * sizeof(float)));
        unpack_row(from, row / kPanel, row % kPanel, x);
        bf16* out = to + std::int64_t{index} * from.k;
        for (int i = 0; i < from.k; ++i) out[i] = to_bf16(to_float(to_bf16(x[i])) * scale);
    });
}

}  // namespace tokenmill::TOKENMILL_ISA
