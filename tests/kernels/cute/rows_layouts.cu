// Host program: counts where the layouts of Hopper's products of rows differ from what TMA writes and from what the
// epilogue reads.
#include <cstdio>

#include "element.cuh"
#include "sm90_rows.cuh"

namespace {

using namespace cute;

// Element of row `row` and column `column` in a box of 64 by 64 that TMA wrote with the swizzle of 128 bytes.
int in_box(int row, int column) {
  const int byte = row * 128 + column * 2;
  return (byte ^ (byte / 128 % 8 * 16)) / 2;
}

template <int product, typename Config>
int wrong() {
  using Own = zk::sm90::Rows<product, ZkElement, Config>;
  constexpr int kRows = Own::kRows, kHalf = Own::kHalf, kDepth = zk::sm90::kDepth, kBox = Own::kBox;
  const auto a = as_position_independent_swizzle_layout(typename Own::LayoutA{});
  const auto b = as_position_independent_swizzle_layout(typename Own::LayoutB{});
  int found = 0;
  for (int stage = 0; stage < zk::kStages; ++stage)
    for (int k = 0; k < kDepth; ++k) {
      for (int row = 0; row < kRows; ++row)
        found += a(row, k, stage) != (stage * Own::kBoxesA + row / 64) * kBox + in_box(row % 64, k);
      for (int column = 0; column < 2 * kHalf; ++column) {
        // A box of dgrad's weights has one of their rows, a step of the sum, in a row.
        const int inside = Own::across ? in_box(k, column % 64) : in_box(column % 64, k);
        found += b(column, k, stage) != (stage * Own::kBoxesB + column / 64) * kBox + inside;
      }
    }
  typename Own::Mma mma;
  const auto places = make_identity_tensor(make_shape(Int<kRows>{}, Int<2 * kHalf>{}));
  Tensor sums = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<2 * kHalf>>{});
  for (int thread = 0; thread < Own::kConsumers; ++thread) {
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

template <int product>
void tell() {
  std::printf("%d %d\n", wrong<product, zk::sm90::Small>(), wrong<product, zk::sm90::Large>());
}

}  // namespace

int main() { tell<zk::kForward>(), tell<zk::kDgrad>(), tell<zk::kFc1>(), tell<zk::kDswiglu>(); }
