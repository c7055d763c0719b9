// The CPU kernels for processors with AVX-512.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define LANES 16
#define ISA with_avx512
#include "winograd.h"

namespace resnet_fast::cpu {
const Isa avx512{"AVX-512", ISA::panel, ISA::winograd, ISA::winograd_filters};
}
