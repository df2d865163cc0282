// Kernels over rows, without CUTLASS: SwiGLU with the routing weight and its gradient, zeros past the last group.
// Rows are read and written 16 bytes at a time; sums run in a fixed order, so results repeat bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"
#include "groups.cuh"
#include "swiglu.h"

namespace {

constexpr int kThreads = 256;

template <typename Element>
struct alignas(16) Vector {
  Element at[8];
};

template <typename Element>
__device__ Vector<Element> load(const Element* row, int64_t i) {
  return reinterpret_cast<const Vector<Element>*>(row)[i];
}

template <typename Element>
__device__ void store(Element* row, int64_t i, const Vector<Element>& value) {
  reinterpret_cast<Vector<Element>*>(row)[i] = value;
}

// Sum over the block, the same order each time. Every thread must call it; thread 0 gets the result.
__device__ float block_sum(float value) {
  __shared__ float of_warp[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.f;
  for (int w = 0; w < kThreads / 32; ++w) value += of_warp[w];
  return value;
}

template <typename Element>
__global__ void swiglu_rows(const Element* pre, const float* probs, const int32_t* ends, int groups, int64_t rows,
                            int width, Element* act) {
  const int64_t tail = zk::tail_of(ends, groups, rows);
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const Element* gate = pre + r * 2 * width;
    const float prob = r >= tail ? 0.f : probs ? probs[r] : 1.f;
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
      Vector<Element> out{};
      if (r < tail) {
        const Vector<Element> g = load(gate, i), u = load(gate + width, i);
        for (int j = 0; j < 8; ++j) out.at[j] = Element(zk::swiglu(float(g.at[j]), float(u.at[j]), prob));
      }
      store(act + r * width, i, out);
    }
  }
}

template <typename Element>
__global__ void swiglu_grad_rows(const Element* dact, const Element* pre, const float* probs, const int32_t* ends,
                                 int groups, int64_t rows, int width, Element* dpre, Element* act, float* dprobs) {
  const int64_t tail = zk::tail_of(ends, groups, rows);
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const Element* gate = pre + r * 2 * width;
    Element* dgate = dpre + r * 2 * width;
    const float prob = r >= tail ? 0.f : probs ? probs[r] : 1.f;
    float sum = 0.f;
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
      Vector<Element> dg{}, du{}, a{};
      if (r < tail) {
        const Vector<Element> g = load(gate, i), u = load(gate + width, i), d = load(dact + r * width, i);
        for (int j = 0; j < 8; ++j) {
          const zk::SwigluGrad grad = zk::swiglu_grad(float(g.at[j]), float(u.at[j]), prob, float(d.at[j]));
          dg.at[j] = Element(grad.gate), du.at[j] = Element(grad.up), a.at[j] = Element(grad.act);
          sum += grad.prob;
        }
      }
      store(dgate, i, dg), store(dgate + width, i, du), store(act + r * width, i, a);
    }
    if (dprobs) {
      sum = block_sum(sum);
      if (threadIdx.x == 0) dprobs[r] = sum;
    }
  }
}

__global__ void zero_tail(float4* data, const int32_t* ends, int groups, int64_t rows, int64_t vectors) {
  const int64_t start = zk::tail_of(ends, groups, rows) * vectors, stop = rows * vectors;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = start + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < stop; i += step)
    data[i] = make_float4(0.f, 0.f, 0.f, 0.f);
}

unsigned blocks_for(int64_t work, int sm_count) {
  const int64_t most = int64_t(sm_count) * 16;
  return unsigned(work < most ? work : most);
}

// What all launchers ask of their sizes; `width` counts elements of a row.
int check(int64_t work, int width, int sm_count) {
  if (work < 0 || work > INT32_MAX || width <= 0 || sm_count <= 0) return zk::kBadArgument;
  return width % 8 ? zk::kMisaligned : 0;
}

template <typename... P>
bool all_aligned(const P*... pointers) {
  return (zk::aligned(pointers) && ...);
}

}  // namespace

// Call `launch` with a value of the element type: 0 bfloat16, 1 half.
#define ZK_BY_TYPE(dtype, ...)                       \
  switch (dtype) {                                   \
    case 0: { using Element = __nv_bfloat16; __VA_ARGS__; break; } \
    case 1: { using Element = __half; __VA_ARGS__; break; }        \
    default: return zk::kBadArgument;                \
  }                                                  \
  return cudaGetLastError()

#define ZK_IN(pointer) static_cast<const Element*>(pointer)
#define ZK_OUT(pointer) static_cast<Element*>(pointer)

int zk_swiglu(int dtype, int groups, int64_t rows, int width, const int32_t* ends, const void* pre, const float* probs,
              void* act, int sm_count, void* stream) {
  if (const int error = check(rows, width, sm_count)) return error;
  if (!all_aligned(pre, act)) return zk::kMisaligned;
  if (rows == 0) return 0;
  ZK_BY_TYPE(dtype, (ZK_LAUNCH(swiglu_rows<Element>, blocks_for(rows, sm_count), kThreads, 0, cudaStream_t(stream))(
                        ZK_IN(pre), probs, ends, groups, rows, width, ZK_OUT(act))));
}

int zk_swiglu_grad(int dtype, int groups, int64_t rows, int width, const int32_t* ends, const void* dact,
                   const void* pre, const float* probs, void* dpre, void* act, float* dprobs, int sm_count,
                   void* stream) {
  if (const int error = check(rows, width, sm_count)) return error;
  if (!all_aligned(dact, pre, dpre, act)) return zk::kMisaligned;
  if (rows == 0) return 0;
  ZK_BY_TYPE(dtype, (ZK_LAUNCH(swiglu_grad_rows<Element>, blocks_for(rows, sm_count), kThreads, 0, cudaStream_t(stream))(
                        ZK_IN(dact), ZK_IN(pre), probs, ends, groups, rows, width, ZK_OUT(dpre), ZK_OUT(act), dprobs)));
}

int zk_zero_tail(int groups, int64_t rows, int64_t row_bytes, const int32_t* ends, void* data, int sm_count,
                 void* stream) {
  if (rows < 0 || row_bytes <= 0 || sm_count <= 0) return zk::kBadArgument;
  if (row_bytes % 16 || !zk::aligned(data)) return zk::kMisaligned;
  if (rows == 0) return 0;
  ZK_LAUNCH(zero_tail, sm_count, kThreads, 0, cudaStream_t(stream))(static_cast<float4*>(data), ends, groups, rows,
                                                            row_bytes / 16);
  return cudaGetLastError();
}
