// Sixteen lanes, whatever the machine: the few operations that the kernels are written in.
//
// Each translation unit is compiled once per instruction set, with TOKENMILL_ISA naming the namespace. `F` holds 16
// floats, `I` 16 32-bit integers. The dot products are what the matrix kernels live on:
//
//   dot_bf16(acc, w, a)   acc[i] += w[2i] * a.lo + w[2i+1] * a.hi     w: 32 bf16, a: one pair of bf16 for all lanes
//   dot_u8s8(acc, w, a)   acc[i] += sum of w[4i+j] * a[j], j = 0..3   w: 64 uint8, a: one quad of int8 for all lanes
//   dot_s16(acc, w, a)    acc[i] += w[2i] * a.lo + w[2i+1] * a.hi     w: 32 int16, a: one pair of int16 for all lanes
//
// w is a vector, or memory to load it from: for dot_s16 int8, which become int16.
//
// Results are the same at every call site of one instruction set; between instruction sets the last bits of dot_bf16
// differ.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tokenmill::TOKENMILL_ISA {

inline float to_float(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Asks for a cache line that will be read soon. Any address will do.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// The same for what is not needed so soon, or too much for the first-level cache.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

struct F {
    __m512 v;
};
// Lanes of the type that the products of bytes have in the compiler: with any other it keeps sums in memory.
struct I {
    __v16si lanes;

    I() = default;
    I(__m512i x) : lanes(reinterpret_cast<__v16si>(x)) {}
    operator __m512i() const { return reinterpret_cast<__m512i>(lanes); }
};

inline F zero() { return {_mm512_setzero_ps()}; }
inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F load(const bf16* p) {
    return {_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
inline void store(bf16* p, F a) {
#if defined(__AVX512BF16__)
    const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(a.v);  // makes subnormal numbers zeros
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
#else
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F scale_by_power_of_two(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// a < b ? yes : no, so `no` where either is NaN.
inline F choose_less(F a, F b, F yes, F no) {
    return {_mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), yes.v)};
}
inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(F a) { return _mm512_reduce_max_ps(a.v); }

inline I izero() { return {_mm512_setzero_si512()}; }
inline I iset(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I load(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(std::int32_t* p, I a) { _mm512_storeu_si512(p, a); }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a, b)}; }
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a)}; }
inline I bits(F a) { return {_mm512_castps_si512(a.v)}; }
inline I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // rounds to nearest even
inline void store_int8(std::int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a));
}
inline void store_int16(std::int16_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a));
}
inline I widen_int8(const std::int8_t* p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline I load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(void* p, I a) { _mm512_storeu_si512(p, a); }
inline I widen_bytes(const std::uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a, b)}; }
inline I operator&(I a, I b) { return {_mm512_and_si512(a, b)}; }
inline I operator|(I a, I b) { return {_mm512_or_si512(a, b)}; }
template <int bits>
inline I shift_left(I a) {
    return {_mm512_slli_epi32(a, bits)};
}
template <int bits>
inline I shift_right(I a) {
    return {_mm512_srli_epi32(a, bits)};
}
inline I add_bytes(I a, I b) { return {_mm512_add_epi8(a, b)}; }
inline I multiply_low16(I a, I b) { return {_mm512_mullo_epi16(a, b)}; }
inline I multiply_high16(I a, I b) { return {_mm512_mulhi_epu16(a, b)}; }

inline F dot_bf16(F acc, I w, std::uint32_t a) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.lanes, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)))};
#else
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    acc.v = _mm512_fmadd_ps(low, _mm512_set1_ps(to_float(static_cast<bf16>(a))), acc.v);
    return {_mm512_fmadd_ps(high, _mm512_set1_ps(to_float(static_cast<bf16>(a >> 16))), acc.v)};
#endif
}

inline I dot_u8s8(I acc, I w, std::int32_t a) {
    const __m512i quad = _mm512_set1_epi32(a);
#if defined(__AVX512VNNI__)
    return {_mm512_dpbusd_epi32(acc, w, quad)};
#else
    // Bytes 0, 2 and 1, 3 apart: the 16-bit products then cannot saturate.
    const __m512i low = _mm512_set1_epi16(0x00ff);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, low),
                                           _mm512_srai_epi16(_mm512_slli_epi16(quad, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(quad, 8));
    return {_mm512_add_epi32(acc, _mm512_add_epi32(even, odd))};
#endif
}

