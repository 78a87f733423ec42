// One step of a Llama-family model over paged KV, as one parallel region: no interpreter and no
// allocation between layers. Included once per instruction set (llama_avx2.cpp, llama_avx512.cpp) with
// the multiplies (`G`: layers, `H`: head) that fit it.
#pragma once
#include <sys/mman.h>

#include <atomic>
#include <new>

#include "api.h"
#include "attention.h"
#include "threads.h"
#include "tiles.h"

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
  return 1.f / std::sqrt(sum8(sum) / static_cast<float>(n) + epsilon);
}

// A row of `n` values times `factor` (and times `weight` where there is one) into its lane of a tile.
template <class G>
inline void scale_to_tile(const float* x, float factor, const float* weight, int n, char* tile, int lane, int column) {
  const __m256 f = _mm256_set1_ps(factor);
  for (int i = 0; i < n; i += QUANT) {
    __m256 v[4];
    for (int j = 0; j < 4; j++) {
      v[j] = _mm256_mul_ps(load8(x + i + 8 * j), f);
      if (weight) v[j] = _mm256_mul_ps(v[j], load8(weight + i + 8 * j));
    }
    G::put(tile, lane, column + i, v);
  }
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

// Memory of one kind of activations: aligned, zeroed, only grows.
struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
  void need(size_t bytes) {
    if (bytes <= size) return;
    std::free(data);
    size = (bytes + 63) / 64 * 64;
    data = static_cast<char*>(std::aligned_alloc(64, size));
    if (!data) throw std::bad_alloc();
    std::memset(data, 0, size);
  }
  float* floats() { return reinterpret_cast<float*>(data); }
};

enum {
  SPLIT_KEYS = 256,            // keys of a partial result when few sequences must keep all threads busy
  SPLIT_PARTS = 16,            // partial results of one query at most (flash-decoding)
  UNIT = 4,                    // panels that are computed together
  BLOCK_BYTES = 256 << 10,     // activations that one thread works on at a time: half of a small second-level cache
  STATIC_ROWS = 8,             // up to here every thread has its own stretch of the weights; beyond, units are taken
};

template <class G, class Head>
struct Model final : Step {
  DfModel d;
  std::vector<DfLayer> layers;
  Threads threads;
  int q_width, group, query_tokens, capacity = 0;
  Buffer hidden, normed, queries, attended, activated, scratch, parts;
  std::vector<int> tile_of, lane_of;
  std::vector<size_t> slot_of;                 // token -> elements from the pool's start to its place in a block
  std::vector<std::atomic<int>> taken;         // units taken, per layer and phase

  explicit Model(const DfModel& description)
      : d(description), layers(description.layer, description.layer + description.layers), threads(description.threads),
        taken(static_cast<size_t>(description.layers) * PHASES + 1) {
    q_width = d.heads * d.head_dim;
    group = d.heads / d.kv_heads;
    query_tokens = std::max(1, QUERY_ROWS / group);
  }

  enum Phase { QKV, ATTEND, OUTPUT, GATE_UP, DOWN, PHASES };

  // Buffers for `rows` tokens. The last tile may have idle lanes.
  void reserve(int rows) {
    if (rows <= capacity) return;
    const size_t tokens = rows, tiles = tokens / ROWS + 2;
    hidden.need(tokens * d.hidden * 4);
    normed.need(tiles * std::max(G::tile_bytes(d.hidden), Head::tile_bytes(d.hidden)));
    queries.need(tokens * q_width * 4);
    attended.need(tiles * G::tile_bytes(q_width));
    activated.need(tiles * G::tile_bytes(d.intermediate));
    scratch.need(d.threads * scratch_floats() * 4);
    tile_of.resize(tokens);
    lane_of.resize(tokens);
    slot_of.resize(tokens);
    capacity = rows;
  }

  // Tiles of a row block: its activations stay in the second-level cache while all weights pass.
  static int block_tiles(int k) { return std::max<int>(1, BLOCK_BYTES / static_cast<int>(G::tile_bytes(k))); }
  size_t scratch_floats() const {  // of one thread: a head's rows of a row block, or a unit's
    return static_cast<size_t>(block_tiles(d.hidden)) * ROWS * std::max(d.head_dim, UNIT * COLS);
  }

