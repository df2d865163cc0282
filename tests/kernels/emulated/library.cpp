// The kernels without tensor cores, for the CPU: the C interface of csrc/rows.cu as it is, and what the grouped
// GEMM and the products of rows read.
#include <cuda_runtime.h>

#include "row_product.cuh"

#include "rows.cu"

namespace {

template <typename Value>
void copy(int64_t*& out, const Value* from, int groups) {
  for (int e = 0; e < groups; ++e) *out++ = int64_t(from[e]);
}

__global__ void count(const int32_t* ends, int groups, int64_t rows, int width, zk::Tiling tiling, int32_t* starts) {
  zk::count_units(ends, groups, rows, width, tiling, starts);
}

zk::Tiling own_tiling(int product, int tile) { return zk::tiling_of(product == zk::kFc1, tile); }

}  // namespace

// Fill the arguments of a grouped GEMM and report them: m, n, k, then a, b, d, lda, ldb, ldd, each of length `groups`.
ZK_API int prepare_arrays(int product, int groups, int64_t rows, int n, int k, const int32_t* ends, const void* a,
                          const void* b, void* d, const void* const* experts, float beta, int in_bytes, int out_bytes,
                          int64_t* out) {
  std::vector<char> memory(size_t(zk::arrays_bytes(groups)), char(0x7f));
  void* workspace = memory.data();  // aligned as malloc does, less than the arrays ask for
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
  const auto whole = [](const void* block) { return reinterpret_cast<uintptr_t>(block) % 256 == 0; };
  return whole(at.shapes) && whole(at.rest) && at.rest <= memory.data() + memory.size() ? 0 : 1;
}

ZK_API int64_t tiles_of(int m, int n, int tile_m, int tile_n, int cluster_m) {
  return zk::tiles_of({m, n, 1}, tile_m, tile_n, cluster_m);
}

ZK_API int64_t tail_of(const int32_t* ends, int groups, int64_t rows) { return zk::tail_of(ends, groups, rows); }

// A product of rows: rows, columns and cluster of a tile.
ZK_API void tiling(int product, int tile, int32_t* out) {
  const zk::Tiling own = own_tiling(product, tile);
  out[0] = own.rows, out[1] = own.columns, out[2] = own.cluster;
}

ZK_API void count_units(int product, int tile, int groups, int64_t rows, int width, const int32_t* ends,
                        int32_t* starts) {
  ZK_LAUNCH(count, 1, 32, 0, nullptr)(ends, groups, rows, width, own_tiling(product, tile), starts);
}

// expert, row, rows, column, beside of each tile: starts[groups] units of as many tiles as a cluster has blocks.
ZK_API void tiles_at(int product, int tile, int groups, int64_t rows, int width, const int32_t* ends,
                     const int32_t* starts, int64_t* out) {
  const zk::Tiling own = own_tiling(product, tile);
  for (int unit = 0; unit < starts[groups]; ++unit)
    for (int rank = 0; rank < own.cluster; ++rank) {
      const zk::RowTile at = zk::tile_at(starts, groups, unit, rank, ends, rows, width, own);
      *out++ = at.expert, *out++ = at.row, *out++ = at.rows, *out++ = at.column, *out++ = at.beside;
    }
}

// What the launcher answers to these arguments before it launches anything.
ZK_API int check_rows(int product, int tile, int groups, int64_t rows, int columns, int depth, const int32_t* ends,
                      const void* x, const void* maps, void* pre, void* out) {
  zk::RowProduct p{};
  p.product = product, p.groups = groups, p.columns = columns, p.depth = depth, p.sm_count = 132, p.rows = rows;
  p.ends = ends, p.x = x, p.maps = maps, p.pre = pre, p.out = p.act = out, p.sums = static_cast<float*>(pre);
  return zk::check(p, own_tiling(product, tile));
}
