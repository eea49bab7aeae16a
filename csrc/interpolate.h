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
#include <numeric>
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

// (stride, size) of the dimensions that have more than one element, the densest first.
inline std::vector<std::pair<int64_t, int64_t>> sorted_dims(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1) {
      dims.emplace_back(strides[i], sizes[i]);
    }
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Whether a tensor covers each element of a contiguous piece of memory exactly once, in whatever order.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return true;
  }
  int64_t expected = 1;
  for (const auto& [stride, size] : sorted_dims(tensor)) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Whether each dimension steps over all denser ones, as slices do: then no two elements share memory.
inline bool is_nested(const Tensor& tensor) {
  int64_t last = 0;
  for (const auto& [stride, size] : sorted_dims(tensor)) {
    if (stride <= last) {
      return false;
    }
    last += (size - 1) * stride;
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

using Pieces = std::vector<std::pair<const char*, const char*>>;  // [begin, end) of memory

inline bool any_overlap(Pieces pieces) {
  std::sort(pieces.begin(), pieces.end());
  for (size_t i = 1; i < pieces.size(); ++i) {
    if (pieces[i].first < pieces[i - 1].second) {
      return true;
    }
  }
  return false;
}

// From a tensor's first byte to behind its last, gaps included.
inline void add_extent(Pieces& pieces, const Tensor& tensor) {
  if (tensor.numel() == 0) {
    return;
  }
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    last += (sizes[i] - 1) * strides[i];
  }
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  pieces.emplace_back(begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size()));
}

// Both on one device of the kernel's kind, and with memory and strides at all.
inline bool same_device(const Tensor& slow, const Tensor& fast, bool on_cuda) {
  return slow.get_device_index() == fast.get_device_index() &&
      (on_cuda ? slow.is_cuda() && fast.is_cuda() : slow.is_cpu() && fast.is_cpu());
}

inline bool is_strided(const Tensor& tensor) {
  int32_t layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

// Why the kernel does not take a pair of tensors; nullptr if it does.
inline const char* obstacle(const Tensor& slow, const Tensor& fast, bool on_cuda) {
  if (!same_device(slow, fast, on_cuda)) {
    return "are on different devices, or not on the kind of the others";
  }
  if (!is_strided(slow) || !is_strided(fast) || !same_layout(slow, fast) || !is_dense(slow)) {
    return "should have the same sizes and strides and no gaps";
  }
  if (!visit_dtype_pair(slow.scalar_type(), fast.scalar_type(), [](auto) {})) {
    return "have dtypes none of those that the kernel takes";
  }
  return nullptr;
}

// Whether torch._foreach_* surely manages a pair that the kernel does not take.
inline bool foreach_manages(const Tensor& slow, const Tensor& fast, bool on_cuda) {
  if (!same_device(slow, fast, on_cuda) || !is_strided(slow) || !is_strided(fast)) {
    return false;
  }
  const auto sizes = slow.sizes();
  const auto sizes_fast = fast.sizes();
  if (sizes.size() != sizes_fast.size() || !std::equal(sizes.begin(), sizes.end(), sizes_fast.begin())) {
    return false;
  }
  const auto is_real = [](ScalarType t) {
    return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16;
  };
  const auto is_complex = [](ScalarType t) {
    return t == ScalarType::ComplexFloat || t == ScalarType::ComplexDouble;
  };
  const ScalarType slow_dtype = slow.scalar_type();
  const ScalarType fast_dtype = fast.scalar_type();
  if (!(is_real(slow_dtype) && is_real(fast_dtype)) && !(is_complex(slow_dtype) && is_complex(fast_dtype))) {
    return false;
  }
  return is_nested(slow) && is_nested(fast);
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

inline void check_arguments(const std::vector<Tensor>& slow, const std::vector<Tensor>& fast, double weight) {
  STD_TORCH_CHECK(
      slow.size() == fast.size(),
      "interpolate_: slow and fast should have the same length (got ", slow.size(), " and ", fast.size(), ")");
  STD_TORCH_CHECK(weight >= 0.0 && weight <= 1.0, "interpolate_: weight should lie in [0, 1] (got ", weight, ")");
}

inline Pieces pieces_of(const std::vector<Group>& groups) {
  Pieces pieces;
  for (const auto& group : groups) {
    visit_dtype_pair(group.slow_dtype, group.fast_dtype, [&](auto pair) {
      for (const auto& span : group.spans) {
        pieces.emplace_back(span.slow, span.slow + span.numel * sizeof(typename decltype(pair)::Slow));
        pieces.emplace_back(span.fast, span.fast + span.numel * sizeof(typename decltype(pair)::Fast));
      }
    });
  }
  return pieces;
}

// Checks everything before anything is written and sorts the pairs into groups. Memory that overlaps is refused: the
// result would depend on the order of threads.
inline std::vector<Group> make_groups(
    const std::vector<Tensor>& slow, const std::vector<Tensor>& fast, double weight, bool on_cuda) {
  check_arguments(slow, fast, weight);
  std::vector<Group> groups;
  for (size_t i = 0; i < slow.size(); ++i) {
    const char* why = obstacle(slow[i], fast[i], on_cuda);
    STD_TORCH_CHECK(why == nullptr, "interpolate_: slow[", i, "] and fast[", i, "] ", why == nullptr ? "" : why);
    add_to_groups(groups, slow[i], fast[i]);
  }
  STD_TORCH_CHECK(
      !any_overlap(pieces_of(groups)),
      "interpolate_: two of the tensors share memory; every slow and fast tensor needs memory of its own");
  return groups;
}

inline std::vector<int64_t> every_index(size_t size) {
  std::vector<int64_t> indices(size);
  std::iota(indices.begin(), indices.end(), 0);
  return indices;
}

// The pairs that the kernel takes, and the indices of those that it leaves to torch._foreach_*.
struct Shares {
  std::vector<Group> groups;
  std::vector<int64_t> left;
};

// Leaves every pair wherever one is neither for the kernel nor surely for foreach, or where memory might be shared:
// whoever asks then has to look closer, and nothing was written.
inline Shares share_out(
    const std::vector<Tensor>& slow, const std::vector<Tensor>& fast, double weight, bool on_cuda) {
  check_arguments(slow, fast, weight);
  Shares shares;
  bool clear = true;
  for (size_t i = 0; i < slow.size() && clear; ++i) {
    if (obstacle(slow[i], fast[i], on_cuda) == nullptr) {
      add_to_groups(shares.groups, slow[i], fast[i]);
    } else {
      clear = foreach_manages(slow[i], fast[i], on_cuda);
      shares.left.push_back(static_cast<int64_t>(i));
    }
  }
  if (clear) {
    Pieces pieces = pieces_of(shares.groups);
    for (const int64_t i : shares.left) {
      add_extent(pieces, slow[i]);
      add_extent(pieces, fast[i]);
    }
    clear = !any_overlap(std::move(pieces));
  }
  if (!clear) {
    shares.groups.clear();
    shares.left = every_index(slow.size());
  }
  return shares;
}

}  // namespace torch_gradmatch
