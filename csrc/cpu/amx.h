// Whether oneDNN multiplies bfloat16 with AMX tiles on this processor. None of our kernels does: there bfloat16 is left to it.
#pragma once

#include <cpuid.h>
#include <strings.h>

#include <cstdint>
#include <cstdlib>

namespace resnet_fast::cpu {

// The processor has AMX-TILE and AMX-BF16 (cpuid, leaf 7), and the system saves TILECFG and TILEDATA (XCR0).
inline bool amx_usable(uint32_t leaf7_edx, uint64_t xcr0) {
  constexpr uint32_t bf16_and_tile = 1u << 22 | 1u << 24;
  constexpr uint64_t tiles = 3ull << 17;
  return (leaf7_edx & bf16_and_tile) == bf16_and_tile && (xcr0 & tiles) == tiles;
}

// Whether the value of oneDNN's variable lets it use AMX: a limit names an instruction set (AVX512_CORE_BF16), of those with AMX too.
inline bool onednn_may_amx(const char* limit) {
  if (!limit || (strncasecmp(limit, "AVX", 3) && strncasecmp(limit, "SSE", 3))) return true;
  for (; *limit; ++limit)
    if (!strncasecmp(limit, "AMX", 3)) return true;
  return false;
}

inline bool onednn_has_amx() {
  const char *newer = std::getenv("ONEDNN_MAX_CPU_ISA"), *older = std::getenv("DNNL_MAX_CPU_ISA");
  if (!onednn_may_amx(newer && *newer ? newer : older)) return false;
  uint32_t eax, ebx, ecx1, edx1, ecx7, edx7;
  if (!__get_cpuid(1, &eax, &ebx, &ecx1, &edx1) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx7, &edx7)) return false;
  if (!(ecx1 & 1u << 27)) return false;  // OSXSAVE: without it xgetbv is an illegal instruction
  uint32_t low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return amx_usable(edx7, uint64_t(high) << 32 | low);
}

}  // namespace resnet_fast::cpu
