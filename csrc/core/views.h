// Plain views of memory that the caller owns. No ownership, no allocation.
#pragma once

#include <cstdint>

namespace onp {

// B masks over S sites, one bit a site, set = pruned: word s / 64, bit s % 64.
// The Python owner of this layout is onp/masks.py.
struct MaskView {
  const std::uint64_t* words;  // [B, words_per_mask]
  std::int64_t batch;
  std::int64_t words_per_mask;

  bool pruned(std::int64_t mask, std::int64_t site) const {
    return (words[mask * words_per_mask + (site >> 6)] >> (site & 63)) & 1u;
  }
};

// A graph of N nodes in compressed sparse rows: the neighbours of node n are
// indices[indptr[n]] .. indices[indptr[n + 1] - 1].
struct CsrView {
  const std::int64_t* indptr;   // [N + 1]
  const std::int64_t* indices;  // [E]
  std::int64_t nodes;
};

}  // namespace onp
