// Every kernel registers its name once, beside its definition, so that bindings.cpp can report its attributes.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace resnet_fast {

struct Kernel {
  std::string name;      // "file.kernel<dtype,vector width>"
  const void* function;  // the host stub cudaFuncGetAttributes takes
  int block;             // threads per block it is launched with
  int shared_bytes;      // dynamic shared memory it is launched with
};

inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;  // inside a function: registrations in other files may run first
  return all;
}

struct Registration {
  template <class Function>
  Registration(std::string name, Function* function, int block, int shared_bytes = 0) {
    kernels().push_back({std::move(name), reinterpret_cast<const void*>(function), block, shared_bytes});
  }
};

}  // namespace resnet_fast
