// Runs CUDA kernels on the CPU, so that the kernels themselves are tested where there is no GPU. Each thread of a block
// is a fibre; blocks run one after the other, those of a cluster together. __syncthreads and the warp-wide instructions (host_ptx.h) are where
// fibres wait for each other. Between two of them threads run in random order, some warps only when no other can go on,
// shared memory starts as NaN, and copies land as late (or as early) as PTX allows: a missing barrier, wait or element
// shows in the result. Memory beyond an allocation from host_guarded() faults, and the launch returns
// cudaErrorIllegalAddress as a GPU would.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fibre {
  static constexpr size_t kStack = 1 << 16;
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false, finished = false;
  bool must_wait = false;  // for the kernels before, since it has not
  bool (*ready)(const void* at, unsigned seen) = nullptr;  // waits until it says so of what follows
  const void* gate = nullptr;
  unsigned seen = 0;
  dim3 index;
  unsigned rank = 0;  // of its block in the cluster
  std::vector<std::vector<Copy>> groups;  // of cp.async: all but the last are committed
};

struct Warp {
  unsigned round = 0, arrived = 0;
  const char* instruction = nullptr;
  alignas(16) unsigned char in[32][64], out[32][32];
};

constexpr unsigned kMostBlocks = 8;  // of a cluster

struct Barrier {
  unsigned round = 0, arrived = 0;
};

// A block, or the blocks of a cluster with their threads one after the other.
struct Block {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  Barrier barriers[kMostBlocks], cluster_barrier;
  unsigned blocks = 1, alive[kMostBlocks] = {};  // in the cluster; threads of each that have not ended
  dim3 first;  // blockIdx of rank 0
  uint64_t serial = 0;                           // of all blocks ever run
  std::vector<std::function<void()>> in_flight;  // copies that land by themselves, at the latest when all threads wait
  std::function<void()> at_end;                  // what is to be checked once all threads have ended
  int current = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  std::mt19937 random;
};

inline Block block;
inline sigjmp_buf abort_launch;
inline char message[256];
constexpr size_t kShared = kHopperShared + 4096;  // dynamic; the rest notices writes too far
static_assert(kShared % 1024 == 0);
alignas(1024) inline unsigned char shared_memories[kMostBlocks][kShared];
inline unsigned char* shared_memory = shared_memories[0];  // of the block whose thread is running
inline size_t shared_bytes = 0;

[[noreturn]] inline void fail(const char* text, cudaError_t error = cudaErrorLaunchFailure) {
  std::snprintf(message, sizeof message, "%s (block %u, %u; thread %d)", text, blockIdx.x, blockIdx.y, block.current);
  siglongjmp(abort_launch, error);
}

// While the kernels before a dependent one are pretended to run, nobody may look at what host_guarded() gave.
inline std::map<void*, size_t> guarded;  // whole pages
inline bool before_runs = false;

inline void kernels_before_run(bool run) {
  if (run == before_runs) return;
  for (const auto& [at, size] : guarded) mprotect(at, size, run ? PROT_NONE : PROT_READ | PROT_WRITE);
  before_runs = run;
}

inline void on_fault(int) { fail("access outside an allocation, or undefined behaviour", cudaErrorIllegalAddress); }

inline Fibre& self() { return block.fibres[block.current]; }

inline void enter_block(unsigned rank) {
  shared_memory = shared_memories[rank];
  blockIdx = dim3(block.first.x + rank, block.first.y);
}

inline void wait_until(bool (*ready)(const void*, unsigned), const void* gate, unsigned seen) {
  Fibre& fibre = self();
  fibre.ready = ready;
  fibre.gate = gate;
  fibre.seen = seen;
  if (_setjmp(fibre.here) == 0) _longjmp(block.scheduler, 1);
}

inline void wait_for(const unsigned& round) {
  wait_until([](const void* at, unsigned seen) { return *static_cast<const unsigned*>(at) != seen; }, &round, round);
}

