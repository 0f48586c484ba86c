// emu_runtime: the few functions of the CUDA runtime that a launcher calls. Hidden and weak:
// nothing is linked against the runtime, and a real one in the same process is not disturbed.
#pragma once

#include "emu_machine.h"

#define EMU_RUNTIME extern "C" __attribute__((weak, visibility("hidden")))

EMU_RUNTIME cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
EMU_RUNTIME cudaError_t CUDARTAPI cudaPeekAtLastError() { return cudaSuccess; }
EMU_RUNTIME const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulated runtime";
}

EMU_RUNTIME cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Few multiprocessors, so that a persistent kernel goes round its loop.
EMU_RUNTIME cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute,
                                                         int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = int(emu::kDefaultDynamicLimit);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(emu::kSharedLimit);
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    default:
      throw emu::Fault("cudaDeviceGetAttribute: attribute " + std::to_string(int(attribute)) +
                       " is not emulated");
  }
}

EMU_RUNTIME cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* kernel,
                                                       cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  emu::require_shared(size_t(value), emu::kSharedLimit, "dynamic shared memory");
  emu::machine().dynamic_limits[kernel] = size_t(value);
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

EMU_RUNTIME cudaError_t CUDARTAPI cudaMemsetAsync(void* address, int value, size_t bytes,
                                                  cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

#undef EMU_RUNTIME
