// SwiGLU with the routing weight, in float: act = silu(gate) * up * prob, and its derivatives.
#pragma once
#include <cmath>

#include "index.h"

namespace zk {

ZK_HD float sigmoid(float x) {
#ifdef __CUDA_ARCH__
  // The hardware's approximations, right to 1e-5 of the value. expf and the exact division branch for values far out,
  // and elements that branch one by one do not overlap. Flushing to zero changes nothing: 1 + tiny is 1.
  float grown, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(grown) : "f"(-1.44269504f * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.f + grown));
  return result;
#else
  return 1.f / (1.f + expf(-x));
#endif
}

struct SwigluGrad {
  float gate, up, prob, act;
};

ZK_HD float swiglu(float gate, float up, float prob) { return gate * sigmoid(gate) * up * prob; }

// `act` is computed again, so that only the pre-activation is kept for the backward pass.
ZK_HD SwigluGrad swiglu_grad(float gate, float up, float prob, float dact) {
  const float s = sigmoid(gate), silu = gate * s;
  return {dact * prob * up * (s + silu * (1.f - s)), dact * prob * silu, dact * silu * up, silu * up * prob};
}

}  // namespace zk
