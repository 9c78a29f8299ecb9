// From chunks to passes: cuts a batch where rows run out, plans the units of attention, runs the threads.
#include "pass.h"

#include <algorithm>
#include <chrono>

#include "worker.h"

namespace octavo {
namespace {

void add_units(Pass& pass) {
  constexpr int kUnitTokens = 16;
  const OctavoRunner& r = pass.r;
  pass.units.assign(static_cast<size_t>(r.model.kv_groups), {});
  std::vector<bool> seen(static_cast<size_t>(r.model.kv_groups), false);
  for (const LayerState& layer : r.layers) {
    const auto group = static_cast<size_t>(layer.spec.kv_group);
    if (seen[group]) continue;
    seen[group] = true;
    for (size_t i = 0; i < pass.segments.size(); i++) {
      const Segment& segment = pass.segments[i];
      const int index = static_cast<int>(i);
      if (segment.rows > 1) {
        for (int row = 0; row < segment.rows; row += kUnitTokens)
          pass.units[group].push_back({index, row, std::min(kUnitTokens, segment.rows - row), -1});
        continue;
      }
      for (int block = first_visible(segment.start, layer.spec.window) / kBlockTokens;
           block <= segment.start / kBlockTokens; block++)
        pass.units[group].push_back({index, 0, 1, block});
    }
  }
}

void run_pass(Pass& pass) {
  OctavoRunner& r = pass.r;
  if (pass.rows == 0) return;
  int blocks = 0;
  for (Segment& segment : pass.segments) {
    if (segment.rows > 1) continue;
    segment.partial_block = blocks;
    blocks += segment.start / kBlockTokens + 1;
  }
  r.partial_out.grow(static_cast<size_t>(blocks) * static_cast<size_t>(r.mixed));
  r.partial_state.grow(static_cast<size_t>(blocks) * 2 * static_cast<size_t>(r.max_heads));
  const size_t targets = std::min<size_t>(pass.targeted.size(), kTargetRows);
  r.target_logits.grow(targets * static_cast<size_t>(r.model.vocab_size));
  add_units(pass);

  int size_class = 0;
  while (pass.rows >> (size_class + 1) && size_class < 15) size_class++;
  Governor& governor = r.governors[size_class];
  pass.threads = governor.choose(r.pool->threads());
  const auto begin = std::chrono::steady_clock::now();
  r.pool->run(pass.threads, [](void* p, int thread) { Worker(*static_cast<Pass*>(p), thread).run(); }, &pass);
  governor.report(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / pass.rows);

  pass.rows = 0;
  pass.segments.clear();
  pass.segment_of.clear();
  pass.sampled.clear();
  pass.targeted.clear();
  for (std::atomic<int>& claim : pass.claims) claim.store(0);
}

void add_segment(Pass& pass, const OctavoChunk& chunk, int offset, int rows) {
  const int index = static_cast<int>(pass.segments.size());
  const OctavoAdapter* adapter = pass.r.slots[static_cast<size_t>(chunk.slot)].adapter;
  pass.segments.push_back({&chunk, adapter, pass.rows, rows, chunk.start + offset, 0});
  pass.segment_of.insert(pass.segment_of.end(), static_cast<size_t>(rows), index);
  if (chunk.targets)
    for (int i = 0; i < rows; i++)
      if (chunk.targets[offset + i] >= 0) pass.targeted.push_back({pass.rows + i, index, -1});
  const int first_kept = chunk.tokens - 1 - chunk.drafts;
  for (int i = std::max(0, first_kept - offset); chunk.sample && i < rows; i++) {
    Slot& slot = pass.r.slots[static_cast<size_t>(chunk.slot)];
    if (offset + i == first_kept) slot.logits_row = pass.r.logits_rows;
    pass.sampled.push_back({pass.rows + i, index, pass.r.logits_rows++});
  }
  pass.rows += rows;
}

}  // namespace

void forward(OctavoRunner& r, const OctavoChunk* chunks, int count) {
  r.logits_rows = 0;
  size_t kept = 0;
  for (int i = 0; i < count; i++) kept += chunks[i].sample ? static_cast<size_t>(chunks[i].drafts) + 1 : 0;
  r.logits.grow(kept * static_cast<size_t>(r.model.vocab_size));
  for (Slot& slot : r.slots) slot.logits_row = -1;
  Pass pass(r);
  for (int i = 0; i < count; i++)
    if (const OctavoAdapter* adapter = r.slots[static_cast<size_t>(chunks[i].slot)].adapter)
      pass.rank = std::max(pass.rank, adapter->rank);
  if (pass.rank) {
    const size_t rows = static_cast<size_t>(std::max(r.model.row_capacity, kTargetRows));
    r.lowered.grow(rows * kLowered * static_cast<size_t>(pass.rank));
    r.up.grow(rows * static_cast<size_t>(r.fed));
    for (Scratch& s : r.scratch) s.lowered.grow(kLowered * static_cast<size_t>(pass.rank));
  }
  for (int i = 0; i < count; i++) {
    for (int done = 0; done < chunks[i].tokens;) {
      const int rows = std::min(chunks[i].tokens - done, r.model.row_capacity - pass.rows);
      add_segment(pass, chunks[i], done, rows);
      done += rows;
      if (pass.rows == r.model.row_capacity) run_pass(pass);
    }
  }
  run_pass(pass);
}

}  // namespace octavo
