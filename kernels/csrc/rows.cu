// Kernels over rows, without CUTLASS: SwiGLU with the routing weight, the sort by expert, permutation and combine.
// Rows are read and written 16 bytes at a time; sums run in a fixed order, so results repeat bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"
#include "groups.cuh"
#include "swiglu.h"
#include "warp.cuh"

namespace {

using zk::kSlots;
using zk::warp_prefix;

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

// The sort by expert, stable in the order of slots, in four passes: count per block, prefix over blocks, ends, place.

__global__ void count_slots(const int32_t* ids, int64_t slots, int experts, int32_t* counts) {
  ZK_DYNAMIC_SHARED(int32_t, own);
  for (int e = threadIdx.x; e < experts; e += blockDim.x) own[e] = 0;
  __syncthreads();
  const int64_t slot = int64_t(blockIdx.x) * kSlots + threadIdx.x;
  const int expert = slot < slots ? zk::expert_of(ids, slot, experts) : -1;
  if (expert >= 0) atomicAdd(own + expert, 1);  // integers: the order does not matter
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[int64_t(blockIdx.x) * experts + e] = own[e];
}

// One warp an expert: its counts become the slots before each block, `totals` their sum.
__global__ void prefix_blocks(int32_t* counts, int64_t blocks, int experts, int32_t* totals) {
  const int expert = blockIdx.x, lane = threadIdx.x;
  int32_t before = 0;
  for (int64_t first = 0; first < blocks; first += 32) {
    const int64_t block = first + lane;
    const int32_t own = block < blocks ? counts[block * experts + expert] : 0;
    const int32_t sum = warp_prefix(own);
    if (block < blocks) counts[block * experts + expert] = before + sum - own;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) totals[expert] = before;
}

// One warp; 32 loads at a time, because one after the other would take longer than a decoding step can hide.
__global__ void inclusive_ends(int32_t* ends, int experts) {
  const int lane = threadIdx.x;
  int32_t before = 0;
  for (int first = 0; first < experts; first += 32) {
    const int e = first + lane;
    const int32_t sum = warp_prefix(e < experts ? ends[e] : 0);
    if (e < experts) ends[e] = before + sum;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
}

__global__ void place_slots(const int32_t* ids, int64_t slots, int experts, const int32_t* counts, const int32_t* ends,
                            int32_t* row_map) {
  __shared__ int of_slot[kSlots];
  const int64_t slot = int64_t(blockIdx.x) * kSlots + threadIdx.x;
  const int expert = slot < slots ? zk::expert_of(ids, slot, experts) : -1;
  of_slot[threadIdx.x] = expert;
  __syncthreads();
  if (slot >= slots) return;
  int32_t row = -1;
  if (expert >= 0) {
    row = (expert > 0 ? ends[expert - 1] : 0) + counts[int64_t(blockIdx.x) * experts + expert];
    for (int i = 0; i < int(threadIdx.x); ++i) row += of_slot[i] == expert;
  }
  row_map[slot] = row;
}

template <typename Element>
__global__ void gather_rows(const Element* x, const int32_t* row_map, int64_t slots, int picks, int width, Element* out) {
  for (int64_t s = blockIdx.x; s < slots; s += gridDim.x) {
    const int64_t row = row_map[s];
    if (row < 0) continue;
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) store(out + row * width, i, load(x + s / picks * width, i));
  }
}

template <typename Element>
__global__ void combine_rows(const Element* y, const int32_t* row_map, const float* probs, int64_t tokens, int picks,
                             int width, Element* out) {
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x) {
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
      float sum[8] = {};
      for (int k = 0; k < picks; ++k) {
        const int64_t row = row_map[t * picks + k];
        if (row < 0) continue;
        const float prob = probs ? probs[t * picks + k] : 1.f;
        const Vector<Element> value = load(y + row * width, i);
        for (int j = 0; j < 8; ++j) sum[j] += prob * float(value.at[j]);
      }
      Vector<Element> result;
      for (int j = 0; j < 8; ++j) result.at[j] = Element(sum[j]);
      store(out + t * width, i, result);
    }
  }
}

