// Ampere and whatever has no kernel of its own: CUTLASS 2 GemmGrouped, scheduled on the device.
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/device/gemm_grouped.h"
#include "cutlass/gemm/kernel/default_gemm_grouped.h"
#include "element.cuh"
#include "groups.cuh"

namespace {

using zk::Problem;

template <int product, typename Element>
struct Grouped {
  static constexpr bool wgrad = product == zk::kWgrad;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using LayoutA = std::conditional_t<wgrad, Column, Row>;
  using LayoutB = std::conditional_t<product == zk::kForward, Column, Row>;
  using Output = std::conditional_t<wgrad, float, Element>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
      Element, LayoutA, cutlass::ComplexTransform::kNone, 8, Element, LayoutB, cutlass::ComplexTransform::kNone, 8,
      Output, Row, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 32>,
      cutlass::gemm::GemmShape<64, 64, 32>, cutlass::gemm::GemmShape<16, 8, 16>,
      cutlass::epilogue::thread::LinearCombination<Output, 16 / sizeof(Output), float, float>,
      cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
      cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmGrouped<Kernel>;
  static_assert(sizeof(cutlass::gemm::GemmCoord) == sizeof(zk::Shape));

  static int run(const Problem& p) {
    if (const int error = zk::check(p)) return error;
    if (p.workspace_bytes < zk::arrays_bytes(p.groups)) return zk::kSmallWorkspace;
    const zk::Arrays at = zk::carve(p.workspace, p.groups);
    if (const int error = zk::launch_prepare(p, at, sizeof(Element), sizeof(Output))) return error;
    const int blocks = Gemm::maximum_active_blocks();
    if (blocks <= 0) return zk::kCutlass - int(cutlass::Status::kErrorInternal);
    Output** outputs = reinterpret_cast<Output**>(at.d);
    typename Gemm::Arguments args(reinterpret_cast<cutlass::gemm::GemmCoord*>(at.shapes), p.groups,
                                  blocks * p.sm_count, {1.f, p.beta},
                                  reinterpret_cast<Element**>(const_cast<void**>(at.a)),
                                  reinterpret_cast<Element**>(const_cast<void**>(at.b)), outputs, outputs, at.lda,
                                  at.ldb, at.ldd, at.ldd);
    Gemm gemm;
    cutlass::Status status = gemm.initialize(args, nullptr, p.stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(p.stream);
    return status == cutlass::Status::kSuccess ? 0 : zk::kCutlass - int(status);
  }
};

}  // namespace

int ZK_NAME(zk_sm80)(const Problem& p) {
  if (p.product == zk::kWgrad) return Grouped<zk::kWgrad, ZkElement>::run(p);
  return p.product == zk::kDgrad ? Grouped<zk::kDgrad, ZkElement>::run(p) : Grouped<zk::kForward, ZkElement>::run(p);
}
