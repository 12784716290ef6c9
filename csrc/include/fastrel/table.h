// The table of kernels of the instruction set this file is compiled for.
#pragma once

#include "attention.h"
#include "pointwise.h"
#include "reduced.h"

namespace fastrel {
namespace FASTREL_ISA {

template <class T>
const Kernels<T>& table() {
  static const Kernels<T> kernels{
      absolute<T>, ratio<T>, combine<T>, share<T>, activation_ratio<T>, signed_share<T>, scale<T>,
      layer_norm_backward<T>, attention_update<T>, attention_head<T>};
  return kernels;
}

const ReducedKernels& reduced() { return reduced_table(); }

template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace FASTREL_ISA
}  // namespace fastrel
