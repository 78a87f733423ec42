// The step for AVX-512 with BF16 and VNNI (Zen 4, Sapphire Rapids and later). Float weights, attention and
// everything between multiplies stay with eight lanes.
#include "gemm512.h"
#include "step.h"

Step* make_avx512(const DfModel& model) {
  return make_step<GemmF32, GemmBF16Pairs, GemmINT8Quads, GemmINT4Quads>(model);
}
