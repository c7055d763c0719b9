// hopper.cuh's clusters, emulated: blocks see of each other's shared memory what was there at the last barrier that publishes it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

namespace host_cuda {

struct Published {
  uint64_t serial = 0;              // of the cluster this is of
  unsigned arrived = 0;             // threads of the block, since the start
  std::vector<unsigned char> bytes;  // as they were when the last of them arrived
};

inline Published published[kMostBlocks];

inline unsigned threads_of_a_block() { return blockDim.x * blockDim.y * blockDim.z; }

// By each thread that arrives at a barrier that publishes.
inline void publish() {
  Published& mine = published[self().rank];
  if (mine.serial != block.serial) mine = {block.serial, 0, {}};
  if (++mine.arrived % threads_of_a_block() == 0) mine.bytes.assign(shared_memory, shared_memory + shared_bytes);
}

inline void meet() { arrive_and_wait(block.cluster_barrier, threads_of_a_block() * block.blocks); }

}  // namespace host_cuda

namespace resnet_fast {

inline unsigned cluster_rank() { return host_cuda::self().rank; }

inline void cluster_sync() {
  host_cuda::publish();
  host_cuda::meet();
}

inline void cluster_sync_relaxed() { host_cuda::meet(); }

// Where `p` lies in the shared memory of a block of the cluster, which must still be there.
template <class T>
T* in_block(T* p, unsigned rank) {
  if (rank >= host_cuda::block.blocks) host_cuda::fail("a block that the cluster has not");
  if (host_cuda::block.alive[rank] == 0) host_cuda::fail("shared memory of a block that has ended");
  const auto* at = reinterpret_cast<const unsigned char*>(p);
  return reinterpret_cast<T*>(host_cuda::shared_memories[rank] + (at - host_cuda::shared_memory));
}

inline float4 load_from_block(const float4* shared, unsigned rank) {
  const auto* at = reinterpret_cast<const unsigned char*>(shared);
  if (at < host_cuda::shared_memory || at + sizeof(float4) > host_cuda::shared_memory + host_cuda::shared_bytes)
    host_cuda::fail("a load outside shared memory");
  const float4* there = in_block(shared, rank);
  const host_cuda::Published& seen = host_cuda::published[rank];
  if (rank != cluster_rank() && (seen.serial != host_cuda::block.serial || seen.bytes.empty() ||
                                 std::memcmp(there, seen.bytes.data() + (at - host_cuda::shared_memory), sizeof(float4)) != 0))
    host_cuda::fail("a load of what another block has not published");
  return *there;
}

}  // namespace resnet_fast
