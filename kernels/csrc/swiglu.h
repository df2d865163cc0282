// SwiGLU with the routing weight, in float: act = silu(gate) * up * prob, and its derivatives.
#pragma once
#include <cmath>

#include "index.h"

namespace zk {

ZK_HD float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

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
