// From ends on the device to the argument arrays of a grouped GEMM, in the caller's workspace.
#pragma once
#include <cuda_runtime.h>

#include "index.h"

// The tests run these kernels on the CPU and bring their own launch.
#ifndef ZK_LAUNCH
#define ZK_LAUNCH(kernel, grid, block, shared, stream) kernel<<<grid, block, shared, stream>>>
#endif

namespace zk {

// Error codes of the C functions: 0, a cudaError (positive), one of these, or kCutlass - status.
enum Error { kBadArgument = -1, kSmallWorkspace = -2, kMisaligned = -3, kNotBuilt = -4, kCutlass = -100 };

// Everything a launcher needs. `experts` is a host array of device pointers: weights, or in wgrad the outputs.
struct Problem {
  int product, groups, n, k, sm_count;
  int64_t rows;
  const int32_t* ends;
  const void* a;
  const void* b;
  void* d;
  const void* const* experts;
  float beta;
  void* workspace;
  int64_t workspace_bytes;
  cudaStream_t stream;
};

struct Pointers {
  const void* at[kPointers];
};

// Arrays of length `groups` in the workspace; what follows `rest` is the GEMM's own.
struct Arrays {
  Shape* shapes;
  const void** a;
  const void** b;
  void** d;
  int64_t *lda, *ldb, *ldd;
  char* rest;
};

// The first byte of a workspace on which a block may start; every size asked for has one block to spare.
inline char* first_block(void* workspace) {
  const int64_t past = int64_t(reinterpret_cast<uintptr_t>(workspace) % kBlock);
  return static_cast<char*>(workspace) + (past ? kBlock - past : 0);
}

inline Arrays carve(void* workspace, int groups) {
  char* at = first_block(workspace);
  const auto take = [&](int64_t size) {
    char* here = at;
    at += padded(size * groups);
    return here;
  };
  Arrays arrays;
  arrays.shapes = reinterpret_cast<Shape*>(take(sizeof(Shape)));
  arrays.a = reinterpret_cast<const void**>(take(8));
  arrays.b = reinterpret_cast<const void**>(take(8));
  arrays.d = reinterpret_cast<void**>(take(8));
  arrays.lda = reinterpret_cast<int64_t*>(take(8));
  arrays.ldb = reinterpret_cast<int64_t*>(take(8));
  arrays.ldd = reinterpret_cast<int64_t*>(take(8));
  arrays.rest = at;
  return arrays;
}

inline int64_t arrays_bytes(int groups) {
  return kBlock + padded(int64_t(sizeof(Shape)) * groups) + 6 * padded(8LL * groups);
}

// Static: each translation unit has its own copy, so that none needs relocatable device code.
static __global__ void prepare(Problem p, Pointers experts, int first, int in_bytes, int out_bytes, Arrays arrays) {
  const int e = first + blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= p.groups || e >= first + kPointers) return;
  const Span span = span_of(p.ends, e, p.rows);
  const Offsets at = offsets_of(p.product, span.begin, p.n, p.k);
  const bool wgrad = p.product == kWgrad;
  const void* own = experts.at[e - first];
  arrays.shapes[e] = shape_of(p.product, span.rows, p.n, p.k);
  arrays.a[e] = static_cast<const char*>(p.a) + at.a * in_bytes;
  arrays.b[e] = wgrad ? static_cast<const char*>(p.b) + at.b * in_bytes : own;
  arrays.d[e] = wgrad ? const_cast<void*>(own) : static_cast<char*>(p.d) + at.d * out_bytes;
  // Leading dimensions: rows of x have k elements, rows of dy n, a weight is [n, k].
  arrays.lda[e] = p.product == kForward ? p.k : p.n;
  arrays.ldb[e] = p.k;
  arrays.ldd[e] = p.product == kForward ? p.n : p.k;
}

// Zeros for the gradients of experts without rows, which no tile of the GEMM writes.
static __global__ void zero_empty(const Shape* shapes, void** outputs, int64_t vectors) {
  const int e = blockIdx.y;
  if (shapes[e].m > 0) return;
  float4* output = static_cast<float4*>(outputs[e]);
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += int64_t(gridDim.x) * blockDim.x)
    output[i] = make_float4(0.f, 0.f, 0.f, 0.f);
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The table of experts: every pointer there and aligned.
inline int check_experts(const void* const* experts, int groups) {
  for (int e = 0; e < groups; ++e)
    if (!aligned(experts[e]) || !experts[e]) return experts[e] ? kMisaligned : kBadArgument;
  return 0;
}

// The part of the table that travels with one launch.
inline Pointers pointers_from(const void* const* experts, int groups, int first) {
  Pointers pointers{};
  for (int e = first; e < groups && e < first + kPointers; ++e) pointers.at[e - first] = experts[e];
  return pointers;
}

inline int check(const Problem& p) {
  if (p.groups <= 0 || p.groups > 65535 || p.n <= 0 || p.k <= 0 || p.rows < 0 || p.rows > INT32_MAX || p.sm_count <= 0)
    return kBadArgument;
  if (!p.ends || !p.experts || !p.workspace) return kBadArgument;
  if (p.n % 8 || p.k % 8 || !aligned(p.a) || !aligned(p.b) || !aligned(p.d) || !aligned(p.workspace)) return kMisaligned;
  return check_experts(p.experts, p.groups);
}

// Fill the arrays and, where the product overwrites, clear the outputs of empty groups. Elements: `in_bytes` of the
// operands, `out_bytes` of the output.
inline int launch_prepare(const Problem& p, const Arrays& arrays, int in_bytes, int out_bytes) {
  for (int first = 0; first < p.groups; first += kPointers) {
    const Pointers pointers = pointers_from(p.experts, p.groups, first);
    ZK_LAUNCH(prepare, 1, kPointers, 0, p.stream)(p, pointers, first, in_bytes, out_bytes, arrays);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  if (p.product == kWgrad && p.beta == 0.f) {
    const int64_t vectors = int64_t(p.n) * p.k * out_bytes / 16;
    ZK_LAUNCH(zero_empty, dim3(32, p.groups), 256, 0, p.stream)(arrays.shapes, arrays.d, vectors);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return 0;
}

}  // namespace zk
