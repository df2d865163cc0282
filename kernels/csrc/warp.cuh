// What the lanes of a warp compute together.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace zk {

// Sum over this lane and those before it. All lanes of the warp must call it.
static __device__ int32_t warp_prefix(int32_t sum) {
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (int(threadIdx.x % 32) >= step) sum += other;
  }
  return sum;
}

}  // namespace zk