  void place(const Tiles& tiles) {
    for (int t = 0; t < tiles.count; t++)
      for (int r = tiles.first(t); r < tiles.first(t + 1); r++) tile_of[r] = t, lane_of[r] = r - tiles.first(t);
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

  // Calls f(row block's first tile, its end, unit) for this thread's part of blocks x units.
  template <class F>
  void each(int id, std::atomic<int>& next, const Tiles& tiles, int k, int units, F&& f) {
    const int per = block_tiles(k), blocks = (tiles.count + per - 1) / per, total = blocks * units;
    auto call = [&](int index) {
      const int first = index / units * per;
      f(first, std::min(tiles.count, first + per), index % units);
    };
    if (tiles.rows <= STATIC_ROWS || threads.count() == 1) {
      int begin, end;
      share(total, id, threads.count(), &begin, &end);
      for (int i = begin; i < end; i++) call(i);
    } else {
      for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) call(i);
    }
  }

  // `count` panels from panel `first` of a packed matrix times the rows of tiles [t0, t1).
  template <class M, class Done>
  static DF_INLINE void product(const Tiles& tiles, int t0, int t1, const Buffer& rows, const void* packed, int first,
                                int count, int k, Done&& done) {
    const size_t tile = M::tile_bytes(k), panel = panel_bytes(M::FORMAT, k);
    const char* weights = static_cast<const char*>(packed) + panel * first;
    auto one = [&](int t, int p, int n) {
      const int row = tiles.first(t);
      multiply<M>(rows.data + tile * t, tiles.first(t + 1) - row, row, weights + panel * p, n, k,
                  [&](int index, int r, __m256 x, __m256 y) { done(first + p + index, r, x, y); });
    };
    if (t1 - t0 == 1) return one(t0, 0, count);
    for (int p = 0; p < count; p += M::NEIGHBOURS)
      for (int t = t0; t < t1; t++) one(t, p, std::min<int>(M::NEIGHBOURS, count - p));
  }

  template <class KV>
  void run(const DfBatch& b);
  void step(const DfBatch& b) override { d.kv_bf16 ? run<bf16>(b) : run<float>(b); }
  void head(int id, int rows, const int32_t* row_tokens, float* out);
  void logits(int rows, const int32_t* row_tokens, float* out) override {
    threads.run([&](int id) { head(id, rows, row_tokens, out); });
  }

  void embed(int token, float* out) const {
    if (d.tied) {
      const char* panel = static_cast<const char*>(d.lm_head) + panel_bytes(Head::FORMAT, d.hidden) * (token / COLS);
      panel_column(Head::FORMAT, panel, d.hidden, token % COLS, out);
    } else if (d.embedding_bf16) {
      const bf16* e = static_cast<const bf16*>(d.embedding) + static_cast<size_t>(token) * d.hidden;
      for (int i = 0; i < d.hidden; i += 8) store8(out + i, load8(e + i));
    } else {
      std::memcpy(out, static_cast<const float*>(d.embedding) + static_cast<size_t>(token) * d.hidden,
                  sizeof(float) * d.hidden);
    }
  }
};

