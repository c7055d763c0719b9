// The PTX instructions that Hopper's matrix kernels are made of, one function each (sm_90a only): mbarriers, tensor
// copies by TMA, warp-group matrix products, fences between the proxies, registers moved between warp groups.
// Source: PTX ISA, "mbarrier", "cp.async.bulk.tensor", "Asynchronous Warpgroup Level Matrix Multiply-Accumulate
// Instructions", "fence.proxy", "setmaxnreg". Without nvcc the host tests supply the same functions, emulated from the
// same text. For other architectures a kernel compiles these away under `if constexpr (kHopper)` and traps instead.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "matrix_descriptor.h"

namespace resnet_fast {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

}  // namespace resnet_fast

#ifndef __CUDACC__
#include "host_hopper.h"
#else

namespace resnet_fast {

// The block's dynamic shared memory, aligned as 128-byte swizzled tiles want it.
__device__ __forceinline__ unsigned char* hopper_shared() {
  extern __shared__ __align__(1024) unsigned char pattern_aligned[];
  return pattern_aligned;
}

// Ends the kernel with an error.
__device__ __forceinline__ void trap() { asm volatile("trap;\n"); }

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- mbarriers. A phase ends once `arrivals` threads arrived and all announced bytes landed; phases alternate parity.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After the inits, by the thread that made them and before the __syncthreads() or cluster_sync_relaxed() that publishes them.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes that copies into shared memory will report to this barrier in its present phase.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// At the barrier in the same place of another block's shared memory (`rank` in the cluster), or one's own: what this thread
// had to read there it has read. What it wrote it does not publish: a release to the cluster would be a fence of the whole
// GPU before every arrival (MEMBAR.GPU, hundreds of clocks within a main loop). CUTLASS's ClusterBarrier arrives this way.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, unsigned rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Returns once the phase of this parity has ended. The phase "before the first" has parity 1 and has ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Named barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads, a multiple of 32.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// ---- Programmatic dependent launch: this kernel's blocks were placed while the one before was finishing.

// Returns once all kernels before are done and what they wrote can be seen, since each of them waited in its turn; then
// lets the next one's blocks in, which take only what room is left. By all threads.
__device__ __forceinline__ void wait_for_kernels_before() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

// ---- Clusters: blocks that run at the same time and reach each other's shared memory.

__device__ __forceinline__ unsigned cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// All threads of all blocks, which then see what each had written to its own shared memory, and to nothing else: the barrier's own
// release would also wait for L2, where blocks see each other's stores to global memory (some hundreds of clocks).
__device__ __forceinline__ void cluster_sync() {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)  // PTX 8.6
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed.aligned;\n"
               "barrier.cluster.wait.acquire.aligned;\nfence.acquire.sync_restrict::shared::cluster.cluster;\n" ::: "memory");
#else
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

// The same where nothing is to be seen by the others but mbarriers, by mbarrier_init_fence(). Before the first access to another
// block, and before a block ends that others may still access: what they were to read, they have read.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}

// What lies in the same place of another block's shared memory (`rank` in the cluster), or in one's own.
__device__ __forceinline__ float4 load_from_block(const float4* shared, unsigned rank) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}\n"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return v;
}

// ---- Tensor copies. One thread starts a copy of the map's box at element coordinates `at`, innermost first; what lies
// outside the tensor is read as zero and never written. Shared addresses: multiples of 128, of 1024 if swizzled.

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Brings a box on its way into L2 and says nothing about when. It shows nobody anything: what is written later shows there too.
__device__ __forceinline__ void tma_prefetch_l2(const CUtensorMap* map, const int (&at)[4]) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];\n" ::"l"(map), "r"(at[0]), "r"(at[1]),
               "r"(at[2]), "r"(at[3])
               : "memory");
}

template <int D>
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, const int (&at)[D]) {
  static_assert(D == 2 || D == 4, "add the rank that is wanted");
  if constexpr (D == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
            shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];\n" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
}

// The same into every block of the cluster whose bit is set, to the same place, reported to the barrier in the same place.
template <int D>
__device__ __forceinline__ void tma_load_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                                   const int (&at)[D], unsigned blocks) {
  static_assert(D == 2, "add the rank that is wanted");
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "h"(uint16_t(blocks))
      : "memory");
}

// Rows of an im2col map (encode_im2col_map), from the pixel at {channel, w, h, image} on, each from the tap that is so much
// further right and down; past the last image, zeros.
__device__ __forceinline__ void tma_load_im2col(void* shared, const CUtensorMap* map, uint64_t* barrier, const int (&at)[4],
                                                int right = 0, int down = 0) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2], {%7, %8};\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "h"(uint16_t(right)),
      "h"(uint16_t(down))
      : "memory");
}

