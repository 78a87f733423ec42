// Matrix multiply for one to many rows with AVX2: activations in tiles of up to six rows, weights in
// panels of sixteen columns (panels.h). A format brings its tile layout (`put`, 32 values of a row at a
// time), its inner loop (`micro`: M rows times N neighbouring panels) and how many panels full tiles take at
// once (NEIGHBOURS). A row's sum runs over k in one
// order whatever M and N are, so that a token's numbers do not depend on the batch it is in.
#pragma once
#include "panels.h"
#include "tiles.h"

struct GemmF32 {
  enum { FORMAT = F32, NEIGHBOURS = 1 };
  static size_t tile_bytes(int k) { return static_cast<size_t>(k) * ROWS * sizeof(float); }
  static DF_INLINE void put(char* tile, int lane, int column, const __m256 v[4]) { put_floats(tile, lane, column, v); }

  template <int M, int N>
  static DF_INLINE void micro(const char* tile, const char* const* panels, int k, __m256 c[M][2 * N]) {
    const float* a = reinterpret_cast<const float*>(tile);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < 2 * N; j++) c[i][j] = _mm256_setzero_ps();
    for (size_t at = 0; at < static_cast<size_t>(k); at += 8, a += OCTET) {
#pragma GCC unroll 8
      for (int step = 0; step < 8; step++) {
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          const float* b = reinterpret_cast<const float*>(panels[n]) + (at + step) * COLS;
          prefetch(b);
          const __m256 b0 = load8(b), b1 = load8(b + 8);
#pragma GCC unroll 6
          for (int i = 0; i < M; i++) {
            const __m256 x = _mm256_broadcast_ss(a + i * 8 + step);
            c[i][2 * n] = _mm256_fmadd_ps(x, b0, c[i][2 * n]);
            c[i][2 * n + 1] = _mm256_fmadd_ps(x, b1, c[i][2 * n + 1]);
          }
        }
      }
    }
  }
};

struct GemmBF16 {
  enum { FORMAT = BF16, NEIGHBOURS = 1 };
  static size_t tile_bytes(int k) { return static_cast<size_t>(k) * ROWS * sizeof(float); }
  static DF_INLINE void put(char* tile, int lane, int column, const __m256 v[4]) { put_floats(tile, lane, column, v); }

  template <int M, int N>
  static DF_INLINE void micro(const char* tile, const char* const* panels, int k, __m256 c[M][2 * N]) {
    const float* a = reinterpret_cast<const float*>(tile);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < 2 * N; j++) c[i][j] = _mm256_setzero_ps();
    for (size_t at = 0; at < static_cast<size_t>(k); at += 8, a += OCTET) {
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; pair++) {
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          const bf16* b = reinterpret_cast<const bf16*>(panels[n]) + (at + 2 * pair) * COLS;
          prefetch(b);
          const __m256i left = load16(b), right = load16(b + COLS);
#pragma GCC unroll 2
          for (int parity = 0; parity < 2; parity++) {
            const __m256 b0 = parity ? odd(left) : even(left), b1 = parity ? odd(right) : even(right);
#pragma GCC unroll 6
            for (int i = 0; i < M; i++) {
              const __m256 x = _mm256_broadcast_ss(a + i * 8 + 2 * pair + parity);
              c[i][2 * n] = _mm256_fmadd_ps(x, b0, c[i][2 * n]);
              c[i][2 * n + 1] = _mm256_fmadd_ps(x, b1, c[i][2 * n + 1]);
            }
          }
        }
      }
    }
  }
};

// Activations of the integer formats: 32 values as signed bytes times one scale (127 levels of the
// largest magnitude), and the sum of these rounded values for formats with minima. (Not the exact sum: a
// weight, minimum included, is smaller than the part above its minimum, and so is what rounding then costs.)
struct ByteBlock {
  int8_t q[QUANT];
  float scale, sum;
};

struct ByteTile {
  static size_t tile_bytes(int k) { return static_cast<size_t>(k / QUANT) * ROWS * sizeof(ByteBlock); }
  static DF_INLINE void put(char* tile, int lane, int column, const __m256 v[4]) {
    ByteBlock* out = reinterpret_cast<ByteBlock*>(tile) + static_cast<size_t>(column / QUANT) * ROWS + lane;
    const __m256 sign = _mm256_set1_ps(-0.f);
    const __m256 top = _mm256_max_ps(_mm256_max_ps(_mm256_andnot_ps(sign, v[0]), _mm256_andnot_ps(sign, v[1])),
                                     _mm256_max_ps(_mm256_andnot_ps(sign, v[2]), _mm256_andnot_ps(sign, v[3])));
    const float peak = max8(top), inverse = peak > 0 ? 127.f / peak : 0.f;
    const __m256 f = _mm256_set1_ps(inverse);
    __m256i q[4];
    for (int i = 0; i < 4; i++) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], f));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out->q), _mm256_permutevar8x32_epi32(bytes, order));
    const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
    out->scale = peak / 127.f;
    out->sum = out->scale * sum8(_mm256_cvtepi32_ps(sums));
  }
  static DF_INLINE __m256i quad(const ByteBlock& x, int index) {
    int32_t bits;
    std::memcpy(&bits, x.q + 4 * index, 4);
    return _mm256_set1_epi32(bits);
  }
};

