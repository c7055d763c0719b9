// hopper.cuh's stmatrix and ldmatrix, emulated from the PTX ISA. What is stored belongs to the lane that gave its row's
// address, and is held back from TMA and wgmma, as from everybody here, until that lane's fence.proxy.async.
#pragma once

#include "host_ptx.h"

namespace resnet_fast {

template <class Pair>
void stmatrix_x2_trans(void* row, const Pair (&in)[2]) {
  using Row = std::array<uint16_t, 8>;
  std::array<uint16_t, 4> mine;
  std::memcpy(mine.data(), in, sizeof mine);
  const auto exchange = [](std::array<uint16_t, 4> (&ins)[32], Row (&rows)[32]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) rows[8 * (i / 2) + 2 * (lane % 4) + i % 2][size_t(lane) / 4] = ins[lane][size_t(i)];
  };
  const Row made = host_cuda::collective<Row>("stmatrix.trans", mine, exchange);
  if (host_cuda::block.current % 32 >= 16) return;
  check_shared(row, "stmatrix to an address outside shared memory");
  std::array<uint32_t, 4> words;
  std::memcpy(words.data(), made.data(), sizeof words);
  for (size_t i = 0; i < 4; ++i) store_for_async(static_cast<uint32_t*>(row) + i, words[i]);
}

template <class Pair>
void ldmatrix_x2_trans(Pair (&out)[2], const void* row) {
  using Values = std::array<uint16_t, 4>;
  if (host_cuda::block.current % 32 < 16) check_shared(row, "ldmatrix from an address outside shared memory");
  const auto exchange = [](const void* (&rows)[32], Values (&values)[32]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        std::memcpy(&values[lane][size_t(i)],
                    static_cast<const uint16_t*>(rows[8 * (i / 2) + 2 * (lane % 4) + i % 2]) + lane / 4, 2);
  };
  const Values values = host_cuda::collective<Values>("ldmatrix.trans", row, exchange);
  std::memcpy(out, values.data(), sizeof values);
}

}  // namespace resnet_fast
