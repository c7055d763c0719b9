// Training batch norm, residual and activation over NHWC, forward and backward, two launches each.
//
//   forward    y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual),  mean, var (biased) of the batch
//   backward   dz = dy * [act'(y)],  xhat = (x - mean) / sqrt(var + eps),  dbeta = sum dz,  dgamma = sum dz * xhat,
//              dx = gamma / sqrt(var + eps) * (dz - dbeta / P - xhat * dgamma / P),  dresidual = dz
//
// The first launch leaves each block's partial sums in a workspace; in the second every block merges those of its
// channels (in one fixed order, without atomics: deterministic) and then makes its part of the output. Variance is
// never a difference of large sums: groups of kAhead values are centred on their own mean, then merged pairwise.
// Layout: x, y, residual and gradients [P pixels, C], dense; per-channel vectors [C]; mean and var float32. float32,
// float16, bfloat16; arithmetic in float32, one rounding on store. Any C; multiples of 8 (float32: 4) move 128 bits.
// Floor for E = P C elements of b bytes, by DRAM: forward 3Eb (x twice, y) + Eb for the residual; backward 7Eb (dy, x,
// y twice, dx) + Eb for dresidual, 2Eb less without ReLU, less what of the first pass L2 still holds in the second.
// Source: Ioffe and Szegedy 2015; merging of moments: Chan, Golub and LeVeque 1979.
#include "epilogue.cuh"
#include "launch.cuh"

namespace resnet_fast {
namespace {

// Pixels whose loads a thread has under way before it uses the first, of one tensor, of two and of three: DRAM's 0.8 us at
// 4.3 TB/s are 26 kB for each of 132 SMs, all the time, and two blocks of 256 threads with 16 bytes each are 8 kB a load, some
// of the time.
constexpr int kAhead = 8, kAheadOfTwo = 4, kAheadOfThree = 3;
constexpr int kBlocks = 2;  // of 256 threads on a processor, so 128 registers a thread

// A partial result for V channels over n pixels. Forward: a = sum of x, b = sum of squared distances from the mean.
// Backward: a = sum of dz, b = sum of dz * xhat.
template <int V>
struct Part {
  float n = 0.f, a[V] = {}, b[V] = {};
};

struct MergeMoments {
  template <int V>
  RF_HD static void apply(Part<V>& p, const Part<V>& q) {
    if (q.n == 0.f) return;
    const float n = p.n + q.n, per_p = p.n > 0.f ? 1.f / p.n : 0.f, per_q = 1.f / q.n, weight = p.n * (q.n / n);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float delta = q.a[j] * per_q - p.a[j] * per_p;
      p.b[j] += q.b[j] + (p.n > 0.f ? delta * delta * weight : 0.f);
      p.a[j] += q.a[j];
    }
    p.n = n;
  }
};

struct MergeSums {
  template <int V>
  RF_HD static void apply(Part<V>& p, const Part<V>& q) {
#pragma unroll
    for (int j = 0; j < V; ++j) p.a[j] += q.a[j], p.b[j] += q.b[j];
    p.n += q.n;
  }
};

template <int V>
struct BlockParts {
  float n[kThreads], a[V][kThreads], b[V][kThreads];

  __device__ void put(int at, const Part<V>& p) {
    n[at] = p.n;
#pragma unroll
    for (int j = 0; j < V; ++j) a[j][at] = p.a[j], b[j][at] = p.b[j];
  }

  __device__ Part<V> get(int at) const {
    Part<V> p;
    p.n = n[at];
#pragma unroll
    for (int j = 0; j < V; ++j) p.a[j] = a[j][at], p.b[j] = b[j][at];
    return p;
  }
};

// Merges the rows of a block as a tree; every thread of a lane gets the lane's total. All threads take part.
template <class Merge, int V>
__device__ Part<V> merge_rows(Part<V> part, const GateGrid& grid) {
  __shared__ BlockParts<V> shared;
  const int self = threadIdx.y * grid.lanes + threadIdx.x;
  shared.put(self, part);
  __syncthreads();
  for (int half = grid.rows / 2; half > 0; half /= 2) {
    if (int(threadIdx.y) < half) {
      Merge::apply(part, shared.get(self + half * grid.lanes));
      shared.put(self, part);
    }
    __syncthreads();
  }
  return shared.get(threadIdx.x);
}

// partial is [splits, 2, channels].
template <int V>
__device__ void write_partial(float* partial, const Part<V>& part, int64_t split, int64_t channel, int64_t channels) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    partial[2 * split * channels + channel + j] = part.a[j];
    partial[(2 * split + 1) * channels + channel + j] = part.b[j];
  }
}

