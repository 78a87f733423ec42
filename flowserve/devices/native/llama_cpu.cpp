// One step of a Llama-family model on CPU cores over paged KV, as one call: no interpreter and no
// allocation between layers. Plain C interface for ctypes (flowserve/devices/native/library.py holds
// the Python side of every struct). Needs AVX2 and FMA; the loader checks.
//
// Activations and sums are float. Weights are bf16 or float, packed in panels of sixteen columns;
// KV pages are bf16 or float in the pool's layout (block, layer, K/V, kv_head, token, dim).
#include <atomic>

#include "attention.h"
#include "gemm.h"
#include "simd.h"
#include "threads.h"

#define DF_EXPORT __attribute__((visibility("default")))
extern "C" {

struct DfLayer {  // borrowed pointers; null where the architecture has none
  const float *attention_norm, *ffn_norm, *qkv_bias, *q_norm, *k_norm;
  const void *qkv, *output, *gate_up, *down;  // packed; gate and up panels alternate
};

struct DfModel {
  int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, block_tokens;
  int32_t weights_bf16, kv_bf16, threads, tied;
  float norm_epsilon;
  const float *final_norm, *cosines, *sines;  // rotary tables [max_len][head_dim / 2]
  const void *embedding;                      // [vocab][hidden]; unused where tied
  const void *lm_head;                        // packed; the embedding too where tied
  const DfLayer* layer;
};

struct DfBatch {
  int32_t tokens, sequences, rows, table_width;
  const int32_t *ids, *positions;          // [tokens]
  const int32_t *first, *count;            // [sequences] span of tokens in the batch
  const int32_t *tables;                   // [sequences][table_width] block ids
  const int32_t *row_tokens;               // [rows] tokens whose logits are wanted
  void* pages;
  float* logits;                           // [rows][vocab]
};
}

namespace {

struct Work {  // one attention task: `count` queries from `first` of a sequence, one KV head, tokens [begin, end)
  int sequence, head, first, count, begin, end;
  int part;  // index of the partial result, -1 = the whole
};
struct Merge {
  int work, parts;
};

inline void share(int total, int id, int threads, int* begin, int* end) {
  *begin = static_cast<int>(static_cast<int64_t>(total) * id / threads);
  *end = static_cast<int>(static_cast<int64_t>(total) * (id + 1) / threads);
}

inline float inverse_rms(const float* x, int n, float epsilon) {
  __m256 sum = _mm256_setzero_ps();
  for (int i = 0; i < n; i += 8) sum = _mm256_fmadd_ps(load8(x + i), load8(x + i), sum);
  return 1.f / std::sqrt(sum8(sum) / n + epsilon);
}

// Normalised row into its lane of a tile (gemm.h has the layout).
inline void norm_to_tile(const float* x, const float* weight, int n, float epsilon, float* out) {
  const __m256 f = _mm256_set1_ps(inverse_rms(x, n, epsilon));
  for (int i = 0; i < n; i += 8, out += OCTET)
    store8(out, _mm256_mul_ps(_mm256_mul_ps(load8(x + i), f), load8(weight + i)));
}

// A row of `n` values times `factor` into its lane of a tile.
inline void scale_to_tile(const float* x, float factor, int n, float* out) {
  for (int i = 0; i < n; i += 8, out += OCTET) store8(out, _mm256_mul_ps(load8(x + i), _mm256_set1_ps(factor)));
}

inline void norm_in_place(float* x, const float* weight, int n, float epsilon) {
  const __m256 f = _mm256_set1_ps(inverse_rms(x, n, epsilon));
  for (int i = 0; i < n; i += 8) store8(x + i, _mm256_mul_ps(_mm256_mul_ps(load8(x + i), f), load8(weight + i)));
}

inline void rotate(float* x, const float* cosines, const float* sines, int half) {
  for (int i = 0; i < half; i += 8) {
    const __m256 a = load8(x + i), b = load8(x + half + i), c = load8(cosines + i), s = load8(sines + i);
    store8(x + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
    store8(x + half + i, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
  }
}

inline __m256 silu(__m256 x) {
  const __m256 e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), x));
  return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.f), e));
}

