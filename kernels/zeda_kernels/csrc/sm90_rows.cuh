// Hopper: every product of rows with their expert's weight, in one persistent kernel.
//
// One warp loads by TMA in boxes of 64 by 64, each other warpgroup multiplies 64 rows. A tile of the fused fc1 has
// boxes of gate rows and those of the same up rows, so one thread's accumulators hold both halves of a pair, and weights
// stay as checkpoints have them. Of what the two blocks of a cluster share, each loads a half for both.
#pragma once
#include "cute/tensor.hpp"
#include "cute/arch/cluster_sm90.hpp"
#include "cute/arch/copy_sm90.hpp"
#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/memory.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/numeric_conversion.h"
#include "cutlass/pipeline/sm90_pipeline.hpp"
#include "row_product.cuh"
#include "swiglu.h"

namespace zk::sm90 {

using namespace cute;

constexpr int kDepth = 64;  // elements of k in a stage: 128 bytes, the width of the swizzle

struct Small {  // few rows per expert; two blocks on a multiprocessor hide each other's epilogue
  static constexpr int tile = 0, blocks = 2, producers = 32;
};

struct Large {
  static constexpr int tile = 1, blocks = 1, producers = 128;  // a warpgroup, which gives its registers away
};

template <int product, typename Element, typename Config>
struct Rows {
  static constexpr bool fused = product == kFc1;
  static constexpr Tiling tiling = tiling_of(fused, Config::tile);
  static constexpr int kRows = tiling.rows, kHalf = tiling.columns / (fused ? 1 : 2), kGroups = kRows / 64;
  static constexpr int kConsumers = kGroups * 128, kThreads = kConsumers + Config::producers;
  static constexpr int kBox = 64 * kDepth, kBoxesA = kRows / 64, kBoxesB = 2 * kHalf / 64;
  static constexpr bool kCluster = tiling.cluster == 2;
  using TileShape = cute::Shape<Int<kRows>, Int<2 * kHalf>, Int<kDepth>>;
  using Atom = SM90::GMMA::Layout_K_SW128_Atom<Element>;
  using LayoutA = decltype(tile_to_shape(Atom{}, cute::Shape<Int<kRows>, Int<kDepth>, Int<kStages>>{}));
  // The weights of these are read across: their columns lie next to each other.
  static constexpr bool across = product == kDgrad || product == kDswiglu;
  static constexpr auto kMajorB = across ? SM90::GMMA::Major::MN : SM90::GMMA::Major::K;
  using AtomB = cute::conditional_t<across, SM90::GMMA::Layout_MN_SW128_Atom<Element>, Atom>;
  using OrderB = cute::conditional_t<across, Step<_2, _1, _3>, Step<_1, _2, _3>>;
  using LayoutB = decltype(tile_to_shape(AtomB{}, cute::Shape<Int<2 * kHalf>, Int<kDepth>, Int<kStages>>{}, OrderB{}));
  using Mma = decltype(make_tiled_mma(
      SM90::GMMA::ss_op_selector<Element, Element, float, TileShape, SM90::GMMA::Major::K, kMajorB>(),
      Layout<cute::Shape<Int<kGroups>, _1, _1>>{}));
  using Cluster = cute::Shape<Int<tiling.cluster>, _1, _1>;
  using Pipeline = cutlass::PipelineTmaAsync<kStages>;
  using State = typename Pipeline::PipelineState;

  struct Shared {
    alignas(1024) Element a[cosize_v<LayoutA>];  // the swizzle counts from multiples of 1024 bytes
    alignas(1024) Element b[cosize_v<LayoutB>];
    alignas(128) Element staged[kConsumers / 32][16 * 64];
    typename Pipeline::SharedStorage pipeline;
    int32_t starts[kMaxGroups + 1];
  };
  static_assert(sizeof(Shared) <= (228 * 1024 / Config::blocks - 1024), "shared memory of a multiprocessor");

