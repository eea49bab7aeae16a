// The schema of torch_gradmatch::interpolate_. It is here and nowhere else; the files of the devices only add
// implementations.
#include "interpolate.h"

STABLE_TORCH_LIBRARY(torch_gradmatch, m) {
  // Checks all pairs before it writes. A ValueError says that the kernel does not take them and that nothing was written.
  m.def("interpolate_(Tensor(a!)[] slow, Tensor(b!)[] fast, float weight) -> ()");
}
