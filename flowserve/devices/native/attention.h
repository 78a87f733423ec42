// Attention of a few query rows over one KV head's pages, without gathering them: scores in tiles of
// 128 keys, online softmax (Milakov and Gimelshein 2018, as in FlashAttention), then the values.
#pragma once
#include "simd.h"

enum { KEY_TILE = 128, QUERY_ROWS = 24, HEAD_DIM_MAX = 256, PAGE = 16 };

// Where one KV head of one layer lies: page p of a sequence starts at base + table[p] * page_stride.
template <class KV>
struct Pages {
  const KV *keys, *values;
  size_t block_stride;  // elements between blocks of the pool
  const int* table;
  int block_tokens, head_dim;
  const KV* at(const KV* base, int token) const {
    return base + static_cast<size_t>(table[token / block_tokens]) * block_stride +
           static_cast<size_t>(token % block_tokens) * head_dim;
  }
};

// Sixteen keys of `dim` to [dim][16] floats.
template <class KV>
static DF_INLINE void transpose_page(const KV* keys, int dim, float* out) {
  for (int t = 0; t < PAGE; t += 8) {
    for (int d = 0; d < dim; d += 8) {
      __m256 r[8], u[8];
      for (int i = 0; i < 8; i++) r[i] = load8(keys + static_cast<size_t>(t + i) * dim + d);
      for (int i = 0; i < 8; i += 2) {
        u[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        u[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(u[i], u[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(u[i], u[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0xee);
      }
      for (int i = 0; i < 4; i++) {
        _mm256_store_ps(out + (d + i) * PAGE + t, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_store_ps(out + (d + i + 4) * PAGE + t, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
      }
    }
  }
}

template <int M>
static DF_INLINE void score_rows(const float* const* q, const float* keys, int dim, float (*scores)[KEY_TILE],
                                 int column) {
  __m256 c[M][2];
  for (int i = 0; i < M; i++) c[i][0] = c[i][1] = _mm256_setzero_ps();
  for (int d = 0; d < dim; d++) {
    const __m256 k0 = _mm256_load_ps(keys + d * PAGE), k1 = _mm256_load_ps(keys + d * PAGE + 8);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
      const __m256 x = _mm256_broadcast_ss(q[i] + d);
      c[i][0] = _mm256_fmadd_ps(x, k0, c[i][0]);
      c[i][1] = _mm256_fmadd_ps(x, k1, c[i][1]);
    }
  }
  for (int i = 0; i < M; i++) {
    _mm256_store_ps(&scores[i][column], c[i][0]);
    _mm256_store_ps(&scores[i][column + 8], c[i][1]);
  }
}

// out[i][0..31] += sum over tokens of weight * value, 32 dimensions at a time.
template <int M, class KV>
static DF_INLINE void weigh_rows(const KV* values, int tokens, int dim, const float (*weights)[KEY_TILE], int column,
                                 float* out) {
  __m256 c[M][4];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 4; j++) c[i][j] = load8(out + static_cast<size_t>(i) * dim + j * 8);
  for (int t = 0; t < tokens; t++) {
    const KV* v = values + static_cast<size_t>(t) * dim;
    __m256 w[M];
    for (int i = 0; i < M; i++) w[i] = _mm256_broadcast_ss(&weights[i][column + t]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m256 x = load8(v + j * 8);
      for (int i = 0; i < M; i++) c[i][j] = _mm256_fmadd_ps(w[i], x, c[i][j]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 4; j++) store8(out + static_cast<size_t>(i) * dim + j * 8, c[i][j]);
}

// Rows of queries (row r at position[r]) over tokens [begin, end) of `pages`; causal. Leaves in `out`
// [rows][dim] the unnormalised sum, in `top` and `total` the running maximum and sum of weights, so
// that parts over different tokens can be merged. `begin` is a multiple of the page size.
template <class KV>
static void attend(const Pages<KV>& pages, const float* const* query, const int* position, int rows, int begin,
                   int end, float* out, float* top, float* total) {
  const int dim = pages.head_dim;
  const float scale = 1.f / std::sqrt(static_cast<float>(dim));
  alignas(64) float keys[HEAD_DIM_MAX * PAGE];
  alignas(64) float scores[QUERY_ROWS][KEY_TILE];
  for (int r = 0; r < rows; r++) top[r] = -INFINITY, total[r] = 0;
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(rows) * dim);

  for (int base = begin; base < end; base += KEY_TILE) {
    const int count = std::min<int>(KEY_TILE, end - base), width = (count + PAGE - 1) / PAGE * PAGE;
    for (int column = 0; column < width; column += PAGE) {
      transpose_page(pages.at(pages.keys, base + column), dim, keys);
      int r = 0;
      for (; r + 6 <= rows; r += 6) score_rows<6>(query + r, keys, dim, scores + r, column);
      for (; r + 3 <= rows; r += 3) score_rows<3>(query + r, keys, dim, scores + r, column);
      for (; r < rows; r++) score_rows<1>(query + r, keys, dim, scores + r, column);
    }
    for (int r = 0; r < rows; r++) {
      float* row = scores[r];
      const int valid = std::min(count, position[r] - base + 1);
      if (valid <= 0) {
        std::memset(row, 0, sizeof(float) * width);
        continue;
      }
      for (int i = valid; i < width; i++) row[i] = -INFINITY;
      __m256 peak = _mm256_load_ps(row);
      for (int i = 8; i < width; i += 8) peak = _mm256_max_ps(peak, _mm256_load_ps(row + i));
      const float now = std::max(top[r], max8(peak) * scale);
      const float shrink = top[r] == -INFINITY ? 0.f : std::exp(top[r] - now);
      for (int i = 0; i < width; i += 8) {
        const __m256 x = _mm256_fmsub_ps(_mm256_load_ps(row + i), _mm256_set1_ps(scale), _mm256_set1_ps(now));
        _mm256_store_ps(row + i, exp8(x));
      }
      for (int i = valid; i < width; i++) row[i] = 0;  // exp8 clamps instead of giving zero
      __m256 sum = _mm256_setzero_ps();
      for (int i = 0; i < width; i += 8) sum = _mm256_add_ps(sum, _mm256_load_ps(row + i));
      total[r] = total[r] * shrink + sum8(sum);
      top[r] = now;
      if (shrink != 1.f) {
        float* o = out + static_cast<size_t>(r) * dim;
        for (int d = 0; d < dim; d += 8) store8(o + d, _mm256_mul_ps(load8(o + d), _mm256_set1_ps(shrink)));
      }
    }
    for (int column = 0; column < width; column += PAGE) {
      const KV* values = pages.at(pages.values, base + column);
      const int tokens = std::min<int>(PAGE, count - column);
      for (int d = 0; d < dim; d += 32) {
        int r = 0;
        for (; r + 3 <= rows; r += 3)
          weigh_rows<3>(values + d, tokens, dim, scores + r, column, out + static_cast<size_t>(r) * dim + d);
        for (; r < rows; r++)
          weigh_rows<1>(values + d, tokens, dim, scores + r, column, out + static_cast<size_t>(r) * dim + d);
      }
    }
  }
}
