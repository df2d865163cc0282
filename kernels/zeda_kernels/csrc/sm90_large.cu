// Hopper, forward and dgrad, tile for many rows per group.
#include "sm90.cuh"

using zk::Problem;
using Forward = zk::sm90::Grouped<zk::kForward, ZkElement, zk::sm90::Large>;
using Dgrad = zk::sm90::Grouped<zk::kDgrad, ZkElement, zk::sm90::Large>;

int ZK_NAME(zk_sm90_large)(const Problem& p) { return p.product == zk::kDgrad ? Dgrad::run(p) : Forward::run(p); }

int64_t ZK_NAME(zk_sm90_large_workspace)(const Problem& p) {
  return p.product == zk::kDgrad ? Dgrad::workspace(p) : Forward::workspace(p);
}