// All splits of this block's channels, merged; the same value in every thread of a lane.
template <class Merge, int V>
__device__ Part<V> merge_partials(const float* partial, const GateGrid& grid, int64_t channel, int64_t channels,
                                  int64_t pixels) {
  constexpr int kTogether = 4;  // loaded before the first is merged
  Part<V> total;
  if (channel < channels) {
    for (int64_t first = threadIdx.y; first < grid.splits; first += kTogether * grid.rows) {
      Part<V> part[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int64_t split = first + i * grid.rows;
        if (split >= grid.splits) continue;
        part[i].n = float(smaller((split + 1) * grid.share, pixels) - smaller(split * grid.share, pixels));
        load(partial + 2 * split * channels + channel, part[i].a);
        load(partial + (2 * split + 1) * channels + channel, part[i].b);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) Merge::apply(total, part[i]);  // an absent one is empty
    }
  }
  return merge_rows<Merge>(total, grid);
}

// f(Type<T>{}) for the element type of `dtype`: once for V neighbours, whose loads then go together.
template <class F>
__device__ __forceinline__ void as_type(DType dtype, F f) {
  if (dtype == DType::f32) f(Type<float>{});
  if (dtype == DType::f16) f(Type<__half>{});
  if (dtype == DType::bf16) f(Type<__nv_bfloat16>{});
}

template <int V>
__device__ void load_vector(const void* p, DType dtype, int64_t first, float (&out)[V]) {
  as_type(dtype, [&](auto type) {
    const auto* from = static_cast<const typename decltype(type)::type*>(p) + first;
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = to_float(from[j]);
  });
}

template <int V>
__device__ void store_vector(void* p, DType dtype, int64_t first, const float (&in)[V]) {
  as_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
#pragma unroll
    for (int j = 0; j < V; ++j) static_cast<T*>(p)[first + j] = from_float<T>(in[j]);
  });
}

// kAt of a thread's pixels, the first at element `at`, the next ones `step` further each; kAll: all of them are there.
template <int kAt_, bool kAll>
struct Pixels {
  static constexpr int kAt = kAt_;
  int64_t left, at, step;  // left: pixels of the block from the first on
  int rows;

  __device__ __forceinline__ bool there(int i) const { return kAll || left > i * rows; }
  __device__ __forceinline__ int64_t element(int i) const { return at + i * step; }

  // Starts the loads, zeros where no pixel is there.
  template <class T, int V>
  __device__ __forceinline__ void load(const void* from, Pack<T, V> (&out)[kAt]) const {
#pragma unroll
    for (int i = 0; i < kAt; ++i)
      out[i] = there(i) ? *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(from) + element(i)) : Pack<T, V>{};
  }
};

// f(Pixels) for a thread's pixels of its block, kAt at a time: upwards in the first launch and downwards in the second, for
// what the first read last, L2 still holds.
template <int kAt, bool kDown, class F>
__device__ __forceinline__ void each_group(const GateTile& tile, const GateGrid& grid, int64_t channels, F f) {
  const int64_t step = (kDown ? -channels : channels) * grid.rows;
  int64_t left = tile.end - tile.begin - threadIdx.y;
  int64_t at = (kDown ? tile.end - 1 - threadIdx.y : tile.begin + threadIdx.y) * channels + tile.channel;
  for (; left > (kAt - 1) * grid.rows; left -= kAt * grid.rows, at += kAt * step)
    f(Pixels<kAt, true>{left, at, step, grid.rows});
  if (left > 0) f(Pixels<kAt, false>{left, at, step, grid.rows});
}

// ---------------------------------------------------------------- forward

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    moments_kernel(const T* x, float* partial, int64_t pixels, int64_t channels, GateGrid grid) {
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, pixels, V);
  Part<V> total;
  if (tile.channel < channels) {
    each_group<kAhead, false>(tile, grid, channels, [&](const auto& at) {
      Pack<T, V> pack[kAhead];
      at.load(x, pack);
      Part<V> group;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) group.n += at.there(i) ? 1.f : 0.f;
      const float per_pixel = 1.f / group.n;
#pragma unroll
      for (int j = 0; j < V; ++j) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) group.a[j] += to_float(pack[i].v[j]);  // absent ones are zero
        const float mean = group.a[j] * per_pixel;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const float delta = to_float(pack[i].v[j]) - mean;
          group.b[j] += at.there(i) ? delta * delta : 0.f;
        }
      }
      MergeMoments::apply(total, group);
    });
  }
  total = merge_rows<MergeMoments>(total, grid);
  if (threadIdx.y == 0 && tile.channel < channels) write_partial(partial, total, blockIdx.x, tile.channel, channels);
}

