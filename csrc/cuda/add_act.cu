// Residual add + activation, forward and backward, with or without a squeeze-and-excitation gate.
//
//   ungated   out = act(x + y)          dx = dy = d,  d = dout * act'(out)
//   gated     out = act(x * gate + y)   dy = d,  dx = d * gate,  dgate[n, c] = sum over pixels of d * x
//
// Layout: ungated, any dense layout that all tensors share (the kernel sees a flat array); gated, NHWC-dense with gate
// [N, C]. float32, float16, bfloat16; arithmetic in float32, one rounding on store.
// Floor, for E elements of b bytes (a FLOP or two each, so DRAM is the bound): ungated forward and backward 3Eb; gated
// forward 3Eb; gated backward 5Eb (dout, out, x in; dx, dy out), and dgate's float32 partials, one for every 64 or more
// elements of x.
// Deterministic: dgate is summed in a fixed order in two launches, without atomics.
#include "epilogue.cuh"
#include "launch.cuh"

namespace resnet_fast {
namespace {

struct AddAct {
  RF_HD static float apply(float x, float y, Act act) { return activate(x + y, act); }
};

struct MaskGrad {
  RF_HD static float apply(float dout, float out, Act act) { return activate_grad(dout, out, act); }
};

template <class T, int V, class Op>
__global__ void __launch_bounds__(kThreads)
    binary_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, int64_t count, Act act) {
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, vectors = count / V;
  for (int64_t i = first; i < vectors; i += int64_t(gridDim.x) * kThreads) {
    float va[V], vb[V];
    load(a + i * V, va);
    load(b + i * V, vb);
#pragma unroll
    for (int j = 0; j < V; ++j) va[j] = Op::apply(va[j], vb[j], act);
    store(out + i * V, va);
  }
  const int64_t tail = vectors * V + first;
  if (tail < count) out[tail] = from_float<T>(Op::apply(to_float(a[tail]), to_float(b[tail]), act));
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(const T* __restrict__ x, const T* __restrict__ y, const T* __restrict__ gate, T* __restrict__ out,
                int64_t pixels, int64_t channels, GateGrid grid, Act act) {
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, pixels, V);
  if (tile.channel >= channels) return;
  float g[V];
  load(gate + tile.image * channels + tile.channel, g);
  for (int64_t pixel = tile.begin + threadIdx.y; pixel < tile.end; pixel += grid.rows) {
    const int64_t at = (tile.image * pixels + pixel) * channels + tile.channel;
    float vx[V], vy[V];
    load(x + at, vx);
    load(y + at, vy);
#pragma unroll
    for (int j = 0; j < V; ++j) vx[j] = activate(vx[j] * g[j] + vy[j], act);
    store(out + at, vx);
  }
}

// Writes dx and dy, and this block's share of dgate: a thread sums its pixels, then the block sums its rows in order.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gate_backward_kernel(const T* __restrict__ dout, const T* __restrict__ out, const T* __restrict__ x,
                         const T* __restrict__ gate, T* __restrict__ dx, T* __restrict__ dy,
                         float* __restrict__ partial, int64_t pixels, int64_t channels, GateGrid grid, Act act) {
  __shared__ float sums[V][kThreads];
  const GateTile tile = gate_tile(grid, blockIdx.x, blockIdx.y, threadIdx.x, pixels, V);
  const int self = threadIdx.y * grid.lanes + threadIdx.x;
  float sum[V] = {};
  if (tile.channel < channels) {
    float g[V];
    load(gate + tile.image * channels + tile.channel, g);
    for (int64_t pixel = tile.begin + threadIdx.y; pixel < tile.end; pixel += grid.rows) {
      const int64_t at = (tile.image * pixels + pixel) * channels + tile.channel;
      float d[V], o[V], vx[V];
      load(dout + at, d);
      load(out + at, o);
      load(x + at, vx);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        d[j] = activate_grad(d[j], o[j], act);
        sum[j] += d[j] * vx[j];
        vx[j] = d[j] * g[j];
      }
      store(dy + at, d);
      store(dx + at, vx);
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) sums[j][self] = sum[j];
  __syncthreads();
  if (threadIdx.y != 0 || tile.channel >= channels) return;
  for (int row = 1; row < grid.rows; ++row) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += sums[j][row * grid.lanes + threadIdx.x];
  }
#pragma unroll
  for (int j = 0; j < V; ++j) partial[int64_t(blockIdx.x) * channels + tile.channel + j] = sum[j];
}

// dgate[n, c] = sum over splits of partial[n, split, c].
template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_sum_kernel(const float* __restrict__ partial, T* __restrict__ dgate, int64_t count, int64_t channels,
                    int64_t splits) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t image = i / channels, channel = i % channels;
    float sum = 0.f;
    for (int64_t split = 0; split < splits; ++split) sum += partial[(image * splits + split) * channels + channel];
    dgate[i] = from_float<T>(sum);
  }
}

