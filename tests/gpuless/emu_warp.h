// emu_warp: what a warp operation gives each lane, once all lanes of its mask have arrived.
//
//   results(requests of 32 lanes, mask) -> a result for each lane of the mask
//
// Follows the PTX definitions of shfl.sync, vote.sync, match.any.sync and redux.sync.
// Reading a lane outside the mask is undefined on a GPU and a fault here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace emu {

// A mistake in the kernel or its launch that the emulator noticed.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class WarpOp {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kMatchAny,
  kReduceAdd,
  kReduceMinUnsigned,
  kReduceMaxUnsigned,
  kReduceMinSigned,
  kReduceMaxSigned,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
};

struct WarpRequest {
  WarpOp op = WarpOp::kSync;
  unsigned mask = 0;
  uint64_t value = 0;    // the lane's operand; for a ballot 0 or 1
  unsigned operand = 0;  // source lane, distance or xor mask of a shuffle
  unsigned width = 32;   // a shuffle stays within groups of this many lanes
};

inline bool in_mask(unsigned mask, unsigned lane) { return mask >> lane & 1; }

inline unsigned shuffle_source(const WarpRequest& request, unsigned lane) {
  const unsigned first = lane & ~(request.width - 1), end = first + request.width;
  switch (request.op) {
    case WarpOp::kShuffle:
      return first + (request.operand & (request.width - 1));
    case WarpOp::kShuffleUp:
      return lane - first >= request.operand ? lane - request.operand : lane;
    case WarpOp::kShuffleDown:
      return end - lane > request.operand ? lane + request.operand : lane;
    default:
      return (lane ^ request.operand) < end ? lane ^ request.operand : lane;
  }
}

inline uint32_t reduce_pair(WarpOp op, uint32_t a, uint32_t b) {
  const auto sa = static_cast<int32_t>(a), sb = static_cast<int32_t>(b);
  switch (op) {
    case WarpOp::kReduceAdd:
      return a + b;
    case WarpOp::kReduceMinUnsigned:
      return std::min(a, b);
    case WarpOp::kReduceMaxUnsigned:
      return std::max(a, b);
    case WarpOp::kReduceMinSigned:
      return static_cast<uint32_t>(std::min(sa, sb));
    case WarpOp::kReduceMaxSigned:
      return static_cast<uint32_t>(std::max(sa, sb));
    case WarpOp::kReduceAnd:
      return a & b;
    case WarpOp::kReduceOr:
      return a | b;
    default:
      return a ^ b;
  }
}

// `request_of(lane)` is valid for each lane of `mask`, and all of them ask for the same operation.
template <class RequestOf>
uint64_t warp_result(const RequestOf& request_of, unsigned mask, unsigned lane) {
  const WarpRequest& own = request_of(lane);
  unsigned lanes = 0;
  uint32_t total = 0;
  switch (own.op) {
    case WarpOp::kSync:
      return 0;
    case WarpOp::kShuffle:
    case WarpOp::kShuffleUp:
    case WarpOp::kShuffleDown:
    case WarpOp::kShuffleXor: {
      const unsigned source = shuffle_source(own, lane);
      if (source > 31 || !in_mask(mask, source))
        throw Fault("lane " + std::to_string(lane) + " shuffles from lane " +
                    std::to_string(source) + ", which is not in the mask");
      return request_of(source).value;
    }
    case WarpOp::kBallot:
      for (unsigned j = 0; j < 32; ++j)
        if (in_mask(mask, j) && request_of(j).value) lanes |= 1u << j;
      return lanes;
    case WarpOp::kMatchAny:
      for (unsigned j = 0; j < 32; ++j)
        if (in_mask(mask, j) && request_of(j).value == own.value) lanes |= 1u << j;
      return lanes;
    default:
      for (unsigned j = 0, first = 1; j < 32; ++j)
        if (in_mask(mask, j)) {
          const auto value = static_cast<uint32_t>(request_of(j).value);
          total = first ? value : reduce_pair(own.op, total, value);
          first = 0;
        }
      return total;
  }
}

}  // namespace emu
