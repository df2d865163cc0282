// The C interface of the library: pointers to device memory, sizes and a stream; no torch, no exceptions.
//
// Every function returns 0, a cudaError_t (positive), or a negative code: -1 bad argument, -2 workspace too small,
// -3 not aligned to 16 bytes or not a multiple of 8 elements, -4 not built for this GPU, -100 - s for CUTLASS status s.
// No function waits for the device or reads its memory, so all may be captured in a CUDA graph.
// dtype: 0 bfloat16, 1 half. product: 0 forward, 1 dgrad, 2 wgrad. ends: int32 on the device, inclusive.
#pragma once
#include <cstdint>

#define ZK_API extern "C" __attribute__((visibility("default")))

// Bit 0: Ampere kernels, bit 1: Hopper kernels, bit 2: half beside bfloat16.
ZK_API int zk_built();

// 0, or the error that any call would end with here: 35 where the driver is older than the runtime in the library.
ZK_API int zk_probe();

// On Hopper (arch 90) wgrad, elsewhere (80) all three. forward: d[rows,n] = a[rows,k] w_e^T; dgrad: d[rows,k] =
// a[rows,n] w_e; both with experts[e] = w_e [n,k]. wgrad: experts[e] [n,k] float = a_e^T b_e + beta * experts[e],
// a [rows,n], b [rows,k]. `experts` is a host array. Rows past the last end are neither read nor written.
ZK_API int64_t zk_grouped_workspace(int product, int dtype, int arch, int groups, int64_t rows, int n, int k,
                                    int sm_count);
ZK_API int zk_grouped(int product, int dtype, int arch, int groups, int64_t rows, int n, int k, const int32_t* ends,
                      const void* a, const void* b, void* d, const void* const* experts, float beta, void* workspace,
                      int64_t workspace_bytes, int sm_count, void* stream);

// Hopper: what describes weights [n, k] to its memory engine, 128 bytes each, written to the host memory `maps`; zk_rows
// wants them on the device. They hold until a weight moves. `experts` is a host array.
ZK_API int zk_maps(int dtype, int groups, int n, int k, const void* const* experts, void* maps);

// Hopper: products of rows in one kernel, x [rows, depth], out [rows, columns]. forward and dgrad as above; product 3, the
// fused fc1: pre [rows, 2 columns] = x w_e^T, w_e [2 columns, depth], gate rows first, out = silu(gate) * up * prob;
// probs may be null, pre too: it is not stored then. Product 4, its gradient behind dgrad's product, which is that of the
// activation: out [rows, 2 columns] pre's, act [rows, columns] the activation again, sums [rows, zk_tiles] whose sum over
// a row is prob's. tile: 0 small, 1 large. lead: 0 to 3, products of 64 along depth by which half of a large tile is ahead
// of the other. At most 1024 groups. Rows past the last end become zero, but those of sums.
ZK_API int zk_rows(int product, int dtype, int tile, int lead, int groups, int64_t rows, int columns, int depth,
                   const int32_t* ends, const void* x, const void* maps, const float* probs, void* pre, void* out,
                   void* act, float* sums, int sm_count, void* stream);

// Tiles of a row of product 4: columns of sums.
ZK_API int zk_tiles(int tile, int columns);

// pre [rows, 2 width], gate first -> act [rows, width]; probs may be null. Rows past the last end become zero.
ZK_API int zk_swiglu(int dtype, int groups, int64_t rows, int width, const int32_t* ends, const void* pre,
                     const float* probs, void* act, int sm_count, void* stream);
ZK_API int zk_swiglu_grad(int dtype, int groups, int64_t rows, int width, const int32_t* ends, const void* dact,
                          const void* pre, const float* probs, void* dpre, void* act, float* dprobs, int sm_count,
                          void* stream);

// Zero the rows past the last end.
ZK_API int zk_zero_tail(int groups, int64_t rows, int64_t row_bytes, const int32_t* ends, void* data, int sm_count,
                        void* stream);
