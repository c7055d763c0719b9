// ptx.cuh's instructions, emulated. Where each lane's elements lie is written down here a second time, straight from
// the PTX ISA ("Matrix Fragments for mma.m16n8k16", "ldmatrix"), and not taken from tile.h, which it is to test.
#pragma once

#include <cuda_runtime.h>

#include <array>

namespace resnet_fast {

inline unsigned char* dynamic_shared() { return host_cuda::shared_memory; }

inline void check_shared(const void* p, const char* what) {
  const auto* at = static_cast<const unsigned char*>(p);
  const unsigned char* begin = host_cuda::shared_memory;
  if (at < begin || at + 16 > begin + host_cuda::shared_bytes) host_cuda::fail(what);
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) host_cuda::fail("a shared address that is no multiple of 16");
}

inline void land(const host_cuda::Copy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
}

inline void cp_async16(void* shared, const void* global, bool valid) {
  check_shared(shared, "cp.async to an address outside shared memory");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) host_cuda::fail("cp.async from an unaligned address");
  const host_cuda::Copy copy{shared, valid ? global : nullptr};
  if (host_cuda::settings.late_copies) {
    host_cuda::self().groups.back().push_back(copy);
  } else {
    land(copy);
  }
}

inline void cp_async_commit() { host_cuda::self().groups.emplace_back(); }

template <int N>
inline void cp_async_wait() {
  auto& groups = host_cuda::self().groups;
  while (groups.size() > N + 1) {
    for (const auto& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  using Registers = std::array<uint32_t, 4>;
  check_shared(row, "ldmatrix from an address outside shared memory");
  const auto exchange = [](const void* (&rows)[32], Registers (&result)[32]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) banks |= 1u << reinterpret_cast<uintptr_t>(rows[8 * matrix + r]) / 16 % 8;
      if (banks != 0xff) host_cuda::fail("ldmatrix with a bank conflict");
      for (int lane = 0; lane < 32; ++lane) {
        const auto* from = static_cast<const unsigned char*>(rows[8 * matrix + lane / 4]) + lane % 4 * 4;
        std::memcpy(&result[lane][matrix], from, 4);
      }
    }
  };
  const auto all = host_cuda::collective<Registers>("ldmatrix", row, exchange);
  for (int i = 0; i < 4; ++i) out[i] = all[i];
}

inline float half_of(uint32_t pair, int which, __half) {
  return __half2float({uint16_t(pair >> 16 * which)});
}
inline float half_of(uint32_t pair, int which, __nv_bfloat16) {
  return __bfloat162float({uint16_t(pair >> 16 * which)});
}

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct In {
    uint32_t a[4], b[2];
    float d[4];
  } in;
  std::memcpy(in.a, a, sizeof a);
  std::memcpy(in.b, b, sizeof b);
  std::memcpy(in.d, d, sizeof d);
  using Registers = std::array<float, 4>;
  const auto all = host_cuda::collective<Registers>("mma", in, [](In (&ins)[32], Registers (&result)[32]) {
    double wide_a[16][16], wide_b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, in_group = lane % 4;
      for (int i = 0; i < 8; ++i) {  // a0 .. a7
        const int row = i / 2 % 2 == 0 ? group : group + 8;
        const int column = in_group * 2 + i % 2 + (i >= 4 ? 8 : 0);
        wide_a[row][column] = half_of(ins[lane].a[i / 2], i % 2, T{});
      }
      for (int i = 0; i < 4; ++i) {  // b0 .. b3
        const int row = in_group * 2 + i % 2 + (i >= 2 ? 8 : 0);
        wide_b[row][group] = half_of(ins[lane].b[i / 2], i % 2, T{});
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {  // c0 .. c3
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + i % 2;
        double sum = ins[lane].d[i];
        for (int k = 0; k < 16; ++k) sum += wide_a[row][k] * wide_b[k][column];
        result[lane][i] = float(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = all[i];
}

}  // namespace resnet_fast