template <class T, int V, bool kResidual>
__device__ __forceinline__ void normalise(const BnArgs& p, const GateTile& tile, const GateGrid& grid, const float (&mean)[V],
                                          const float (&scale)[V], const float (&shift)[V]) {
  constexpr int kAt = kResidual ? kAheadOfTwo : kAhead;
  each_group<kAt, true>(tile, grid, p.channels, [&](const auto& at) {
    Pack<T, V> x[kAt], residual[kAt] = {};
    at.load(p.x, x);
    if constexpr (kResidual) at.load(p.residual, residual);
#pragma unroll
    for (int i = 0; i < kAt; ++i) {
      float v[V];
#pragma unroll
      for (int j = 0; j < V; ++j)
        v[j] = activate((to_float(x[i].v[j]) - mean[j]) * scale[j] + shift[j] + to_float(residual[i].v[j]), p.act);
      if (at.there(i)) store(static_cast<T*>(p.y) + at.element(i), v);
    }
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) normalise_kernel(BnArgs p, GateGrid grid) {
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, p.pixels, V);
  const Part<V> total = merge_partials<MergeMoments, V>(p.partial, grid, tile.channel, p.channels, p.pixels);
  if (tile.channel >= p.channels) return;
  float mean[V], scale[V], shift[V];
  load_vector(p.gamma, p.param_dtype, tile.channel, scale);
  load_vector(p.beta, p.param_dtype, tile.channel, shift);
  const float per_pixel = 1.f / float(p.pixels);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float var = total.b[j] * per_pixel;
    mean[j] = total.a[j] * per_pixel;
    scale[j] /= sqrtf(var + p.eps);
    if (blockIdx.x == 0 && threadIdx.y == 0) p.mean[tile.channel + j] = mean[j], p.var[tile.channel + j] = var;
  }
  if (p.residual != nullptr)
    normalise<T, V, true>(p, tile, grid, mean, scale, shift);
  else
    normalise<T, V, false>(p, tile, grid, mean, scale, shift);
}

// ---------------------------------------------------------------- backward

// A group of pixels: x, dy and, where the activation needs it, y.
template <class T, int V>
struct Gradients {
  Pack<T, V> dy[kAheadOfThree], x[kAheadOfThree], y[kAheadOfThree] = {};

  template <class At>
  __device__ __forceinline__ Gradients(const BnBackwardArgs& p, const At& at) {
    at.load(p.dy, dy), at.load(p.x, x);
    if (p.act != Act::none) at.load(p.y, y);
  }

  __device__ __forceinline__ float dz(int i, int j, Act act) const {
    return activate_grad(to_float(dy[i].v[j]), to_float(y[i].v[j]), act);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_sums_kernel(BnBackwardArgs p, GateGrid grid) {
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, p.pixels, V);
  Part<V> total;
  if (tile.channel < p.channels) {
    float mean[V], rstd[V];
    load(p.mean + tile.channel, mean);
    load(p.var + tile.channel, rstd);
#pragma unroll
    for (int j = 0; j < V; ++j) rstd[j] = 1.f / sqrtf(rstd[j] + p.eps);
    each_group<kAheadOfThree, false>(tile, grid, p.channels, [&](const auto& at) {
      const Gradients<T, V> group(p, at);
#pragma unroll
      for (int i = 0; i < kAheadOfThree; ++i) {
        if (!at.there(i)) continue;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float dz = group.dz(i, j, p.act);
          total.a[j] += dz;
          total.b[j] += dz * ((to_float(group.x[i].v[j]) - mean[j]) * rstd[j]);
        }
      }
    });
  }
  total = merge_rows<MergeSums>(total, grid);
  if (threadIdx.y == 0 && tile.channel < p.channels)
    write_partial(p.partial, total, blockIdx.x, tile.channel, p.channels);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_kernel(BnBackwardArgs p, GateGrid grid) {
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, p.pixels, V);
  const Part<V> total = merge_partials<MergeSums, V>(p.partial, grid, tile.channel, p.channels, p.pixels);
  if (tile.channel >= p.channels) return;
  float mean[V], scale[V], mean_dz[V], slope[V];  // dx = scale * (dz - mean_dz - (x - mean) * slope)
  load(p.mean + tile.channel, mean);
  load(p.var + tile.channel, slope);
  load_vector(p.gamma, p.param_dtype, tile.channel, scale);
  if (blockIdx.x == 0 && threadIdx.y == 0) {
    store_vector(p.dbeta, p.param_dtype, tile.channel, total.a);
    store_vector(p.dgamma, p.param_dtype, tile.channel, total.b);
  }
  const float per_pixel = 1.f / float(p.pixels);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float rstd = 1.f / sqrtf(slope[j] + p.eps);
    scale[j] *= rstd;
    mean_dz[j] = total.a[j] * per_pixel;
    slope[j] = rstd * (total.b[j] * per_pixel);
  }
  each_group<kAheadOfThree, true>(tile, grid, p.channels, [&](const auto& at) {
    const Gradients<T, V> group(p, at);
#pragma unroll
    for (int i = 0; i < kAheadOfThree; ++i) {
      float dz[V], dx[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        dz[j] = group.dz(i, j, p.act);
        dx[j] = scale[j] * (dz[j] - mean_dz[j] - (to_float(group.x[i].v[j]) - mean[j]) * slope[j]);
      }
      if (!at.there(i)) continue;
      store(static_cast<T*>(p.dx) + at.element(i), dx);
      if (p.dresidual != nullptr) store(static_cast<T*>(p.dresidual) + at.element(i), dz);
    }
  });
}