template <class T, int V, class Op>
cudaError_t run_binary(const BinaryArgs& p, cudaStream_t stream) {
  return launch(binary_kernel<T, V, Op>, dim3(unsigned(flat_blocks(p.count, V))), dim3(kThreads), stream,
                static_cast<const T*>(p.a), static_cast<const T*>(p.b), static_cast<T*>(p.out), p.count, p.act);
}

template <class Op>
cudaError_t choose_binary(const BinaryArgs& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return aligned16(p.a, p.b, p.out) ? run_binary<T, kVector<T>, Op>(p, stream) : run_binary<T, 1, Op>(p, stream);
  });
}

template <class T, int V>
cudaError_t run_gate(const GateArgs& p, cudaStream_t stream) {
  const GateGrid g = gate_grid(p.images, p.pixels, p.channels, V);
  return launch(gate_kernel<T, V>, dim3(unsigned(p.images * g.splits), unsigned(g.chunks)), dim3(g.lanes, g.rows),
                stream, static_cast<const T*>(p.x), static_cast<const T*>(p.y), static_cast<const T*>(p.gate),
                static_cast<T*>(p.out), p.pixels, p.channels, g, p.act);
}

int gate_backward_width(const GateBackwardArgs& p) {
  const int width = p.dtype == DType::f32 ? kVector<float> : kVector<__half>;
  return p.channels % width == 0 && aligned16(p.dout, p.out, p.x, p.gate, p.dx, p.dy) ? width : 1;
}

template <class T, int V>
cudaError_t run_gate_backward(const GateBackwardArgs& p, cudaStream_t stream) {
  const GateGrid g = gate_grid(p.images, p.pixels, p.channels, V);
  const cudaError_t error =
      launch(gate_backward_kernel<T, V>, dim3(unsigned(p.images * g.splits), unsigned(g.chunks)),
             dim3(g.lanes, g.rows), stream, static_cast<const T*>(p.dout), static_cast<const T*>(p.out),
             static_cast<const T*>(p.x), static_cast<const T*>(p.gate), static_cast<T*>(p.dx), static_cast<T*>(p.dy),
             p.partial, p.pixels, p.channels, g, p.act);
  if (error != cudaSuccess) return error;
  const int64_t count = p.images * p.channels;
  return launch(gate_sum_kernel<T>, dim3(unsigned(flat_blocks(count, 1))), dim3(kThreads), stream,
                static_cast<const float*>(p.partial), static_cast<T*>(p.dgate), count, p.channels, g.splits);
}

}  // namespace

cudaError_t add_act(const BinaryArgs& p, cudaStream_t stream) { return choose_binary<AddAct>(p, stream); }

cudaError_t add_act_backward(const BinaryArgs& p, cudaStream_t stream) { return choose_binary<MaskGrad>(p, stream); }

cudaError_t add_act_gate(const GateArgs& p, cudaStream_t stream) {
  if (p.images * p.pixels * p.channels == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool wide = p.channels % kVector<T> == 0 && aligned16(p.x, p.y, p.gate, p.out);
    return wide ? run_gate<T, kVector<T>>(p, stream) : run_gate<T, 1>(p, stream);
  });
}

int64_t add_act_gate_backward_workspace(const GateBackwardArgs& p) {
  const int width = gate_backward_width(p);
  return p.images * gate_grid(p.images, p.pixels, p.channels, width).splits * p.channels;
}

// No pixels is not no work: dgate is then a sum over nothing, zero, and still has to be written.
cudaError_t add_act_gate_backward(const GateBackwardArgs& p, cudaStream_t stream) {
  if (p.images * p.channels == 0) return cudaSuccess;
  return dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return gate_backward_width(p) > 1 ? run_gate_backward<T, kVector<T>>(p, stream)
                                      : run_gate_backward<T, 1>(p, stream);
  });
}

namespace {

template <class T>
void register_kernels(const char* dtype) {
  const std::string wide = std::string("<") + dtype + "," + std::to_string(kVector<T>) + ">";
  Registration("add_act.forward" + wide, binary_kernel<T, kVector<T>, AddAct>, kThreads);
  Registration("add_act.backward" + wide, binary_kernel<T, kVector<T>, MaskGrad>, kThreads);
  Registration("add_act.gate" + wide, gate_kernel<T, kVector<T>>, kThreads);
  Registration("add_act.gate_backward" + wide, gate_backward_kernel<T, kVector<T>>, kThreads);
}

const bool registered = (register_kernels<float>("f32"), register_kernels<__half>("f16"),
                         register_kernels<__nv_bfloat16>("bf16"), true);

}  // namespace
}  // namespace resnet_fast
