// philox: random numbers as a function of (seed, position, sample), and of nothing else.
//
// Philox4x32-10 of Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3"
// (2011). key = seed, counter = (position low, position high, stream, sample); the first two words
// are the 64-bit uniform. Streams keep uses apart that share a seed and a position.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace pyllmtune {

constexpr uint32_t kDrawStream = 0;  // tokens of `sample`

struct Philox {
  uint32_t word[4];
};

PLT_HD Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

PLT_HD uint64_t uniform_of(int64_t seed, int64_t position, uint32_t sample) {
  const uint64_t key = static_cast<uint64_t>(seed), counter = static_cast<uint64_t>(position);
  const Philox out =
      philox(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), kDrawStream,
             sample, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  return static_cast<uint64_t>(out.word[1]) << 32 | out.word[0];
}

}  // namespace pyllmtune