__device__ __forceinline__ void tma_load_im2col_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                                          const int (&at)[4], unsigned blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], {%7, %7}, %8;\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "h"(uint16_t(0)),
      "h"(uint16_t(blocks))
      : "memory");
}

template <int D>
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* shared, const int (&at)[D]) {
  static_assert(D == 2 || D == 4, "add the rank that is wanted");
  if constexpr (D == 2) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(map),
                 "r"(shared_address(shared)), "r"(at[0]), "r"(at[1])
                 : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(map),
                 "r"(shared_address(shared)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
  }
}

// Closes the group of stores this thread has started; the waits are for all but its last N groups: to have read shared
// memory, or to be done altogether.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }

template <int N>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(N) : "memory");
}

template <int N>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(N) : "memory");
}

// What this thread wrote to shared memory may now be read by TMA (and by wgmma), once it has told the others so.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// A plain store, which the emulation holds back until the fence above: for what TMA is to read.
__device__ __forceinline__ void store_for_async(void* shared, uint32_t value) {
  *static_cast<uint32_t*>(shared) = value;
}

// ---- Matrix products by a warp group (128 threads, the first a multiple of 128), both operands in shared memory.

// Before the first product that touches accumulators which other instructions have touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// All but the last N groups are done: accumulators may be read, shared tiles overwritten.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

// The same, and nothing is computed with these sums before: to the compiler they are made here.
template <int N, int D>
__device__ __forceinline__ void wgmma_wait(float (&d)[D]) {
  wgmma_wait<N>();
#pragma unroll
  for (int i = 0; i < D; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N, int D>
__device__ __forceinline__ void wgmma_wait(float (&d)[2][D]) {
  wgmma_wait<N>();
#pragma unroll
  for (int i = 0; i < 2 * D; ++i) asm volatile("" : "+f"(d[i / D][i % D])::"memory");
}

// Names of N / 2 registers and the accumulators bound to them, built up from eight.
#define RF_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
                 "+f"(d[i + 6]), "+f"(d[i + 7])
#define RF_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RF_D32(i) RF_D8(i), RF_D8(i + 8), RF_D8(i + 16), RF_D8(i + 24)
#define RF_NAMES16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define RF_NAMES32 RF_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define RF_NAMES64 RF_NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
                   "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define RF_NAMES104 RF_NAMES64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83" \
                    ",%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103"
#define RF_NAMES108 RF_NAMES104 ",%104,%105,%106,%107"
#define RF_NAMES116 RF_NAMES108 ",%108,%109,%110,%111,%112,%113,%114,%115"
#define RF_NAMES124 RF_NAMES116 ",%116,%117,%118,%119,%120,%121,%122,%123"
#define RF_NAMES128 RF_NAMES124 ",%124,%125,%126,%127"
#define RF_WGMMA(shape, types, names, a_at, b_at, add_at, ...)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" add_at ", 0;\nwgmma.mma_async.sync.aligned." shape "k16.f32." types \
               " {" names "}, %" a_at ", %" b_at ", p, 1, 1, 0, 0;\n}\n"                                              \
               : __VA_ARGS__                                                                                          \
               : "l"(a), "l"(b), "r"(int(add)))
#define RF_WGMMA_N(types)                                                                                             \
  if constexpr (N == 32) {                                                                                            \
    RF_WGMMA("m64n32", types, RF_NAMES16, "16", "17", "18", RF_D8(0), RF_D8(8));                                      \
  } else if constexpr (N == 64) {                                                                                     \
    RF_WGMMA("m64n64", types, RF_NAMES32, "32", "33", "34", RF_D32(0));                                               \
  } else if constexpr (N == 128) {                                                                                    \
    RF_WGMMA("m64n128", types, RF_NAMES64, "64", "65", "66", RF_D32(0), RF_D32(32));                                  \
  } else if constexpr (N == 208) {                                                                                    \
    RF_WGMMA("m64n208", types, RF_NAMES104, "104", "105", "106", RF_D32(0), RF_D32(32), RF_D32(64),                   \
             RF_D8(96));                                                                                              \
  } else if constexpr (N == 216) {                                                                                    \
    RF_WGMMA("m64n216", types, RF_NAMES108, "108", "109", "110", RF_D32(0), RF_D32(32), RF_D32(64),                   \
             RF_D8(96), RF_D4(104));                                                                                  \
  } else if constexpr (N == 232) {                                                                                    \
    RF_WGMMA("m64n232", types, RF_NAMES116, "116", "117", "118", RF_D32(0), RF_D32(32), RF_D32(64),                   \
             RF_D8(96), RF_D8(104), RF_D4(112));                                                                      \
  } else if constexpr (N == 248) {                                                                                    \
    RF_WGMMA("m64n248", types, RF_NAMES124, "124", "125", "126", RF_D32(0), RF_D32(32), RF_D32(64),                   \
             RF_D8(96), RF_D8(104), RF_D8(112), RF_D4(120));                                                          \
  } else {                                                                                                            \
    RF_WGMMA("m64n256", types, RF_NAMES128, "128", "129", "130", RF_D32(0), RF_D32(32), RF_D32(64), RF_D32(96));      \
  }

// d[64 x N] = a[64 x 16] * b[N x 16]^T (+ d if `add`), accumulated in float32; a and b are matrix descriptors, the same
// in all threads. Thread t of the group holds rows 16 (t / 32) + t % 32 / 4 (+ 8) of d: pair j of its registers is
// columns 8 (j / 2) + 2 (t % 4), + 1 of the row (even j) or of the row + 8 (odd j).
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 208 || N == 216 || N == 232 || N == 248 || N == 256, "add the width that is wanted");
  if constexpr (std::is_same_v<T, __half>) {
    RF_WGMMA_N("f16.f16")
  } else {
    RF_WGMMA_N("bf16.bf16")
  }
}

