// Products of rows with their expert's weight on Hopper, without the tensor cores: arguments, their check, the units of
// every expert.
#pragma once
#include "groups.cuh"

namespace zk {

// kForward: out [rows, columns] = x w_e^T, w_e [columns, depth]. kDgrad: out = x w_e, w_e [depth, columns]. kFc1: pre
// [rows, 2 columns] = x w_e^T, w_e [2 columns, depth], out = silu(gate) * up * prob. kDswiglu: with the product of kDgrad
// for the gradient of that, and pre: out [rows, 2 columns] is pre's gradient, act [rows, columns] what was computed,
// sums [rows, tiles of a row] parts of prob's gradient. x [rows, depth]. Rows of out, pre and act past the last end
// become zero; those of sums are not written. lead: products by which the first warpgroup of a large tile is ahead of the
// second, which then has the tensor cores for itself while the first writes its rows.
struct RowProduct {
  int product, groups, columns, depth, lead, sm_count;
  int64_t rows;
  const int32_t* ends;
  const void* x;
  const void* maps;    // a tensor map of each weight in boxes of 64 by 64, on the device
  const float* probs;  // null: one
  void* pre;           // kFc1: null: not stored
  void* out;
  void* act;
  float* sums;
  cudaStream_t stream;
};

// Stages of operands in shared memory.
constexpr int kStages = 4;

inline int check(const RowProduct& p, Tiling tiling) {
  if (p.groups <= 0 || p.groups > kMaxGroups || p.columns <= 0 || p.columns > INT32_MAX / 2 || p.depth <= 0 ||
      p.rows < 0 || p.rows > INT32_MAX - 256 || p.lead < 0 || p.lead >= kStages || p.sm_count <= 0)
    return kBadArgument;
  if (!p.ends || !p.maps || (p.rows > 0 && (!p.x || !p.out))) return kBadArgument;
  if (p.product == kDswiglu && p.rows > 0 && (!p.pre || !p.act || !p.sums)) return kBadArgument;
  if (p.columns % 8 || p.depth % 8 || !aligned(p.x) || !aligned(p.pre) || !aligned(p.out) || !aligned(p.act) ||
      reinterpret_cast<uintptr_t>(p.maps) % 64)
    return kMisaligned;
  // Units are int32 even if every group had all rows, as ends that make no sense may claim.
  if (units_of(tiling, p.rows, p.columns) > (INT32_MAX - 2 * p.sm_count) / p.groups) return kBadArgument;
  return 0;
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
