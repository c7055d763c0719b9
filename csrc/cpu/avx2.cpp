// The CPU kernels for processors with AVX2 and FMA, which setup.py compiles this file for.
#if !(__AVX2__ && __FMA__)
#error "compile with -mavx2 -mfma"
#endif
#define LANES 8
#define ISA with_avx2
#include "bn_act.h"
#include "conv.h"
#include "winograd.h"

namespace resnet_fast::cpu {
const Isa avx2{"AVX2", ISA::panel, false, ISA::winograd, ISA::winograd_filters, ISA::conv,
               ISA::moments, ISA::normalise, ISA::sums, ISA::gradient, ISA::merge_moments, ISA::merge_sums};
}