inline void arrive_and_wait(Barrier& barrier, unsigned threads) {
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.round;
  } else {
    wait_for(barrier.round);
  }
}

// Something that was in flight lands: any of it, in any order.
inline bool land_one() {
  if (block.in_flight.empty()) return false;
  std::swap(block.in_flight[block.random() % block.in_flight.size()], block.in_flight.back());
  const std::function<void()> land = std::move(block.in_flight.back());
  block.in_flight.pop_back();
  land();
  return true;
}

// All 32 lanes hand in `in`; the last to come computes every lane's `out` from them.
template <class Out, class In, class F>
Out collective(const char* instruction, const In& in, F&& compute) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 32);
  Warp& warp = block.warps[block.current / 32];
  const int lane = block.current % 32;
  if (warp.arrived != 0 && std::strcmp(warp.instruction, instruction) != 0) fail("lanes of a warp diverged");
  warp.instruction = instruction;
  std::memcpy(warp.in[lane], &in, sizeof in);
  if (++warp.arrived == 32) {
    In ins[32];
    Out outs[32];
    for (int l = 0; l < 32; ++l) std::memcpy(&ins[l], warp.in[l], sizeof(In));
    compute(ins, outs);
    for (int l = 0; l < 32; ++l) std::memcpy(warp.out[l], &outs[l], sizeof(Out));
    warp.arrived = 0;
    ++warp.round;
  } else {
    wait_for(warp.round);
  }
  Out out;
  std::memcpy(&out, warp.out[lane], sizeof out);
  return out;
}

inline void enter_fibre() {
  block.body();
  self().finished = true;
  _longjmp(block.scheduler, 1);
}

inline void resume(int thread) {
  Fibre& fibre = block.fibres[thread];
  block.current = thread;
  threadIdx = fibre.index;
  enter_block(fibre.rank);
  if (_setjmp(block.scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.here, 1);
  fibre.started = true;
  setcontext(&fibre.start);
}

inline void run_block(unsigned threads_of_one) {
  const unsigned threads = threads_of_one * block.blocks;
  for (Barrier& barrier : block.barriers) barrier.arrived = 0;
  block.cluster_barrier.arrived = 0;
  block.warps.assign((threads + 31) / 32, Warp{});
  block.in_flight.clear();
  block.at_end = nullptr;
  ++block.serial;
  const size_t watched = size_t(settings.shared_limit) + 4096;
  for (unsigned rank = 0; rank < block.blocks; ++rank) std::memset(shared_memories[rank], 0xff, watched);
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& fibre = block.fibres[t];
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = Fibre::kStack;
    makecontext(&fibre.start, enter_fibre, 0);
    fibre.started = fibre.finished = false;
    fibre.must_wait = before_runs;
    fibre.ready = nullptr;
    fibre.groups.assign(1, {});
    const unsigned i = t % threads_of_one;
    fibre.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fibre.rank = t / threads_of_one;
  }
  for (unsigned& alive : block.alive) alive = threads_of_one;
  const auto alive = [] { return block.alive[0] + (block.blocks > 1 ? block.alive[1] : 0); };
  unsigned size = 1;
  while (size < threads) size *= 2;
  const auto run_some = [&](uint32_t warps) {  // each of their threads that can go on; false if there is none
    bool progress = false;
    const unsigned first = block.random(), step = block.random() | 1;  // an odd step visits each of 2^n threads once
    for (unsigned i = 0; i < size; ++i) {
      const unsigned t = (first + i * step) % size;
      if (t >= threads || block.fibres[t].finished || (warps >> t / 32 & 1) == 0) continue;
      Fibre& fibre = block.fibres[t];
      if (fibre.ready != nullptr && !fibre.ready(fibre.gate, fibre.seen)) continue;
      progress = true;
      resume(int(t));
      block.alive[fibre.rank] -= fibre.finished;
    }
    return progress;
  };
  const auto some_warps = [&] {  // random ones, or groups of four, or blocks
    const unsigned together[] = {1, 4, (threads_of_one + 31) / 32}, width = together[block.random() % 3];
    const uint32_t chosen = block.random();
    uint32_t warps = 0;
    for (unsigned i = 0; i < 32; ++i) warps |= (chosen >> i / width & 1) << i;
    return warps;
  };
  for (uint32_t fast = some_warps(); alive() > 0;) {
    if (run_some(fast)) continue;
    const bool progress = run_some(~0u);
    fast = some_warps();
    if (!progress && !land_one()) fail("deadlock: a barrier that not all threads reach");
  }
  if (!block.in_flight.empty()) fail("the block ended before its copies had landed");
  if (block.at_end) block.at_end();
  for (unsigned rank = 0; rank < block.blocks; ++rank)
    for (size_t i = shared_bytes; i < watched; ++i)
      if (shared_memories[rank][i] != 0xff) fail("a write beyond the block's shared memory");
}

