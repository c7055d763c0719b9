// hopper.cuh's instructions, emulated from the PTX ISA: mbarriers, TMA, named barriers, proxy fences and setmaxnreg
// here, clusters in host_cluster.h, wgmma in host_wgmma.h. What the hardware may do late is done as late as the text allows: a load lands when no
// thread can go on without it (any of those in flight first), a store reads shared memory when it is waited for, a
// product is taken when it is waited for. With `late_copies` off, loads land and stores read at once.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <utility>

#include "host_cluster.h"

namespace host_cuda {

// The pixels of an im2col map from {c, w, h, n} on ("im2col mode", "Traversal Stride"), for walk_box.
template <class F>
void walk_pixels(const Map& map, const std::array<int, 5>& at, F&& f) {
  std::array<int64_t, 3> p{at[1], at[2], at[3]};
  const auto last = [&](size_t d) { return int64_t(map.size[d + 1]) - 1 + map.upper[d]; };
  for (size_t d = 0; d < 2; ++d)
    if (p[d] < map.lower[d] || p[d] > last(d)) fail("im2col from a pixel outside of its bounding box");
  for (size_t i = 0; i < map.box[1]; ++i) {
    const std::array<int64_t, 3> read{p[0] + map.tap[0], p[1] + map.tap[1], p[2]};
    bool inside = true;
    for (size_t d = 0; d < 3; ++d) inside = inside && uint64_t(read[d]) < map.size[d + 1];
    for (int64_t j = 0; j < map.box[0]; ++j) {
      unsigned char* element = inside && uint64_t(at[0] + j) < map.size[0] ? map.data + 2 * (at[0] + j) : nullptr;
      for (size_t d = 0; d < 3 && element != nullptr; ++d) element += read[d] * int64_t(map.stride[d]);
      f((i * map.box[0] + size_t(j)) * 2, element);
    }
    size_t d = 0;
    for (; d < 2 && (p[d] += map.every[d]) > last(d); ++d) p[d] = map.lower[d];
    p[2] += d == 2;
  }
}

// A map's box at coordinates `at`: f(bytes from the tile's begin before swizzling, element in memory or null outside).
template <class F>
void walk_box(const Map& map, const std::array<int, 5>& at, F&& f) {
  if (map.im2col) return walk_pixels(map, at, f);
  size_t offset = 0;
  std::array<uint32_t, 5> i{};
  for (bool more = true; more; offset += 2) {
    unsigned char* element = map.data;
    for (uint32_t d = 0; d < map.rank && element != nullptr; ++d) {
      const int64_t index = int64_t(at[d]) + i[d];
      const bool inside = uint64_t(index) < map.size[d];  // negative ones are not
      element = inside ? element + index * int64_t(d == 0 ? 2 : map.stride[d - 1]) : nullptr;
    }
    f(offset, element);
    more = false;
    for (uint32_t d = 0; d < map.rank && !more; ++d) {
      more = ++i[d] < map.box[d];
      if (!more) i[d] = 0;
    }
  }
}

inline size_t box_bytes(const Map& map) {
  size_t bytes = 2;
  for (uint32_t d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

// 128-byte swizzle, by absolute address: bits 4 to 6 are xored with bits 7 to 9.
inline size_t swizzle_shared(size_t address) { return address ^ ((address >> 7) & 7) << 4; }

struct Store {
  Map map;
  size_t from;
  std::array<int, 5> at;
  std::vector<uint16_t> read;  // what shared memory held; empty before it was read
};

struct HopperThread {
  std::vector<std::vector<Store>> stores = std::vector<std::vector<Store>>(1);  // all groups but the last are committed
  std::vector<std::pair<uint32_t*, uint32_t>> unfenced;                         // stores for TMA before the fence
  std::vector<uint64_t*> new_barriers;
  int registers = 0;  // what setmaxnreg said last
};

struct NamedBarrier : Barrier {
  int threads = 0;
};

struct Hopper {
  uint64_t serial = 0;  // of the block this is the state of
  std::vector<HopperThread> threads;
  std::array<NamedBarrier, 16> barriers[kMostBlocks];
  int pool[kMostBlocks] = {}, launched = 0;  // free registers of a block (thread by thread); those of a thread at first
};

inline Hopper hopper_state;

inline void read_shared(Store& store) {
  if (!store.read.empty()) return;
  store.read.resize(box_bytes(store.map) / 2);
  for (size_t i = 0; i < store.read.size(); ++i)
    std::memcpy(&store.read[i], shared_memory + swizzle_shared(store.from + 2 * i), 2);
}

inline void write_global(const Store& store) {
  walk_box(store.map, store.at, [&](size_t offset, unsigned char* element) {
    if (element != nullptr) std::memcpy(element, &store.read[offset / 2], 2);
  });
}

inline void check_end_of_block() {
  Hopper& hopper = hopper_state;
  for (size_t t = 0; t < hopper.threads.size(); ++t) {
    block.current = int(t);
    enter_block(block.fibres[t].rank);
    for (auto& group : hopper.threads[t].stores)
      for (Store& store : group) {
        if (store.read.empty()) fail("the block ended before a store had read shared memory");
        write_global(store);
      }
    if (!hopper.threads[t].unfenced.empty()) fail("a write for TMA without fence.proxy.async after it");
    if (hopper.threads[t].registers != hopper.threads[t / 128 * 128].registers)
      fail("setmaxnreg by some warps of a warp group only");
  }
}

inline Hopper& hopper() {
  if (hopper_state.serial != block.serial) {
    const int threads = int(blockDim.x * blockDim.y * blockDim.z);
    hopper_state = Hopper{block.serial, std::vector<HopperThread>(size_t(threads) * block.blocks), {}, {},
                          65536 / threads / 8 * 8};
    block.at_end = check_end_of_block;
  }
  return hopper_state;
}

inline HopperThread& hopper_thread() { return hopper().threads[size_t(block.current)]; }

// ---- mbarriers: the 64 bits in shared memory are the state, so what overwrites them shows.

struct Mbarrier {
  uint64_t state : 2;  // 1: initialised, 2: and fenced. Fresh shared memory is 3
  uint64_t phase : 1;
  uint64_t arrivals : 20, pending : 20;
  int64_t bytes : 21;
};

inline Mbarrier load_barrier(const uint64_t* at, bool fenced = true) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(at);
  const size_t where = size_t(bytes - shared_memories[0]);
  if (where >= block.blocks * kShared || where % kShared + 8 > shared_bytes || where % 8 != 0)
    fail("an mbarrier outside shared memory, or unaligned");
  Mbarrier barrier;
  std::memcpy(&barrier, at, 8);
  if (barrier.state == 0 || barrier.state == 3) fail("an mbarrier that was not initialised, or overwritten");
  if (fenced && barrier.state != 2) fail("an mbarrier used before the fence that follows its init");
  return barrier;
}

inline void store_barrier(uint64_t* at, Mbarrier barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.arrivals;
  }
  std::memcpy(at, &barrier, 8);
}

inline void count_bytes(Mbarrier& barrier, int64_t bytes) {
  const int64_t count = barrier.bytes + bytes;
  if (count <= -(1 << 20) || count >= 1 << 20) fail("more bytes than an mbarrier counts");
  barrier.bytes = count;
}

inline void arrive(uint64_t* at, int64_t bytes) {
  Mbarrier barrier = load_barrier(at);
  if (barrier.pending == 0) fail("more arrivals at an mbarrier than its phase expects");
  count_bytes(barrier, bytes);
  --barrier.pending;
  store_barrier(at, barrier);
}

inline const Map& map_of(const CUtensorMap* map) {
  const auto& m = *reinterpret_cast<const Map*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || m.magic != Map::kMagic) fail("TMA with what is no tensor map");
  if (m.box[0] != 64) fail("TMA of rows other than 128 bytes: not emulated");
  return m;
}

