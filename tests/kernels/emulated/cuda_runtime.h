// Enough of CUDA to run a kernel on the CPU: the threads of a block are coroutines that take turns between barriers.
// For tests. Blocks run one after the other; a barrier that not every live thread reaches ends the process.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  const char* waits = nullptr;
};

inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline unsigned current;
inline std::function<void()> body;
inline float exchanged[1024];

inline void enter() {
  body();
  threads[current].done = true;
  swapcontext(&threads[current].context, &scheduler);
}

inline void wait(const char* what) {
  threads[current].waits = what;
  swapcontext(&threads[current].context, &scheduler);
}

inline void run_block(unsigned size) {
  threads.resize(size);
  for (Thread& thread : threads) {
    constexpr size_t kStack = 32768;
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, enter, 0);
  }
  for (bool live = true; live;) {
    live = false;
    const char* waits = nullptr;
    for (current = 0; current < size; ++current) {
      if (threads[current].done) continue;
      threadIdx.x = current;
      swapcontext(&scheduler, &threads[current].context);
      if (threads[current].done) continue;
      live = true;
      if (waits && waits != threads[current].waits) {
        std::fprintf(stderr, "threads of one block wait at %s and at %s\n", waits, threads[current].waits);
        std::abort();
      }
      waits = threads[current].waits;
    }
  }
}

template <typename... P>
auto launch(void (*kernel)(P...), dim3 grid, dim3 block) {
  return [=](P... parts) {
    gridDim = grid, blockDim = block;
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx.x = x, blockIdx.y = y;
        body = [&] { kernel(parts...); };
        run_block(block.x);
      }
  };
}

inline const char* const kBarrier = "__syncthreads";
inline const char* const kExchange = "a shuffle";

// `source` gives the lane to read from, within the warp.
template <typename Value>
Value shuffle(Value value, unsigned lane) {
  static_assert(sizeof(Value) <= sizeof(float));
  const unsigned own = threadIdx.x;
  std::memcpy(exchanged + own, &value, sizeof(Value));
  wait(kExchange);
  if (lane < 32) std::memcpy(&value, exchanged + (own / 32 * 32 + lane), sizeof(Value));
  wait(kExchange);
  return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::kBarrier); }
template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return emulated::shuffle(value, threadIdx.x % 32 ^ unsigned(mask));
}
template <typename Value>
Value __shfl_up_sync(unsigned, Value value, int step) {
  const unsigned lane = threadIdx.x % 32;
  return emulated::shuffle(value, lane >= unsigned(step) ? lane - step : lane);
}
template <typename Value>
Value __shfl_sync(unsigned, Value value, int lane) {
  return emulated::shuffle(value, unsigned(lane));
}

#define ZK_LAUNCH(kernel, grid, block, shared, stream) emulated::launch(kernel, grid, block)
