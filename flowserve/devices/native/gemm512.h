// The multiplies with AVX-512: bf16 by pairs (AVX512-BF16), bytes by fours (AVX512-VNNI). Same panels as
// gemm.h; a panel's sixteen columns are one register. Activations of bf16 weights are rounded to bf16.
#pragma once
#include "gemm.h"
#include "simd512.h"

template <int M, int N>
static DF_INLINE void halves(const floats16 (&sum)[M][N], __m256 c[M][2 * N]) {
  for (int i = 0; i < M; i++)
    for (int n = 0; n < N; n++) c[i][2 * n] = left_half(sum[i][n]), c[i][2 * n + 1] = right_half(sum[i][n]);
}

struct GemmBF16Pairs {
  enum { FORMAT = BF16, NEIGHBOURS = 2 };
  static size_t tile_bytes(int k) { return static_cast<size_t>(k) * ROWS * sizeof(bf16); }
  static DF_INLINE void put(char* tile, int lane, int column, const __m256 v[4]) {
    bf16* out = reinterpret_cast<bf16*>(tile) + static_cast<size_t>(column) * ROWS + lane * 8;
    for (int i = 0; i < 4; i++) store8(out + i * OCTET, v[i]);
  }

  template <int M, int N>
  static DF_INLINE void micro(const char* tile, const char* const* panels, int k, __m256 c[M][2 * N]) {
    const bf16* a = reinterpret_cast<const bf16*>(tile);
    floats16 sum[M][N];
    for (int i = 0; i < M; i++)
      for (int n = 0; n < N; n++) sum[i][n] = zero_floats16();
    for (size_t at = 0; at < static_cast<size_t>(k); at += 8, a += OCTET) {
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; pair++) {
        ints16 b[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          const bf16* p = reinterpret_cast<const bf16*>(panels[n]) + (at + 2 * pair) * COLS;
          prefetch(p);
          b[n] = load64(p);
        }
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
          const ints16 x = repeat4(a + i * 8 + 2 * pair);
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) sum[i][n] = add_pairs(sum[i][n], x, b[n]);
        }
      }
    }
    halves<M, N>(sum, c);
  }
};

struct GemmINT8Quads : ByteTile {
  enum { FORMAT = INT8, NEIGHBOURS = 2 };
  // The instruction wants one side unsigned: activations are kept 128 higher, and 128 times the weights' sum
  // is taken off again.
  static DF_INLINE void put(char* tile, int lane, int column, const __m256 v[4]) {
    ByteTile::put(tile, lane, column, v);
    ByteBlock* block = reinterpret_cast<ByteBlock*>(tile) + static_cast<size_t>(column / QUANT) * ROWS + lane;
    __m256i* q = reinterpret_cast<__m256i*>(block->q);
    _mm256_storeu_si256(q, _mm256_xor_si256(_mm256_loadu_si256(q), _mm256_set1_epi8(static_cast<char>(0x80))));
  }

  template <int M, int N>
  static DF_INLINE void micro(const char* tile, const char* const* panels, int k, __m256 c[M][2 * N]) {
    const ByteBlock* a = reinterpret_cast<const ByteBlock*>(tile);
    const ints16 offset = repeat1(0x80);
    floats16 sum[M][N];
    for (int i = 0; i < M; i++)
      for (int n = 0; n < N; n++) sum[i][n] = zero_floats16();
    for (int block = 0; block < k / QUANT; block++, a += ROWS) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const Int8Block& w = reinterpret_cast<const Int8Block*>(panels[n])[block];
        ints16 s[M], shift = zero_ints16();
        for (int i = 0; i < M; i++) s[i] = zero_ints16();
#pragma GCC unroll 8
        for (int q = 0; q < QUANT / 4; q++) {
          prefetch(w.q[q]);
          const ints16 b = load64(w.q[q]);
          shift = add_quads(shift, offset, b);
#pragma GCC unroll 6
          for (int i = 0; i < M; i++) s[i] = add_quads(s[i], repeat4(a[i].q + 4 * q), b);
        }
        const floats16 d = load_halves16(w.scale);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++)
          sum[i][n] = times_plus(to_floats(minus(s[i], shift)), times(repeat(a[i].scale), d), sum[i][n]);
      }
    }
    halves<M, N>(sum, c);
  }
};

struct GemmINT4Quads : ByteTile {
  enum { FORMAT = INT4, NEIGHBOURS = 2 };
  template <int M, int N>
  static DF_INLINE void micro(const char* tile, const char* const* panels, int k, __m256 c[M][2 * N]) {
    const ByteBlock* a = reinterpret_cast<const ByteBlock*>(tile);
    floats16 sum[M][N];
    for (int i = 0; i < M; i++)
      for (int n = 0; n < N; n++) sum[i][n] = zero_floats16();
    for (int block = 0; block < k / QUANT; block++, a += ROWS) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const Int4Block& w = reinterpret_cast<const Int4Block*>(panels[n])[block];
        ints16 s[M];
        for (int i = 0; i < M; i++) s[i] = zero_ints16();
#pragma GCC unroll 4
        for (int q = 0; q < QUANT / 8; q++) {
          prefetch(w.q[q]);
          const ints16 raw = load64(w.q[q]), low = low_nibbles(raw), high = high_nibbles(raw);
#pragma GCC unroll 6
          for (int i = 0; i < M; i++) {
            s[i] = add_quads(s[i], low, repeat4(a[i].q + 8 * q));
            s[i] = add_quads(s[i], high, repeat4(a[i].q + 8 * q + 4));
          }
        }
        const floats16 d = load_halves16(w.scale), m = load_halves16(w.minimum);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
          const floats16 base = times_plus(repeat(a[i].sum), m, sum[i][n]);
          sum[i][n] = times_plus(to_floats(s[i]), times(repeat(a[i].scale), d), base);
        }
      }
    }
    halves<M, N>(sum, c);
  }
};
