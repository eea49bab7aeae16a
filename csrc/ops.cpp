// The schema of every operator of torch_gradmatch. It stands here and nowhere else; the files of the devices only add
// implementations.
#include "interpolate.h"

namespace torch_gradmatch {
namespace {

// Where a device has no kernel: every pair is left.
std::vector<int64_t> interpolate_taken_nowhere(std::vector<Tensor> slow, std::vector<Tensor>, double) {
  return every_index(slow.size());
}

}  // namespace

STABLE_TORCH_LIBRARY(torch_gradmatch, m) {
  // Refuses what the kernel cannot do.
  m.def("interpolate_(Tensor(a!)[] slow, Tensor(b!)[] fast, float weight) -> ()");
  // Does the pairs that the kernel takes and returns the indices of the others, which it leaves alone; leaves all where
  // it cannot vouch for the others. So whoever calls it need not look at every tensor beforehand, nor catch an error.
  m.def("interpolate_taken_(Tensor(a!)[] slow, Tensor(b!)[] fast, float weight) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(torch_gradmatch, CompositeExplicitAutograd, m) {
  m.impl("interpolate_taken_", TORCH_BOX(&interpolate_taken_nowhere));
}

}  // namespace torch_gradmatch
