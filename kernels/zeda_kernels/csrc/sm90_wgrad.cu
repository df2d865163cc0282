// Hopper, gradient of the weights, float output, added to what is there or written over it: CUTLASS's pointer-array
// grouped GEMM, shapes and pointers on the device.
#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "element.cuh"
#include "groups.cuh"

namespace {

using namespace cute;
using zk::Arrays;
using zk::Problem;

struct Wgrad {
  using Element = ZkElement;
  using Row = cutlass::layout::RowMajor;
  using LayoutA = cutlass::layout::ColumnMajor;  // dy^T
  using LayoutB = Row;
  using Output = float;
  using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using Tile = cute::Shape<_128, _128, _64>;
  using Cluster = cute::Shape<_2, _1, _1>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, float, Row*, 16 / sizeof(Output), Output, Row*,
      16 / sizeof(Output), cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
      cutlass::epilogue::fusion::LinearCombination<Output, float>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA*, 8, Element, LayoutB*, 8, float, Tile,
      Cluster, cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // A stride of CUTLASS is its one leading dimension; the others are compile-time constants and take no memory.
  static_assert(sizeof(typename Kernel::InternalStrideA) == 8 && sizeof(typename Kernel::InternalStrideB) == 8 &&
                sizeof(typename Kernel::InternalStrideD) == 8 && sizeof(typename ProblemShape::UnderlyingProblemShape) == sizeof(zk::Shape));

  static typename Gemm::Arguments arguments(const Problem& p, const Arrays& at) {
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    args.problem_shape = {p.groups, reinterpret_cast<typename ProblemShape::UnderlyingProblemShape*>(at.shapes), nullptr};
    args.mainloop.ptr_A = reinterpret_cast<const Element**>(at.a);
    args.mainloop.dA = reinterpret_cast<typename Kernel::InternalStrideA*>(at.lda);
    args.mainloop.ptr_B = reinterpret_cast<const Element**>(at.b);
    args.mainloop.dB = reinterpret_cast<typename Kernel::InternalStrideB*>(at.ldb);
    args.epilogue.thread.alpha = 1.f;
    args.epilogue.thread.beta = p.beta;
    args.epilogue.ptr_C = (const float**)at.d;  // not read where beta is zero; a null one has no tensor map
    args.epilogue.dC = reinterpret_cast<typename Kernel::InternalStrideC*>(at.ldd);
    args.epilogue.ptr_D = reinterpret_cast<Output**>(at.d);
    args.epilogue.dD = reinterpret_cast<typename Kernel::InternalStrideD*>(at.ldd);
    args.hw_info.sm_count = p.sm_count;  // zero would ask the driver at each launch
    return args;
  }

  static int64_t workspace(const Problem& p) {
    const Arrays none = zk::carve(nullptr, p.groups);
    return zk::arrays_bytes(p.groups) + int64_t(Gemm::get_workspace_size(arguments(p, none)));
  }

  static int run(const Problem& p) {
    if (const int error = zk::check(p)) return error;
    if (p.workspace_bytes < workspace(p)) return zk::kSmallWorkspace;
    const Arrays at = zk::carve(p.workspace, p.groups);
    if (const int error = zk::launch_prepare(p, at, sizeof(Element), sizeof(Output))) return error;
    Gemm gemm;
    cutlass::Status status = gemm.initialize(arguments(p, at), at.rest, p.stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(p.stream);
    return status == cutlass::Status::kSuccess ? 0 : zk::kCutlass - int(status);
  }
};

}  // namespace

int ZK_NAME(zk_sm90_wgrad)(const Problem& p) { return Wgrad::run(p); }

int64_t ZK_NAME(zk_sm90_wgrad_workspace)(const Problem& p) { return Wgrad::workspace(p); }
