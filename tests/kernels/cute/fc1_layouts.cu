// Host program: counts where the fused fc1's layouts differ from what TMA writes and from what its epilogue reads.
#include <cstdio>

#include "element.cuh"
#include "sm90_fc1.cuh"

namespace {

using namespace cute;

// Element of row `row` and column `k` in a box that TMA wrote with the swizzle of 128 bytes.
int in_box(int row, int k) {
  const int byte = row * 128 + k * 2;
  return (byte ^ (byte / 128 % 8 * 16)) / 2;
}

template <typename Config>
int wrong() {
  using Fc1 = zk::sm90::FusedFc1<ZkElement, Config>;
  constexpr int kRows = Fc1::kRows, kHalf = Fc1::kHalf, kDepth = zk::sm90::kDepth;
  const auto a = as_position_independent_swizzle_layout(typename Fc1::LayoutA{});
  const auto b = as_position_independent_swizzle_layout(typename Fc1::LayoutB{});
  int found = 0;
  for (int stage = 0; stage < Fc1::kStages; ++stage)
    for (int k = 0; k < kDepth; ++k) {
      for (int row = 0; row < kRows; ++row) found += a(row, k, stage) != stage * kRows * kDepth + in_box(row, k);
      for (int row = 0; row < 2 * kHalf; ++row)  // two boxes, gate and up
        found += b(row, k, stage) != (stage * 2 + row / kHalf) * kHalf * kDepth + in_box(row % kHalf, k);
    }
  typename Fc1::Mma mma;
  const auto places = make_identity_tensor(make_shape(Int<kRows>{}, Int<2 * kHalf>{}));
  Tensor sums = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<2 * kHalf>>{});
  for (int thread = 0; thread < Fc1::kConsumers; ++thread) {
    const auto own = mma.get_slice(thread).partition_C(places);
    found += size(own) != kHalf || size(sums) != kHalf;
    for (int i = 0; i < kHalf; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      found += get<0>(own(i)) != row || get<1>(own(i)) != column || &sums(i) - &sums(0) != i;
      if (i < kHalf / 2) found += get<1>(own(i + kHalf / 2)) != column + kHalf;  // up, beside its gate
    }
  }
  return found;
}

}  // namespace

int main() {
  std::printf("%d %d\n", wrong<zk::sm90::Small>(), wrong<zk::sm90::Large>());
}
