// The schema of every operator of torch_gradmatch. It stands here and nowhere else; the files of the devices only add
// implementations.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_gradmatch, m) {
  m.def("interpolate_(Tensor(a!)[] slow, Tensor(b!)[] fast, float weight) -> ()");
}