inline I dot_s16(I acc, I w, std::uint32_t a) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(acc, w, pair)};
#else
    return {_mm512_add_epi32(acc, _mm512_madd_epi16(w, pair))};
#endif
}

#elif defined(__AVX2__) && defined(__FMA__)

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};

inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline __m256 half_from_bf16(const bf16* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline F load(const bf16* p) { return {half_from_bf16(p), half_from_bf16(p + 8)}; }
inline void store(bf16* p, F x) {
    alignas(32) float lanes[16];
    store(lanes, x);
    for (int i = 0; i < 16; ++i) p[i] = to_bf16(lanes[i]);
}
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F round(F x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
inline __m256 half_power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F scale_by_power_of_two(F x, F n) {
    return {_mm256_mul_ps(x.a, half_power_of_two(n.a)), _mm256_mul_ps(x.b, half_power_of_two(n.b))};
}
inline F choose_less(F x, F y, F yes, F no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline float sum(F x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_add_ps(x.a, x.b));
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}
inline float largest(F x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_max_ps(x.a, x.b));
    float most = lanes[0];
    for (int i = 1; i < 8; ++i) most = most > lanes[i] ? most : lanes[i];
    return most;
}

inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I iset(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I load(const std::int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void store(std::int32_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
inline I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline void store_int8(std::int8_t* p, I x) {
    alignas(32) std::int32_t lanes[16];
    store(lanes, x);
    for (int i = 0; i < 16; ++i) {
        p[i] = static_cast<std::int8_t>(lanes[i] > 127 ? 127 : lanes[i] < -128 ? -128 : lanes[i]);
    }
}
inline void store_int16(std::int16_t* p, I x) {
    // Packing works within halves of a register; the middle two quarters change places afterwards.
    const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0b11011000);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
inline I widen_int8(const std::int8_t* p) {
    const auto* halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(halves)), _mm256_cvtepi8_epi16(_mm_loadu_si128(halves + 1))};
}

inline I load_bytes(const void* p) {
    const auto* halves = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store_bytes(void* p, I x) {
    auto* halves = static_cast<__m256i*>(p);
    _mm256_storeu_si256(halves, x.a);
    _mm256_storeu_si256(halves + 1, x.b);
}
inline I widen_bytes(const std::uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I operator&(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I operator|(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int bits>
inline I shift_left(I x) {
    return {_mm256_slli_epi32(x.a, bits), _mm256_slli_epi32(x.b, bits)};
}
template <int bits>
inline I shift_right(I x) {
    return {_mm256_srli_epi32(x.a, bits), _mm256_srli_epi32(x.b, bits)};
}
inline I add_bytes(I x, I y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
inline I multiply_low16(I x, I y) { return {_mm256_mullo_epi16(x.a, y.a), _mm256_mullo_epi16(x.b, y.b)}; }
inline I multiply_high16(I x, I y) { return {_mm256_mulhi_epu16(x.a, y.a), _mm256_mulhi_epu16(x.b, y.b)}; }

inline __m256 half_dot_bf16(__m256 acc, __m256i pairs, float low, float high) {
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_set1_ps(low), acc);
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pairs, upper)), _mm256_set1_ps(high), acc);
}
inline F dot_bf16(F acc, I w, std::uint32_t a) {
    const float low = to_float(static_cast<bf16>(a)), high = to_float(static_cast<bf16>(a >> 16));
    return {half_dot_bf16(acc.a, w.a, low, high), half_dot_bf16(acc.b, w.b, low, high)};
}
// Bytes 0, 2 and 1, 3 apart: the 16-bit products then cannot saturate.
inline __m256i half_dot_u8s8(__m256i acc, __m256i weights, __m256i quad) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(weights, _mm256_set1_epi16(0x00ff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(quad, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(weights, 8), _mm256_srai_epi16(quad, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
inline I dot_u8s8(I acc, I w, std::int32_t a) {
    const __m256i quad = _mm256_set1_epi32(a);
    return {half_dot_u8s8(acc.a, w.a, quad), half_dot_u8s8(acc.b, w.b, quad)};
}
inline I dot_s16(I acc, I w, std::uint32_t a) {
    const __m256i pair = _mm256_set1_epi32(static_cast<int>(a));
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, pair)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, pair))};
}

#else  // plain loops, for the compiler to vectorize

struct F {
    float v[16];
};
struct I {
    std::int32_t v[16];
};

template <class R, class Fn>
inline R lanes(Fn fn) {
    R r;
    for (int i = 0; i < 16; ++i) r.v[i] = fn(i);
    return r;
}

inline F set(float x) {
    return lanes<F>([=](int) { return x; });
}
inline F zero() { return set(0.0f); }
inline F load(const float* p) {
    return lanes<F>([=](int i) { return p[i]; });
}
inline void store(float* p, F a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline F load(const bf16* p) {
    return lanes<F>([=](int i) { return to_float(p[i]); });
}
inline void store(bf16* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = to_bf16(a.v[i]);
}
inline F operator+(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F operator-(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F operator*(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F operator/(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F fma(F a, F b, F c) {
    return lanes<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F max(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F min(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F abs(F a) {
    return lanes<F>([&](int i) { return std::fabs(a.v[i]); });
}
inline F round(F a) {
    return lanes<F>([&](int i) { return std::nearbyint(a.v[i]); });
}
inline F scale_by_power_of_two(F a, F n) {
    return lanes<F>([&](int i) { return a.v[i] * std::exp2(n.v[i]); });
}
inline F choose_less(F a, F b, F yes, F no) {
    return lanes<F>([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}
inline float sum(F a) {
    float total = 0;
    for (float x : a.v) total += x;
    return total;
}
inline float largest(F a) {
    float most = a.v[0];
    for (float x : a.v) most = most > x ? most : x;
    return most;
}

inline I iset(std::int32_t x) {
    return lanes<I>([=](int) { return x; });
}
inline I izero() { return iset(0); }
inline I load(const std::int32_t* p) {
    return lanes<I>([=](int i) { return p[i]; });
}
inline void store(std::int32_t* p, I a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline I operator+(I a, I b) {
    return lanes<I>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F to_float(I a) {
    return lanes<F>([&](int i) { return static_cast<float>(a.v[i]); });
}
inline I bits(F a) {
    I r;
    std::memcpy(r.v, a.v, sizeof(r.v));
    return r;
}
inline I to_int(F a) {
    return lanes<I>([&](int i) { return static_cast<std::int32_t>(std::nearbyint(a.v[i])); });
}
inline void store_int8(std::int8_t* p, I a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(a.v[i] > 127 ? 127 : a.v[i] < -128 ? -128 : a.v[i]);
}
inline void store_int16(std::int16_t* p, I a) {
    for (int i = 0; i < 16; ++i) {
        p[i] = static_cast<std::int16_t>(a.v[i] > 32767 ? 32767 : a.v[i] < -32768 ? -32768 : a.v[i]);
    }
}
inline I widen_int8(const std::int8_t* p) {
    std::int16_t wide[32];
    for (int i = 0; i < 32; ++i) wide[i] = p[i];
    I r;
    std::memcpy(r.v, wide, sizeof(r.v));
    return r;
}

inline I load_bytes(const void* p) {
    I r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
}
inline void store_bytes(void* p, I a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline I widen_bytes(const std::uint8_t* p) {
    return lanes<I>([=](int i) { return static_cast<std::int32_t>(p[i]); });
}
inline I operator-(I a, I b) {
    return lanes<I>([&](int i) { return a.v[i] - b.v[i]; });
}
inline I operator&(I a, I b) {
    return lanes<I>([&](int i) { return a.v[i] & b.v[i]; });
}
inline I operator|(I a, I b) {
    return lanes<I>([&](int i) { return a.v[i] | b.v[i]; });
}
template <int bits>
inline I shift_left(I a) {
    return lanes<I>([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << bits); });
}
template <int bits>
inline I shift_right(I a) {
    return lanes<I>([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) >> bits); });
}
// The lanes as more and narrower ones.
template <class T, class Fn>
inline I narrow_lanes(I a, I b, Fn fn) {
    constexpr int count = 64 / sizeof(T);
    T x[count], y[count];
    std::memcpy(x, a.v, sizeof(x));
    std::memcpy(y, b.v, sizeof(y));
    for (int i = 0; i < count; ++i) x[i] = static_cast<T>(fn(std::uint32_t{x[i]}, std::uint32_t{y[i]}));
    std::memcpy(a.v, x, sizeof(x));
    return a;
}
inline I add_bytes(I a, I b) {
    return narrow_lanes<std::uint8_t>(a, b, [](std::uint32_t x, std::uint32_t y) { return x + y; });
}
inline I multiply_low16(I a, I b) {
    return narrow_lanes<std::uint16_t>(a, b, [](std::uint32_t x, std::uint32_t y) { return x * y; });
}
inline I multiply_high16(I a, I b) {
    return narrow_lanes<std::uint16_t>(a, b, [](std::uint32_t x, std::uint32_t y) { return x * y >> 16; });
}

inline F dot_bf16(F acc, I w, std::uint32_t a) {
    const float low = to_float(static_cast<bf16>(a)), high = to_float(static_cast<bf16>(a >> 16));
    bf16 pairs[32];
    std::memcpy(pairs, w.v, sizeof(pairs));
    for (int i = 0; i < 16; ++i) acc.v[i] += to_float(pairs[2 * i]) * low;
    for (int i = 0; i < 16; ++i) acc.v[i] += to_float(pairs[2 * i + 1]) * high;
    return acc;
}
inline I dot_u8s8(I acc, I w, std::int32_t a) {
    for (int j = 0; j < 4; ++j) {
        const std::int32_t one = static_cast<std::int8_t>(a >> (8 * j));
        for (int i = 0; i < 16; ++i) acc.v[i] += (w.v[i] >> (8 * j) & 0xff) * one;
    }
    return acc;
}
inline I dot_s16(I acc, I w, std::uint32_t a) {
    const std::int32_t low = static_cast<std::int16_t>(a), high = static_cast<std::int16_t>(a >> 16);
    std::int16_t pairs[32];
    std::memcpy(pairs, w.v, sizeof(pairs));
    for (int i = 0; i < 16; ++i) acc.v[i] += pairs[2 * i] * low + pairs[2 * i + 1] * high;
    return acc;
}

#endif

inline F dot_bf16(F acc, const bf16* w, std::uint32_t a) { return dot_bf16(acc, load_bytes(w), a); }
inline I dot_s16(I acc, const std::int8_t* w, std::uint32_t a) { return dot_s16(acc, widen_int8(w), a); }
inline I dot_u8s8(I acc, const std::uint8_t* w, std::int32_t a) { return dot_u8s8(acc, load_bytes(w), a); }

// e^x to about 2 units in the last place; below -87.3 it is 0, above 88.3 infinite, and NaN gives NaN.
// Cody-Waite reduction and a degree-6 polynomial (coefficients of Cephes' expf).
inline F exp(F x) {
    const F low = set(-87.33654f), high = set(88.37626f);
    // max and min return their second operand for NaN, so the argument stands second to pass NaN on.
    const F clamped = min(high, max(low, x));
    const F n = round(clamped * set(1.44269504f));
    F r = fma(n, set(-0.693359375f), clamped);
    r = fma(n, set(2.12194440e-4f), r);
    F p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p * r, r, r + set(1.0f));
    const F result = scale_by_power_of_two(p, n);
    return choose_less(high, x, set(INFINITY), choose_less(x, low, zero(), result));
}

// x / (1 + e^-x)
inline F silu(F x) { return x / (set(1.0f) + exp(zero() - x)); }

// x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + e^-2u)
inline F gelu(F x) {
    const F twice_u = set(1.5957691216f) * (x + set(0.044715f) * x * x * x);
    return x / (set(1.0f) + exp(zero() - twice_u));
}

}  // namespace tokenmill::TOKENMILL_ISA
