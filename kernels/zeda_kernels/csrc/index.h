// Index mathematics shared by the kernels and by the host: no CUDA call, so that g++ compiles it for the tests.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define ZK_HD __host__ __device__ inline
#else
#define ZK_HD inline
#endif

namespace zk {

// The three products of a linear layer y = x w^T over groups of rows, w[e] of shape [n, k]; the first with SwiGLU behind
// it, and the second with SwiGLU's derivative behind it.
enum Product { kForward = 0, kDgrad = 1, kWgrad = 2, kFc1 = 3, kDswiglu = 4 };

// Rows of one group. Sizes live on the device, so nobody checks them before: they are clamped here.
struct Span {
  int64_t begin, rows;
};

// Group `e` of inclusive ends, within `rows` rows. Ends that decrease give an empty group, ends past the buffer
// stop at it.
ZK_HD Span span_of(const int32_t* ends, int e, int64_t rows) {
  int64_t begin = e > 0 ? ends[e - 1] : 0;
  int64_t end = ends[e];
  begin = begin < 0 ? 0 : begin > rows ? rows : begin;
  end = end < begin ? begin : end > rows ? rows : end;
  return {begin, end - begin};
}

// First row that belongs to no group.
ZK_HD int64_t tail_of(const int32_t* ends, int groups, int64_t rows) {
  if (groups == 0) return 0;
  const Span last = span_of(ends, groups - 1, rows);
  return last.begin + last.rows;
}

struct Shape {
  int m, n, k;
};

// GEMM of one group. An empty group has no tile in any product: with k = 0 the Hopper main loop would store
// accumulators that nothing cleared, and the Ampere one may read out of bounds.
ZK_HD Shape shape_of(int product, int64_t rows, int n, int k) {
  if (product == kForward) return {int(rows), n, k};
  if (product == kDgrad) return {int(rows), k, n};
  return {rows > 0 ? n : 0, k, int(rows)};
}

// Where the operands of a group start, in elements. `a` is x (forward) or dy; `b` is x in wgrad, else the weight;
// `d` is the output, which in wgrad is a matrix of its own.
struct Offsets {
  int64_t a, b, d;
};

ZK_HD Offsets offsets_of(int product, int64_t begin, int n, int k) {
  if (product == kForward) return {begin * k, 0, begin * n};
  if (product == kDgrad) return {begin * n, 0, begin * k};
  return {begin * n, begin * k, 0};
}

ZK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Output tiles of one group, clusters included, as the grouped scheduler counts them.
ZK_HD int64_t tiles_of(Shape shape, int tile_m, int tile_n, int cluster_m) {
  return ceil_div(ceil_div(shape.m, tile_m), cluster_m) * cluster_m * ceil_div(shape.n, tile_n);
}

// One block of the workspace per group array, aligned for the tensor memory accelerator.
constexpr int64_t kBlock = 256;
ZK_HD int64_t padded(int64_t bytes) { return ceil_div(bytes, kBlock) * kBlock; }

// Tiles of a persistent kernel over groups, each `rows` rows by `columns` columns. A unit of work is what a cluster of one
// or two blocks computes: two tiles one below the other, which share the weight; or, of the last row of tiles where their
// number is odd, two beside each other, which share the rows.
struct Tiling {
  int rows, columns, cluster;
};

// Units of a group of `rows` rows.
ZK_HD int64_t units_of(Tiling tiling, int64_t rows, int width) {
  const int64_t down = ceil_div(rows, tiling.rows), across = ceil_div(width, tiling.columns);
  return tiling.cluster == 1 ? down * across : down / 2 * across + down % 2 * ceil_div(across, 2);
}

// One tile: its first row in the buffer, the rows its expert has from there on (none in a tile that only fills a
// cluster), its first column, and whether the cluster's tiles lie beside each other.
struct RowTile {
  int expert, rows, column;
  bool beside;
  int64_t row;
};

// Tile of block `rank` of a cluster in unit `unit`; starts[e] counts the units before group e, starts[groups] all.
// Tiles below each other follow each other: they share the weight.
ZK_HD RowTile tile_at(const int32_t* starts, int groups, int unit, int rank, const int32_t* ends, int64_t rows,
                      int width, Tiling tiling) {
  int low = 0, high = groups;  // starts[low] <= unit < starts[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= unit ? low : high) = middle;
  }
  const Span span = span_of(ends, low, rows);
  const int own = unit - starts[low], down = int(ceil_div(span.rows, tiling.rows));
  const int across = int(ceil_div(width, tiling.columns)), pairs = down / tiling.cluster;
  const bool beside = own >= pairs * across;  // behind the pairs below each other, if there are two blocks
  const int tile = beside ? down - 1 : own % pairs * tiling.cluster + rank;
  const int column = beside ? (own - pairs * across) * 2 + rank : own / pairs;
  const int64_t skipped = int64_t(tile) * tiling.rows;
  return {low, column < across ? int(span.rows - skipped) : 0, column * tiling.columns, beside, span.begin + skipped};
}

// A tile of the fused fc1 has the columns of gate and the same ones of up: its product is twice as wide.
constexpr Tiling kFc1Small{64, 64, 1}, kFc1Large{128, 128, 2}, kPlainSmall{64, 128, 1}, kPlainLarge{128, 256, 2};

constexpr Tiling tiling_of(bool fused, int tile) {
  return fused ? (tile == 0 ? kFc1Small : kFc1Large) : (tile == 0 ? kPlainSmall : kPlainLarge);
}

// Groups whose starts fit beside the operands in shared memory.
constexpr int kMaxGroups = 1024;

// Experts whose pointers travel in one launch's arguments.
constexpr int kPointers = 128;

}  // namespace zk
