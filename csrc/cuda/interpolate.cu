// torch_gradmatch::interpolate_ on an NVIDIA GPU: one pass over memory, up to 128 tensors in a launch; kernel.h has the
// kernel. This is a library of its own, which torch_gradmatch loads only where torch has CUDA; its run time is linked
// into it, so that it loads whatever CUDA torch was built with.
#include "../interpolate.h"
#include "kernel.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <mutex>
#include <unordered_map>

namespace torch_gradmatch {
namespace {

template <typename T>
struct OnDevice {
  using type = T;
};
template <>
struct OnDevice<BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct OnDevice<Half> {
  using type = __half;
};

template <typename Pair>
void launch(const Group& group, double weight, cudaStream_t stream) {
  using Slow = typename OnDevice<typename Pair::Slow>::type;
  using Fast = typename OnDevice<typename Pair::Fast>::type;
  using Math = typename Pair::Math;
  const Span* refused = cuda::for_each_launch<Slow, Fast>(group.spans, [&](const cuda::Table& table, unsigned blocks) {
    cuda::interpolate_kernel<Slow, Fast, Math><<<blocks, cuda::kThreads, 0, stream>>>(
        table, static_cast<Math>(weight), static_cast<Math>(1.0 - weight));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  STD_TORCH_CHECK(
      refused == nullptr, "interpolate_: a tensor of ", refused == nullptr ? 0 : refused->numel, " elements is too large");
}

// Why the kernel does not run on a device; nullptr if it does. Asks for the kernel's machine code, which is what a
// launch would miss: a GPU older than all for which it was compiled, or a driver that cannot compile it anew.
const char* obstacle_on(int32_t device) {
  static std::mutex mutex;
  static std::unordered_map<int32_t, cudaError_t> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    const auto kernel = cuda::interpolate_kernel<float, float, float>;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
    cudaGetLastError();  // so that nobody else is told of it
    found = known.emplace(device, error).first;
  }
  return found->second == cudaSuccess ? nullptr : cudaGetErrorString(found->second);
}

void interpolate_cuda(std::vector<Tensor> slow, std::vector<Tensor> fast, double weight) {
  const std::vector<Group> groups = make_groups(slow, fast, weight, /*on_cuda=*/true);
  for (const Group& group : groups) {
    const char* why = obstacle_on(group.device);
    accept_if(why == nullptr, "the kernel does not run on cuda:", group.device, ": ", why == nullptr ? "" : why);
  }
  for (const Group& group : groups) {
    const torch::stable::accelerator::DeviceGuard guard(group.device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(group.device, &stream));
    visit_dtype_pair(group.slow_dtype, group.fast_dtype, [&](auto pair) {
      launch<decltype(pair)>(group, weight, static_cast<cudaStream_t>(stream));
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_gradmatch, CUDA, m) {
  m.impl("interpolate_", TORCH_BOX(&interpolate_cuda));
}

}  // namespace torch_gradmatch

// What native_status() asks. The first two initialize no CUDA; versions are 1000 major + 10 minor, the driver's 0 where
// there is none.
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int torch_gradmatch_cuda_runtime_version() { return CUDART_VERSION; }

EXPORTED int torch_gradmatch_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

EXPORTED const char* torch_gradmatch_cuda_obstacle(int device) {
  return torch_gradmatch::obstacle_on(device);
}
