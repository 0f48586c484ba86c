// occupancy_reference: blocks per SM by CUDA's own cuda_occupancy.h, to compare occupancy.py with.
//
// Reads lines "compute_capability registers threads static_smem dynamic_smem", such as "90 32 256 0
// 1024".
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int capability, registers, threads, static_smem, dynamic_smem;
  while (std::scanf("%d %d %d %d %d", &capability, &registers, &threads, &static_smem,
                    &dynamic_smem) == 5) {
    const int smem_kib = capability == 80 ? 164 : 228;
    cudaOccDeviceProp device{};
    device.computeMajor = capability / 10;
    device.computeMinor = capability % 10;
    device.numSms = 1;
    device.warpSize = 32;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerBlockOptin = (smem_kib - 1) << 10;
    device.sharedMemPerMultiprocessor = smem_kib << 10;
    device.reservedSharedMemPerBlock = 1 << 10;

    cudaOccFuncAttributes kernel{};
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = static_smem;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.numBlockBarriers = 1;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin - static_smem;

    cudaOccResult result;
    const cudaOccDeviceState state;
    const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state,
                                                               threads, dynamic_smem);
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