template <typename Element>
__global__ void combine_grad_rows(const Element* dout, const Element* y, const int32_t* row_map, const float* probs,
                                  int64_t slots, int picks, int width, Element* dy, float* dprobs) {
  for (int64_t s = blockIdx.x; s < slots; s += gridDim.x) {
    const int64_t row = row_map[s];
    float sum = 0.f;
    if (row >= 0) {
      for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
        const Vector<Element> d = load(dout + s / picks * width, i), value = load(y + row * width, i);
        Vector<Element> result;
        for (int j = 0; j < 8; ++j) {
          result.at[j] = Element(probs[s] * float(d.at[j]));
          sum += float(d.at[j]) * float(value.at[j]);
        }
        store(dy + row * width, i, result);
      }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) dprobs[s] = sum;
  }
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

int64_t zk_sort_workspace(int64_t slots, int experts) { return zk::ceil_div(slots, kSlots) * experts * 4; }

int zk_sort(int64_t slots, int experts, const int32_t* ids, int32_t* row_map, int32_t* ends, void* workspace,
            int64_t workspace_bytes, void* stream) {
  if (slots < 0 || slots > INT32_MAX || experts <= 0 || experts > 8192) return zk::kBadArgument;
  if (workspace_bytes < zk_sort_workspace(slots, experts)) return zk::kSmallWorkspace;
  const cudaStream_t on = cudaStream_t(stream);
  if (slots == 0) return cudaMemsetAsync(ends, 0, size_t(experts) * 4, on);
  int32_t* counts = static_cast<int32_t*>(workspace);
  const int64_t blocks = zk::ceil_div(slots, kSlots);
  ZK_LAUNCH(count_slots, unsigned(blocks), kSlots, experts * 4, on)(ids, slots, experts, counts);
  ZK_LAUNCH(prefix_blocks, experts, 32, 0, on)(counts, blocks, experts, ends);
  ZK_LAUNCH(inclusive_ends, 1, 32, 0, on)(ends, experts);
  ZK_LAUNCH(place_slots, unsigned(blocks), kSlots, 0, on)(ids, slots, experts, counts, ends, row_map);
  return cudaGetLastError();
}

int zk_gather(int dtype, int64_t slots, int picks, int width, const int32_t* row_map, const void* x, void* out,
              int sm_count, void* stream) {
  if (const int error = check(slots, width, sm_count)) return error;
  if (picks <= 0) return zk::kBadArgument;
  if (!all_aligned(x, out)) return zk::kMisaligned;
  if (slots == 0) return 0;
  ZK_BY_TYPE(dtype, (ZK_LAUNCH(gather_rows<Element>, blocks_for(slots, sm_count), kThreads, 0, cudaStream_t(stream))(
                        ZK_IN(x), row_map, slots, picks, width, ZK_OUT(out))));
}

int zk_combine(int dtype, int64_t tokens, int picks, int width, const int32_t* row_map, const void* y,
               const float* probs, void* out, int sm_count, void* stream) {
  if (const int error = check(tokens, width, sm_count)) return error;
  if (picks <= 0) return zk::kBadArgument;
  if (!all_aligned(y, out)) return zk::kMisaligned;
  if (tokens == 0) return 0;
  ZK_BY_TYPE(dtype, (ZK_LAUNCH(combine_rows<Element>, blocks_for(tokens, sm_count), kThreads, 0, cudaStream_t(stream))(
                        ZK_IN(y), row_map, probs, tokens, picks, width, ZK_OUT(out))));
}

int zk_combine_grad(int dtype, int64_t slots, int picks, int width, const int32_t* row_map, const void* dout,
                    const void* y, const float* probs, void* dy, float* dprobs, int sm_count, void* stream) {
  if (const int error = check(slots, width, sm_count)) return error;
  if (picks <= 0 || !probs || !dprobs) return zk::kBadArgument;
  if (!all_aligned(dout, y, dy)) return zk::kMisaligned;
  if (slots == 0) return 0;
  ZK_BY_TYPE(dtype, (ZK_LAUNCH(combine_grad_rows<Element>, blocks_for(slots, sm_count), kThreads, 0, cudaStream_t(stream))(
                        ZK_IN(dout), ZK_IN(y), row_map, probs, slots, picks, width, ZK_OUT(dy), dprobs)));
}
