// One plain struct a problem: filled and checked once where torch ends, read by every kernel on every device.
// All sizes and strides are 64-bit and count elements.
#pragma once

#include <cstdint>

namespace espk {

constexpr int64_t kMaxBranches = 8;

// How the CPU multiplies bfloat16 (cpu/bfloat16_product.h); null where it does so in float32.
struct Bfloat16Arithmetic;

enum class Type { float32, float64, bfloat16, float16 };

inline int64_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// Dense four-dimensional maps only: contiguous is [B, C, H, W], channels_last is [B, H, W, C] in memory.
enum class Layout { contiguous, channels_last };

// K depthwise 3x3 convolutions of x [B, d, H, W] with weight [K, d, 3, 3], branch k dilated by dilations[k] and padded
// by as much, so that the result has H' = (H - 1) / stride + 1 rows; hff makes branch k the sum of branches 1..k.
struct Pyramid {
  Type type;
  Layout layout;
  int64_t batch, channels, height, width, out_height, out_width, branches, stride;
  int64_t dilations[kMaxBranches];
  bool hff;

  int64_t out_channels() const { return branches * channels; }
  int64_t multiply_adds() const { return 9 * batch * out_channels() * out_height * out_width; }
};

// prelu(value * scale + shift + residual, slope); a null pointer leaves its step out.
// scale, shift and slope hold one number a channel in the compute type (float, or double for float64).
struct Epilogue {
  const void* scale;
  const void* shift;
  const void* slope;
  const void* residual;  // like the output, in its type and layout

  bool empty() const { return !scale && !shift && !slope && !residual; }
};

// What a down-sampler adds of its image in place of a residual: the pointwise convolution of image [B, I, H', W'], of few
// channels, with weight [N, I] in the problem's type and shift [N] in the compute type. There is none without an image.
struct ImageShortcut {
  const void *image, *weight, *shift;
  int64_t channels;  // I

  int64_t multiply_adds() const { return image ? channels : 0; }  // a number of the result
};

// prelu(map * scale + shift, slope) of the channels of a map that a kernel reads. Without scale the map is read as it is;
// slope may be null alone.
struct Normalise {
  const double *scale, *shift, *slope;
};

// The mean and the biased variance of each channel of a map that a kernel makes; null where nobody asks.
struct Moments {
  double *mean, *variance;
};

// out [B, K*d, H', W'] of x [B, d, H, W]. Training sets `normalise` and `moments`, for channels_last maps alone.
struct SpatialPyramid : Pyramid {
  const void* x;
  const void* weight;
  Epilogue epilogue;  // without a residual
  int64_t out_pixel;  // channels_last: from pixel to pixel of out, which may lie in a wider map
  void* out;
  Normalise normalise;
  Moments moments;
};

// grad_x [B, d, H, W] of grad [B, K*d, H', W'].
struct SpatialPyramidBackwardInput : Pyramid {
  const void* grad;
  const void* weight;
  void* grad_x;
};

// grad_weight [K, d, 3, 3] of grad [B, K*d, H', W'] and x [B, d, H, W].
struct SpatialPyramidBackwardWeight : Pyramid {
  const void* grad;
  const void* x;
  void* grad_weight;
};

// 1x1 convolution in groups: x [B, M, P pixels] with weight [N, M/groups] -> out [B, N, P].
// weight_transposed reads the weight as [M, N/groups] instead, which makes the same kernel the gradient of the input.
struct GroupPointwise {
  Type type;
  Layout layout;
  int64_t batch, pixels, in_channels, out_channels, groups;
  bool weight_transposed;
  const void* x;
  const void* weight;
  void* out;
  Epilogue epilogue;
  const Bfloat16Arithmetic* bfloat16;
  bool tf32;  // on CUDA: float32 may be multiplied with factors of eleven digits
  bool part_of_far_map;  // on the CPU: x has left the caches with a larger map, few as its pixels are

  int64_t multiply_adds() const { return batch * pixels * in_channels * (out_channels / groups); }
};

// grad_weight [N, M/groups] of grad [B, N, P] and x [B, M, P].
struct GroupPointwiseBackwardWeight {
  Type type;
  Layout layout;
  int64_t batch, pixels, in_channels, out_channels, groups;
  const void* grad;
  const void* x;
  void* grad_weight;
  bool tf32;