inline size_t tile_address(const void* shared, const Map& map, bool im2col = false) {
  if (map.im2col != im2col) fail("TMA of one mode with a map of the other");
  if (self().must_wait) fail("a copy by TMA while, for all this thread knows, the kernels before still run");
  const auto* at = static_cast<const unsigned char*>(shared);
  if (at < shared_memory || at + box_bytes(map) > shared_memory + shared_bytes) fail("TMA outside shared memory");
  if ((at - shared_memory) % 1024 != 0) fail("TMA of a swizzled tile that is no multiple of 1024");
  return size_t(at - shared_memory);
}

template <int D>
std::array<int, 5> coordinates(const int (&at)[D], const Map& map) {
  if (map.rank != D) fail("TMA with as many coordinates as the map has not");
  std::array<int, 5> all{};
  for (int i = 0; i < D; ++i) all[size_t(i)] = at[i];
  return all;
}

}  // namespace host_cuda

namespace resnet_fast {

inline unsigned char* hopper_shared() { return host_cuda::shared_memory; }

inline void wait_for_kernels_before() {
  host_cuda::self().must_wait = false;
  host_cuda::kernels_before_run(false);
}

inline void trap() { host_cuda::fail("a trap"); }

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - host_cuda::shared_memory);
}

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  std::memset(barrier, 0, 8);
  if (arrivals == 0 || arrivals >= 1 << 20) host_cuda::fail("an mbarrier of no or too many arrivals");
  const host_cuda::Mbarrier fresh{1, 0, arrivals, arrivals, 0};
  std::memcpy(barrier, &fresh, 8);
  host_cuda::load_barrier(barrier, false);
  host_cuda::hopper_thread().new_barriers.push_back(barrier);
}

