// The fused fc1 without its tensor cores: arguments, their check, the workspace, and the units of every expert.
#pragma once
#include "groups.cuh"

namespace zk {

// pre [rows, 2 width] = x w_e^T, act [rows, width] = silu(gate) * up * prob; x [rows, k], w_e [2 width, k].
struct Fc1 {
  int tile, groups, width, k, sm_count;
  int64_t rows;
  const int32_t* ends;
  const void* x;
  const void* const* experts;  // host array of device pointers
  const float* probs;          // null: one
  void* pre;                   // null: not stored
  void* act;
  void* workspace;
  int64_t workspace_bytes;
  cudaStream_t stream;
};

constexpr int64_t kMapBytes = 128;

// The weights' tensor maps, from the first block on, then the starts.
inline int64_t fc1_bytes(int groups) { return kBlock + padded(kMapBytes * groups) + padded(4LL * (groups + 1)); }

inline int32_t* starts_in(void* workspace, int groups) {
  return reinterpret_cast<int32_t*>(first_block(workspace) + padded(kMapBytes * groups));
}

inline int check(const Fc1& p, Tiling tiling) {
  if (p.groups <= 0 || p.groups > kMaxGroups || p.width <= 0 || p.width > INT32_MAX / 2 || p.k <= 0 || p.rows < 0 ||
      p.rows > INT32_MAX - 256 || p.sm_count <= 0)
    return kBadArgument;
  if (!p.ends || !p.experts || !p.workspace || (p.rows > 0 && (!p.x || !p.act))) return kBadArgument;
  if (p.width % 8 || p.k % 8 || !aligned(p.x) || !aligned(p.pre) || !aligned(p.act)) return kMisaligned;
  if (const int error = check_experts(p.experts, p.groups)) return error;
  // Units are int32 even if every group had all rows, as ends that make no sense may claim.
  if (units_of(tiling, p.rows, p.width) > (INT32_MAX - 2 * p.sm_count) / p.groups) return kBadArgument;
  return p.workspace_bytes < fc1_bytes(p.groups) ? kSmallWorkspace : 0;
}

// Sum over this lane and those before it. All lanes of the warp must call it.
static __device__ int32_t warp_prefix(int32_t sum) {
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (int(threadIdx.x % 32) >= step) sum += other;
  }
  return sum;
}

// One warp: starts [groups + 1], the units before each group, and all of them.
static __device__ void count_units(const int32_t* ends, int groups, int64_t rows, int width, Tiling tiling,
                                   int32_t* starts) {
  const int lane = threadIdx.x % 32;
  int32_t before = 0;
  for (int first = 0; first < groups; first += 32) {
    const int e = first + lane;
    const int32_t own = e < groups ? int32_t(units_of(tiling, span_of(ends, e, rows).rows, width)) : 0;
    const int32_t sum = warp_prefix(own);
    if (e < groups) starts[e] = before + sum - own;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) starts[groups] = before;
}

}  // namespace zk