struct GemmINT8 : ByteTile {
  enum { FORMAT = INT8, NEIGHBOURS = 1 };
  template <int M, int N>
  static DF_INLINE void micro(const char* tile, const char* const* panels, int k, __m256 c[M][2 * N]) {
    const ByteBlock* a = reinterpret_cast<const ByteBlock*>(tile);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < 2 * N; j++) c[i][j] = _mm256_setzero_ps();
    for (int block = 0; block < k / QUANT; block++, a += ROWS) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const Int8Block& w = reinterpret_cast<const Int8Block*>(panels[n])[block];
        __m256i s[M][2];
        for (int i = 0; i < M; i++) s[i][0] = s[i][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int q = 0; q < QUANT / 4; q++) {
          prefetch(w.q[q]);
#pragma GCC unroll 2
          for (int j = 0; j < 2; j++) {
            const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.q[q][8 * j]));
            const __m256i magnitude = _mm256_abs_epi8(b);
#pragma GCC unroll 6
            for (int i = 0; i < M; i++) {  // |w| * (x with w's sign): a pair is at most 2 * 127 * 127, which fits
              const __m256i x = _mm256_sign_epi8(quad(a[i], q), b);
              s[i][j] = _mm256_add_epi32(s[i][j], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), ones));
            }
          }
        }
        const __m256 d0 = load8_half(w.scale), d1 = load8_half(w.scale + 8);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
          const __m256 f = _mm256_broadcast_ss(&a[i].scale);
          c[i][2 * n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[i][0]), _mm256_mul_ps(f, d0), c[i][2 * n]);
          c[i][2 * n + 1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[i][1]), _mm256_mul_ps(f, d1), c[i][2 * n + 1]);
        }
      }
    }
  }
};

struct GemmINT4 : ByteTile {
  enum { FORMAT = INT4, NEIGHBOURS = 1 };
  template <int M, int N>
  static DF_INLINE void micro(const char* tile, const char* const* panels, int k, __m256 c[M][2 * N]) {
    const ByteBlock* a = reinterpret_cast<const ByteBlock*>(tile);
    const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < 2 * N; j++) c[i][j] = _mm256_setzero_ps();
    for (int block = 0; block < k / QUANT; block++, a += ROWS) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const Int4Block& w = reinterpret_cast<const Int4Block*>(panels[n])[block];
        __m256i s[M][2];  // sixteen-bit sums: eight pairs of at most 2 * 15 * 127 each fit
        for (int i = 0; i < M; i++) s[i][0] = s[i][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int q = 0; q < QUANT / 8; q++) {
          prefetch(w.q[q]);
          __m256i b[2][2];
          for (int j = 0; j < 2; j++) {
            const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.q[q][8 * j]));
            b[0][j] = _mm256_and_si256(raw, nibble);
            b[1][j] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble);
          }
#pragma GCC unroll 6
          for (int i = 0; i < M; i++) {
#pragma GCC unroll 2
            for (int parity = 0; parity < 2; parity++) {
              const __m256i x = quad(a[i], 2 * q + parity);
              s[i][0] = _mm256_add_epi16(s[i][0], _mm256_maddubs_epi16(b[parity][0], x));
              s[i][1] = _mm256_add_epi16(s[i][1], _mm256_maddubs_epi16(b[parity][1], x));
            }
          }
        }
        const __m256 d0 = load8_half(w.scale), d1 = load8_half(w.scale + 8);
        const __m256 m0 = load8_half(w.minimum), m1 = load8_half(w.minimum + 8);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
          const __m256 f = _mm256_broadcast_ss(&a[i].scale), sum = _mm256_broadcast_ss(&a[i].sum);
          const __m256 x = _mm256_cvtepi32_ps(_mm256_madd_epi16(s[i][0], ones));
          const __m256 y = _mm256_cvtepi32_ps(_mm256_madd_epi16(s[i][1], ones));
          c[i][2 * n] = _mm256_fmadd_ps(x, _mm256_mul_ps(f, d0), _mm256_fmadd_ps(sum, m0, c[i][2 * n]));
          c[i][2 * n + 1] = _mm256_fmadd_ps(y, _mm256_mul_ps(f, d1), _mm256_fmadd_ps(sum, m1, c[i][2 * n + 1]));
        }
      }
    }
  }
};
