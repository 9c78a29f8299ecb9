// What one pass through the model computes: rows of activations, from one or more chunks, in order.
// pass.cpp cuts a batch into passes; worker.h is a thread's way through one.
#pragma once
#include <atomic>
#include <vector>

#include "../runner.h"

namespace octavo {

// Consecutive rows of the pass that belong to one chunk.
struct Segment {
  const OctavoChunk* chunk;
  const OctavoAdapter* adapter;  // of its slot; null: none
  int first_row;
  int rows;
  int start;          // position of the first row
  int partial_block;  // where its blocks lie in the runner's partials, if it is a single row
};

// A piece of attention: queries of a segment against one block of keys (of a single row) or all they see.
struct AttendUnit {
  int segment;
  int first_row;  // within the segment
  int rows;
  int block;  // -1: all
};

// A row whose logits are wanted, to sample from or for a target's logprob.
struct WantedRow {
  int row;
  int segment;
  int logits_row;  // of the runner's logits; -1: a target's
};

struct Pass {
  explicit Pass(OctavoRunner& runner) : r(runner) {}
  OctavoRunner& r;
  int rows = 0;
  int threads = 1;
  int rank = 0;  // the largest of the batch's adapters, 0: there are none
  std::vector<Segment> segments;
  std::vector<int> segment_of;                 // [rows]
  std::vector<std::vector<AttendUnit>> units;  // [kv_groups]
  std::vector<WantedRow> sampled, targeted;
  // Blocks are claimed, not assigned, so that a slow core takes fewer; a counter is cleared two stages ahead.
  std::atomic<int> claims[4] = {};
};

struct Range {
  int begin, end;
};
inline Range share(int n, int thread, int threads) {
  return {static_cast<int>(static_cast<int64_t>(n) * thread / threads),
          static_cast<int>(static_cast<int64_t>(n) * (thread + 1) / threads)};
}

inline int first_visible(int position, int window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

}  // namespace octavo
