// Training batch norm, residual and activation over NHWC, forward and backward, two launches each.
//
//   forward    y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual),  mean, var (biased) of the batch
//   backward   dz = dy * [act'(y)],  xhat = (x - mean) / sqrt(var + eps),  dbeta = sum dz,  dgamma = sum dz * xhat,
//              dx = gamma / sqrt(var + eps) * (dz - dbeta / P - xhat * dgamma / P),  dresidual = dz
//
// The first launch leaves each block's partial sums in a workspace; in the second every block merges those of its
// channels (in one fixed order, without atomics: deterministic) and then makes its part of the output. Variance is
// never a difference of large sums: groups of kGroup values are centred on their own mean, then merged pairwise.
// Layout: x, y, residual and gradients [P pixels, C], dense; per-channel vectors [C]; mean and var float32. float32,
// float16, bfloat16; arithmetic in float32, one rounding on store. Any C; multiples of 8 (float32: 4) move 128 bits.
// Floor for E = P C elements of b bytes, by DRAM: forward 3Eb (x twice, y) + Eb for the residual; backward 7Eb (dy, x,
// y twice, dx) + Eb for dresidual, 2Eb less without ReLU, less what of the first pass L2 still holds in the second.
// Source: Ioffe and Szegedy 2015; merging of moments: Chan, Golub and LeVeque 1979.
#include "epilogue.cuh"
#include "launch.cuh"

namespace resnet_fast {
namespace {

constexpr int kGroup = 4;  // pixels a thread loads before it uses the first

// Blocks over [pixels, channels]: GateGrid with one image. Fewer blocks than elsewhere, two or so for each of 132
// processors, because every block of the second launch reads all partials of its channels.
GateGrid bn_grid(int64_t pixels, int64_t channels, int width) {
  constexpr int64_t kBlocksWanted = 256;
  GateGrid grid = gate_grid(1, pixels, channels, width);
  grid.splits = smaller(grid.splits, ceil_div(kBlocksWanted, grid.chunks));
  return grid;
}

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
  Part<V> total;
  if (channel < channels) {
    for (int64_t split = threadIdx.y; split < grid.splits; split += grid.rows) {
      Part<V> part;
      const GateTile tile = gate_tile(grid, split, 0, 0, pixels, V);
      part.n = float(tile.end - tile.begin);
      load(partial + 2 * split * channels + channel, part.a);
      load(partial + (2 * split + 1) * channels + channel, part.b);
      Merge::apply(total, part);
    }
  }
  return merge_rows<Merge>(total, grid);
}

__device__ void store_as(void* p, DType dtype, int64_t i, float v) {
  if (dtype == DType::f32) static_cast<float*>(p)[i] = v;
  if (dtype == DType::f16) static_cast<__half*>(p)[i] = from_float<__half>(v);
  if (dtype == DType::bf16) static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(v);
}

// ---------------------------------------------------------------- forward

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const T* __restrict__ x, float* __restrict__ partial, int64_t pixels, int64_t channels,
                   GateGrid grid) {
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, pixels, V);
  Part<V> total;
  if (tile.channel < channels) {
    const int64_t step = int64_t(grid.rows) * kGroup;
    for (int64_t pixel = tile.begin + threadIdx.y; pixel < tile.end; pixel += step) {
      float v[kGroup][V] = {};
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (pixel + i * grid.rows < tile.end) load(x + (pixel + i * grid.rows) * channels + tile.channel, v[i]);
      const int count = int(smaller(ceil_div(tile.end - pixel, grid.rows), kGroup));
      Part<V> group;
      group.n = float(count);
#pragma unroll
      for (int j = 0; j < V; ++j) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) group.a[j] += v[i][j];  // absent ones are zero
        const float mean = group.a[j] / group.n;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) group.b[j] += i < count ? (v[i][j] - mean) * (v[i][j] - mean) : 0.f;
      }
      MergeMoments::apply(total, group);
    }
  }
  total = merge_rows<MergeMoments>(total, grid);
  if (threadIdx.y == 0 && tile.channel < channels) write_partial(partial, total, blockIdx.x, tile.channel, channels);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) normalise_kernel(BnArgs p, GateGrid grid) {
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, p.pixels, V);
  const Part<V> total = merge_partials<MergeMoments, V>(p.partial, grid, tile.channel, p.channels, p.pixels);
  if (tile.channel >= p.channels) return;
  float mean[V], scale[V], shift[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t c = tile.channel + j;
    const float var = total.b[j] / float(p.pixels);
    mean[j] = total.a[j] / float(p.pixels);
    scale[j] = load_as_float(p.gamma, p.param_dtype, c) / sqrtf(var + p.eps);
    shift[j] = load_as_float(p.beta, p.param_dtype, c);
    if (blockIdx.x == 0 && threadIdx.y == 0) p.mean[c] = mean[j], p.var[c] = var;
  }
  const T* __restrict__ x = static_cast<const T*>(p.x);
  const T* __restrict__ residual = static_cast<const T*>(p.residual);
  T* __restrict__ y = static_cast<T*>(p.y);
