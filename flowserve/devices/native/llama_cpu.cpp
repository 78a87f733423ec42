// The shared library's functions. Activations and sums are float; weights are packed (panels.h); KV pages
// are bf16 or float in the pool's layout (block, layer, K/V, kv_head, token, dim).
#include <sys/mman.h>

#include "api.h"
#include "panels.h"

#define DF_EXPORT __attribute__((visibility("default")))

extern "C" {

DF_EXPORT int32_t df_version(void) { return 4; }
DF_EXPORT int32_t df_supported(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Memory for weights: pages of their own, large ones where the system gives them. Null if there is none.
DF_EXPORT void* df_allocate(uint64_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  madvise(p, bytes, MADV_HUGEPAGE);  // a wish: four times fewer misses of the address cache while weights stream
  return p;
}
DF_EXPORT void df_release(void* p, uint64_t bytes) { munmap(p, bytes); }

DF_EXPORT uint64_t df_packed_bytes(int32_t format, int32_t n, int32_t k) {
  return panel_bytes(format, k) * ((n + COLS - 1) / COLS);
}
DF_EXPORT void df_pack(int32_t format, const void* matrix, int32_t is_bf16, int32_t n, int32_t k, int32_t first,
                       int32_t step, void* out) {
  if (is_bf16)
    pack_panels(format, static_cast<const bf16*>(matrix), n, k, first, step, static_cast<char*>(out));
  else
    pack_panels(format, static_cast<const float*>(matrix), n, k, first, step, static_cast<char*>(out));
}
// Row `row` of a packed matrix as floats: what the step multiplies with.
DF_EXPORT void df_unpack(int32_t format, const void* packed, int32_t k, int32_t row, float* out) {
  const char* panel = static_cast<const char*>(packed) + panel_bytes(format, k) * (row / COLS);
  panel_column(format, panel, k, row % COLS, out);
}

// The widest instruction set here that the step is written for: 2 or 512.
DF_EXPORT int32_t df_widest(void) {
#ifdef DF_EMULATE_AVX512
  return 512;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
                 __builtin_cpu_supports("avx512vnni")
             ? 512
             : 2;
#endif
}
// `width` is 2 or what df_widest says. Null for formats that do not go together.
DF_EXPORT void* df_model_new(const DfModel* description, int32_t width) {
#ifndef DF_EMULATE_AVX512
  if (width == 2) return make_avx2(*description);
#endif
  return width == 512 ? make_avx512(*description) : nullptr;
}
DF_EXPORT void df_model_free(void* model) { delete static_cast<Step*>(model); }
DF_EXPORT void df_step(void* model, const DfBatch* batch) { static_cast<Step*>(model)->step(*batch); }
// `rows` is at most the tokens of the last step.
DF_EXPORT void df_logits(void* model, int32_t rows, const int32_t* row_tokens, float* logits) {
  static_cast<Step*>(model)->logits(rows, row_tokens, logits);
}
}