  int64_t multiply_adds() const { return batch * pixels * in_channels * (out_channels / groups); }
};

// The EESP unit after its reduction: the pyramid of x, an affine and PReLU a channel of the concatenated map, then a
// group pointwise convolution with its epilogue. The concatenated map never reaches memory.
struct PyramidPointwise : Pyramid {
  int64_t threads;  // how many will share the units: they are cut to come out even, which changes no bit
  const void* x;
  const void* weight;
  Epilogue pyramid_epilogue;  // without a residual
  int64_t pointwise_channels, groups;
  const void* pointwise_weight;  // [pointwise_channels, K*d / groups]
  Epilogue epilogue;
  ImageShortcut shortcut;  // channels_last alone
  int64_t out_pixel;  // channels_last: from pixel to pixel of out and of the residual, which may lie in a wider map
  void* out;
  const Bfloat16Arithmetic* bfloat16;
  bool tf32;

  int64_t multiply_adds() const {
    const int64_t pixel = out_channels() * (9 + pointwise_channels / groups);
    return batch * out_height * out_width * (pixel + pointwise_channels * shortcut.multiply_adds());
  }
};

// One EESP unit with its batch norms folded: x [B, M, H, W] is reduced to the d channels of the pyramid by a group
// pointwise convolution, and the rest is PyramidPointwise.
struct Eesp : PyramidPointwise {
  int64_t in_channels, reduce_groups;
  const void* reduce_weight;  // [d, M / reduce_groups]
  Epilogue reduce_epilogue;   // without scale and residual

  // All but where its result goes.
  GroupPointwise reduction() const {
    GroupPointwise r{};
    r.type = type;
    r.layout = layout;
    r.batch = batch;
    r.pixels = height * width;
    r.in_channels = in_channels;
    r.out_channels = channels;
    r.groups = reduce_groups;
    r.x = x;
    r.weight = reduce_weight;
    r.epilogue = reduce_epilogue;
    r.bfloat16 = bfloat16;
    r.tf32 = tf32;
    return r;
  }

  int64_t multiply_adds() const {
    return batch * height * width * channels * (in_channels / reduce_groups) + PyramidPointwise::multiply_adds();
  }
};

// The strided unit beside an average pooling: out [B, M + N, H', W'] is prelu(concat(pooled x, unit of x) + shortcut),
// pooled by 3x3 means in steps of 2 whose padding counts. The shortcut and the slope are those of all M + N channels.
struct DownSampler : Eesp {
  const void* slope;  // [M + N]
};

// Dense convolution of any filter size, padded with zeros: x [B, M, H, W] in either layout with weight [N, M, h, w]
// -> out [B, N, H', W'] in channels_last.
struct Convolution {
  Type type;
  Layout layout;  // of x
  int64_t batch, in_channels, height, width, out_channels, out_height, out_width;
  int64_t filter_height, filter_width, stride, padding_rows, padding_columns;
  const void* x;
  const void* weight;
  Epilogue epilogue;  // without a residual
  void* out;
  const Bfloat16Arithmetic* bfloat16;

  int64_t depth() const { return in_channels * filter_height * filter_width; }
  int64_t multiply_adds() const { return batch * out_height * out_width * out_channels * depth(); }
};

// prelu(3x3 means of x [B, C, H, W] in steps of 2, padded by one row and column of zeros that count, + residual).
struct AveragePool {
  Type type;
  Layout layout;
  int64_t batch, channels, height, width, out_height, out_width;
  const void* x;
  const void* slope;       // of a PReLU [C] in the compute type, or none
  ImageShortcut shortcut;  // channels_last alone
  int64_t out_pixel;  // channels_last: as in PyramidPointwise
  void* out;

  int64_t multiply_adds() const { return (9 + shortcut.multiply_adds()) * batch * channels * out_height * out_width; }
};

// The mean of each channel of x [B, C, pixels] -> out [B, C].
struct GlobalAverage {
  Type type;
  Layout layout;
  int64_t batch, channels, pixels;
  const void* x;
  void* out;

  int64_t multiply_adds() const { return batch * channels * pixels; }
};

// Bilinear resizing with corners aligned, of x [B, C, H, W] in channels_last: prelu((resized + skip * sigmoid(gate)) *
// scale + shift) with skip [B, C, H', W'] and gate [B, C]; a null pointer leaves its step out.
struct Resize {
  Type type;
  int64_t batch, channels, height, width, out_height, out_width;
  const void* x;
  const void* skip;
  const void* gate;
  Epilogue epilogue;  // without a residual
  int64_t out_pixel;  // as in PyramidPointwise
  void* out;

  int64_t multiply_adds() const { return 3 * batch * channels * out_height * out_width; }
};

// The number of the channel with the largest value at each pixel of `x` resized as Resize does -> [B, H', W'], uint8 where
// `wide` is not set, else int64. Of equal values the first channel wins, and a NaN is larger than every number.
struct ResizedArgmax {
  Type type;
  int64_t batch, channels, height, width, out_height, out_width;
  bool wide;
  const void* x;
  void* out;