// Keys per partial result when few sequences must keep all threads busy (flash-decoding).
enum { SPLIT_KEYS = 512, SPLIT_PARTS = 8 };

struct Model {
  DfModel d;
  std::vector<DfLayer> layers;
  Threads threads;
  int q_width, group, query_tokens, capacity = 0;
  std::vector<float> hidden, normed, queries, attended, activated, scratch, parts;
  std::vector<int> tile_of, lane_of;

  explicit Model(const DfModel& description)
      : d(description), layers(description.layer, description.layer + description.layers), threads(description.threads) {
    q_width = d.heads * d.head_dim;
    group = d.heads / d.kv_heads;
    query_tokens = std::max(1, QUERY_ROWS / group);
  }

  // Buffers for `rows` tokens; they only grow. The last tile may have idle lanes.
  void reserve(int rows) {
    if (rows <= capacity) return;
    const size_t tokens = rows, padded = tokens + ROWS;
    hidden.resize(tokens * d.hidden);
    normed.resize(padded * d.hidden);
    queries.resize(tokens * q_width);
    attended.resize(padded * q_width);
    activated.resize(padded * d.intermediate);
    scratch.resize(static_cast<size_t>(d.threads) * tokens * d.head_dim);
    capacity = rows;
  }

  void place(const Tiles& tiles) {
    tile_of.resize(tiles.rows);
    lane_of.resize(tiles.rows);
    for (int t = 0; t < tiles.count; t++)
      for (int r = tiles.first(t); r < tiles.first(t + 1); r++) tile_of[r] = t, lane_of[r] = r - tiles.first(t);
  }
  float* lane(std::vector<float>& buffer, int row, int width) {
    return buffer.data() + static_cast<size_t>(tile_of[row]) * ROWS * width + lane_of[row] * 8;
  }

  // Queries of every sequence cut into tasks; long contexts of few sequences are split over keys.
  int plan(const DfBatch& b, std::vector<Work>* work, std::vector<Merge>* merges) {
    int slots = 0;
    for (int s = 0; s < b.sequences; s++) {
      for (int head = 0; head < d.kv_heads; head++) {
        for (int f = 0; f < b.count[s]; f += query_tokens) {
          const int count = std::min(query_tokens, b.count[s] - f);
          const int end = b.positions[b.first[s] + f + count - 1] + 1;
          int parts = 1;
          if (d.threads > 1 && b.count[s] <= query_tokens && b.sequences < 4 * d.threads)
            parts = std::min<int>(SPLIT_PARTS, (end + SPLIT_KEYS - 1) / SPLIT_KEYS);
          if (parts <= 1) {
            work->push_back({s, head, f, count, 0, end, -1});
            continue;
          }
          const int per = ((end + parts - 1) / parts + PAGE - 1) / PAGE * PAGE;
          merges->push_back({static_cast<int>(work->size()), parts});
          for (int p = 0; p < parts; p++)
            work->push_back({s, head, f, count, std::min(end, p * per), std::min(end, (p + 1) * per), slots++});
        }
      }
    }
    return slots;
  }

  template <class W, class KV>
  void step(const DfBatch& b);
  template <class W>
  void head(int id, int rows, const int32_t* row_tokens, float* logits);
};

template <class W>
inline const W* panel_at(const void* packed, int index, int k) {
  return static_cast<const W*>(packed) + static_cast<size_t>(index) * COLS * k;
}

