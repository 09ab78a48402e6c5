// Every operator's schema, once. B images, d channels of the reduced map, K branches, M -> N channels, H x W rows and
// columns, ' of the result; the checks and the mathematics are beside the public functions in espkernels/ops.py.
#include <torch/csrc/stable/library.h>

// The CUDA library has the same operators in a namespace of its own.
#if !defined(ESPK_NAMESPACE)
#define ESPK_NAMESPACE espkernels
#endif
#define ESPK_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

ESPK_LIBRARY(ESPK_NAMESPACE, m) {
  // x [B, d, H, W], weight [K, d, 3, 3] -> [B, K*d, H', W'], H' = (H - 1) / stride + 1
  m.def("spatial_pyramid(Tensor x, Tensor weight, int[] dilations, int stride, bool hff) -> Tensor");
  // grad [B, K*d, H', W'], weight [K, d, 3, 3] -> [B, d, height, width]
  m.def(
      "spatial_pyramid_backward_input(Tensor grad, Tensor weight, int[] dilations, int stride, bool hff, "
      "SymInt height, SymInt width) -> Tensor");
  // grad [B, K*d, H', W'], x [B, d, H, W] -> [K, d, 3, 3]
  m.def("spatial_pyramid_backward_weight(Tensor grad, Tensor x, int[] dilations, int stride, bool hff) -> Tensor");

  // x [B, M, H, W], weight [N, M/groups], scale, shift, slope [N], residual [B, N, H, W] -> [B, N, H, W]
  m.def(
      "group_pointwise(Tensor x, Tensor weight, int groups, Tensor? scale, Tensor? shift, Tensor? residual, "
      "Tensor? slope, Tensor? packed=None) -> Tensor");
  // grad [B, N, H, W], weight [N, M/groups] -> [B, M, H, W]
  m.def("group_pointwise_backward_input(Tensor grad, Tensor weight, int groups) -> Tensor");
  // grad [B, N, H, W], x [B, M, H, W] -> [N, M/groups]
  m.def("group_pointwise_backward_weight(Tensor grad, Tensor x, int groups) -> Tensor");

  // x [B, d, H, W], weight [K, d, 3, 3], pointwise_weight [N, K*d/groups], pyramid_* [K*d], scale, shift, slope [N],
  // residual [B, N, H', W'] -> [B, N, H', W']
  m.def(
      "pyramid_pointwise(Tensor x, Tensor weight, int[] dilations, Tensor pointwise_weight, int groups, "
      "Tensor? pyramid_scale, Tensor? pyramid_shift, Tensor? pyramid_slope, Tensor? scale, Tensor? shift, "
      "Tensor? residual, Tensor? slope, int stride, bool hff, Tensor? packed=None) -> Tensor");

  // Training. One EESP unit with its three batch norms, whose vectors lie behind one another: norm_weight, norm_bias
  // [d + K*d + N], slope as long, or without the last N where no PReLU ends the unit. Norm i takes the moments of its map
  // where batch_statistics[i] says so, else those of running_mean and running_variance, float64 [d + K*d + N].
  // x [B, M, H, W], reduce_weight [d, M/reduce_groups], weight [K, d, 3, 3], expand_weight [N, K*d/groups]
  // -> result [B, N, H', W'], reduced [B, d, H, W], concatenated [B, K*d, H', W'] (or [0] without save_concatenated),
  // expanded [B, N, H', W'], all channels_last; the mean and biased variance used, float64 [2, d + K*d + N]
  m.def(
      "eesp_training(Tensor x, Tensor reduce_weight, int reduce_groups, Tensor weight, int[] dilations, Tensor "
      "expand_weight, int groups, Tensor norm_weight, Tensor norm_bias, Tensor slope, Tensor? running_mean, Tensor? "
      "running_variance, float[] eps, bool[] batch_statistics, int stride, bool hff, bool residual, "
      "bool save_concatenated) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // grad [B, N, H', W'] and what the forward pass took and gave -> the gradients of x (channels_last), reduce_weight,
  // weight, expand_weight, norm_weight, norm_bias, slope. `wanted` has one flag for each; the gradients of the vectors
  // are wanted together, and what is not wanted comes back as [0].
  m.def(
      "eesp_training_backward(Tensor grad, Tensor x, Tensor reduced, Tensor concatenated, Tensor expanded, Tensor "
      "statistics, Tensor reduce_weight, int reduce_groups, Tensor weight, int[] dilations, Tensor expand_weight, "
      "int groups, Tensor norm_weight, Tensor norm_bias, Tensor slope, float[] eps, bool[] batch_statistics, int "
      "stride, bool hff, bool residual, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // prelu(batch norm(x [B, C, H, W])), the norm's statistics as above: weight, bias, slope [C], running_* float64 [C]
  // -> result in channels_last, and the mean and biased variance used, float64 [2, C]
  m.def(
      "batch_norm_prelu(Tensor x, Tensor weight, Tensor bias, Tensor slope, Tensor? running_mean, Tensor? "
      "running_variance, float eps, bool batch_statistics) -> (Tensor, Tensor)");
  // grad [B, C, H, W] and what the forward pass took and gave -> the gradients of x (channels_last, or [0] where it is not
  // wanted), weight, bias and slope
  m.def(
      "batch_norm_prelu_backward(Tensor grad, Tensor x, Tensor statistics, Tensor weight, Tensor bias, Tensor slope, "
      "float eps, bool batch_statistics, bool wants_x) -> (Tensor, Tensor, Tensor, Tensor)");
  // What a step of training does to the buffers of batch norms i of C_i channels: one batch more, and means[i], variances[i]
  // [C_i] go by shares[i], or by one over the number of batches where that is no number, towards their part of the moments,
  // float64 [2, sum of C_i]: mean and biased variance of counts[i] values a channel.
  m.def(
      "track_norms(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] batches, Tensor moments, float[] shares, "
      "SymInt[] counts) -> ()");
  // grad [B, N, H', W'], x [B, M, H, W] of a convolution in one group without dilation -> [N, M, height, width]
  m.def("convolution_backward_weight(Tensor grad, Tensor x, int height, int width, int stride, int padding) -> Tensor");
  // grad [B, N, H, W], x [B, M, H, W] of a 3x3 convolution padded by one, 1 to 8 channels a group -> [N, M/groups, 3, 3]
  m.def("grouped_convolution_backward_weight(Tensor grad, Tensor x, int groups) -> Tensor");
  // grad [B, C, H', W'] of average_pool -> [B, C, height, width] in channels_last
  m.def("average_pool_backward(Tensor grad, SymInt height, SymInt width) -> Tensor");
  // The same, added to a map [B, C, H, W] that lies in channels_last
  m.def("add_average_pool_backward(Tensor(a!) map, Tensor grad) -> ()");
  // The same of adaptive_average, and of resize without skip connection and epilogue
  m.def("adaptive_average_backward(Tensor grad, SymInt height, SymInt width) -> Tensor");
  m.def("resize_backward(Tensor grad, SymInt height, SymInt width) -> Tensor");
  // The end of a down-sampler: prelu(concat(pooled [B, M, H, W], expanded [B, N, H, W]) + image weight + shift, slope) with
  // image [B, I, H, W], weight [M+N, I], shift and slope [M+N] -> [B, M+N, H, W] in channels_last; I at most 8
  m.def(
      "long_range_shortcut(Tensor pooled, Tensor expanded, Tensor? image, Tensor? weight, Tensor? shift, Tensor slope) "
      "-> Tensor");
  // grad [B, M+N, H, W] and what the forward pass took -> the gradients of its arguments; of the three maps in
  // channels_last where they are wanted, and what is not, or not there, as [0]
  m.def(
      "long_range_shortcut_backward(Tensor grad, Tensor pooled, Tensor expanded, Tensor? image, Tensor? weight, "
      "Tensor? "
      "shift, Tensor slope, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // A whole down-sampler: average_pool, a unit in steps of 2 as eesp_training takes it, and long_range_shortcut with the
  // image as small as the result. -> its result, and what the backward pass reads, or [0] each without `save`
  m.def(
      "down_sampler_training(Tensor x, Tensor? image, Tensor reduce_weight, int reduce_groups, Tensor weight, int[] "
      "dilations, Tensor expand_weight, int groups, Tensor norm_weight, Tensor norm_bias, Tensor slope, Tensor? "
      "running_mean, Tensor? running_variance, float[] eps, bool[] batch_statistics, bool hff, Tensor? "
      "shortcut_weight, "
      "Tensor? shortcut_shift, Tensor last_slope, bool save) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // A recurrent layer: gates [T, B, 4 H], weight [4 H, H], bias [4 H], hidden and cell [B, H] -> outputs [T, B, H] and the
  // last cell [B, H]; with `save` also the gates behind their functions [T, B, 4 H] and all cells [T, B, H], else [0]
  m.def(
      "recurrence(Tensor gates, Tensor weight, Tensor? bias, Tensor hidden, Tensor cell, bool save) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // grad [T, B, H], grad_cell [B, H] and what the forward pass took and saved -> the gradients of gates, hidden, cell
  m.def(
      "recurrence_backward(Tensor grad, Tensor? grad_cell, Tensor activated, Tensor cells, Tensor cell, Tensor weight) "
      "-> (Tensor, Tensor, Tensor)");

  // Inference only. One EESP unit with its batch norms folded: reduce x [B, M, H, W] to d channels, shift and PReLU, then
  // pyramid_pointwise -> [B, N, H', W'].
  m.def(
      "eesp(Tensor x, Tensor reduce_weight, int reduce_groups, Tensor reduce_shift, Tensor reduce_slope, Tensor "
      "weight, "
      "int[] dilations, Tensor pyramid_scale, Tensor pyramid_shift, Tensor pyramid_slope, Tensor expand_weight, "
      "int groups, Tensor shift, Tensor? residual, Tensor? slope, int stride, bool hff, Tensor? packed=None) -> "
      "Tensor");
  // prelu(concat(average_pool(x), eesp(x)) + shortcut(image)): x [B, M, H, W], image [B, I, H', W'] -> [B, M+N, H', W']
  m.def(
      "down_sampler(Tensor x, Tensor? image, Tensor reduce_weight, int reduce_groups, Tensor reduce_shift, "
      "Tensor reduce_slope, Tensor weight, int[] dilations, Tensor pyramid_scale, Tensor pyramid_shift, "
      "Tensor pyramid_slope, Tensor expand_weight, int groups, Tensor shift, Tensor? shortcut_weight, "
      "Tensor? shortcut_shift, Tensor slope, bool hff, Tensor? packed=None) -> Tensor");
  // x [B, M, H, W], weight [N, M/groups, h, w], shift and slope [N] -> [B, N, H', W'] in channels_last
  m.def(
      "convolution(Tensor x, Tensor weight, Tensor? shift, Tensor? slope, int stride, int padding, int dilation, "
      "int groups) -> Tensor");
  // x [B, C, H, W] -> [B, C, H', W'], H' = (H - 1) / 2 + 1: 3x3 means, zeros of the padding counted
  m.def("average_pool(Tensor x) -> Tensor");
  // Bilinear, corners aligned: prelu((resized x [B, C, H, W] + skip * sigmoid(gate)) * scale + shift) -> [B, C, height,
  // width] in channels_last; skip like the result, gate [B, C, 1, 1]
  m.def(
      "resize(Tensor x, SymInt height, SymInt width, Tensor? skip=None, Tensor? gate=None, Tensor? scale=None, "
      "Tensor? shift=None, Tensor? slope=None) -> Tensor");
  // x [B, C, H, W] -> [B, C, height, width] in channels_last
  m.def("adaptive_average(Tensor x, SymInt height, SymInt width) -> Tensor");
  // The branches of efficient pyramid pooling and their merge: x [B, p, H, W] resized to each of S sizes, convolved 3x3
  // depthwise with weight [S, p, 3, 3], resized back, concatenated, scaled, shifted and PReLU [S*p], then mixed by
  // merge_weight [p, S, 3, 3], shift and PReLU [p] -> [B, p, H, W] in channels_last
  m.def(
      "pyramid_pooling(Tensor x, Tensor weight, SymInt[] sizes, int enlarged, Tensor scale, Tensor shift, Tensor "
      "slope, "
      "Tensor merge_weight, Tensor merge_shift, Tensor merge_slope) -> Tensor");
  // x [B, C, H, W] -> [B, C, 1, 1]
  m.def("global_average(Tensor x) -> Tensor");
  // prelu(x [B, C, H, W] * scale + shift + residual, slope) -> [B, C, H, W] in channels_last
  m.def("affine(Tensor x, Tensor? scale, Tensor? shift, Tensor? residual, Tensor? slope) -> Tensor");
  // x [B, C, H, W] copied to channels_last, or to contiguous
  m.def("change_layout(Tensor x, bool channels_last) -> Tensor");
  // torch.cat; maps with 4 dimensions along the channels to channels_last, all others to contiguous
  m.def("concatenate(Tensor[] maps, int dim) -> Tensor");
  // Bilinear, corners aligned: x [B, C, H, W] -> the channel of the largest number of each pixel [B, height, width]; int64
  // where `wide` or C is above 256, else uint8
  m.def("resized_argmax(Tensor x, SymInt height, SymInt width, bool wide=False) -> Tensor");

  // The weights of one call in the order in which the kernels of this machine read them, as bytes for `packed`. A pack
  // that was made for another layout, dtype, size or instruction set is not used: the call packs for itself. A whole unit
  // takes the packs of its reduction and of its pyramid_pointwise, one behind the other.
  m.def("pack_group_pointwise(Tensor weight, int groups, bool channels_last) -> Tensor");
  m.def(
      "pack_pyramid_pointwise(Tensor weight, Tensor pointwise_weight, int groups, Tensor? pyramid_scale, "
      "Tensor? pyramid_shift, Tensor? pyramid_slope, bool channels_last) -> Tensor");
}
