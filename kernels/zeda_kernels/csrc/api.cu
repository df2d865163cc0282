// The products of the C interface: picks the kernel that was built for an architecture, tile and type.
#include "api.h"

#include "fc1.cuh"

using zk::Fc1;
using zk::Problem;

#define ZK_DECLARE(name, Arguments) \
  int name##_bf16(const Arguments&); \
  int name##_fp16(const Arguments&);
#define ZK_DECLARE_WORKSPACE(name) \
  int64_t name##_bf16(const Problem&); \
  int64_t name##_fp16(const Problem&);

ZK_DECLARE(zk_sm80, Problem)
ZK_DECLARE(zk_sm90_small, Problem)
ZK_DECLARE(zk_sm90_large, Problem)
ZK_DECLARE(zk_sm90_wgrad, Problem)
ZK_DECLARE(zk_sm90_fc1, Fc1)
ZK_DECLARE_WORKSPACE(zk_sm90_small_workspace)
ZK_DECLARE_WORKSPACE(zk_sm90_large_workspace)
ZK_DECLARE_WORKSPACE(zk_sm90_wgrad_workspace)

// The build defines ZK_SM80, ZK_SM90 and ZK_HALF for what it compiles.
#ifdef ZK_HALF
#define ZK_CALL(name, dtype, p) ((dtype) == 0 ? name##_bf16(p) : name##_fp16(p))
constexpr int kTypes = 2;
#else
#define ZK_CALL(name, dtype, p) name##_bf16(p)
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

int64_t zk_grouped_workspace(int product, int dtype, int arch, int tile, int groups, int64_t rows, int n, int k,
                             int sm_count) {
  if (groups <= 0 || sm_count <= 0 || product < 0 || product > 2 || tile < 0 || tile > 1) return zk::kBadArgument;
  if (dtype < 0 || dtype >= kTypes) return zk::kNotBuilt;
  Problem p{};
  p.product = product, p.groups = groups, p.rows = rows, p.n = n, p.k = k, p.sm_count = sm_count;
#ifdef ZK_SM90
  if (arch == 90) {
    if (product == zk::kWgrad) return ZK_CALL(zk_sm90_wgrad_workspace, dtype, p);
    return tile == 0 ? ZK_CALL(zk_sm90_small_workspace, dtype, p) : ZK_CALL(zk_sm90_large_workspace, dtype, p);
  }
#endif
#ifdef ZK_SM80
  if (arch == 80) return zk::arrays_bytes(groups);
#endif
  return zk::kNotBuilt;
}

int zk_grouped(int product, int dtype, int arch, int tile, int groups, int64_t rows, int n, int k, const int32_t* ends,
               const void* a, const void* b, void* d, const void* const* experts, float beta, void* workspace,
               int64_t workspace_bytes, int sm_count, void* stream) {
  if (product < 0 || product > 2 || tile < 0 || tile > 1) return zk::kBadArgument;
  if (dtype < 0 || dtype >= kTypes) return zk::kNotBuilt;
  Problem p{};
  p.product = product, p.groups = groups, p.n = n, p.k = k, p.sm_count = sm_count, p.rows = rows, p.ends = ends;
  p.a = a, p.b = b, p.d = d, p.experts = experts, p.beta = beta;
  p.workspace = workspace, p.workspace_bytes = workspace_bytes, p.stream = cudaStream_t(stream);
#ifdef ZK_SM90
  if (arch == 90) {
    if (product == zk::kWgrad) return ZK_CALL(zk_sm90_wgrad, dtype, p);
    return tile == 0 ? ZK_CALL(zk_sm90_small, dtype, p) : ZK_CALL(zk_sm90_large, dtype, p);
  }
#endif
#ifdef ZK_SM80
  if (arch == 80) return ZK_CALL(zk_sm80, dtype, p);
#endif
  return zk::kNotBuilt;
}

int64_t zk_fc1_workspace(int dtype, int arch, int groups) {
  if (groups <= 0) return zk::kBadArgument;
#ifdef ZK_SM90
  if (arch == 90 && dtype >= 0 && dtype < kTypes && groups <= zk::kMaxGroups) return zk::fc1_bytes(groups);
#endif
  return zk::kNotBuilt;
}

int zk_fc1(int dtype, int arch, int tile, int groups, int64_t rows, int width, int k, const int32_t* ends,
           const void* x, const void* const* experts, const float* probs, void* pre, void* act, void* workspace,
           int64_t workspace_bytes, int sm_count, void* stream) {
  if (tile < 0 || tile > 1) return zk::kBadArgument;
  if (const int64_t bytes = zk_fc1_workspace(dtype, arch, groups); bytes < 0) return int(bytes);
  Fc1 p{};
  p.tile = tile, p.groups = groups, p.width = width, p.k = k, p.sm_count = sm_count, p.rows = rows, p.ends = ends;
  p.x = x, p.experts = experts, p.probs = probs, p.pre = pre, p.act = act;
  p.workspace = workspace, p.workspace_bytes = workspace_bytes, p.stream = cudaStream_t(stream);
#ifdef ZK_SM90
  return ZK_CALL(zk_sm90_fc1, dtype, p);
#else
  return zk::kNotBuilt;
#endif
}
