// How rows of activations are cut into tiles, and how tiles meet panels.
#pragma once
#include "panels.h"

enum { ROWS = 6, OCTET = 8 * ROWS };  // rows of a tile at most; floats between eights of k in a float tile

// Tiles of nearly equal height: 8 rows are 4 + 4, which keeps more multiply-adds in flight than 6 + 2.
// Tile i holds rows [first(i), first(i + 1)).
struct Tiles {
  int rows, count;
  explicit Tiles(int n = 0) : rows(n), count((n + ROWS - 1) / ROWS) {}
  int first(int tile) const { return static_cast<int>(static_cast<int64_t>(rows) * tile / count); }
};

// Float tiles: element (row r, k) at [k / 8][r][k % 8]; written eight values at a time, read in one stream.
static DF_INLINE void put_floats(char* tile, int lane, int column, const __m256 v[4]) {
  float* out = reinterpret_cast<float*>(tile) + static_cast<size_t>(column) * ROWS + lane * 8;
  for (int i = 0; i < 4; i++) store8(out + i * OCTET, v[i]);
}

// Weights are used once a step at small batches: they are asked for this many bytes ahead.
enum { AHEAD = 4096 };
static DF_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + AHEAD, _MM_HINT_T0); }

template <class G, int M, int N, class Done>
static DF_INLINE void block(const char* tile, const char* const* panels, int k, int row, int panel, Done&& done) {
  __m256 c[M][2 * N];
  G::template micro<M, N>(tile, panels, k, c);
  for (int n = 0; n < N; n++)
    for (int i = 0; i < M; i++) done(panel + n, row + i, c[i][2 * n], c[i][2 * n + 1]);
}

// `count` panels, N at a time, then what is left.
template <class G, int M, int N, class Done>
static DF_INLINE void blocks(const char* tile, const char* const* panels, int count, int k, int row, Done&& done) {
  int n = 0;
  for (; n + N <= count; n += N) block<G, M, N>(tile, panels + n, k, row, n, done);
  if constexpr (N > 2)
    for (; n + 2 <= count; n += 2) block<G, M, 2>(tile, panels + n, k, row, n, done);
  if constexpr (N > 1)
    for (; n < count; n++) block<G, M, 1>(tile, panels + n, k, row, n, done);
}

// One tile times up to four neighbouring panels; few rows take several panels at once, which keeps the
// multiply units busy and reads several streams. done(panel 0..count-1, row, left eight, right eight).
template <class G, class Done>
static DF_INLINE void multiply(const char* tile, int height, int row, const char* weights, int count, int k, Done&& done) {
  const size_t bytes = panel_bytes(G::FORMAT, k);
  const char* p[4];
  for (int i = 0; i < 4; i++) p[i] = weights + bytes * std::min(i, count - 1);
  switch (height) {
    case 1: return blocks<G, 1, 4>(tile, p, count, k, row, done);
    case 2: return blocks<G, 2, 2>(tile, p, count, k, row, done);
    case 3: return blocks<G, 3, 2>(tile, p, count, k, row, done);
    case 4: return blocks<G, 4, G::NEIGHBOURS>(tile, p, count, k, row, done);
    case 5: return blocks<G, 5, G::NEIGHBOURS>(tile, p, count, k, row, done);
    default: return blocks<G, 6, G::NEIGHBOURS>(tile, p, count, k, row, done);
  }
}
