// Hopper, gradient of the weights: float output, added to what is there or written over it.
#include "sm90.cuh"

using zk::Problem;
using Wgrad = zk::sm90::Grouped<zk::kWgrad, ZkElement, zk::sm90::Weights>;

int ZK_NAME(zk_sm90_wgrad)(const Problem& p) { return Wgrad::run(p); }

int64_t ZK_NAME(zk_sm90_wgrad_workspace)(const Problem& p) { return Wgrad::workspace(p); }
