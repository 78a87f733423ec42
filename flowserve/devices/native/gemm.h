// Matrix multiply for few to many rows: activations in tiles of up to six rows, weights in panels of
// sixteen columns. Six by two registers of accumulators fill the sixteen that AVX2 has.
#pragma once
#include "simd.h"

enum { COLS = 16, ROWS = 6, OCTET = 8 * ROWS };

// Rows cut into tiles of nearly equal height: 8 rows are 4 + 4, which keeps more multiply-adds in
// flight than 6 + 2. Tile i holds rows [first(i), first(i + 1)), element (row r, k) at
// [i][k / 8][r][k % 8]: rows are written eight values at a time and read in one stream.
struct Tiles {
  int rows, count;
  explicit Tiles(int n = 0) : rows(n), count((n + ROWS - 1) / ROWS) {}
  int first(int tile) const { return static_cast<int>(static_cast<int64_t>(rows) * tile / count); }
};

template <int M, class W>
static DF_INLINE void micro(const float* __restrict__ a, const W* __restrict__ b, int k, __m256 c[M][2]) {
  for (int i = 0; i < M; i++) c[i][0] = c[i][1] = _mm256_setzero_ps();
  for (int octet = 0; octet < k; octet += 8, a += OCTET, b += 8 * COLS) {
#pragma GCC unroll 8
    for (int step = 0; step < 8; step++) {
      const __m256 b0 = load8(b + step * COLS), b1 = load8(b + step * COLS + 8);
#pragma GCC unroll 6
      for (int i = 0; i < M; i++) {
        const __m256 x = _mm256_broadcast_ss(a + i * 8 + step);
        c[i][0] = _mm256_fmadd_ps(x, b0, c[i][0]);
        c[i][1] = _mm256_fmadd_ps(x, b1, c[i][1]);
      }
    }
  }
}

// One row reads weights as fast as memory gives them: four steps in flight, prefetch well ahead.
template <class W>
static DF_INLINE void micro_row(const float* __restrict__ a, const W* __restrict__ b, int k, __m256 c[2]) {
  enum { AHEAD = 2048 };
  __m256 s[4][2];
  for (int i = 0; i < 4; i++) s[i][0] = s[i][1] = _mm256_setzero_ps();
  for (int octet = 0; octet < k; octet += 8, a += OCTET, b += 8 * COLS) {
    for (size_t line = 0; line < 8 * COLS * sizeof(W); line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(b + AHEAD) + line, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const __m256 x = _mm256_broadcast_ss(a + i);
      s[i % 4][0] = _mm256_fmadd_ps(x, load8(b + i * COLS), s[i % 4][0]);
      s[i % 4][1] = _mm256_fmadd_ps(x, load8(b + i * COLS + 8), s[i % 4][1]);
    }
  }
  for (int j = 0; j < 2; j++)
    c[j] = _mm256_add_ps(_mm256_add_ps(s[0][j], s[1][j]), _mm256_add_ps(s[2][j], s[3][j]));
}

template <int M, class W, class Done>
static DF_INLINE void tile(const float* a, const W* b, int k, int row, Done&& done) {
  __m256 c[M][2];
  micro<M>(a, b, k, c);
  for (int i = 0; i < M; i++) done(row + i, c[i][0], c[i][1]);
}

// All rows times one panel; done(row, left eight columns, right eight columns).
template <class W, class Done>
static DF_INLINE void panel(const Tiles& tiles, const float* a, int k, const W* b, Done&& done) {
  for (int i = 0; i < tiles.count; i++, a += static_cast<size_t>(ROWS) * k) {
    const int row = tiles.first(i);
    switch (tiles.first(i + 1) - row) {
      case 6: tile<6>(a, b, k, row, done); break;
      case 5: tile<5>(a, b, k, row, done); break;
      case 4: tile<4>(a, b, k, row, done); break;
      case 3: tile<3>(a, b, k, row, done); break;
      case 2: tile<2>(a, b, k, row, done); break;
      default: {
        __m256 c[2];
        micro_row(a, b, k, c);
        done(row, c[0], c[1]);
      }
    }
  }
}