struct FaultHandler {
  static constexpr size_t kStack = 1 << 16;
  struct sigaction segv, bus, ill;
  stack_t before;
  std::unique_ptr<char[]> stack{new char[kStack]};

  FaultHandler() {
    stack_t mine{};
    mine.ss_sp = stack.get();
    mine.ss_size = kStack;
    sigaltstack(&mine, &before);
    struct sigaction action{};
    action.sa_handler = on_fault;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
    sigaction(SIGILL, &action, &ill);
  }

  ~FaultHandler() {
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    sigaction(SIGILL, &ill, nullptr);
    sigaltstack(&before, nullptr);
  }
};

inline cudaError_t run_grid(dim3 grid, dim3 threads, size_t dynamic_shared, std::function<void()> body,
                            unsigned cluster = 1, bool dependent = false) {
  const unsigned count = threads.x * threads.y * threads.z;
  if (grid.x == 0 || grid.y == 0 || count == 0 || count > 1024 || dynamic_shared > size_t(settings.shared_limit) || grid.y > 65535 ||
      cluster > kMostBlocks || grid.x % cluster != 0)
    return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = threads;
  shared_bytes = dynamic_shared;
  block.body = std::move(body);
  block.random.seed(settings.seed);
  block.blocks = cluster;
  if (block.fibres.size() < count * cluster) block.fibres = std::vector<Fibre>(count * cluster);
  const FaultHandler handler;
  message[0] = 0;
  if (const int error = sigsetjmp(abort_launch, 1)) {
    kernels_before_run(false);
    return cudaError_t(error);
  }
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = settings.first_block; x < grid.x; x += cluster) {
      block.first = dim3(x, y);
      kernels_before_run(dependent);
      run_block(count);
      for (unsigned t = 0; t < count * cluster; ++t)
        if (block.fibres[t].must_wait) fail("a thread of a dependent block never waited for the kernels before");
    }
  }
  return cudaSuccess;
}

}  // namespace host_cuda

inline void __syncthreads() {
  host_cuda::arrive_and_wait(host_cuda::block.barriers[host_cuda::self().rank], blockDim.x * blockDim.y * blockDim.z);
}

inline void __syncwarp() {
  host_cuda::collective<int>("__syncwarp", 0, [](int (&)[32], int (&)[32]) {});
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  unsigned cluster = 1;
  bool dependent = false;
  for (const cudaLaunchAttribute* one = config->attrs; one != config->attrs + config->numAttrs; ++one) {
    if (one->id == cudaLaunchAttributeClusterDimension) cluster = one->val.clusterDim.x;
    if (one->id == cudaLaunchAttributeProgrammaticStreamSerialization)
      dependent = one->val.programmaticStreamSerializationAllowed != 0;
  }
  return host_cuda::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(args...); },
                             cluster, dependent);
}
