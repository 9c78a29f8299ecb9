// The final norm and the head, for rows whose logits are kept or whose targets' logprobs are wanted.
#include <algorithm>
#include <cstring>

#include "worker.h"

namespace octavo {

// Logits [rows, V] of the wanted rows; ends with a barrier, if there is anything to do.
void Worker::score(const std::vector<WantedRow>& wanted, float* logits) {
  if (wanted.empty()) return;
  const OctavoModel& m = r_.model;
  const int count = static_cast<int>(wanted.size()), n = m.hidden_size;
  const int addend = m.layer_count * OCTAVO_LINEARS;
  x_ = input(count, n, r_.head_in);
  const Range range = alone_ ? Range{0, 1} : share(count, thread_, p_.threads);
  for (int i = range.begin; i < range.end; i++) {
    const int row = wanted[static_cast<size_t>(i)].row;
    float* x = s_.queries.data();
    std::memcpy(x, residual(row), static_cast<size_t>(n) * sizeof(float));
    add_pending(x, row);
    encode(i, segment_of(row), x, &m.final_norm, {addend, 1});
  }
  wanted_ = &wanted;
  rows_ready();
  share_blocks(blocks_of(m.head), m.head.block_bytes, [&](int first, int last) {
    multiply(m.head, {addend, 0}, first, last, logits, m.vocab_size);
    if (m.logits_multiplier == 1.0f && m.final_softcap == 0.0f) return;
    const int begin = first * k_.lanes, end = std::min(last * k_.lanes, m.vocab_size);
    for (int i = 0; i < count && begin < end; i++)
      k_.cap(logits + int64_t{i} * m.vocab_size + begin, end - begin, m.logits_multiplier, m.final_softcap);
  });
  barrier();
}

// Rows to sample from: their places in the runner's logits follow each other.
void Worker::score_sampled() {
  if (p_.sampled.empty()) return;
  score(p_.sampled, r_.logits.data() + int64_t{p_.sampled[0].logits_row} * r_.model.vocab_size);
}

// Logprobs of targets: a few rows of logits at a time, since there may be one for every row of a prompt.
void Worker::score_targets() {
  for (size_t first = 0; first < p_.targeted.size(); first += kTargetRows) {
    const size_t last = std::min(first + kTargetRows, p_.targeted.size());
    const std::vector<WantedRow> rows(p_.targeted.begin() + static_cast<std::ptrdiff_t>(first),
                                      p_.targeted.begin() + static_cast<std::ptrdiff_t>(last));
    score(rows, r_.target_logits.data());
    read_targets(rows);
    barrier();
  }
}

void Worker::read_targets(const std::vector<WantedRow>& rows) {
  const Range range = share(static_cast<int>(rows.size()), thread_, p_.threads);
  for (int i = range.begin; i < range.end; i++) {
    const WantedRow& wanted = rows[static_cast<size_t>(i)];
    const Segment& segment = p_.segments[static_cast<size_t>(wanted.segment)];
    const int offset = segment.start + wanted.row - segment.first_row - segment.chunk->start;
    token_logprob(k_, r_.target_logits.data() + int64_t{i} * r_.model.vocab_size, r_.model.vocab_size,
                  segment.chunk->targets[offset], offset, segment.chunk->prompt,
                  r_.sampling[static_cast<size_t>(thread_)]);
  }
}

}  // namespace octavo
