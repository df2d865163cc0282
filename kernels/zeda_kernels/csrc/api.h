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

// arch: 80 or 90, the compute capability's kernels to use. tile: 0 small, 1 large (Hopper forward and dgrad).
ZK_API int64_t zk_grouped_workspace(int product, int dtype, int arch, int tile, int groups, int64_t rows, int n, int k,
                                    int sm_count);

// forward: d[rows,n] = a[rows,k] w_e^T; dgrad: d[rows,k] = a[rows,n] w_e; both with experts[e] = w_e [n,k].
// wgrad: experts[e] [n,k] float = a_e^T b_e + beta * experts[e], a [rows,n], b [rows,k]. `experts` is a host array.
// Rows past the last end are neither read nor written.
ZK_API int zk_grouped(int product, int dtype, int arch, int tile, int groups, int64_t rows, int n, int k,
                      const int32_t* ends, const void* a, const void* b, void* d, const void* const* experts,
                      float beta, void* workspace, int64_t workspace_bytes, int sm_count, void* stream);

// pre [rows, 2 width] = x[rows, k] w_e^T, act [rows, width] = silu(gate) * up * prob, in one kernel; experts[e] = w_e
// [2 width, k], gate rows first. probs may be null, pre too: it is not stored then. Rows past the last end are not
// written. The workspace's size is -4 where no such kernel was built: for other GPUs than Hopper, for many groups.
ZK_API int64_t zk_fc1_workspace(int dtype, int arch, int groups);
ZK_API int zk_fc1(int dtype, int arch, int tile, int groups, int64_t rows, int width, int k, const int32_t* ends,
                  const void* x, const void* const* experts, const float* probs, void* pre, void* act, void* workspace,
                  int64_t workspace_bytes, int sm_count, void* stream);

// pre [rows, 2 width], gate first -> act [rows, width]; probs may be null. Rows past the last end become zero.
ZK_API int zk_swiglu(int dtype, int groups, int64_t rows, int width, const int32_t* ends, const void* pre,
                     const float* probs, void* act, int sm_count, void* stream);
ZK_API int zk_swiglu_grad(int dtype, int groups, int64_t rows, int width, const int32_t* ends, const void* dact,
                          const void* pre, const float* probs, void* dpre, void* act, float* dprobs, int sm_count,
                          void* stream);

// Zero the rows past the last end.
ZK_API int zk_zero_tail(int groups, int64_t rows, int64_t row_bytes, const int32_t* ends, void* data, int sm_count,
                        void* stream);