#pragma unroll 4
  for (int64_t pixel = tile.begin + threadIdx.y; pixel < tile.end; pixel += grid.rows) {
    const int64_t at = pixel * p.channels + tile.channel;
    float v[V], r[V] = {};
    load(x + at, v);
    if (residual != nullptr) load(residual + at, r);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = activate((v[j] - mean[j]) * scale[j] + shift[j] + r[j], p.act);
    store(y + at, v);
  }
}

// ---------------------------------------------------------------- backward

// dz at one vector; y is only read where the activation needs it.
template <class T, int V>
__device__ void load_dz(const BnBackwardArgs& p, int64_t at, float (&dz)[V]) {
  load(static_cast<const T*>(p.dy) + at, dz);
  if (p.act == Act::none) return;
  float y[V];
  load(static_cast<const T*>(p.y) + at, y);
#pragma unroll
  for (int j = 0; j < V; ++j) dz[j] = activate_grad(dz[j], y[j], p.act);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) gradient_sums_kernel(BnBackwardArgs p, GateGrid grid) {
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, p.pixels, V);
  Part<V> total;
  if (tile.channel < p.channels) {
    float mean[V], rstd[V];
    load(p.mean + tile.channel, mean);
    load(p.var + tile.channel, rstd);
#pragma unroll
    for (int j = 0; j < V; ++j) rstd[j] = 1.f / sqrtf(rstd[j] + p.eps);
#pragma unroll 4
    for (int64_t pixel = tile.begin + threadIdx.y; pixel < tile.end; pixel += grid.rows) {
      const int64_t at = pixel * p.channels + tile.channel;
      float dz[V], x[V];
      load_dz<T>(p, at, dz);
      load(static_cast<const T*>(p.x) + at, x);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        total.a[j] += dz[j];
        total.b[j] += dz[j] * ((x[j] - mean[j]) * rstd[j]);
      }
    }
  }
  total = merge_rows<MergeSums>(total, grid);
  if (threadIdx.y == 0 && tile.channel < p.channels)
    write_partial(p.partial, total, blockIdx.x, tile.channel, p.channels);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) gradient_kernel(BnBackwardArgs p, GateGrid grid) {
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, p.pixels, V);
  const Part<V> total = merge_partials<MergeSums, V>(p.partial, grid, tile.channel, p.channels, p.pixels);
  if (tile.channel >= p.channels) return;
  float mean[V], rstd[V], scale[V], mean_dz[V], mean_dz_xhat[V];
  load(p.mean + tile.channel, mean);
  load(p.var + tile.channel, rstd);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t c = tile.channel + j;
    rstd[j] = 1.f / sqrtf(rstd[j] + p.eps);
    scale[j] = load_as_float(p.gamma, p.param_dtype, c) * rstd[j];
    mean_dz[j] = total.a[j] / float(p.pixels);
    mean_dz_xhat[j] = total.b[j] / float(p.pixels);
    if (blockIdx.x == 0 && threadIdx.y == 0) {
      store_as(p.dbeta, p.param_dtype, c, total.a[j]);
      store_as(p.dgamma, p.param_dtype, c, total.b[j]);
    }
  }
#pragma unroll 2
  for (int64_t pixel = tile.begin + threadIdx.y; pixel < tile.end; pixel += grid.rows) {
    const int64_t at = pixel * p.channels + tile.channel;
    float dz[V], x[V];
    load_dz<T>(p, at, dz);
    load(static_cast<const T*>(p.x) + at, x);
#pragma unroll
    for (int j = 0; j < V; ++j)
      x[j] = scale[j] * (dz[j] - mean_dz[j] - (x[j] - mean[j]) * rstd[j] * mean_dz_xhat[j]);
    store(static_cast<T*>(p.dx) + at, x);
    if (p.dresidual != nullptr) store(static_cast<T*>(p.dresidual) + at, dz);
  }
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