template <class G, class Head>
template <class KV>
void Model<G, Head>::run(const DfBatch& b) {
  const int tokens = b.tokens, H = d.hidden, D = d.head_dim, half = D / 2, I = d.intermediate;
  const size_t head_stride = static_cast<size_t>(d.block_tokens) * D, value_offset = head_stride * d.kv_heads,
               layer_stride = 2 * value_offset, block_stride = layer_stride * d.layers;
  const size_t part_size = static_cast<size_t>(QUERY_ROWS) * (D + 2);
  KV* pages = static_cast<KV*>(b.pages);
  reserve(tokens);
  std::vector<Work> work;
  std::vector<Merge> merges;
  const int slots = plan(b, &work, &merges);
  parts.need(slots * part_size * 4);
  const Tiles tiles(tokens);
  place(tiles);
  for (int s = 0; s < b.sequences; s++) {
    const int32_t* table = b.tables + static_cast<size_t>(s) * b.table_width;
    for (int t = b.first[s]; t < b.first[s] + b.count[s]; t++)
      slot_of[t] = static_cast<size_t>(table[b.positions[t] / d.block_tokens]) * block_stride +
                   static_cast<size_t>(b.positions[t] % d.block_tokens) * D;
  }
  for (auto& counter : taken) counter.store(0, std::memory_order_relaxed);

  threads.run([&](int id) {
    const int N = threads.count();
    int begin, end;
    share(tokens, id, N, &begin, &end);
    auto state = [&](int t) { return hidden.floats() + static_cast<size_t>(t) * H; };
    auto norm_rows = [&](const float* weight) {
      for (int t = begin; t < end; t++)
        scale_to_tile<G>(state(t), inverse_rms(state(t), H, d.norm_epsilon), weight, H,
                         normed.data + tile_of[t] * G::tile_bytes(H), lane_of[t], 0);
    };
    auto add_to_hidden = [&](int panel, int r, __m256 x, __m256 y) {
      float* o = state(r) + panel * COLS;
      store8(o, _mm256_add_ps(load8(o), x));
      store8(o + 8, _mm256_add_ps(load8(o + 8), y));
    };
    auto add_product = [&](std::atomic<int>& next, const Buffer& rows, const void* packed, int k) {
      const int panels = H / COLS;
      each(id, next, tiles, k, (panels + UNIT - 1) / UNIT, [&](int t0, int t1, int unit) {
        product<G>(tiles, t0, t1, rows, packed, unit * UNIT, std::min<int>(UNIT, panels - unit * UNIT), k, add_to_hidden);
      });
    };
    auto to_attended = [&](const float* x, float factor, int token, int head) {
      scale_to_tile<G>(x, factor, nullptr, D, attended.data + tile_of[token] * G::tile_bytes(q_width), lane_of[token],
                       head * D);
    };
    float* const own = scratch.floats() + id * scratch_floats();

    for (int t = begin; t < end; t++) embed(b.ids[t], state(t));
    for (int index = 0; index < d.layers; index++) {
      const DfLayer& layer = layers[index];
      std::atomic<int>* next = &taken[static_cast<size_t>(index) * PHASES];
      norm_rows(layer.attention_norm);
      threads.barrier();

      // Head by head: the thread that makes a head also rotates it and writes it to its pages.
      each(id, next[QKV], tiles, H, d.heads + 2 * d.kv_heads, [&](int t0, int t1, int head) {
        const bool query = head < d.heads, key = !query && head < d.heads + d.kv_heads;
        const int r0 = tiles.first(t0), r1 = tiles.first(t1), stride = query ? q_width : D, panels = D / COLS;
        float* const out = query ? queries.floats() + static_cast<size_t>(r0) * stride + static_cast<size_t>(head) * D : own;
        for (int p = 0; p < panels; p += UNIT) {
          product<G>(tiles, t0, t1, normed, layer.qkv, head * panels + p, std::min<int>(UNIT, panels - p), H,
                     [&](int panel, int r, __m256 x, __m256 y) {
                       const int column = (panel - head * panels) * COLS;
                       if (const float* bias = layer.qkv_bias) {
                         x = _mm256_add_ps(x, load8(bias + head * D + column));
                         y = _mm256_add_ps(y, load8(bias + head * D + column + 8));
                       }
                       float* o = out + static_cast<size_t>(r - r0) * stride + column;
                       store8(o, x);
                       store8(o + 8, y);
                     });
        }
        const float* norm = query ? layer.q_norm : key ? layer.k_norm : nullptr;
        for (int t = r0; t < r1 && (query || key); t++) {
          float* x = out + static_cast<size_t>(t - r0) * stride;
          if (norm) norm_in_place(x, norm, D, d.norm_epsilon);
          const size_t row = static_cast<size_t>(b.positions[t]) * half;
          rotate(x, d.cosines + row, d.sines + row, half);
        }
        if (query) return;
        const int kv_head = key ? head - d.heads : head - d.heads - d.kv_heads;
        KV* base = pages + index * layer_stride + (key ? 0 : value_offset) + kv_head * head_stride;
        for (int t = r0; t < r1; t++)
          for (int i = 0; i < D; i += 8) store8(base + slot_of[t] + i, load8(out + static_cast<size_t>(t - r0) * D + i));
      });
      threads.barrier();

      for (int w; (w = next[ATTEND].fetch_add(1, std::memory_order_relaxed)) < static_cast<int>(work.size());) {
        const Work& k = work[w];
        const float* query[QUERY_ROWS];
        int position[QUERY_ROWS], rows = 0;
        alignas(64) float out[QUERY_ROWS * HEAD_DIM_MAX];
        float top[QUERY_ROWS], total[QUERY_ROWS];
        const int token = b.first[k.sequence] + k.first;
        for (int i = 0; i < k.count; i++) {
          for (int g = 0; g < group; g++, rows++) {
            query[rows] = queries.floats() + static_cast<size_t>(token + i) * q_width + static_cast<size_t>(k.head * group + g) * D;
            position[rows] = b.positions[token + i];
          }
        }
        const KV* base = pages + index * layer_stride + k.head * head_stride;
        const Pages<KV> view{base, base + value_offset, block_stride,
                             b.tables + static_cast<size_t>(k.sequence) * b.table_width, d.block_tokens, D};
        attend(view, query, position, rows, k.begin, k.end, out, top, total);
        if (k.part >= 0) {
          float* p = parts.floats() + k.part * part_size;
          std::memcpy(p, out, sizeof(float) * rows * D);
          std::memcpy(p + QUERY_ROWS * D, top, sizeof(float) * rows);
          std::memcpy(p + QUERY_ROWS * (D + 1), total, sizeof(float) * rows);
          continue;
        }
        for (int r = 0; r < rows; r++)
          to_attended(out + static_cast<size_t>(r) * D, 1.f / total[r], token + r / group, k.head * group + r % group);
      }
      threads.barrier();
      if (!merges.empty()) {
        for (size_t g = id; g < merges.size(); g += N) {
          const Work& k = work[merges[g].work];
          const int token = b.first[k.sequence] + k.first;
          for (int r = 0; r < k.count * group; r++) {
            float sum[HEAD_DIM_MAX] = {0}, peak = -INFINITY, total = 0;
            for (int p = 0; p < merges[g].parts; p++)
              peak = std::max(peak, parts.floats()[(k.part + p) * part_size + QUERY_ROWS * D + r]);
            for (int p = 0; p < merges[g].parts; p++) {
              const float* part = parts.floats() + (k.part + p) * part_size;
              const float top = part[QUERY_ROWS * D + r];
              if (top == -INFINITY) continue;  // no key of this part is visible to the row
              const float f = std::exp(top - peak);
              total += part[QUERY_ROWS * (D + 1) + r] * f;
              for (int i = 0; i < D; i++) sum[i] += f * part[static_cast<size_t>(r) * D + i];
            }
            to_attended(sum, 1.f / total, token + r / group, k.head * group + r % group);
          }
        }
        threads.barrier();
      }

      add_product(next[OUTPUT], attended, layer.output, q_width);
      threads.barrier();
      norm_rows(layer.ffn_norm);
      threads.barrier();
      // A unit is 32 outputs: their gate and up panels alternate.
      each(id, next[GATE_UP], tiles, H, I / QUANT, [&](int t0, int t1, int unit) {
        const int r0 = tiles.first(t0), r1 = tiles.first(t1);
        product<G>(tiles, t0, t1, normed, layer.gate_up, unit * UNIT, UNIT, H, [&](int panel, int r, __m256 x, __m256 y) {
          float* o = own + static_cast<size_t>(r - r0) * UNIT * COLS + panel % UNIT * COLS;
          store8(o, x);
          store8(o + 8, y);
        });
        for (int r = r0; r < r1; r++) {
          const float* o = own + static_cast<size_t>(r - r0) * UNIT * COLS;
          __m256 v[4];
          for (int j = 0; j < 4; j++) {
            const float* gate = o + j / 2 * 2 * COLS + j % 2 * 8;
            v[j] = _mm256_mul_ps(silu(load8(gate)), load8(gate + COLS));
          }
          G::put(activated.data + tile_of[r] * G::tile_bytes(I), lane_of[r], unit * QUANT, v);
        }
      });
      threads.barrier();
      add_product(next[DOWN], activated, layer.down, I);
      threads.barrier();
    }
    if (b.rows > 0) head(id, b.rows, b.row_tokens, b.logits);
  });
}