// ---------------------------------------------------------------- launchers

// The grid of both launches and whether elements move in vectors: f(Type<T>, width as a constant).
template <class F>
cudaError_t choose(DType dtype, int64_t channels, bool aligned, F&& f) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (aligned && channels % kVector<T> == 0) return f(type, std::integral_constant<int, kVector<T>>{});
    return f(type, std::integral_constant<int, 1>{});
  });
}

bool aligned(const BnArgs& p) { return aligned16(p.x, p.residual, p.y, p.partial); }

bool aligned(const BnBackwardArgs& p) { return aligned16(p.dy, p.x, p.y, p.mean, p.var, p.dx, p.dresidual, p.partial); }

}  // namespace

int64_t bn_act_workspace(int64_t pixels, int64_t channels) {
  // The element-wise grid has the most splits; 16-byte grids of any dtype need no more.
  int64_t splits = 1;
  for (int width : {1, 4, 8}) splits = larger(splits, bn_grid(pixels, channels, width).splits);
  return 2 * splits * channels;
}

cudaError_t bn_act(const BnArgs& p, cudaStream_t stream) {
  if (p.pixels * p.channels == 0) return cudaSuccess;
  return choose(p.dtype, p.channels, aligned(p), [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(width)::value;
    const GateGrid g = bn_grid(p.pixels, p.channels, V);
    const dim3 blocks(unsigned(g.splits), unsigned(g.chunks)), threads(g.lanes, g.rows);
    const cudaError_t error = launch(moments_kernel<T, V>, blocks, threads, stream, static_cast<const T*>(p.x),
                                     p.partial, p.pixels, p.channels, g);
    return error != cudaSuccess ? error : launch(normalise_kernel<T, V>, blocks, threads, stream, p, g);
  });
}

cudaError_t bn_act_backward(const BnBackwardArgs& p, cudaStream_t stream) {
  if (p.pixels * p.channels == 0) return cudaSuccess;
  return choose(p.dtype, p.channels, aligned(p), [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(width)::value;
    const GateGrid g = bn_grid(p.pixels, p.channels, V);
    const dim3 blocks(unsigned(g.splits), unsigned(g.chunks)), threads(g.lanes, g.rows);
    const cudaError_t error = launch(gradient_sums_kernel<T, V>, blocks, threads, stream, p, g);
    return error != cudaSuccess ? error : launch(gradient_kernel<T, V>, blocks, threads, stream, p, g);
  });
}

namespace {

template <class T>
void register_kernels(const char* dtype) {
  const std::string wide = std::string("<") + dtype + "," + std::to_string(kVector<T>) + ">";
  Registration("bn_act.moments" + wide, moments_kernel<T, kVector<T>>, kThreads);
  Registration("bn_act.normalise" + wide, normalise_kernel<T, kVector<T>>, kThreads);
  Registration("bn_act.gradient_sums" + wide, gradient_sums_kernel<T, kVector<T>>, kThreads);
  Registration("bn_act.gradient" + wide, gradient_kernel<T, kVector<T>>, kThreads);
}

const bool registered = (register_kernels<float>("f32"), register_kernels<__half>("f16"),
                         register_kernels<__nv_bfloat16>("bf16"), true);

}  // namespace
}  // namespace resnet_fast
