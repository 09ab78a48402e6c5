// How a door runs a kernel of the CPU: on torch's threads, with its weights prepared for the call or taken from a pack.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "door.h"
#include "plan.h"

namespace espk {

// Tells the recording of this thread of a tensor that a kernel will write.
inline void record_output(const Tensor& out, int64_t bytes) {
  if (Recording* record = recording()) record->output(out.const_data_ptr(), bytes, std::make_shared<Tensor>(out));
}

// A map for a kernel to write, known to the recording.
inline Tensor result_map(std::vector<int64_t> sizes, const Tensor& like, Layout layout) {
  Tensor out = empty_map(std::move(sizes), like, layout);
  record_output(out, out.numel() * bytes_of(type_of(out)));
  return out;
}

// Runs a kernel: weights are prepared here, or come `prepared` in a pack.
template <class Problem>
void launch(const char* name, const Kernel<Problem>& kernel, const Problem& problem, void* prepared = nullptr) {
  void* shared = prepared ? prepared : scratch(Slot::shared, kernel.shared_bytes(problem));
  if (!prepared) kernel.before(problem, shared);
  if (Recording* record = recording()) record->launch(name, kernel, problem, shared);
  run_units(kernel, problem, shared);
}

// The 3x3 average pooling of stride 2 of `x` [B, C, H, W]: all but its maps and their layout.
inline AveragePool describe_pool(const Tensor& x) {
  STD_TORCH_CHECK(x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, "x: expected one channel, row and column");
  AveragePool p{};
  p.type = type_of(x);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.out_height = (p.height - 1) / 2 + 1;
  p.out_width = (p.width - 1) / 2 + 1;
  return p;
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
  return {
      &kernels(), int64_t(p.type), int64_t(p.layout), bytes, {p.groups, p.branches, p.channels, p.pointwise_channels}};
}

// Whole cache lines, so that packs may lie one behind the other.
inline int64_t pack_size(int64_t bytes) { return int64_t(sizeof(PackLabel)) + (bytes + 63) / 64 * 64; }

template <class Problem>
Tensor pack(const Kernel<Problem>& kernel, const Problem& problem, const Tensor& like) {
  const int64_t bytes = kernel.shared_bytes(problem);
  Tensor packed =
      torch::stable::empty(std::vector<int64_t>{pack_size(bytes)}, ScalarType::Byte, std::nullopt, like.device());
  char* data = static_cast<char*>(packed.mutable_data_ptr());
  const PackLabel label = label_of(problem, bytes);
  __builtin_memcpy(data, &label, sizeof label);
  kernel.before(problem, data + sizeof label);
  return packed;
}

// The packs in a tensor, one behind the other, in the order in which a call launches its kernels.
class Packs {
 public:
  explicit Packs(const std::optional<Tensor>& packed) {
    if (!packed || !packed->is_cpu() || packed->scalar_type() != ScalarType::Byte || !packed->is_contiguous()) return;
    data_ = static_cast<char*>(packed->data_ptr());
    left_ = reinterpret_cast<uintptr_t>(data_) % 64 == 0 ? packed->numel() : 0;
  }

  // The prepared weights in the next pack, or null where it does not fit this launch, or there is none.
  template <class Problem>
  void* next(const Kernel<Problem>& kernel, const Problem& problem) {
    const int64_t bytes = kernel.shared_bytes(problem), size = pack_size(bytes);
    if (left_ < size) return nullptr;
    char* pack = data_;
    data_ += size;
    left_ -= size;
    PackLabel label;
    __builtin_memcpy(&label, pack, sizeof label);
    if (label == label_of(problem, bytes)) return pack + sizeof label;
    left_ = 0;
    return nullptr;
  }

 private:
  char* data_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace espk
