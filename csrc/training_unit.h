// What the doors of training ask of a unit's tensors, on any device: sizes that fit, dense weights, and its maps.
#pragma once

#include "door.h"

namespace espk {

// The tensors of a unit that both operators of training take, checked and dense, and its sizes.
struct TrainingUnit {
  Tensor reduce_weight, weight, expand_weight;
  int64_t in_channels, out_channels, reduce_groups, groups;
  bool residual;
  Pyramid pyramid{};

  TrainingUnit(const Tensor& x, const Tensor& reduce, int64_t reduce_groups, const Tensor& branches,
               const std::vector<int64_t>& dilations, const Tensor& expand, int64_t groups,
               const std::vector<double>& eps, const std::vector<bool>& batch_statistics, int64_t stride, bool hff,
               bool residual)
      : reduce_weight(dense_weight(reduce)),
        weight(dense_weight(branches)),
        expand_weight(dense_weight(expand)),
        in_channels(x.size(1)),
        out_channels(expand.size(0)),
        reduce_groups(reduce_groups),
        groups(groups),
        residual(residual) {
    for (const Tensor* each : {&reduce, &branches, &expand}) check_same_type(x, *each);
    STD_TORCH_CHECK(x.numel() > 0, "x: expected at least one image, channel, row and column");
    check_pointwise_weight(reduce, in_channels, reduce_groups);
    describe(pyramid, x, Layout::channels_last, {x.size(0), reduce.size(0), x.size(2), x.size(3)}, dilations, stride,
             hff);
    check_branch_weight(branches, pyramid);
    check_pointwise_weight(expand, pyramid.out_channels(), groups);
    STD_TORCH_CHECK(
        !residual || (in_channels == out_channels && pyramid.out_height == x.size(2) && pyramid.out_width == x.size(3)),
        "residual: expected a result of the shape of x");
    STD_TORCH_CHECK(eps.size() == 3 && batch_statistics.size() == 3, "eps, batch_statistics: expected one a norm");
  }

  int64_t in_pixels() const { return pyramid.batch * pyramid.height * pyramid.width; }
  int64_t out_pixels() const { return pyramid.batch * pyramid.out_height * pyramid.out_width; }
  int64_t inner_channels() const { return pyramid.channels + pyramid.out_channels(); }
  int64_t norm_channels() const { return inner_channels() + out_channels; }

  // Whether a PReLU ends the unit: the vector of slopes has its numbers.
  bool ends_in_prelu(const Tensor& slopes) const { return slopes.dim() == 1 && slopes.size(0) == norm_channels(); }

  Tensor in_map(int64_t channels, const Tensor& like) const {
    return empty_map({pyramid.batch, channels, pyramid.height, pyramid.width}, like, Layout::channels_last);
  }
  Tensor out_map(int64_t channels, const Tensor& like) const {
    return empty_map({pyramid.batch, channels, pyramid.out_height, pyramid.out_width}, like, Layout::channels_last);
  }
  void check_kept(const Tensor& map, int64_t channels, bool strided, const char* name) const {
    STD_TORCH_CHECK(is_here(map) && map.dim() == 4 && map.scalar_type() == expand_weight.scalar_type() &&
                        map.size(0) == pyramid.batch && map.size(1) == channels &&
                        map.size(2) == (strided ? pyramid.out_height : pyramid.height) &&
                        map.size(3) == (strided ? pyramid.out_width : pyramid.width),
                    name, ": expected the map of the forward pass");
  }
};

inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_numbers(const Tensor& t, int64_t count, ScalarType type, const char* name) {
  STD_TORCH_CHECK(is_here(t) && t.dim() == 1 && t.size(0) == count && t.scalar_type() == type, name, ": expected a ",
                  device_name, " vector of the unit's channels, float64 for float64 maps and moments, else float32");
}

inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, std::vector<int64_t>{0}); }

}  // namespace espk