inline void mbarrier_init_fence() {
  for (uint64_t* at : host_cuda::hopper_thread().new_barriers) {
    host_cuda::Mbarrier barrier = host_cuda::load_barrier(at, false);
    barrier.state = 2;
    std::memcpy(at, &barrier, 8);
  }
  host_cuda::hopper_thread().new_barriers.clear();
}

inline void mbarrier_arrive(uint64_t* barrier) { host_cuda::arrive(barrier, 0); }

inline void mbarrier_arrive_at(uint64_t* barrier, unsigned rank) { host_cuda::arrive(in_block(barrier, rank), 0); }

inline void mbarrier_expect(uint64_t* barrier, unsigned bytes) { host_cuda::arrive(barrier, bytes); }

inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  host_cuda::load_barrier(barrier);
  if (parity > 1) host_cuda::fail("a parity that is neither 0 nor 1");
  const auto ended = [](const void* at, unsigned parity) {
    return host_cuda::load_barrier(static_cast<const uint64_t*>(at)).phase != parity;
  };
  if (!ended(barrier, parity)) host_cuda::wait_until(ended, barrier, parity);
}

inline void named_barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32 != 0) host_cuda::fail("a named barrier that there is not");
  host_cuda::NamedBarrier& barrier = host_cuda::hopper().barriers[host_cuda::self().rank][size_t(id)];
  if (barrier.arrived != 0 && barrier.threads != threads) host_cuda::fail("a named barrier of two sizes");
  barrier.threads = threads;
  host_cuda::arrive_and_wait(barrier, unsigned(threads));
}

inline void tma_prefetch(const CUtensorMap* map) { host_cuda::map_of(map); }

// Into every block whose bit is set, each counting the bytes on its own barrier at the same place.
template <int D>
void tma_load_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier, const int (&at)[D], unsigned blocks,
                        bool im2col = false, int right = 0, int down = 0) {
  host_cuda::Map box = host_cuda::map_of(map);
  if (right < 0 || right > 255 || down < 0 || down > 255) host_cuda::fail("an im2col offset of more than 8 bits");
  box.tap[0] = uint8_t(right), box.tap[1] = uint8_t(down);
  const size_t to = host_cuda::tile_address(shared, box, im2col);
  host_cuda::load_barrier(barrier);
  if (blocks == 0 || blocks >> host_cuda::block.blocks != 0) host_cuda::fail("TMA into a block that the cluster has not");
  for (unsigned rank = 0; rank < host_cuda::block.blocks; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    unsigned char* const memory = host_cuda::shared_memories[rank];
    const auto land = [box, to, memory, rank, counter = in_block(barrier, rank), where = host_cuda::coordinates(at, box)] {
      if (host_cuda::block.alive[rank] == 0) host_cuda::fail("shared memory of a block that has ended");
      host_cuda::walk_box(box, where, [&](size_t offset, const unsigned char* element) {
        unsigned char* target = memory + host_cuda::swizzle_shared(to + offset);
        if (element != nullptr) {
          std::memcpy(target, element, 2);
        } else {
          std::memset(target, 0, 2);
        }
      });
      host_cuda::Mbarrier state = host_cuda::load_barrier(counter);
      host_cuda::count_bytes(state, -int64_t(host_cuda::box_bytes(box)));
      host_cuda::store_barrier(counter, state);
    };
    if (host_cuda::settings.late_copies) {
      host_cuda::block.in_flight.emplace_back(land);
    } else {
      land();
    }
  }
}

