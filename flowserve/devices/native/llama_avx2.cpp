// The step for AVX2, FMA and F16C: the floor.
#include "gemm.h"
#include "step.h"

Step* make_avx2(const DfModel& model) { return make_step<GemmF32, GemmBF16, GemmINT8, GemmINT4>(model); }
