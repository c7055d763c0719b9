// resnet_fast._C, the Python face of what is not an op: what the compiler made of each kernel. Free of torch.
// Importing the module also loads library.cpp's ops, which register themselves.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "registry.h"

namespace py = pybind11;

namespace {

// Without a GPU the runtime answers with an error and leaves garbage in the result, so every answer is checked.
void check(cudaError_t error, const std::string& kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear it: the next launch must not report this question's failure
  throw std::runtime_error("attributes: got no answer for " + kernel + ", expected a CUDA device that can run it: " +
                           cudaGetErrorString(error));
}

const resnet_fast::Kernel& find(const std::string& name) {
  for (const auto& kernel : resnet_fast::kernels()) {
    if (kernel.name == name) return kernel;
  }
  throw py::key_error("attributes: got " + name + ", expected one of kernels()");
}

py::dict attributes(const std::string& name, py::object block) {
  const auto& kernel = find(name);
  const int threads = block.is_none() ? kernel.block : block.cast<int>();
  cudaFuncAttributes a;
  check(cudaFuncGetAttributes(&a, kernel.function), name);
  // A kernel may use more than 48 kB only once it has been told so, and its launcher may not have run yet.
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes), name);
  int blocks_per_sm = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel.function, threads,
                                                      size_t(kernel.shared_bytes)), name);
  py::dict out;
  out["registers"] = a.numRegs;
  out["shared_bytes"] = a.sharedSizeBytes + size_t(kernel.shared_bytes);  // static and dynamic
  out["local_bytes"] = a.localSizeBytes;  // more than zero: registers were spilled, or an array is indexed dynamically
  out["max_threads"] = a.maxThreadsPerBlock;
  out["binary_version"] = a.binaryVersion;  // 90: compiled for sm_90
  out["block"] = threads;
  out["blocks_per_sm"] = blocks_per_sm;
  return out;
}

py::list kernel_names() {
  py::list names;
  for (const auto& kernel : resnet_fast::kernels()) names.append(kernel.name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of resnet_fast: importing this registers torch.ops.resnet_fast_native.";
  m.def("kernels", &kernel_names, "Names of the kernels in this build.");
  m.def("attributes", &attributes, py::arg("name"), py::arg("block") = py::none(),
        "Registers, shared and local bytes, and resident blocks per multiprocessor of a kernel at `block` threads, as "
        "the current GPU runs it. Raises RuntimeError where there is no GPU, KeyError for an unknown name.");
}