template <int D>
void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, const int (&at)[D]) {
  tma_load_multicast(shared, map, barrier, at, 1u << host_cuda::self().rank);
}

inline void tma_load_im2col_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier, const int (&at)[4],
                                      unsigned blocks) {
  tma_load_multicast(shared, map, barrier, at, blocks, true);
}

inline void tma_load_im2col(void* shared, const CUtensorMap* map, uint64_t* barrier, const int (&at)[4], int right = 0,
                            int down = 0) {
  tma_load_multicast(shared, map, barrier, at, 1u << host_cuda::self().rank, true, right, down);
}

inline void tma_prefetch_l2(const CUtensorMap* map, const int (&)[4]) { host_cuda::map_of(map); }

template <int D>
void tma_store(const CUtensorMap* map, const void* shared, const int (&at)[D]) {
  const host_cuda::Map& box = host_cuda::map_of(map);
  host_cuda::Store store{box, host_cuda::tile_address(shared, box), host_cuda::coordinates(at, box), {}};
  if (!host_cuda::settings.late_copies) host_cuda::read_shared(store);
  host_cuda::hopper_thread().stores.back().push_back(std::move(store));
}

inline void tma_store_commit() { host_cuda::hopper_thread().stores.emplace_back(); }

template <int N>
void tma_store_wait_read() {
  auto& groups = host_cuda::hopper_thread().stores;
  for (size_t i = 0; i + N + 1 < groups.size(); ++i)
    for (host_cuda::Store& store : groups[i]) host_cuda::read_shared(store);
}

template <int N>
void tma_store_wait() {
  tma_store_wait_read<N>();
  auto& groups = host_cuda::hopper_thread().stores;
  while (groups.size() > N + 1) {
    for (const host_cuda::Store& store : groups.front()) host_cuda::write_global(store);
    groups.erase(groups.begin());
  }
}

inline void store_for_async(void* shared, uint32_t value) {
  const auto* at = static_cast<unsigned char*>(shared);
  if (at < host_cuda::shared_memory || at + 4 > host_cuda::shared_memory + host_cuda::shared_bytes)
    host_cuda::fail("a write outside shared memory");
  host_cuda::hopper_thread().unfenced.emplace_back(static_cast<uint32_t*>(shared), value);
}

inline void fence_proxy_async() {
  auto& unfenced = host_cuda::hopper_thread().unfenced;
  for (const auto& [at, value] : unfenced) *at = value;
  unfenced.clear();
}

// The pool begins empty; what one group gives up another may take.
template <int N>
void registers_down() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  host_cuda::Hopper& hopper = host_cuda::hopper();
  if (N > hopper.launched) host_cuda::fail("setmaxnreg.dec to more registers than there are");
  hopper.pool[host_cuda::self().rank] += hopper.launched - N;
  host_cuda::hopper_thread().registers = N;
}

template <int N>
void registers_up() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  host_cuda::Hopper& hopper = host_cuda::hopper();
  if (N < hopper.launched) host_cuda::fail("setmaxnreg.inc to fewer registers than there are");
  const auto enough = [](const void* free, unsigned wanted) { return *static_cast<const int*>(free) >= int(wanted); };
  const unsigned wanted = unsigned(N - hopper.launched);
  int& pool = hopper.pool[host_cuda::self().rank];
  if (!enough(&pool, wanted)) host_cuda::wait_until(enough, &pool, wanted);
  pool -= int(wanted);
  host_cuda::hopper_thread().registers = N;
}

}  // namespace resnet_fast

#include "host_matrix.h"
#include "host_wgmma.h"