template <class W, class KV>
void Model::step(const DfBatch& b) {
  const int tokens = b.tokens, H = d.hidden, D = d.head_dim, half = D / 2, I = d.intermediate;
  const size_t head_stride = static_cast<size_t>(d.block_tokens) * D, value_offset = head_stride * d.kv_heads,
               layer_stride = 2 * value_offset, block_stride = layer_stride * d.layers;
  const size_t part_size = static_cast<size_t>(QUERY_ROWS) * (D + 2);
  KV* pages = static_cast<KV*>(b.pages);
  reserve(tokens);
  std::vector<Work> work;
  std::vector<Merge> merges;
  const int slots = plan(b, &work, &merges);
  if (parts.size() < slots * part_size) parts.resize(slots * part_size);
  const Tiles tiles(tokens);
  place(tiles);
  std::atomic<int> next{0};

  threads.run([&](int id) {
    const int N = threads.count();
    int begin, end, p0, p1;
    share(tokens, id, N, &begin, &end);
    for (int t = begin; t < end; t++) {
      float* out = &hidden[static_cast<size_t>(t) * H];
      if (d.tied) {
        const W* e = panel_at<W>(d.lm_head, b.ids[t] / COLS, H) + b.ids[t] % COLS;
        for (int i = 0; i < H; i++) {
          if constexpr (sizeof(W) == 4) {
            out[i] = e[static_cast<size_t>(i) * COLS];
          } else {
            const uint32_t bits = static_cast<uint32_t>(e[static_cast<size_t>(i) * COLS]) << 16;
            std::memcpy(out + i, &bits, 4);
          }
        }
      } else {
        const W* e = static_cast<const W*>(d.embedding) + static_cast<size_t>(b.ids[t]) * H;
        for (int i = 0; i < H; i += 8) store8(out + i, load8(e + i));
      }
    }
    for (int index = 0; index < d.layers; index++) {
      const DfLayer& layer = layers[index];
      for (int t = begin; t < end; t++)
        norm_to_tile(&hidden[static_cast<size_t>(t) * H], layer.attention_norm, H, d.norm_epsilon, lane(normed, t, H));
      threads.barrier();

      // Head by head: the thread that makes a head also rotates it and writes it to its pages.
      int h0, h1;
      share(d.heads + 2 * d.kv_heads, id, N, &h0, &h1);
      float* own = &scratch[static_cast<size_t>(id) * capacity * D];
      for (int head = h0; head < h1; head++) {
        const bool query = head < d.heads, key = !query && head < d.heads + d.kv_heads;
        float* out = query ? &queries[static_cast<size_t>(head) * D] : own;
        const int stride = query ? q_width : D;
        for (int p = 0; p < D / COLS; p++) {
          const float* bias = layer.qkv_bias ? layer.qkv_bias + head * D + p * COLS : nullptr;
          const __m256 b0 = bias ? load8(bias) : _mm256_setzero_ps(), b1 = bias ? load8(bias + 8) : _mm256_setzero_ps();
          panel(tiles, normed.data(), H, panel_at<W>(layer.qkv, head * D / COLS + p, H), [&](int r, __m256 x, __m256 y) {
            float* o = out + static_cast<size_t>(r) * stride + p * COLS;
            store8(o, _mm256_add_ps(x, b0));
            store8(o + 8, _mm256_add_ps(y, b1));
          });
        }
        const float* norm = query ? layer.q_norm : key ? layer.k_norm : nullptr;
        for (int t = 0; t < tokens && (query || key); t++) {
          float* x = out + static_cast<size_t>(t) * stride;
          if (norm) norm_in_place(x, norm, D, d.norm_epsilon);
          const size_t row = static_cast<size_t>(b.positions[t]) * half;
          rotate(x, d.cosines + row, d.sines + row, half);
        }
        if (query) continue;
        const int kv_head = key ? head - d.heads : head - d.heads - d.kv_heads;
        KV* base = pages + index * layer_stride + (key ? 0 : value_offset) + kv_head * head_stride;
        for (int s = 0; s < b.sequences; s++) {
          const int32_t* table = b.tables + static_cast<size_t>(s) * b.table_width;
          for (int t = b.first[s]; t < b.first[s] + b.count[s]; t++) {
            const int position = b.positions[t];
            KV* o = base + static_cast<size_t>(table[position / d.block_tokens]) * block_stride +
                    static_cast<size_t>(position % d.block_tokens) * D;
            for (int i = 0; i < D; i += 8) store8(o + i, load8(out + static_cast<size_t>(t) * stride + i));
          }
        }
      }
      if (id == 0) next.store(0, std::memory_order_relaxed);
      threads.barrier();

      for (int w; (w = next.fetch_add(1, std::memory_order_relaxed)) < static_cast<int>(work.size());) {
        const Work& k = work[w];
        const float* query[QUERY_ROWS];
        int position[QUERY_ROWS], rows = 0;
        alignas(64) float out[QUERY_ROWS * HEAD_DIM_MAX];
        float top[QUERY_ROWS], total[QUERY_ROWS];
        const int token = b.first[k.sequence] + k.first;
        for (int i = 0; i < k.count; i++) {
          for (int g = 0; g < group; g++, rows++) {
            query[rows] = &queries[static_cast<size_t>(token + i) * q_width + static_cast<size_t>(k.head * group + g) * D];
            position[rows] = b.positions[token + i];
          }
        }
        const KV* base = pages + index * layer_stride + k.head * head_stride;
        const Pages<KV> view{base, base + value_offset, block_stride,
                             b.tables + static_cast<size_t>(k.sequence) * b.table_width, d.block_tokens, D};
        attend(view, query, position, rows, k.begin, k.end, out, top, total);
        if (k.part >= 0) {
          float* p = &parts[k.part * part_size];
          std::memcpy(p, out, sizeof(float) * rows * D);
          std::memcpy(p + QUERY_ROWS * D, top, sizeof(float) * rows);
          std::memcpy(p + QUERY_ROWS * (D + 1), total, sizeof(float) * rows);
          continue;
        }
        for (int r = 0; r < rows; r++) {
          float* o = lane(attended, token + r / group, q_width) + static_cast<size_t>(k.head * group + r % group) * D * ROWS;
          scale_to_tile(out + static_cast<size_t>(r) * D, 1.f / total[r], D, o);
        }
      }
      threads.barrier();
      if (!merges.empty()) {
        for (size_t g = id; g < merges.size(); g += N) {
          const Work& k = work[merges[g].work];
          const int token = b.first[k.sequence] + k.first;
          for (int r = 0; r < k.count * group; r++) {
            float sum[HEAD_DIM_MAX] = {0}, peak = -INFINITY, total = 0;
            for (int p = 0; p < merges[g].parts; p++)
              peak = std::max(peak, parts[(k.part + p) * part_size + QUERY_ROWS * D + r]);
            for (int p = 0; p < merges[g].parts; p++) {
              const float* part = &parts[(k.part + p) * part_size];
              const float top = part[QUERY_ROWS * D + r];
              if (top == -INFINITY) continue;  // no key of this part is visible to the row
              const float f = std::exp(top - peak);
              total += part[QUERY_ROWS * (D + 1) + r] * f;
              for (int i = 0; i < D; i++) sum[i] += f * part[static_cast<size_t>(r) * D + i];
            }
            float* o = lane(attended, token + r / group, q_width) + static_cast<size_t>(k.head * group + r % group) * D * ROWS;
            scale_to_tile(sum, 1.f / total, D, o);
          }
        }
        threads.barrier();
      }

      auto add_to_hidden = [&](int p, int r, __m256 x, __m256 y) {
        float* o = &hidden[static_cast<size_t>(r) * H + p * COLS];
        store8(o, _mm256_add_ps(load8(o), x));
        store8(o + 8, _mm256_add_ps(load8(o + 8), y));
      };
      share(H / COLS, id, N, &p0, &p1);
      for (int p = p0; p < p1; p++)
        panel(tiles, attended.data(), q_width, panel_at<W>(layer.output, p, q_width),
              [&](int r, __m256 x, __m256 y) { add_to_hidden(p, r, x, y); });
      threads.barrier();
      for (int t = begin; t < end; t++)
        norm_to_tile(&hidden[static_cast<size_t>(t) * H], layer.ffn_norm, H, d.norm_epsilon, lane(normed, t, H));
      threads.barrier();
      share(I / COLS, id, N, &p0, &p1);
      for (int p = p0; p < p1; p++) {
        const size_t column = static_cast<size_t>(p) * COLS * ROWS;
        panel(tiles, normed.data(), H, panel_at<W>(layer.gate_up, 2 * p, H), [&](int r, __m256 x, __m256 y) {
          float* o = lane(activated, r, I) + column;
          store8(o, silu(x));
          store8(o + OCTET, silu(y));
        });
        panel(tiles, normed.data(), H, panel_at<W>(layer.gate_up, 2 * p + 1, H), [&](int r, __m256 x, __m256 y) {
          float* o = lane(activated, r, I) + column;
          store8(o, _mm256_mul_ps(load8(o), x));
          store8(o + OCTET, _mm256_mul_ps(load8(o + OCTET), y));
        });
      }
      threads.barrier();
      share(H / COLS, id, N, &p0, &p1);
      for (int p = p0; p < p1; p++)
        panel(tiles, activated.data(), I, panel_at<W>(layer.down, p, I),
              [&](int r, __m256 x, __m256 y) { add_to_hidden(p, r, x, y); });
      threads.barrier();
    }
    if (b.rows > 0) head<W>(id, b.rows, b.row_tokens, b.logits);
  });
}

