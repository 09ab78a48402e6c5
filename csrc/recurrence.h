// The problems of a recurrent layer: all steps of a chunk in one call, forward and backward.
//
//   i, f, g, o = gates[t] + weight h[t-1] + bias, each of H numbers; i, f, o through sigmoid, g through tanh
//   c[t] = f c[t-1] + i g,  h[t] = o tanh(c[t])
//
// Arrays are dense, [T, B, ...] with the steps outermost. A row of the batch never sees another, so rows are the units of
// work and no step waits for a thread.
#pragma once

#include "shapes.h"

namespace espk {

struct Recurrence {
  Type type;
  int64_t steps, batch, hidden;  // T, B, H
  const void* gates;  // [T, B, 4 H]
  const void* weight;  // [4 H, H]
  const void* bias;  // [4 H] in the compute type, or null
  const void *first_hidden, *first_cell;  // [B, H], those before the first step
  void* out;  // h [T, B, H]
  void* last_cell;  // [B, H]
  void *activated, *cells;  // i, f, g, o [T, B, 4 H] and c [T, B, H] for the backward pass, or both null

  int64_t multiply_adds() const { return steps * batch * 4 * hidden * hidden; }
};

struct RecurrenceBackward {
  Type type;
  int64_t steps, batch, hidden;
  const void* grad;  // of out
  const void* grad_last_cell;  // or null
  const void *activated, *cells, *first_cell, *weight;
  void* grad_gates;  // [T, B, 4 H]
  void *grad_first_hidden, *grad_first_cell;

  int64_t multiply_adds() const { return steps * batch * 4 * hidden * hidden; }
};

}  // namespace espk
