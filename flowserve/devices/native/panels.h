// Weights at rest: matrices [n][k] cut into panels of sixteen output columns, so that one pass over a
// panel reads memory in one stream. Formats:
//   F32   [k][16] floats
//   BF16  [k / 2][16][2]: a pair of k for each column, what dot-product instructions take
//   INT8  blocks of 32 k: sixteen half-precision scales, then [8 quads of k][16][4] signed bytes.
//         weight = scale * q, scale = largest magnitude / 127 (the scheme of ggml's Q8_0)
//   INT4  blocks of 32 k: sixteen scales, sixteen minima, then [4][16][4] bytes whose low nibbles are
//         quad 2i and high nibbles quad 2i + 1. weight = scale * q + minimum (the scheme of Q4_1)
// Quantizing a matrix that came out of Q8_0 or Q4_1 blocks gives those blocks again: their extreme values
// are in the block, so scale and minimum are found exactly.
#pragma once
#include "simd.h"

enum Format { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
enum { COLS = 16, QUANT = 32 };  // columns of a panel, k of a quantized block

struct Int8Block {
  half scale[COLS];
  int8_t q[QUANT / 4][COLS][4];
};
struct Int4Block {
  half scale[COLS], minimum[COLS];
  uint8_t q[QUANT / 8][COLS][4];
};

static inline size_t panel_bytes(int format, int k) {
  switch (format) {
    case F32: return static_cast<size_t>(k) * COLS * 4;
    case BF16: return static_cast<size_t>(k) * COLS * 2;
    case INT8: return static_cast<size_t>(k / QUANT) * sizeof(Int8Block);
    default: return static_cast<size_t>(k / QUANT) * sizeof(Int4Block);
  }
}

static inline half to_half(float x) { return static_cast<half>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
static inline float from_half(half x) { return _cvtsh_ss(x); }
static inline int clamp_round(float x, int low, int high) {
  return std::min(high, std::max(low, static_cast<int>(std::nearbyint(x))));
}

static inline void quantize(const float* x, int column, Int8Block* out) {
  float top = 0;
  for (int i = 0; i < QUANT; i++) top = std::max(top, std::fabs(x[i]));
  out->scale[column] = to_half(top / 127.f);
  const float scale = from_half(out->scale[column]), inverse = scale > 0 ? 1.f / scale : 0.f;
  for (int i = 0; i < QUANT; i++)
    out->q[i / 4][column][i % 4] = static_cast<int8_t>(clamp_round(x[i] * inverse, -127, 127));
}

static inline void quantize(const float* x, int column, Int4Block* out) {
  float low = x[0], high = x[0];
  for (int i = 1; i < QUANT; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
  out->minimum[column] = to_half(low);
  low = from_half(out->minimum[column]);
  out->scale[column] = to_half((high - low) / 15.f);
  const float scale = from_half(out->scale[column]), inverse = scale > 0 ? 1.f / scale : 0.f;
  for (int i = 0; i < QUANT; i++) {
    const int q = clamp_round((x[i] - low) * inverse, 0, 15);
    uint8_t* byte = &out->q[i / 8][column][i % 4];
    *byte = static_cast<uint8_t>(i / 4 % 2 ? (*byte & 15) | q << 4 : q);
  }
}

// Column `column` of a panel, k values, to floats.
static inline void panel_column(int format, const void* panel, int k, int column, float* out) {
  switch (format) {
    case F32:
      for (int i = 0; i < k; i++) out[i] = static_cast<const float*>(panel)[static_cast<size_t>(i) * COLS + column];
      return;
    case BF16:
      for (int i = 0; i < k; i++)
        out[i] = to_float(static_cast<const bf16*>(panel)[(static_cast<size_t>(i / 2) * COLS + column) * 2 + i % 2]);
      return;
    case INT8:
      for (int i = 0; i < k; i++) {
        const Int8Block& b = static_cast<const Int8Block*>(panel)[i / QUANT];
        out[i] = from_half(b.scale[column]) * static_cast<float>(b.q[i % QUANT / 4][column][i % 4]);
      }
      return;
    default:
      for (int i = 0; i < k; i++) {
        const Int4Block& b = static_cast<const Int4Block*>(panel)[i / QUANT];
        const int byte = b.q[i % QUANT / 8][column][i % 4], q = i / 4 % 2 ? byte >> 4 : byte & 15;
        out[i] = from_half(b.scale[column]) * static_cast<float>(q) + from_half(b.minimum[column]);
      }
  }
}

// Packs matrix [n][k]; panel i goes to out + (first + i * step) * panel_bytes. Missing columns are zero.
template <class T>
static inline void pack_panels(int format, const T* matrix, int n, int k, int first, int step, char* out) {
  const size_t bytes = panel_bytes(format, k);
  std::vector<float> row(k);
  for (int i = 0; i * COLS < n; i++) {
    char* panel = out + (first + static_cast<size_t>(i) * step) * bytes;
    std::memset(panel, 0, bytes);
    for (int c = 0; c < COLS && i * COLS + c < n; c++) {
      const T* x = matrix + (static_cast<size_t>(i) * COLS + c) * k;
      for (int j = 0; j < k; j++) row[j] = to_float(x[j]);
      for (int j = 0; j < k; j++) {
        if (format == F32)
          reinterpret_cast<float*>(panel)[static_cast<size_t>(j) * COLS + c] = row[j];
        else if (format == BF16)
          reinterpret_cast<bf16*>(panel)[(static_cast<size_t>(j / 2) * COLS + c) * 2 + j % 2] = to_bf16(row[j]);
        else
          break;
      }
      for (int j = 0; j < k / QUANT; j++) {
        if (format == INT8) quantize(&row[j * QUANT], c, reinterpret_cast<Int8Block*>(panel) + j);
        if (format == INT4) quantize(&row[j * QUANT], c, reinterpret_cast<Int4Block*>(panel) + j);
      }
    }
  }
}
