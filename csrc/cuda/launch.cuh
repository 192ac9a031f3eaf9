// What every launch needs: the right device, and errors that are seen.
#pragma once

#include <cuda_runtime.h>

#include "core/check.h"

// The static runtime keeps its own error state, which torch does not see.
#define ONP_CUDA_CHECK(expression)                                                          \
  do {                                                                                      \
    const cudaError_t onp_status = (expression);                                            \
    ONP_CHECK(onp_status == cudaSuccess, #expression ": ", cudaGetErrorString(onp_status)); \
  } while (false)

namespace onp {

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    ONP_CUDA_CHECK(cudaGetDevice(&before_));
    if (device != before_) ONP_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

}  // namespace onp