// Logits of `rows` tokens of the last step, whose hidden states are still there. Called by every thread.
template <class G, class Head>
void Model<G, Head>::head(int id, int rows, const int32_t* row_tokens, float* out) {
  const int N = threads.count(), H = d.hidden, panels = d.vocab / COLS;
  const Tiles wanted(rows);
  if (id == 0) {
    place(wanted);
    taken.back().store(0, std::memory_order_relaxed);
  }
  threads.barrier();
  for (int r = id; r < rows; r += N) {
    const float* x = hidden.floats() + static_cast<size_t>(row_tokens[r]) * H;
    scale_to_tile<Head>(x, inverse_rms(x, H, d.norm_epsilon), d.final_norm, H,
                        normed.data + tile_of[r] * Head::tile_bytes(H), lane_of[r], 0);
  }
  threads.barrier();
  each(id, taken.back(), wanted, H, (panels + UNIT - 1) / UNIT, [&](int t0, int t1, int unit) {
    product<Head>(wanted, t0, t1, normed, d.lm_head, unit * UNIT, std::min<int>(UNIT, panels - unit * UNIT), H,
                  [&](int panel, int r, __m256 x, __m256 y) {
                    float* o = out + static_cast<size_t>(r) * d.vocab + panel * COLS;
                    store8(o, x);
                    store8(o + 8, y);
                  });
  });
}

template <class F32, class BF16, class INT8, class INT4>
Step* make_step(const DfModel& m) {
  switch (m.weights * 4 + m.head) {
    case ::F32 * 4 + ::F32: return new Model<F32, F32>(m);
    case ::BF16 * 4 + ::BF16: return new Model<BF16, BF16>(m);
    case ::INT8 * 4 + ::INT8: return new Model<INT8, INT8>(m);
    case ::INT4 * 4 + ::INT8: return new Model<INT4, INT8>(m);
    default: return nullptr;
  }
}

}  // namespace