// The same with a[64 x 16] in registers: thread t's four pairs are rows 16 (t / 32) + t % 32 / 4 (+ 8: odd ones), columns
// 2 (t % 4), + 1 (+ 8: the last two), so that sums, rounded to pairs, are the next product's rows. Until the products are
// waited for, `a` must stay as it is.
#define RF_WGMMA_ROWS(shape, types, names, a0, a1, a2, a3, b_at, add_at, ...)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" add_at ", 0;\nwgmma.mma_async.sync.aligned." shape "k16.f32." types \
               " {" names "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_at ", p, 1, 1, 0;\n}\n"                      \
               : __VA_ARGS__                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))
#define RF_WGMMA_ROWS_N(types)                                                                                         \
  if constexpr (N == 64) {                                                                                            \
    RF_WGMMA_ROWS("m64n64", types, RF_NAMES32, "32", "33", "34", "35", "36", "37", RF_D32(0));                         \
  } else {                                                                                                            \
    RF_WGMMA_ROWS("m64n128", types, RF_NAMES64, "64", "65", "66", "67", "68", "69", RF_D32(0), RF_D32(32));            \
  }

template <class T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(N == 64 || N == 128, "add the width that is wanted");
  if constexpr (std::is_same_v<T, __half>) {
    RF_WGMMA_ROWS_N("f16.f16")
  } else {
    RF_WGMMA_ROWS_N("bf16.bf16")
  }
}

#undef RF_WGMMA_ROWS_N
#undef RF_WGMMA_ROWS
#undef RF_WGMMA_N
#undef RF_WGMMA
#undef RF_NAMES128
#undef RF_NAMES124
#undef RF_NAMES116
#undef RF_NAMES108
#undef RF_NAMES104
#undef RF_NAMES64
#undef RF_NAMES32
#undef RF_NAMES16
#undef RF_D32
#undef RF_D4
#undef RF_D8

// ---- Two 8x8 matrices of 16-bit elements, turned on their way into shared memory and out of it. Lane l < 16 passes the
// address of row l % 8 of matrix l / 8 (the others any), and lane l holds rows 2 (l % 4) and + 1 of column l / 4 of both.

template <class Pair>
__device__ __forceinline__ void stmatrix_x2_trans(void* row, const Pair (&in)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(shared_address(row)),
               "r"(reinterpret_cast<const uint32_t&>(in[0])), "r"(reinterpret_cast<const uint32_t&>(in[1]))
               : "memory");
}

template <class Pair>
__device__ __forceinline__ void ldmatrix_x2_trans(Pair (&out)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(reinterpret_cast<uint32_t&>(out[0])), "=r"(reinterpret_cast<uint32_t&>(out[1]))
               : "r"(shared_address(row))
               : "memory");
}

// ---- Registers: all four warps of a group give up, or take, registers per thread (24 to 256, a multiple of 8). The
// block keeps as many as it was launched with: 65536 / threads, rounded down to a multiple of 8, for each thread.

template <int N>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}

}  // namespace resnet_fast
#endif
