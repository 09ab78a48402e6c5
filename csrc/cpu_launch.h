// How a door runs a kernel of the CPU: on torch's threads, with its weights prepared for the call or taken from a pack.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "door.h"
#include "plan.h"

namespace espk {

// A map for a kernel to write, known to the recording of this thread.
inline Tensor result_map(std::vector<int64_t> sizes, const Tensor& like, Layout layout) {
  Tensor out = empty_map(std::move(sizes), like, layout);
  if (Recording* record = recording()) {
    record->output(out.const_data_ptr(), out.numel() * bytes_of(type_of(out)), std::make_shared<Tensor>(out));
  }
  return out;
}

// Runs a kernel: weights are prepared here, or come `prepared` in a pack.
template <class Problem>
void launch(const char* name, const Kernel<Problem>& kernel, const Problem& problem, void* prepared = nullptr) {
  void* shared = prepared ? prepared : scratch(Slot::shared, kernel.shared_bytes(problem));
  if (!prepared) kernel.before(problem, shared);
  if (Recording* record = recording()) record->launch(name, kernel, problem, shared);
  run_units(kernel, problem, shared, true);
}

// What a pack was made for; it stands in front of the prepared weights and takes one cache line of them.
struct alignas(64) PackLabel {
  const Kernels* kernels;  // one table an instruction set, and none of another process
  int64_t type, layout, bytes, sizes[4];

  bool operator==(const PackLabel&) const = default;
};
static_assert(sizeof(PackLabel) == 64);

inline PackLabel label_of(const GroupPointwise& p, int64_t bytes) {
  return {&kernels(), int64_t(p.type), int64_t(p.layout), bytes, {p.groups, p.in_channels, p.out_channels, 0}};
}

inline PackLabel label_of(const PyramidPointwise& p, int64_t bytes) {
  return {&kernels(),
          int64_t(p.type),
          int64_t(p.layout),
          bytes,
          {p.groups, p.branches, p.channels, p.pointwise_channels}};
}

template <class Problem>
Tensor pack(const Kernel<Problem>& kernel, const Problem& problem, const Tensor& like) {
  const int64_t bytes = kernel.shared_bytes(problem);
  Tensor packed = torch::stable::empty(std::vector<int64_t>{int64_t(sizeof(PackLabel)) + bytes}, ScalarType::Byte,
                                       std::nullopt, like.device());
  char* data = static_cast<char*>(packed.mutable_data_ptr());
  const PackLabel label = label_of(problem, bytes);
  __builtin_memcpy(data, &label, sizeof label);
  kernel.before(problem, data + sizeof label);
  return packed;
}

// The prepared weights in a pack, or null where it does not fit this call.
template <class Problem>
void* prepared_in(const std::optional<Tensor>& packed, const Kernel<Problem>& kernel, const Problem& problem) {
  if (!packed || !packed->is_cpu() || packed->scalar_type() != ScalarType::Byte || !packed->is_contiguous()) {
    return nullptr;
  }
  const int64_t bytes = kernel.shared_bytes(problem);
  char* data = static_cast<char*>(packed->data_ptr());
  if (packed->numel() != int64_t(sizeof(PackLabel)) + bytes || reinterpret_cast<uintptr_t>(data) % 64 != 0) {
    return nullptr;
  }
  PackLabel label;
  __builtin_memcpy(&label, data, sizeof label);
  return label == label_of(problem, bytes) ? data + sizeof label : nullptr;
}

}  // namespace espk
