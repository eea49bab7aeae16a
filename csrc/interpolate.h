// What the CPU and CUDA kernels of torch_gradmatch::interpolate_ share: the checks, the dtype pairs and the table of
// tensors, which makes one flat index space of many tensors.
//
//   slow <- slow + weight (fast - slow);  fast <- cast(slow)
//
// Shi et al., Gradient Matching for Domain Generalization, ICLR 2022, arXiv 2104.09937, Algorithm 1, last line.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
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
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
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

// Refuses pieces of memory that overlap: the result would depend on the order of threads.
inline void check_no_overlap(const std::vector<Group>& groups) {
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
  for (size_t i = 1; i < pieces.size(); ++i) {
    STD_TORCH_CHECK(
        pieces[i - 1].second <= pieces[i].first,
        "interpolate_: two of the tensors share memory; every slow and fast tensor needs memory of its own");
  }
}

// Checks everything before anything is written and sorts the pairs into groups.
inline std::vector<Group> make_groups(
    const std::vector<Tensor>& slow, const std::vector<Tensor>& fast, double weight, bool on_cuda) {
  STD_TORCH_CHECK(
      slow.size() == fast.size(),
      "interpolate_: slow and fast should have the same length (got ", slow.size(), " and ", fast.size(), ")");
  STD_TORCH_CHECK(weight >= 0.0 && weight <= 1.0, "interpolate_: weight should lie in [0, 1] (got ", weight, ")");
  std::vector<Group> groups;
  for (size_t i = 0; i < slow.size(); ++i) {
    const Tensor& s = slow[i];
    const Tensor& f = fast[i];
    const int32_t device = s.get_device_index();
    const ScalarType slow_dtype = s.scalar_type();
    const ScalarType fast_dtype = f.scalar_type();
    STD_TORCH_CHECK(
        device == f.get_device_index() && (on_cuda ? s.is_cuda() && f.is_cuda() : s.is_cpu() && f.is_cpu()),
        "interpolate_: slow[", i, "] and fast[", i, "] are on different devices, or not on the kind of the others");
    STD_TORCH_CHECK(
        same_layout(s, f) && is_dense(s),
        "interpolate_: slow[", i, "] and fast[", i, "] should have the same sizes and strides and no gaps");
    STD_TORCH_CHECK(
        visit_dtype_pair(slow_dtype, fast_dtype, [](auto) {}),
        "interpolate_: the dtypes of slow[", i, "] and fast[", i, "] are none of those that the kernel takes");
    const int64_t numel = s.numel();
    if (numel == 0) {
      continue;
    }
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
  check_no_overlap(groups);
  return groups;
}

}  // namespace torch_gradmatch
