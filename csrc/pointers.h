// Where the pointers of a problem point to and how far, so that a plan can move them: visitor.map(pointer, bytes) for a
// map that is read, visitor.residual(pointer, bytes) for one that is read just before the result is stored in its place,
// visitor.out(pointer, bytes) for one that is written, the last of them, visitor.vector(pointer, count) for numbers of the
// compute type that never change, visitor.constant(pointer, bytes) for others, visitor.weight(pointer) for weights, which
// kernels read from their prepared copy only.
#pragma once

#include "shapes.h"

namespace espk {

// How far a map reaches, and how much of that is its own: less where it lies between the channels of a wider map.
struct MapBytes {
  int64_t span, own;

  MapBytes(int64_t dense) : span(dense), own(dense) {}
  MapBytes(int64_t span, int64_t own) : span(span), own(own) {}
  operator int64_t() const { return span; }
};

// Bytes of a map of channels_last rows `pixel` elements apart, or of a dense one.
inline MapBytes map_bytes(Type type, int64_t batch, int64_t channels, int64_t pixels, int64_t pixel) {
  const int64_t count = batch * pixels, size = bytes_of(type);
  return {count ? ((count - 1) * pixel + channels) * size : 0, count * channels * size};
}

template <class Visitor>
void visit(Visitor& v, Epilogue& e, int64_t channels, MapBytes residual_bytes) {
  v.vector(e.scale, channels);
  v.vector(e.shift, channels);
  v.vector(e.slope, channels);
  v.residual(e.residual, residual_bytes);
}

template <class Visitor>
void visit(Visitor& v, ImageShortcut& s, Type type, int64_t batch, int64_t channels, int64_t pixels) {
  v.map(s.image, map_bytes(type, batch, s.channels, pixels, s.channels));
  v.constant(s.weight, channels * s.channels * bytes_of(type));
  v.vector(s.shift, channels);
}

template <class Visitor>
void visit_pointers(Visitor& v, SpatialPyramid& p) {
  v.map(p.x, map_bytes(p.type, p.batch, p.channels, p.height * p.width, p.channels));
  v.weight(p.weight);
  visit(v, p.epilogue, p.channels, 0);
  v.out(p.out, map_bytes(p.type, p.batch, p.out_channels(), p.out_height * p.out_width, p.out_pixel));
}

template <class Visitor>
void visit_pointers(Visitor& v, GroupPointwise& p) {
  const MapBytes bytes = map_bytes(p.type, p.batch, p.out_channels, p.pixels, p.out_channels);
  v.map(p.x, map_bytes(p.type, p.batch, p.in_channels, p.pixels, p.in_channels));
  v.weight(p.weight);
  visit(v, p.epilogue, p.out_channels, bytes);
  v.out(p.out, bytes);
}

// All but the map that it reads.
template <class Visitor>
void visit_rest(Visitor& v, PyramidPointwise& p) {
  const MapBytes bytes = map_bytes(p.type, p.batch, p.pointwise_channels, p.out_height * p.out_width, p.out_pixel);
  v.weight(p.weight);
  v.weight(p.pointwise_weight);
  v.weight(p.pyramid_epilogue.scale);
  v.weight(p.pyramid_epilogue.shift);
  v.weight(p.pyramid_epilogue.slope);
  visit(v, p.epilogue, p.pointwise_channels, bytes);
  visit(v, p.shortcut, p.type, p.batch, p.pointwise_channels, p.out_height * p.out_width);
  v.out(p.out, bytes);
}

template <class Visitor>
void visit_pointers(Visitor& v, PyramidPointwise& p) {
  v.map(p.x, map_bytes(p.type, p.batch, p.channels, p.height * p.width, p.channels));
  visit_rest(v, p);
}

template <class Visitor>
void visit_pointers(Visitor& v, Eesp& p) {
  v.map(p.x, map_bytes(p.type, p.batch, p.in_channels, p.height * p.width, p.in_channels));
  v.weight(p.reduce_weight);
  visit(v, p.reduce_epilogue, p.channels, 0);
  visit_rest(v, p);
}

template <class Visitor>
void visit_pointers(Visitor& v, Convolution& p) {
  v.map(p.x, map_bytes(p.type, p.batch, p.in_channels, p.height * p.width, p.in_channels));
  v.weight(p.weight);
  visit(v, p.epilogue, p.out_channels, 0);
  v.out(p.out, map_bytes(p.type, p.batch, p.out_channels, p.out_height * p.out_width, p.out_channels));
}

template <class Visitor>
void visit_pointers(Visitor& v, AveragePool& p) {
  v.map(p.x, map_bytes(p.type, p.batch, p.channels, p.height * p.width, p.channels));
  v.vector(p.slope, p.channels);
  visit(v, p.shortcut, p.type, p.batch, p.channels, p.out_height * p.out_width);
  v.out(p.out, map_bytes(p.type, p.batch, p.channels, p.out_height * p.out_width, p.out_pixel));
}

template <class Visitor>
void visit_pointers(Visitor& v, GlobalAverage& p) {
  v.map(p.x, map_bytes(p.type, p.batch, p.channels, p.pixels, p.channels));
  v.out(p.out, map_bytes(p.type, p.batch, p.channels, 1, p.channels));
}

template <class Visitor>
void visit_pointers(Visitor& v, Resize& p) {
  const int64_t pixels = p.out_height * p.out_width;
  v.map(p.x, map_bytes(p.type, p.batch, p.channels, p.height * p.width, p.channels));
  v.map(p.skip, map_bytes(p.type, p.batch, p.channels, pixels, p.channels));
  v.map(p.gate, map_bytes(p.type, p.batch, p.channels, 1, p.channels));
  visit(v, p.epilogue, p.channels, 0);
  v.out(p.out, map_bytes(p.type, p.batch, p.channels, pixels, p.out_pixel));
}

template <class Visitor>
void visit_pointers(Visitor& v, AdaptiveAverage& p) {
  v.map(p.x, map_bytes(p.type, p.batch, p.channels, p.height * p.width, p.channels));
  visit(v, p.epilogue, p.channels, 0);
  v.out(p.out, map_bytes(p.type, p.batch, p.channels, p.out_height * p.out_width, p.out_pixel));
}

template <class Visitor>
void visit_pointers(Visitor& v, ResizedArgmax& p) {
  v.map(p.x, map_bytes(p.type, p.batch, p.channels, p.height * p.width, p.channels));
  v.out(p.out, p.out_bytes());
}

template <class Visitor>
void visit_pointers(Visitor& v, Affine& p) {
  const MapBytes bytes = map_bytes(p.type, p.batch, p.channels, p.pixels, p.channels);
  v.map(p.x, bytes);
  visit(v, p.epilogue, p.channels, bytes);
  v.out(p.out, bytes);
}

template <class Visitor>
void visit_pointers(Visitor& v, ChangeLayout& p) {
  const MapBytes bytes = map_bytes(p.type, p.batch, p.rows, p.columns, p.rows);
  v.map(p.x, bytes);
  v.out(p.out, bytes);
}

template <class Visitor>
void visit_pointers(Visitor& v, Concatenate& p) {
  v.map(p.x, map_bytes(p.type, 1, p.row, p.rows, p.row));
  v.out(p.out, map_bytes(p.type, 1, p.row, p.rows, p.out_row));
}

template <class Visitor>
void visit_pointers(Visitor& v, GroupedConvolution& p) {
  v.map(p.x, map_bytes(p.type, p.batch, p.in_channels(), p.height * p.width, p.in_channels()));
  v.weight(p.weight);
  v.weight(p.epilogue.scale);
  v.weight(p.epilogue.shift);
  v.weight(p.epilogue.slope);
  v.out(p.out, map_bytes(p.type, p.batch, p.out_channels(), p.height * p.width, p.out_channels()));
}

template <class Visitor>
void visit_pointers(Visitor& v, PyramidPooling& p) {
  auto weights = [&](const void*& weight, Epilogue& epilogue) {
    v.weight(weight);
    v.weight(epilogue.scale);
    v.weight(epilogue.shift);
    v.weight(epilogue.slope);
  };
  for (int64_t k = 0; k < p.branches(); ++k) {
    PooledBranch& b = p.branch[k];
    v.map(b.x, map_bytes(p.type, p.batch, p.channels(), p.pixels_of(b), p.channels()));
    weights(b.weight, b.epilogue);
  }
  weights(p.weight, p.epilogue);
  v.out(p.out, map_bytes(p.type, p.batch, p.channels(), p.height * p.width, p.channels()));
}

}  // namespace espk
