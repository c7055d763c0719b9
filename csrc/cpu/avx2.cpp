// The CPU kernels for processors with AVX2 and FMA.
#pragma GCC target("avx2,fma")
#define LANES 8
#define ISA with_avx2
#include "winograd.h"

namespace resnet_fast::cpu {
const Isa avx2{"AVX2", ISA::panel, ISA::winograd, ISA::winograd_filters};
}
