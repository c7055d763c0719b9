// The CPU kernels for processors with AVX-512 that multiply bfloat16, which setup.py compiles this file for.
#if !(__AVX512F__ && __AVX512BW__ && __AVX512DQ__ && __AVX512VL__ && __FMA__ && __AVX512BF16__)
#error "compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mavx512bf16"
#endif
#define LANES 16
#define BF16_PAIRS
#define ISA with_avx512_bf16
#include "bn_act.h"
#include "conv.h"
#include "winograd.h"

namespace resnet_fast::cpu {
const Isa avx512_bf16{"AVX-512 BF16", ISA::panel, true, ISA::winograd, ISA::winograd_filters, ISA::conv,
                      ISA::moments, ISA::normalise, ISA::sums, ISA::gradient, ISA::merge_moments, ISA::merge_sums};
}
