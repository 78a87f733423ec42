// The plain C interface for ctypes; library.py mirrors every struct field by field.
#pragma once
#include <cstdint>

extern "C" {

struct DfLayer {  // borrowed pointers; null where the architecture has none
  const float *attention_norm, *ffn_norm, *qkv_bias, *q_norm, *k_norm;
  const void *qkv, *output, *gate_up, *down;  // packed (panels.h); gate and up panels alternate
};

struct DfModel {
  int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, block_tokens;
  int32_t weights, head, kv_bf16, embedding_bf16, threads, tied;  // formats of layers and head
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

// A model on one instruction set.
struct Step {
  virtual ~Step() = default;
  virtual void step(const DfBatch& batch) = 0;
  virtual void logits(int rows, const int32_t* row_tokens, float* out) = 0;
};
Step* make_avx2(const DfModel& model);
Step* make_avx512(const DfModel& model);
