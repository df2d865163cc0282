// Hopper, forward and dgrad, tile for few rows per group.
#include "sm90.cuh"

using zk::Problem;
using Forward = zk::sm90::Grouped<zk::kForward, ZkElement, zk::sm90::Small>;
using Dgrad = zk::sm90::Grouped<zk::kDgrad, ZkElement, zk::sm90::Small>;

int ZK_NAME(zk_sm90_small)(const Problem& p) { return p.product == zk::kDgrad ? Dgrad::run(p) : Forward::run(p); }

int64_t ZK_NAME(zk_sm90_small_workspace)(const Problem& p) {
  return p.product == zk::kDgrad ? Dgrad::workspace(p) : Forward::workspace(p);
}
