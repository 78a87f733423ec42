// Attention of a few query rows over one KV head's pages, without gathering them: scores in tiles of
// 128 keys, online softmax (Milakov and Gimelshein 2018, as in FlashAttention), then the values.
#pragma once
#include "simd.h"

enum { KEY_TILE = 128, QUERY_ROWS = 24, HEAD_DIM_MAX = 256, PAGE = 16 };

// Where one KV head of one layer lies: page p of a sequence starts at base + table[p] * block_stride.
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

// Sixteen dimensions as two registers, in the order that is cheapest to read: bf16 pairs come apart into
// even and odd ones. Sums are kept in that order and put right at the end.
static DF_INLINE void load_pair(const float* p, __m256 out[2]) { out[0] = load8(p), out[1] = load8(p + 8); }
static DF_INLINE void load_pair(const bf16* p, __m256 out[2]) {
  const __m256i raw = load16(p);
  out[0] = even(raw), out[1] = odd(raw);
}
static DF_INLINE int arranged(const float*, int i) { return i; }
static DF_INLINE int arranged(const bf16*, int i) { return i / 16 * 16 + i % 2 * 8 + i % 16 / 2; }

// Part `index` of a page that is needed soon: `dims` dimensions of sixteen tokens. Spread over the work on
// another page, because a burst of requests fills the core's miss buffers and then holds everything up.
template <class KV>
static DF_INLINE void prefetch_part(const KV* page, int dims, int index) {
  const size_t bytes = sizeof(KV) * PAGE * dims;
  const char* p = reinterpret_cast<const char*>(page) + bytes * index;
  for (size_t at = 0; at < bytes; at += 64) _mm_prefetch(p + at, _MM_HINT_T0);
}

// Sixteen keys, turned: word w of all keys side by side, [words][16]. A word is one float or two bf16.
template <class KV>
static DF_INLINE void transpose_page(const KV* keys, int dim, float* out) {
  const int words = dim * static_cast<int>(sizeof(KV)) / 4;
  const float* in = reinterpret_cast<const float*>(keys);
  for (int t = 0; t < PAGE; t += 8) {
    for (int w = 0; w < words; w += 8) {
      __m256 r[8], u[8];
      for (int i = 0; i < 8; i++) r[i] = load8(in + static_cast<size_t>(t + i) * words + w);
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
        _mm256_store_ps(out + (w + i) * PAGE + t, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_store_ps(out + (w + i + 4) * PAGE + t, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
      }
    }
  }
}

// Dimension d of eight keys from a turned page.
static DF_INLINE __m256 load_turned(const float* page, int d, int eight, const float*) {
  return _mm256_load_ps(page + d * PAGE + eight);
}
static DF_INLINE __m256 load_turned(const float* page, int d, int eight, const bf16*) {
  const __m256i raw = _mm256_load_si256(reinterpret_cast<const __m256i*>(page + d / 2 * PAGE + eight));
  return d % 2 ? odd(raw) : even(raw);
}

// Read where it is used: kept in registers the weights would push out sums, and a sum that goes through
// memory takes twice as long as its multiply.
static DF_INLINE __m256 broadcast_now(const float* p) {
  __m256 v;
  asm volatile("vbroadcastss %1, %0" : "=x"(v) : "m"(*p));
  return v;
}

// M rows against a turned page. Up to three rows keep two sums each, so that enough multiplies are in flight.
template <int M, class KV>
static DF_INLINE void score_rows(const float* const* q, const float* page, const KV* soon, int dim,
                                 float (*scores)[KEY_TILE], int column) {
  enum { CHAINS = M <= 3 ? 2 : 1 };
  __m256 c[M][2][CHAINS];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 2; j++)
      for (int n = 0; n < CHAINS; n++) c[i][j][n] = _mm256_setzero_ps();
  for (int d = 0; d < dim; d += 2) {
    prefetch_part(soon, 2, d / 2);
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
      const __m256 left = load_turned(page, d + n, 0, soon), right = load_turned(page, d + n, 8, soon);
#pragma GCC unroll 6
      for (int i = 0; i < M; i++) {
        const __m256 x = broadcast_now(q[i] + d + n);
        c[i][0][n % CHAINS] = _mm256_fmadd_ps(x, left, c[i][0][n % CHAINS]);
        c[i][1][n % CHAINS] = _mm256_fmadd_ps(x, right, c[i][1][n % CHAINS]);
      }
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 2; j++)
      _mm256_store_ps(&scores[i][column + 8 * j],
                      CHAINS == 2 ? _mm256_add_ps(c[i][j][0], c[i][j][CHAINS - 1]) : c[i][j][0]);
}

