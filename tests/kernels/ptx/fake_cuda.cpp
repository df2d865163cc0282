// The part of the CUDA runtime and driver that the library's host code calls, without a GPU: device memory is host
// memory, and a launch is handed to whoever set `zk_on_launch`.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

using OnLaunch = int (*)(const char* kernel, const uint32_t* grid_block_cluster, uint64_t shared, void** arguments);

OnLaunch on_launch = nullptr;
cudaError_t last_error = cudaSuccess;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

std::vector<Configuration> pushed;

cudaError_t launch(const void* function, dim3 grid, dim3 block, dim3 cluster, size_t shared, void** arguments) {
  const auto found = kernels().find(function);
  // 48 KB need no leave; more must have been asked for.
  const auto limit = shared_limits().find(function);
  if (found == kernels().end() || !on_launch) return last_error = cudaErrorInvalidDeviceFunction;
  if (int64_t(shared) > (limit == shared_limits().end() ? 48 << 10 : limit->second)) return last_error = cudaErrorInvalidValue;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    return last_error = cudaErrorInvalidConfiguration;
  const uint32_t sizes[9] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, cluster.x, cluster.y, cluster.z};
  return last_error = cudaError_t(on_launch(found->second.c_str(), sizes, shared, arguments));
}

// The layout that tensor_map.py reads.
struct TensorMap {
  uint32_t magic, rank, element, swizzle;
  uint64_t address;
  uint32_t dims[5], box[5];
  uint64_t strides[4];
  uint8_t padding[32];
};
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const int sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  TensorMap made{0x5A454441u, rank, 0, uint32_t(swizzle), uint64_t(uintptr_t(address)), {}, {}, {}, {}};
  if (type > CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank < 1 || rank > 5 || interleave || made.address % 16) return CUDA_ERROR_INVALID_VALUE;
  made.element = sizes[type];
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (!dims[i] || dims[i] > 1ull << 32 || !box[i] || box[i] > 256 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    made.dims[i] = uint32_t(dims[i]), made.box[i] = box[i];
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >> 40)) return CUDA_ERROR_INVALID_VALUE;
    if (i + 1 < rank) made.strides[i] = strides[i];
  }
  const uint32_t inner = box[0] * made.element;
  if (inner % 16 || (swizzle && inner > 16u << swizzle) || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void zk_on_launch(OnLaunch function) { on_launch = function; }

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host] = name;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = pushed.back();
  pushed.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, dim3(1, 1, 1), shared, arguments);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& dim = config->attrs[i].val.clusterDim;
      cluster = dim3(dim.x, dim.y, dim.z);
    }
  return launch(function, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, arguments);
}
EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > 227 << 10) return last_error = cudaErrorInvalidValue;
    shared_limits()[function] = value;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    default: return last_error = cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorString(cudaError_t) { return "error of the stand-in runtime"; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 1, cudaSuccess;
}
