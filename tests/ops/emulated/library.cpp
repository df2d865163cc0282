// The kernels without tensor cores, for the CPU: the C interface of kernels/csrc/rows.cu as it is, and what the grouped
// GEMM reads.
#include <cuda_runtime.h>

#include "rows.cu"

namespace {

template <typename Value>
void copy(int64_t*& out, const Value* from, int groups) {
  for (int e = 0; e < groups; ++e) *out++ = int64_t(from[e]);
}

}  // namespace

// Fill the arguments of a grouped GEMM and report them: m, n, k, then a, b, d, lda, ldb, ldd, each of length `groups`.
ZK_API int prepare_arrays(int product, int groups, int64_t rows, int n, int k, const int32_t* ends, const void* a,
                          const void* b, void* d, const void* const* experts, float beta, int in_bytes, int out_bytes,
                          int64_t* out) {
  std::vector<char> memory(size_t(zk::arrays_bytes(groups)) + 256, char(0x7f));
  void* workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 255) / 256 * 256);
  zk::Problem p{};
  p.product = product, p.groups = groups, p.n = n, p.k = k, p.sm_count = 1, p.rows = rows, p.ends = ends;
  p.a = a, p.b = b, p.d = d, p.experts = experts, p.beta = beta, p.workspace = workspace;
  p.workspace_bytes = zk::arrays_bytes(groups);
  if (const int error = zk::check(p)) return error;
  const zk::Arrays at = zk::carve(p.workspace, groups);
  if (const int error = zk::launch_prepare(p, at, in_bytes, out_bytes)) return error;
  for (int e = 0; e < groups; ++e) *out++ = at.shapes[e].m, *out++ = at.shapes[e].n, *out++ = at.shapes[e].k;
  copy(out, reinterpret_cast<const int64_t*>(at.a), groups);
  copy(out, reinterpret_cast<const int64_t*>(at.b), groups);
  copy(out, reinterpret_cast<const int64_t*>(at.d), groups);
  copy(out, at.lda, groups), copy(out, at.ldb, groups), copy(out, at.ldd, groups);
  return at.rest - static_cast<char*>(p.workspace) == zk::arrays_bytes(groups) ? 0 : 1;
}

ZK_API int64_t tiles_of(int m, int n, int tile_m, int tile_n, int cluster_m) {
  return zk::tiles_of({m, n, 1}, tile_m, tile_n, cluster_m);
}

ZK_API int64_t tail_of(const int32_t* ends, int groups, int64_t rows) { return zk::tail_of(ends, groups, rows); }
