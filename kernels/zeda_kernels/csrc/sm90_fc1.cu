// Hopper, fused fc1: tensor maps, units of work, launch.
#include <algorithm>

#include "cutlass/cuda_host_adapter.hpp"
#include "element.cuh"
#include "sm90_fc1.cuh"

namespace {

using zk::Fc1;
using zk::Pointers;
using zk::Tiling;

constexpr auto kType = std::is_same_v<ZkElement, cutlass::half_t> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Map of a matrix [rows, k] in boxes of `box` rows and one stage's depth; zeros outside. 0 or a CUresult, whose values
// are those of cudaError_t.
int encode(CUtensorMap* map, const void* base, int64_t rows, int k, int box) {
  const cuuint64_t sizes[2] = {cuuint64_t(k), cuuint64_t(rows)}, strides[1] = {cuuint64_t(k) * sizeof(ZkElement)};
  const cuuint32_t boxes[2] = {zk::sm90::kDepth, cuuint32_t(box)}, steps[2] = {1, 1};
  return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      map, kType, cuuint32_t(2), const_cast<void*>(base), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// A copy of the first expert's map for each expert from `first` on, with its own address; and, once, the units.
__global__ void prepare_fc1(const __grid_constant__ CUtensorMap map, const __grid_constant__ Pointers experts,
                            int first, const __grid_constant__ Fc1 p, Tiling tiling, CUtensorMap* maps,
                            int32_t* starts) {
  if (first == 0 && threadIdx.x < 32) zk::count_units(p.ends, p.groups, p.rows, p.width, tiling, starts);
  const int e = first + threadIdx.x;
  if (e >= p.groups) return;
  const int4* from = reinterpret_cast<const int4*>(&map);
  int4* to = reinterpret_cast<int4*>(maps + e);
  for (int i = 0; i < int(sizeof(map) / sizeof(int4)); ++i) to[i] = from[i];
  asm volatile("" ::: "memory");  // the copy is complete before one field changes
  cute::tma_descriptor_replace_addr_in_global_mem(maps + e, experts.at[threadIdx.x]);
  cute::tma_descriptor_fence_release();
}

template <typename Config>
int launch(const Fc1& p) {
  using Kernel = zk::sm90::FusedFc1<ZkElement, Config>;
  constexpr Tiling tiling = Config::tiling;
  static_assert(sizeof(CUtensorMap) == zk::kMapBytes);
  if (const int error = zk::check(p, tiling)) return error;
  if (p.rows == 0) return 0;
  CUtensorMap x, weight;
  if (const int error = encode(&x, p.x, p.rows, p.k, tiling.rows)) return error;
  if (const int error = encode(&weight, p.experts[0], 2LL * p.width, p.k, tiling.columns)) return error;
  CUtensorMap* maps = reinterpret_cast<CUtensorMap*>(zk::first_block(p.workspace));
  int32_t* starts = zk::starts_in(p.workspace, p.groups);
  for (int first = 0; first < p.groups; first += zk::kPointers) {
    const Pointers pointers = zk::pointers_from(p.experts, p.groups, first);
    prepare_fc1<<<1, zk::kPointers, 0, p.stream>>>(weight, pointers, first, p, tiling, maps, starts);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  const auto kernel = zk::sm90::fc1<ZkElement, Config>;
  constexpr int bytes = sizeof(typename Kernel::Shared);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  // No more clusters than units there may be: every expert adds at most one that is not full.
  const int64_t full = p.rows / (tiling.rows * tiling.cluster) + std::min<int64_t>(p.groups, p.rows);
  const int64_t units = full * zk::ceil_div(p.width, tiling.columns);
  const int64_t most = std::max(1, p.sm_count * Config::blocks / tiling.cluster);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = tiling.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min(units, most)) * tiling.cluster);
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = p.stream;
  config.attrs = &cluster, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, x, static_cast<const CUtensorMap*>(maps),
                            static_cast<const int32_t*>(starts), p);
}

}  // namespace

int ZK_NAME(zk_sm90_fc1)(const Fc1& p) {
  return p.tile == 0 ? launch<zk::sm90::Small>(p) : launch<zk::sm90::Large>(p);
}
