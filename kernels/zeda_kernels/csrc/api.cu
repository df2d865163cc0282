// The products of the C interface: picks the kernel that was built for an architecture, tile and type.
#include "api.h"

#include "row_product.cuh"

using zk::Problem;
using zk::RowProduct;

#define ZK_DECLARE(name, Arguments) \
  int name##_bf16(const Arguments&); \
  int name##_fp16(const Arguments&);
#define ZK_DECLARE_WORKSPACE(name) \
  int64_t name##_bf16(const Problem&); \
  int64_t name##_fp16(const Problem&);

ZK_DECLARE(zk_sm80, Problem)
ZK_DECLARE(zk_sm90_wgrad, Problem)
ZK_DECLARE_WORKSPACE(zk_sm90_wgrad_workspace)
int zk_sm90_rows_bf16(const RowProduct&, int);
int zk_sm90_rows_fp16(const RowProduct&, int);
int zk_sm90_maps_bf16(const void* const*, int, int, int, void*);
int zk_sm90_maps_fp16(const void* const*, int, int, int, void*);

// The build defines ZK_SM80, ZK_SM90 and ZK_HALF for what it compiles.
#ifdef ZK_HALF
#define ZK_CALL(name, dtype, ...) ((dtype) == 0 ? name##_bf16(__VA_ARGS__) : name##_fp16(__VA_ARGS__))
constexpr int kTypes = 2;
#else
#define ZK_CALL(name, dtype, ...) name##_bf16(__VA_ARGS__)
constexpr int kTypes = 1;
#endif

int zk_built() {
  int built = kTypes == 2 ? 4 : 0;
#ifdef ZK_SM80
  built |= 1;
#endif
#ifdef ZK_SM90
  built |= 2;
#endif
  return built;
}

int zk_probe() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  cudaGetLastError();  // it is told, and not left for the next call
  return int(error);
}

int64_t zk_grouped_workspace(int product, int dtype, int arch, int groups, int64_t rows, int n, int k, int sm_count) {
  if (groups <= 0 || sm_count <= 0 || product < 0 || product > 2) return zk::kBadArgument;
  if (dtype < 0 || dtype >= kTypes) return zk::kNotBuilt;
  Problem p{};
  p.product = product, p.groups = groups, p.rows = rows, p.n = n, p.k = k, p.sm_count = sm_count;
#ifdef ZK_SM90
  if (arch == 90 && product == zk::kWgrad) return ZK_CALL(zk_sm90_wgrad_workspace, dtype, p);
#endif
#ifdef ZK_SM80
  if (arch == 80) return zk::arrays_bytes(groups);
#endif
  return zk::kNotBuilt;
}

int zk_grouped(int product, int dtype, int arch, int groups, int64_t rows, int n, int k, const int32_t* ends,
               const void* a, const void* b, void* d, const void* const* experts, float beta, void* workspace,
               int64_t workspace_bytes, int sm_count, void* stream) {
  if (product < 0 || product > 2) return zk::kBadArgument;
  if (dtype < 0 || dtype >= kTypes) return zk::kNotBuilt;
  Problem p{};
  p.product = product, p.groups = groups, p.n = n, p.k = k, p.sm_count = sm_count, p.rows = rows, p.ends = ends;
  p.a = a, p.b = b, p.d = d, p.experts = experts, p.beta = beta;
  p.workspace = workspace, p.workspace_bytes = workspace_bytes, p.stream = cudaStream_t(stream);
#ifdef ZK_SM90
  if (arch == 90 && product == zk::kWgrad) return ZK_CALL(zk_sm90_wgrad, dtype, p);
#endif
#ifdef ZK_SM80
  if (arch == 80) return ZK_CALL(zk_sm80, dtype, p);
#endif
  return zk::kNotBuilt;
}

int zk_maps(int dtype, int groups, int n, int k, const void* const* experts, void* maps) {
#ifdef ZK_SM90
  if (dtype >= 0 && dtype < kTypes) return ZK_CALL(zk_sm90_maps, dtype, experts, groups, n, k, maps);
#endif
  return zk::kNotBuilt;
}

int zk_rows(int product, int dtype, int tile, int lead, int groups, int64_t rows, int columns, int depth,
            const int32_t* ends, const void* x, const void* maps, const float* probs, void* pre, void* out, void* act,
            float* sums, int sm_count, void* stream) {
  if (product < 0 || product > 4 || product == zk::kWgrad || tile < 0 || tile > 1) return zk::kBadArgument;
  RowProduct p{};
  p.product = product, p.groups = groups, p.columns = columns, p.depth = depth, p.sm_count = sm_count, p.rows = rows;
  p.lead = lead, p.ends = ends, p.x = x, p.maps = maps, p.probs = probs;
  p.pre = pre, p.out = out, p.act = act, p.sums = sums;
  p.stream = cudaStream_t(stream);
#ifdef ZK_SM90
  if (dtype >= 0 && dtype < kTypes) return ZK_CALL(zk_sm90_rows, dtype, p, tile);
#endif
  return zk::kNotBuilt;
}

int zk_tiles(int tile, int columns) { return int(zk::ceil_div(columns, zk::tiling_of(false, tile).columns)); }