// Logits of `rows` tokens of the last step, whose hidden states are still there. Called by every thread.
template <class W>
void Model::head(int id, int rows, const int32_t* row_tokens, float* logits) {
  const int N = threads.count(), H = d.hidden;
  int p0, p1;
  const Tiles wanted(rows);
  if (id == 0) place(wanted);
  threads.barrier();
  for (int r = id; r < rows; r += N)
    norm_to_tile(&hidden[static_cast<size_t>(row_tokens[r]) * H], d.final_norm, H, d.norm_epsilon, lane(normed, r, H));
  threads.barrier();
  share(d.vocab / COLS, id, N, &p0, &p1);
  for (int p = p0; p < p1; p++)
    panel(wanted, normed.data(), H, panel_at<W>(d.lm_head, p, H), [&](int r, __m256 x, __m256 y) {
      float* o = logits + static_cast<size_t>(r) * d.vocab + p * COLS;
      store8(o, x);
      store8(o + 8, y);
    });
}

}  // namespace

extern "C" {

DF_EXPORT int32_t df_version(void) { return 2; }
DF_EXPORT int32_t df_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
DF_EXPORT void* df_model_new(const DfModel* description) { return new Model(*description); }
DF_EXPORT void df_model_free(void* model) { delete static_cast<Model*>(model); }

DF_EXPORT void df_step(void* handle, const DfBatch* batch) {
  Model& model = *static_cast<Model*>(handle);
  if (model.d.weights_bf16) {
    if (model.d.kv_bf16)
      model.step<bf16, bf16>(*batch);
    else
      model.step<bf16, float>(*batch);
  } else if (model.d.kv_bf16) {
    model.step<float, bf16>(*batch);
  } else {
    model.step<float, float>(*batch);
  }
}

// `rows` is at most the tokens of the last step.
DF_EXPORT void df_logits(void* handle, int32_t rows, const int32_t* row_tokens, float* logits) {
  Model& model = *static_cast<Model*>(handle);
  model.threads.run([&](int id) {
    if (model.d.weights_bf16)
      model.head<bf16>(id, rows, row_tokens, logits);
    else
      model.head<float>(id, rows, row_tokens, logits);
  });
}
}