// out[i][0..31] (arranged) += sum over tokens of weight * value, 32 dimensions at a time; meanwhile asks for
// 512 values from `soon`.
template <int M, class KV>
static DF_INLINE void weigh_rows(const KV* values, const KV* soon, int tokens, int dim, const float (*weights)[KEY_TILE], int column,
                                 float* out) {
  __m256 c[M][4];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 4; j++) c[i][j] = load8(out + static_cast<size_t>(i) * dim + j * 8);
  for (int t = 0; t < tokens; t++) {
    const KV* v = values + static_cast<size_t>(t) * dim;
    prefetch_part(soon, 2, t);
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      __m256 x[2];
      load_pair(v + j * 16, x);
#pragma GCC unroll 3
      for (int i = 0; i < M; i++) {
        const __m256 w = broadcast_now(&weights[i][column + t]);
        c[i][2 * j] = _mm256_fmadd_ps(w, x[0], c[i][2 * j]);
        c[i][2 * j + 1] = _mm256_fmadd_ps(w, x[1], c[i][2 * j + 1]);
      }
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 4; j++) store8(out + static_cast<size_t>(i) * dim + j * 8, c[i][j]);
}

template <class KV>
static DF_INLINE void weigh(const KV* values, const KV* soon, int tokens, int dim, const float (*weights)[KEY_TILE],
                            int column, int rows, float* out) {
  int r = 0;
  for (; r + 3 <= rows; r += 3)
    weigh_rows<3>(values, soon, tokens, dim, weights + r, column, out + static_cast<size_t>(r) * dim);
  if (rows - r == 2) weigh_rows<2>(values, soon, tokens, dim, weights + r, column, out + static_cast<size_t>(r) * dim);
  if (rows - r == 1) weigh_rows<1>(values, soon, tokens, dim, weights + r, column, out + static_cast<size_t>(r) * dim);
}

template <class KV>
static DF_INLINE void score_page(const KV* keys, const KV* soon, const float* const* query, int rows, int dim,
                                 float (*scores)[KEY_TILE], int column) {
  alignas(64) float page[HEAD_DIM_MAX * PAGE];
  transpose_page(keys, dim, page);
  int r = 0;
  for (; r + 6 <= rows; r += 6) score_rows<6, KV>(query + r, page, soon, dim, scores + r, column);
  switch (rows - r) {
    case 5: return score_rows<5, KV>(query + r, page, soon, dim, scores + r, column);
    case 4: return score_rows<4, KV>(query + r, page, soon, dim, scores + r, column);
    case 3: return score_rows<3, KV>(query + r, page, soon, dim, scores + r, column);
    case 2: return score_rows<2, KV>(query + r, page, soon, dim, scores + r, column);
    case 1: return score_rows<1, KV>(query + r, page, soon, dim, scores + r, column);
    default: return;
  }
}

// Rows of queries (row r at position[r]) over tokens [begin, end) of `pages`; causal. Leaves in `out`
// [rows][dim] the unnormalised sum, in `top` and `total` the running maximum and sum of weights, so
// that parts over different tokens can be merged. `begin` is a multiple of the page size.
template <class KV>
static void attend(const Pages<KV>& pages, const float* const* query, const int* position, int rows, int begin,
                   int end, float* out, float* top, float* total) {
  const int dim = pages.head_dim;
  const float scale = 1.f / std::sqrt(static_cast<float>(dim));
  alignas(64) float scores[QUERY_ROWS][KEY_TILE];
  alignas(64) float sums[QUERY_ROWS * HEAD_DIM_MAX];  // arranged
  for (int r = 0; r < rows; r++) top[r] = -INFINITY, total[r] = 0;
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(rows) * dim);

  for (int base = begin; base < end; base += KEY_TILE) {
    const int count = std::min<int>(KEY_TILE, end - base), width = (count + PAGE - 1) / PAGE * PAGE;
    for (int column = 0; column < width; column += PAGE) {
      score_page(pages.at(pages.keys, base + column), pages.at(pages.values, base + column), query, rows, dim, scores, column);
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
        float* o = sums + static_cast<size_t>(r) * dim;
        for (int d = 0; d < dim; d += 8) store8(o + d, _mm256_mul_ps(load8(o + d), _mm256_set1_ps(shrink)));
      }
    }
    for (int column = 0; column < width; column += PAGE) {
      const KV* values = pages.at(pages.values, base + column);
      const int tokens = std::min<int>(PAGE, count - column), ahead = base + KEY_TILE + column;
      const KV* soon = ahead < end ? pages.at(pages.keys, ahead) : values;
      for (int d = 0; d < dim; d += 32)
        weigh(values + d, soon + d * PAGE, tokens, dim, scores, column, rows, sums + d);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < dim; i++) out[r * dim + i] = sums[r * dim + arranged(pages.keys, i)];
}
