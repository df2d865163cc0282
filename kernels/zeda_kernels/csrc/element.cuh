// The element type of a translation unit: bfloat16, or half where the build asks for it.
#pragma once
#include "cutlass/numeric_types.h"

#ifdef ZK_FP16
using ZkElement = cutlass::half_t;
#define ZK_NAME(name) name##_fp16
#else
using ZkElement = cutlass::bfloat16_t;
#define ZK_NAME(name) name##_bf16
#endif