  // Piece `j` of 16 bytes of a row that a warp has staged; those of one column lie in different banks.
  static __device__ uint4* piece(Element* staged, int row, int j) {
    return reinterpret_cast<uint4*>(staged) + row * 8 + (j ^ row % 8);
  }

  // 16 rows by 64 columns of one warp to `out`, whose first element is the first of these. packed[2 j + r]: the pair of
  // columns 8 j + 2 (lane % 4) in row lane / 4 + 8 r.
  static __device__ void store(const uint32_t (&packed)[16], Element* staged, Element* out, int64_t stride, int rows,
                               int columns) {
    const int lane = threadIdx.x % 32;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i)
      SM90_U32x4_STSM_N::copy(packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3],
                              *reinterpret_cast<uint128_t*>(piece(staged, lane % 16, 2 * i + lane / 16)));
    __syncwarp();
    uint4 values[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) values[i] = *piece(staged, 4 * i + lane / 8, lane % 8);
    __syncwarp();  // read before the next call writes
    Element* to = out + lane / 8 * stride + lane % 8 * 8;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i, to += 4 * stride)
      cutlass::arch::global_store<uint4, 16>(values[i], to, 4 * i + lane / 8 < rows && lane % 8 * 8 < columns);
  }

  // The other way round: 16 rows by 64 columns of one warp; zeros outside.
  static __device__ void fetch(uint32_t (&packed)[16], Element* staged, const Element* in, int64_t stride, int rows,
                               int columns) {
    const int lane = threadIdx.x % 32;
    const Element* from = in + lane / 8 * stride + lane % 8 * 8;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i, from += 4 * stride) {
      uint4 value = make_uint4(0, 0, 0, 0);
      cutlass::arch::global_load<uint4, 16>(value, from, 4 * i + lane / 8 < rows && lane % 8 * 8 < columns);
      *piece(staged, 4 * i + lane / 8, lane % 8) = value;
    }
    __syncwarp();
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i)
      SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const uint128_t*>(piece(staged, lane % 16, 2 * i + lane / 16)), packed[4 * i],
                              packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]);
    __syncwarp();  // read before the next call writes
  }

  static __device__ uint32_t pack(float first, float second) {
    const cutlass::Array<float, 2> pair{first, second};
    const auto rounded = cutlass::NumericArrayConverter<Element, float, 2>::convert(pair);
    return reinterpret_cast<const uint32_t&>(rounded);
  }

  static __device__ float part(uint32_t packed, int i) {
    if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>)
      return __uint_as_float(i ? packed & 0xffff0000u : packed << 16);
    return float(Element::bitcast(uint16_t(packed >> 16 * i)));
  }

  // A warp's 16 rows of a tile to memory, 64 columns at a time. `sums` are its threads' and may be overwritten.
  template <typename Accumulators>
  static __device__ void epilogue(Accumulators& sums, const RowTile& tile, const float (&prob)[2], const RowProduct& p,
                                  Element* staged) {
    const int64_t width = p.columns, row = tile.row + threadIdx.x / 32 * 16;
    const int rows = tile.rows - threadIdx.x / 32 * 16;
    if (rows <= 0) return;
    Element *out = static_cast<Element*>(p.out), *pre = static_cast<Element*>(p.pre);
    Element* act = static_cast<Element*>(p.act);
    float dprob[2] = {0.f, 0.f};
    uint32_t gate[16], up[16];
    CUTE_UNROLL
    for (int chunk = 0; chunk < (fused ? kHalf : 2 * kHalf) / 64; ++chunk) {
      const int column = tile.column + chunk * 64, columns = p.columns - column, at = chunk * 32;
      if (columns <= 0) break;
      if constexpr (product == kFc1) {
        CUTE_UNROLL
        for (int i = 0; i < 16; ++i) {
          gate[i] = pack(sums(at + 2 * i), sums(at + 2 * i + 1));
          up[i] = pack(sums(kHalf / 2 + at + 2 * i), sums(kHalf / 2 + at + 2 * i + 1));
        }
        if (pre) {
          store(gate, staged, pre + row * 2 * width + column, 2 * width, rows, columns);
          store(up, staged, pre + row * 2 * width + width + column, 2 * width, rows, columns);
        }
        CUTE_UNROLL
        for (int i = 0; i < 16; ++i) {  // from the rounded values: those that the backward pass sees
          const float first = swiglu(part(gate[i], 0), part(up[i], 0), prob[i % 2]);
          gate[i] = pack(first, swiglu(part(gate[i], 1), part(up[i], 1), prob[i % 2]));
        }
        store(gate, staged, out + row * width + column, width, rows, columns);
      } else if constexpr (product == kDswiglu) {
        fetch(gate, staged, pre + row * 2 * width + column, 2 * width, rows, columns);
        fetch(up, staged, pre + row * 2 * width + width + column, 2 * width, rows, columns);
        CUTE_UNROLL
        for (int i = 0; i < 16; ++i) {
          const SwigluGrad first = swiglu_grad(part(gate[i], 0), part(up[i], 0), prob[i % 2], sums(at + 2 * i));
          const SwigluGrad second = swiglu_grad(part(gate[i], 1), part(up[i], 1), prob[i % 2], sums(at + 2 * i + 1));
          dprob[i % 2] += first.prob + second.prob;
          gate[i] = pack(first.gate, second.gate), up[i] = pack(first.up, second.up);
          sums(at + 2 * i) = __uint_as_float(pack(first.act, second.act));  // kept where no register is to spare
        }
        store(gate, staged, out + row * 2 * width + column, 2 * width, rows, columns);
        store(up, staged, out + row * 2 * width + width + column, 2 * width, rows, columns);
        CUTE_UNROLL
        for (int i = 0; i < 16; ++i) gate[i] = __float_as_uint(sums(at + 2 * i));
        store(gate, staged, act + row * width + column, width, rows, columns);
      } else {
        CUTE_UNROLL
        for (int i = 0; i < 16; ++i) gate[i] = pack(sums(at + 2 * i), sums(at + 2 * i + 1));
        store(gate, staged, out + row * width + column, width, rows, columns);
      }
    }
    if constexpr (product == kDswiglu) {
      const int tiles = int(ceil_div(p.columns, tiling.columns)), own = threadIdx.x % 32 / 4;
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {  // four threads have a row; the same order each time
        dprob[r] += __shfl_xor_sync(0xffffffffu, dprob[r], 1);
        dprob[r] += __shfl_xor_sync(0xffffffffu, dprob[r], 2);
        if (threadIdx.x % 4 == 0 && own + 8 * r < rows)
          p.sums[(row + own + 8 * r) * tiles + tile.column / tiling.columns] = dprob[r];
      }
    }
  }

  // The consumers of all blocks.
  static __device__ void clear_tail(Element* out, int64_t columns, const RowProduct& p) {
    const int64_t vectors = columns * sizeof(Element) / 16, stop = p.rows * vectors;
    const int64_t first = tail_of(p.ends, p.groups, p.rows) * vectors + int64_t(blockIdx.x) * kConsumers + threadIdx.x;
    for (int64_t i = first; i < stop; i += int64_t(gridDim.x) * kConsumers)
      reinterpret_cast<uint4*>(out)[i] = make_uint4(0, 0, 0, 0);
  }

  // What every thread knows of the work.
  struct Work {
    const RowProduct& p;
    const int32_t* starts;
    int rank, first, step, units, depths;

    __device__ RowTile at(int unit) const {
      return tile_at(starts, p.groups, unit, rank, p.ends, p.rows, p.columns, tiling);
    }

    // First column, in the weight, of box `i` of a tile.
    __device__ int box(const RowTile& tile, int i) const {
      if (!fused) return tile.column + 64 * i;
      return tile.column + 64 * (i % (kBoxesB / 2)) + (i < kBoxesB / 2 ? 0 : p.columns);
    }
  };

  // One thread.
  static __device__ void load(const Work& work, const CUtensorMap& x, Pipeline& pipeline, Shared& shared) {
    State state = cutlass::make_producer_start_state<Pipeline>();
    const uint64_t hint = uint64_t(TMA::CacheHintSm90::EVICT_NORMAL);
    int expert = -1;
    for (int unit = work.first; unit < work.units; unit += work.step) {
      const RowTile tile = work.at(unit);
      const CUtensorMap* weight = static_cast<const CUtensorMap*>(work.p.maps) + tile.expert;
      if (tile.expert != expert) tma_descriptor_fence_acquire(weight);  // it lies in memory that others write
      expert = tile.expert;
      for (int depth = 0; depth < work.depths; ++depth, ++state) {
        pipeline.producer_acquire(state);
        uint64_t* barrier = pipeline.producer_get_barrier(state);
        const int k = depth * kDepth;
        Element* a = shared.a + state.index() * kBoxesA * kBox;
        Element* b = shared.b + state.index() * kBoxesB * kBox;
        const auto rows = [&](auto copy, int i, auto... both) {
          copy(&x, barrier, both..., hint, a + i * kBox, k, int(tile.row) + 64 * i);
        };
        const auto columns = [&](auto copy, int i, auto... both) {
          const int column = work.box(tile, i);
          if constexpr (across) copy(weight, barrier, both..., hint, b + i * kBox, column, k);
          else copy(weight, barrier, both..., hint, b + i * kBox, k, column);
        };
        const auto own = [](auto... arguments) { SM90_TMA_LOAD_2D::copy(arguments...); };
        const auto shared_by_two = [](auto... arguments) { SM90_TMA_LOAD_MULTICAST_2D::copy(arguments...); };
        if constexpr (kCluster) {
          if (tile.beside) {
            rows(shared_by_two, work.rank, uint16_t(3));
            CUTE_UNROLL
            for (int i = 0; i < kBoxesB; ++i) columns(own, i);
          } else {
            CUTE_UNROLL
            for (int i = 0; i < kBoxesA; ++i) rows(own, i);
            CUTE_UNROLL
            for (int i = 0; i < kBoxesB / 2; ++i) columns(shared_by_two, work.rank * kBoxesB / 2 + i, uint16_t(3));
          }
        } else {
          CUTE_UNROLL
          for (int i = 0; i < kBoxesA; ++i) rows(own, i);
          CUTE_UNROLL
          for (int i = 0; i < kBoxesB; ++i) columns(own, i);
        }
      }
    }
    pipeline.producer_tail(state);  // until the other block of the cluster needs nothing of this one
  }

  // A warpgroup.
  static __device__ void multiply(const Work& work, Pipeline& pipeline, Shared& shared) {
    Tensor a = make_tensor(make_smem_ptr(shared.a), LayoutA{});
    Tensor b = make_tensor(make_smem_ptr(shared.b), LayoutB{});
    Mma mma;
    const auto slice = mma.get_slice(__shfl_sync(0xffffffffu, threadIdx.x / 128, 0) * 128);
    const Tensor in_a = slice.make_fragment_A(slice.partition_A(a));  // (MMA, M, K, stage)
    const Tensor in_b = slice.make_fragment_B(slice.partition_B(b));
    Tensor sums = partition_fragment_C(mma, cute::Shape<Int<kRows>, Int<2 * kHalf>>{});
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    // The first warpgroup arrives once a tile, the second waits there. It cannot arrive twice before the other has waited:
    // all stages are full by then, and the other has given none back.
    const bool second = threadIdx.x >= 128;
    const int lead = kGroups == 2 && work.depths > kStages ? work.p.lead : 0;
    const cutlass::arch::NamedBarrier ahead(kConsumers, 0);
    State read;
    for (int unit = work.first; unit < work.units; unit += work.step) {
      const RowTile tile = work.at(unit);
      float prob[2] = {1.f, 1.f};
      if ((fused || product == kDswiglu) && work.p.probs) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) prob[r] = row + 8 * r < tile.rows ? work.p.probs[tile.row + row + 8 * r] : 0.f;
      }
      State release = read;
      if (lead && second) ahead.sync();
      mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
      pipeline.consumer_wait(read);
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      CUTE_UNROLL
      for (int k = 0; k < size<2>(in_a); ++k) {
        cute::gemm(mma, in_a(_, _, k, read.index()), in_b(_, _, k, read.index()), sums);
        mma.accumulate_ = SM90::GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      ++read;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int depth = 1; depth < work.depths; ++depth, ++read, ++release) {
        pipeline.consumer_wait(read);
        warpgroup_fence_operand(sums);
        warpgroup_arrive();
        cute::gemm(mma, in_a(_, _, _, read.index()), in_b(_, _, _, read.index()), sums);
        warpgroup_commit_batch();
        if (depth == lead && !second) ahead.arrive();
        warpgroup_wait<1>();  // the product before this one is done with its stage
        warpgroup_fence_operand(sums);
        pipeline.consumer_release(release);
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(release);  // before the epilogue: the next tile's loads run beside it
      epilogue(sums, tile, prob, work.p, shared.staged[threadIdx.x / 32]);
    }
    constexpr bool derived = product == kDswiglu;
    clear_tail(static_cast<Element*>(work.p.out), (derived ? 2LL : 1LL) * work.p.columns, work.p);
    if (derived) clear_tail(static_cast<Element*>(work.p.act), work.p.columns, work.p);
    if (fused && work.p.pre) clear_tail(static_cast<Element*>(work.p.pre), 2LL * work.p.columns, work.p);
  }

  static __device__ void run(const CUtensorMap& x, const RowProduct& p) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const bool producer = threadIdx.x >= kConsumers;
    typename Pipeline::Params params;
    params.transaction_bytes = (kRows + 2 * kHalf) * kDepth * sizeof(Element);
    params.role = producer ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
    params.is_leader = producer;  // only one thread of them loads
    params.num_consumers = kConsumers;
    Pipeline pipeline(shared.pipeline, params, Cluster{});
    // Launched while the kernel before may still run: nothing that it may write is touched before this line.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x < 32) count_units(p.ends, p.groups, p.rows, p.columns, tiling, shared.starts);
    if (threadIdx.x == 0) prefetch_tma_descriptor(&x);
    if constexpr (kCluster) cluster_arrive_relaxed(), cluster_wait();  // the other block's barriers are there
    __syncthreads();
    const int rank = kCluster ? int(block_rank_in_cluster()) : 0;
    const Work work{p, shared.starts, rank, int(blockIdx.x) / tiling.cluster, int(gridDim.x) / tiling.cluster,
                    shared.starts[p.groups], int(ceil_div(p.depth, kDepth))};
    if (producer) {
      if constexpr (Config::producers == 128) cutlass::arch::warpgroup_reg_dealloc<40>();
      if (cutlass::canonical_warp_idx_sync() == kConsumers / 32 && elect_one_sync())
        load(work, x, pipeline, shared);
    } else {
      if constexpr (Config::producers == 128) cutlass::arch::warpgroup_reg_alloc<232>();
      multiply(work, pipeline, shared);
    }
  }
};

template <int product, typename Element, typename Config>
__global__ void __launch_bounds__(Rows<product, Element, Config>::kThreads, Config::blocks)
    rows(const __grid_constant__ CUtensorMap x, const __grid_constant__ RowProduct p) {
  Rows<product, Element, Config>::run(x, p);
}

}  // namespace zk::sm90
