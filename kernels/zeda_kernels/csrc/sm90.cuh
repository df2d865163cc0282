// Hopper: CUTLASS pointer-array grouped GEMM, shapes and pointers on the device.
#pragma once
#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "element.cuh"
#include "groups.cuh"

namespace zk::sm90 {

using namespace cute;

struct Small {  // few rows per group: half of a 128-row tile would be padding
  using Tile = cute::Shape<_64, _128, _64>;
  using Cluster = cute::Shape<_1, _1, _1>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};

struct Large {
  using Tile = cute::Shape<_128, _256, _64>;
  using Cluster = cute::Shape<_2, _1, _1>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};

struct Weights {
  using Tile = cute::Shape<_128, _128, _64>;
  using Cluster = cute::Shape<_2, _1, _1>;
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};

template <int product, typename Element, typename Config>
struct Grouped {
  static constexpr bool wgrad = product == kWgrad;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using LayoutA = cute::conditional_t<wgrad, Column, Row>;                  // dy^T in wgrad
  using LayoutB = cute::conditional_t<product == kForward, Column, Row>;    // w^T in forward
  using Output = cute::conditional_t<wgrad, float, Element>;
  using Source = cute::conditional_t<wgrad, float, void>;                   // only wgrad reads what it adds to
  using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using Tile = typename Config::Tile;
  using Cluster = typename Config::Cluster;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, Row*, 16 / sizeof(Output), Output, Row*,
      16 / sizeof(Output), typename Config::Epilogue,
      cutlass::epilogue::fusion::LinearCombination<Output, float>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA*, 8, Element, LayoutB*, 8, float, Tile,
      Cluster, cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      typename Config::Mainloop>::CollectiveOp;
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
    if constexpr (wgrad) {
      args.epilogue.ptr_C = p.beta == 0.f ? nullptr : (const float**)at.d;
      args.epilogue.dC = reinterpret_cast<typename Kernel::InternalStrideC*>(at.ldd);
    }
    args.epilogue.ptr_D = reinterpret_cast<Output**>(at.d);
    args.epilogue.dD = reinterpret_cast<typename Kernel::InternalStrideD*>(at.ldd);
    args.hw_info.sm_count = p.sm_count;  // zero would ask the driver at each launch
    return args;
  }

  static int64_t workspace(const Problem& p) {
    const Arrays none = carve(nullptr, p.groups);
    return arrays_bytes(p.groups) + int64_t(Gemm::get_workspace_size(arguments(p, none)));
  }

  static int run(const Problem& p) {
    if (const int error = check(p)) return error;
    if (p.workspace_bytes < workspace(p)) return kSmallWorkspace;
    const Arrays at = carve(p.workspace, p.groups);
    if (const int error = launch_prepare(p, at, sizeof(Element), sizeof(Output))) return error;
    Gemm gemm;
    cutlass::Status status = gemm.initialize(arguments(p, at), at.rest, p.stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(p.stream);
    return status == cutlass::Status::kSuccess ? 0 : kCutlass - int(status);
  }
};

}  // namespace zk::sm90
