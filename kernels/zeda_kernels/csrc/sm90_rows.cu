// Hopper, products of rows: tensor maps, launch.
#include <algorithm>

#include "cutlass/cuda_host_adapter.hpp"
#include "element.cuh"
#include "sm90_rows.cuh"

namespace {

using zk::RowProduct;
using zk::Tiling;

constexpr auto kType = std::is_same_v<ZkElement, cutlass::half_t> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Map of a matrix [rows, columns] in boxes of 64 by 64; zeros outside. 0 or a CUresult, whose values are those of
// cudaError_t.
int encode(CUtensorMap* map, const void* base, int64_t rows, int columns) {
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(columns) * sizeof(ZkElement)};
  const cuuint32_t boxes[2] = {64, 64}, steps[2] = {1, 1};
  return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      map, kType, cuuint32_t(2), const_cast<void*>(base), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <int product, typename Config>
int launch(const RowProduct& p) {
  using Kernel = zk::sm90::Rows<product, ZkElement, Config>;
  constexpr Tiling tiling = Kernel::tiling;
  if (const int error = zk::check(p, tiling)) return error;
  if (p.rows == 0) return 0;
  CUtensorMap x;
  if (const int error = encode(&x, p.x, p.rows, p.depth)) return error;
  const auto kernel = zk::sm90::rows<product, ZkElement, Config>;
  constexpr int bytes = sizeof(typename Kernel::Shared);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  // No more clusters than units there may be: every expert adds at most one that is not full.
  const int64_t full = p.rows / (tiling.rows * tiling.cluster) + std::min<int64_t>(p.groups, p.rows);
  const int64_t units = full * zk::ceil_div(p.columns, tiling.columns);
  const int64_t most = std::max(1, p.sm_count * Config::blocks / tiling.cluster);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = tiling.cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min(units, most)) * tiling.cluster);
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = p.stream;
  config.attrs = attributes, config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, x, p);
}

template <int product>
int launch(const RowProduct& p, int tile) {
  return tile == 0 ? launch<product, zk::sm90::Small>(p) : launch<product, zk::sm90::Large>(p);
}

}  // namespace

int ZK_NAME(zk_sm90_maps)(const void* const* experts, int groups, int n, int k, void* out) {
  static_assert(sizeof(CUtensorMap) == 128);
  if (groups <= 0 || n <= 0 || k <= 0 || !experts || !out) return zk::kBadArgument;
  if (n % 8 || k % 8) return zk::kMisaligned;
  if (const int error = zk::check_experts(experts, groups)) return error;
  for (int e = 0; e < groups; ++e) {
    CUtensorMap map;  // aligned, as `out` on the host need not be
    if (const int error = encode(&map, experts[e], n, k)) return error;
    std::copy_n(reinterpret_cast<const char*>(&map), sizeof(map), static_cast<char*>(out) + e * sizeof(map));
  }
  return 0;
}

int ZK_NAME(zk_sm90_rows)(const RowProduct& p, int tile) {
  if (p.product == zk::kFc1) return launch<zk::kFc1>(p, tile);
  if (p.product == zk::kDswiglu) return launch<zk::kDswiglu>(p, tile);
  return p.product == zk::kDgrad ? launch<zk::kDgrad>(p, tile) : launch<zk::kForward>(p, tile);
}