  int64_t out_bytes() const { return batch * out_height * out_width * (wide ? 8 : 1); }
  int64_t multiply_adds() const { return 3 * batch * channels * out_height * out_width; }
};

// What output `i` of `out_size` takes of `size` numbers that are shared out evenly.
struct AdaptiveWindow {
  int64_t first, end;

  AdaptiveWindow(int64_t i, int64_t size, int64_t out_size)
      : first(i * size / out_size), end(((i + 1) * size + out_size - 1) / out_size) {}
  int64_t count() const { return end - first; }
};

// Whether all those windows are of two, one or two apart in turn, or two.
inline bool averages_pairs(int64_t out_size, int64_t size) { return size == 2 * out_size || 2 * size == 3 * out_size; }

// prelu(means of x [B, C, H, W] over windows that share it out evenly * scale + shift) -> [B, C, H', W'], channels_last.
struct AdaptiveAverage {
  Type type;
  int64_t batch, channels, height, width, out_height, out_width;
  const void* x;
  Epilogue epilogue;  // without a residual
  int64_t out_pixel;  // as in PyramidPointwise
  void* out;

  int64_t multiply_adds() const {
    return batch * channels * (height > out_height ? height : out_height) * (width > out_width ? width : out_width);
  }
};

// prelu(x [B, C, pixels] * scale + shift + residual), all in channels_last.
struct Affine {
  Type type;
  int64_t batch, channels, pixels;
  const void* x;
  Epilogue epilogue;
  void* out;

  int64_t multiply_adds() const { return batch * channels * pixels; }
};

// x [B, rows, columns] -> [B, columns, rows]: a contiguous map of `rows` channels to channels_last, or one of `columns`
// channels back.
struct ChangeLayout {
  Type type;
  int64_t batch, rows, columns;
  const void* x;
  void* out;

  int64_t multiply_adds() const { return 0; }
  int64_t numbers() const { return batch * rows * columns; }
};

// One map of a concatenation: `rows` rows of `row` numbers, each into a row of out that begins `out_row` numbers after the
// one before it. The maps of one result differ in x, in `row` and in where out begins.
struct Concatenate {
  Type type;
  int64_t rows, row, out_row;
  const void* x;
  void* out;

  int64_t multiply_adds() const { return 0; }
  int64_t numbers() const { return rows * row; }
};

// 3x3 convolution in `groups` groups of `in` inputs and `out_of_group` outputs, padded by one, channels_last, with weight
// [groups * out_of_group, in, 3, 3]. Input j of group g is channel g * in + j of x.
struct GroupedConvolution {
  Type type;
  int64_t batch, height, width, groups, in, out_of_group;
  const void* x;
  const void* weight;
  Epilogue epilogue;  // without a residual
  void* out;

  int64_t in_channels() const { return groups * in; }
  int64_t out_channels() const { return groups * out_of_group; }
  int64_t multiply_adds() const { return 9 * batch * height * width * out_channels() * in; }
};

// A branch of efficient pyramid pooling, prelu(y * scale + shift) of `epilogue` in the size of the pooling's map. `filtered`:
// y is x [B, C, H, W] in that size, resized bilinearly to height x width, convolved depthwise 3x3 with weight [C, 3, 3], and
// averaged back over windows that share the larger map out evenly, all of 2x2 (averages_pairs); or only convolved, in its own
// size. Else y is x [B, C, height, width] resized bilinearly to that size.
struct PooledBranch {
  bool filtered;
  int64_t height, width;
  const void *x, *weight;
  Epilogue epilogue;  // without a residual
};

// The branches of efficient pyramid pooling, each one input of every group of their merge, which has one output a channel
// -> [B, C, H, W], channels_last.
struct PyramidPooling : GroupedConvolution {  // without an x
  PooledBranch branch[kMaxBranches];
  int64_t threads;  // as in PyramidPointwise

  int64_t channels() const { return groups; }
  int64_t branches() const { return in; }
  int64_t row() const { return width * groups; }
  bool enlarges(const PooledBranch& b) const { return b.filtered && (b.height != height || b.width != width); }
  // Of the map that a branch reads.
  int64_t pixels_of(const PooledBranch& b) const { return b.filtered ? height * width : b.height * b.width; }

  // Those of the convolutions at the sizes of the branches, as the network counts them; the kernel does with fewer.
  int64_t multiply_adds() const {
    int64_t filters = 0;
    for (int64_t k = 0; k < branches(); ++k) filters += branch[k].filtered ? branch[k].height * branch[k].width : 0;
    return GroupedConvolution::multiply_adds() + 9 * batch * channels() * filters;
  }
};

}  // namespace espk
