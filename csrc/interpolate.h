// What the CPU and CUDA kernels of torch_gradmatch::interpolate_ share: the checks, the dtype pairs and the table of
// tensors, which makes one flat index space of many tensors.
//
//   slow <- slow + weight (fast - slow);  fast <- cast(slow)
//
// Shi et al., Gradient Matching for Domain Generalization, ICLR 2022, arXiv 2104.09937, Algorithm 1, last line.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

namespace torch_gradmatch {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The (slow, fast) dtypes that the kernels take. Arithmetic is done in Math.
template <typename SlowType, typename FastType>
struct DtypePair {
  using Slow = SlowType;
  using Fast = FastType;
  using Math = std::conditional_t<std::is_same_v<SlowType, double>, double, float>;
};

// Calls visit(DtypePair<Slow, Fast>{}) for the pair of the two dtypes. Returns whether there is one.
template <typename Visitor>
bool visit_dtype_pair(ScalarType slow, ScalarType fast, const Visitor& visit) {
  const auto is = [&](ScalarType s, ScalarType f) { return slow == s && fast == f; };
  if (is(ScalarType::Float, ScalarType::Float)) {
    visit(DtypePair<float, float>{});
  } else if (is(ScalarType::Double, ScalarType::Double)) {
    visit(DtypePair<double, double>{});
  } else if (is(ScalarType::BFloat16, ScalarType::BFloat16)) {
    visit(DtypePair<BFloat16, BFloat16>{});
  } else if (is(ScalarType::Half, ScalarType::Half)) {
    visit(DtypePair<Half, Half>{});
  } else if (is(ScalarType::Float, ScalarType::BFloat16)) {
    visit(DtypePair<float, BFloat16>{});
  } else if (is(ScalarType::Float, ScalarType::Half)) {
    visit(DtypePair<float, Half>{});
  } else {
    return false;
  }
  return true;
}

// One pair of tensors as flat memory: elements [start, start + numel) of the flat index space.
struct Span {
  char* slow;
  char* fast;
  int64_t start;
  int64_t numel;
};

// All non-empty pairs of one device and one pair of dtypes.
struct Group {
  ScalarType slow_dtype;
  ScalarType fast_dtype;
  int32_t device;
  std::vector<Span> spans;
  int64_t numel = 0;
};

// Whether a tensor covers each element of a contiguous piece of memory exactly once, in whatever order.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return true;
  }
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1) {
      dims.emplace_back(strides[i], sizes[i]);
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes_a = a.sizes();
  const auto sizes_b = b.sizes();
  if (sizes_a.size() != sizes_b.size() || !std::equal(sizes_a.begin(), sizes_a.end(), sizes_b.begin())) {
    return false;
  }
  const auto strides_a = a.strides();
  const auto strides_b = b.strides();
  for (size_t i = 0; i < sizes_a.size(); ++i) {
    if (sizes_a[i] != 1 && strides_a[i] != strides_b[i]) {
      return false;
    }
  }
  return true;
}

inline bool is_strided(const Tensor& tensor) {
  int32_t layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

// Raises a ValueError in Python. No other error of the operator is one, so its caller knows that nothing was written
// and may take another way.
template <typename... Words>
void accept_if(bool accepted, const Words&... words) {
  if (!accepted) {
    std::ostringstream message;
    ((message << "interpolate_: ") << ... << words);
    throw std::invalid_argument(message.str());
  }
}

// Why the kernel does not take a pair of tensors; nullptr if it does.
inline const char* obstacle(const Tensor& slow, const Tensor& fast, bool on_cuda) {
  const bool there = on_cuda ? slow.is_cuda() && fast.is_cuda() : slow.is_cpu() && fast.is_cpu();
  if (!there || slow.get_device_index() != fast.get_device_index()) {
    return "are on different devices, or not on the kind of the others";
  }
  if (!is_strided(slow) || !is_strided(fast) || !same_layout(slow, fast) || !is_dense(slow)) {
    return "should have the same sizes and strides and no gaps";
  }
  if (!visit_dtype_pair(slow.scalar_type(), fast.scalar_type(), [](auto) {})) {
    return "have dtypes that the kernel does not take";
  }
  return nullptr;
}

inline void add_to_groups(std::vector<Group>& groups, const Tensor& s, const Tensor& f) {
  const int64_t numel = s.numel();
  if (numel == 0) {
    return;
  }
  const int32_t device = s.get_device_index();
  const ScalarType slow_dtype = s.scalar_type();
  const ScalarType fast_dtype = f.scalar_type();
  const auto belongs = [&](const Group& g) {
    return g.slow_dtype == slow_dtype && g.fast_dtype == fast_dtype && g.device == device;
  };
  auto group = std::find_if(groups.begin(), groups.end(), belongs);
  if (group == groups.end()) {
    group = groups.insert(groups.end(), Group{slow_dtype, fast_dtype, device, {}, 0});
  }
  group->spans.push_back(
      {static_cast<char*>(s.mutable_data_ptr()), static_cast<char*>(f.mutable_data_ptr()), group->numel, numel});
  group->numel += numel;
}

// Whether two of the tensors share memory: the result would depend on the order of threads.
inline bool any_overlap(const std::vector<Group>& groups) {
  std::vector<std::pair<const char*, const char*>> pieces;  // [begin, end)
  for (const auto& group : groups) {
    visit_dtype_pair(group.slow_dtype, group.fast_dtype, [&](auto pair) {
      for (const auto& span : group.spans) {
        pieces.emplace_back(span.slow, span.slow + span.numel * sizeof(typename decltype(pair)::Slow));
        pieces.emplace_back(span.fast, span.fast + span.numel * sizeof(typename decltype(pair)::Fast));
      }
    });
  }
  std::sort(pieces.begin(), pieces.end());
  const auto overlap = [](const auto& piece, const auto& next) { return next.first < piece.second; };
  return std::adjacent_find(pieces.begin(), pieces.end(), overlap) != pieces.end();
}

// Checks everything before anything is written and sorts the pairs into groups.
inline std::vector<Group> make_groups(
    const std::vector<Tensor>& slow, const std::vector<Tensor>& fast, double weight, bool on_cuda) {
  accept_if(
      slow.size() == fast.size(),
      "slow and fast should have the same length (got ", slow.size(), " and ", fast.size(), ")");
  accept_if(weight >= 0.0 && weight <= 1.0, "weight should lie in [0, 1] (got ", weight, ")");
  std::vector<Group> groups;
  for (size_t i = 0; i < slow.size(); ++i) {
    const char* why = obstacle(slow[i], fast[i], on_cuda);
    accept_if(why == nullptr, "slow[", i, "] and fast[", i, "] ", why == nullptr ? "" : why);
    add_to_groups(groups, slow[i], fast[i]);
  }
  accept_if(
      !any_overlap(groups), "two of the tensors share memory; every slow and fast tensor needs memory of its own");
  return groups;
}

}  // namespace torch_gradmatch
