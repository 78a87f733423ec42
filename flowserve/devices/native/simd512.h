// The few sixteen-lane operations that the AVX-512 multiplies need. With DF_EMULATE_AVX512 the same names
// are plain loops, so that the layouts and sums above them are tested on processors that lack these units.
#pragma once
#include "simd.h"

#ifndef DF_EMULATE_AVX512

typedef __m512 floats16;
typedef __m512i ints16;  // 16 integers, 32 bf16 or 64 bytes

static DF_INLINE floats16 zero_floats16() { return _mm512_setzero_ps(); }
static DF_INLINE ints16 zero_ints16() { return _mm512_setzero_si512(); }
static DF_INLINE ints16 load64(const void* p) { return _mm512_loadu_si512(p); }
static DF_INLINE ints16 repeat4(const void* p) {  // four bytes in every lane
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}
static DF_INLINE ints16 repeat1(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
static DF_INLINE ints16 low_nibbles(ints16 x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
static DF_INLINE ints16 high_nibbles(ints16 x) {
  return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
}
// Lane by lane: sum + x0 * y0 + x1 * y1 of a pair of bf16.
static DF_INLINE floats16 add_pairs(floats16 sum, ints16 x, ints16 y) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
}
// Lane by lane: sum + four products of an unsigned and a signed byte.
static DF_INLINE ints16 add_quads(ints16 sum, ints16 bytes, ints16 signed_bytes) {
  return _mm512_dpbusd_epi32(sum, bytes, signed_bytes);
}
static DF_INLINE ints16 minus(ints16 x, ints16 y) { return _mm512_sub_epi32(x, y); }
static DF_INLINE floats16 to_floats(ints16 x) { return _mm512_cvtepi32_ps(x); }
static DF_INLINE floats16 load_halves16(const half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static DF_INLINE floats16 repeat(float x) { return _mm512_set1_ps(x); }
static DF_INLINE floats16 times(floats16 x, floats16 y) { return _mm512_mul_ps(x, y); }
static DF_INLINE floats16 times_plus(floats16 x, floats16 y, floats16 z) { return _mm512_fmadd_ps(x, y, z); }
static DF_INLINE __m256 left_half(floats16 x) { return _mm512_castps512_ps256(x); }
static DF_INLINE __m256 right_half(floats16 x) { return _mm512_extractf32x8_ps(x, 1); }

#else

struct floats16 {
  float v[16];
};
struct ints16 {
  union {
    int32_t v[16];
    bf16 pairs[32];
    uint8_t bytes[64];
    int8_t signed_bytes[64];
  };
};

static inline floats16 zero_floats16() { return floats16{}; }
static inline ints16 zero_ints16() { return ints16{}; }
static inline ints16 load64(const void* p) {
  ints16 x;
  std::memcpy(x.v, p, 64);
  return x;
}
static inline ints16 repeat4(const void* p) {
  ints16 x;
  for (int i = 0; i < 16; i++) std::memcpy(&x.v[i], p, 4);
  return x;
}
static inline ints16 repeat1(int byte) {
  ints16 x;
  std::memset(x.v, byte, 64);
  return x;
}
static inline ints16 low_nibbles(ints16 x) {
  for (auto& b : x.bytes) b = b & 15;
  return x;
}
static inline ints16 high_nibbles(ints16 x) {
  for (auto& b : x.bytes) b = b >> 4;
  return x;
}
static inline floats16 add_pairs(floats16 sum, ints16 x, ints16 y) {
  for (int i = 0; i < 32; i++) sum.v[i / 2] += to_float(x.pairs[i]) * to_float(y.pairs[i]);
  return sum;
}
static inline ints16 add_quads(ints16 sum, ints16 bytes, ints16 signed_bytes) {
  for (int i = 0; i < 64; i++) sum.v[i / 4] += static_cast<int>(bytes.bytes[i]) * signed_bytes.signed_bytes[i];
  return sum;
}
static inline ints16 minus(ints16 x, ints16 y) {
  for (int i = 0; i < 16; i++) x.v[i] -= y.v[i];
  return x;
}
static inline floats16 to_floats(ints16 x) {
  floats16 out;
  for (int i = 0; i < 16; i++) out.v[i] = static_cast<float>(x.v[i]);
  return out;
}
static inline floats16 load_halves16(const half* p) {
  floats16 out;
  for (int i = 0; i < 16; i++) out.v[i] = _cvtsh_ss(p[i]);
  return out;
}
static inline floats16 repeat(float x) {
  floats16 out;
  for (auto& v : out.v) v = x;
  return out;
}
static inline floats16 times(floats16 x, floats16 y) {
  for (int i = 0; i < 16; i++) x.v[i] *= y.v[i];
  return x;
}
static inline floats16 times_plus(floats16 x, floats16 y, floats16 z) {
  for (int i = 0; i < 16; i++) z.v[i] = std::fma(x.v[i], y.v[i], z.v[i]);
  return z;
}
static inline __m256 left_half(floats16 x) { return load8(x.v); }
static inline __m256 right_half(floats16 x) { return load8(x.v + 8); }

#endif
