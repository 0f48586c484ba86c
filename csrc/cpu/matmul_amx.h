// Products of bfloat16 by the tile registers of AMX, where the CPU and the system have them.
//
// A register holds 16 rows of 64 bytes: of A 16 rows of 32 numbers along k, of B 16 pairs of k of
// 16 columns, of C 16 x 16 float32. Two of A and two of B make four of C, 32 x 32, in 64 cycles for
// four loads of 1 KiB. Rows and columns that are not there are packed as zeros. An element of C is
// one chain of pairs in the order of k inside a block of k, as in matmul.h.
#pragma once

#include "matmul_pack.h"

namespace pyllmtune {
constexpr int64_t kFour = 32;  // rows and columns of C at a time
}

#if defined(__AVX512F__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace pyllmtune {

// The CPU has AMX with bfloat16, the system lets this process use it, and PYLLMTUNE_AMX is not 0.
inline bool multiplies_tiles() {
  static const bool allowed = [] {
    const char* wish = std::getenv("PYLLMTUNE_AMX");
    if (wish != nullptr && std::strcmp(wish, "0") == 0) return false;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for all threads
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return allowed;
}

constexpr int kTileSide = 16;                          // rows, and columns of 4 bytes
constexpr int64_t kTileUnits = kTileSide * kTileSide;  // of 4 bytes
constexpr int64_t kTileK = 2 * kTileSide;              // numbers along k

// What ldtilecfg reads: eight registers of 16 rows of 64 bytes.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

#define PLT_TILE_TARGET __attribute__((target("amx-tile,amx-bf16")))

// Rows of x, k along its columns, in panels of 16 rows: out [panels, steps, 16 pairs of k, 16
// rows], zeros where there is nothing.
inline void pack_pairs(Operand<Bf16> x, int64_t rows, int64_t columns, int64_t panels,
                       Bf16Pair* out) {
  const int64_t depth = (columns + 1) / 2, size = (columns + kTileK - 1) / kTileK * kTileUnits;
  for (int64_t first = 0; first < panels * kTileSide; first += kTileSide, out += size) {
    const int64_t here = std::clamp<int64_t>(rows - first, 0, kTileSide);
    if (here > 0)
      pack<kTileSide, Bf16Pair>(
          Operand<Bf16>{x.at + first * x.row_stride, x.row_stride, x.column_stride}, here, columns,
          out);
    const int64_t filled = here > 0 ? depth * kTileSide : 0;
    std::memset(static_cast<void*>(out + filled), 0, (size - filled) * sizeof(Bf16Pair));
  }
}

// The same as tiles of A: out [panels, steps, 16 rows, 16 pairs of k].
inline void pack_rows(Operand<Bf16> x, int64_t rows, int64_t columns, int64_t panels,
                      Bf16Pair* out) {
  const int64_t steps = (columns + kTileK - 1) / kTileK;
  if (x.column_stride != 1) {
    pack_pairs(x, rows, columns, panels, out);
    for (Bf16Pair* tile = out; tile < out + panels * steps * kTileUnits; tile += kTileUnits) {
      float* at = reinterpret_cast<float*>(tile);
      F32x16 block[kTileSide];
      for (int i = 0; i < kTileSide; ++i) block[i] = load(at + i * kTileSide);
      transpose(block);
      for (int i = 0; i < kTileSide; ++i) store(at + i * kTileSide, block[i]);
    }
    return;
  }
  for (int64_t first = 0; first < panels * kTileSide; first += kTileSide)
    for (int64_t k = 0; k < columns; k += kTileK)
      for (int64_t row = first; row < first + kTileSide; ++row, out += kTileSide) {
        const int64_t here = row < rows ? std::min(kTileK, columns - k) : 0;
        std::memcpy(static_cast<void*>(out), x.at + std::min(row, rows - 1) * x.row_stride + k,
                    here * sizeof(Bf16));
        std::memset(reinterpret_cast<Bf16*>(out) + here, 0, (kTileK - here) * sizeof(Bf16));
      }
}

// 32 x 32 of C over `steps` tiles of k; a and b are two panels each.
PLT_TILE_TARGET inline void multiply_four_tiles(const Bf16Pair* a, const Bf16Pair* b, int64_t steps,
                                                float* out) {
  const Bf16Pair *a1 = a + steps * kTileUnits, *b1 = b + steps * kTileUnits;
  constexpr long kBytes = kTileSide * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t at = 0; at < steps * kTileUnits; at += kTileUnits) {
    _tile_loadd(4, a + at, kBytes);
    _tile_loadd(6, b + at, kBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1 + at, kBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + at, kBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 2 * kBytes);
  _tile_stored(1, out + kTileSide, 2 * kBytes);
  _tile_stored(2, out + 2 * kTileUnits, 2 * kBytes);
  _tile_stored(3, out + 2 * kTileUnits + kTileSide, 2 * kBytes);
}

static_assert(kFour == 2 * kTileSide);
constexpr int64_t kTileBlockK = 512, kTileBlockRows = 384;

PLT_TILE_TARGET inline void multiply_block_tiles(Operand<Bf16> a, Operand<Bf16> b, float* c,
                                                 int64_t stride, int64_t rows, int64_t columns,
                                                 int64_t inner, bool add) {
  static thread_local std::vector<Bf16Pair> packed_a, packed_b;
  const int64_t most = (std::min(inner, kTileBlockK) + kTileK - 1) / kTileK * kTileUnits;
  packed_a.resize(parts(std::min(rows, kTileBlockRows), kFour) * 2 * most + kTileSide);
  packed_b.resize(parts(columns, kFour) * 2 * most + kTileSide);
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  alignas(64) float four[kFour * kFour];
  for (int64_t k = 0; k < inner; k += kTileBlockK) {
    const int64_t block = std::min(kTileBlockK, inner - k), steps = (block + kTileK - 1) / kTileK;
    const Operand<Bf16> bt = b.transposed();
    pack_pairs({bt.at + k * bt.column_stride, bt.row_stride, bt.column_stride}, columns, block,
               2 * parts(columns, kFour), packed_b.data());
    const bool grows = add || k > 0;
    for (int64_t i0 = 0; i0 < rows; i0 += kTileBlockRows) {
      const int64_t height = std::min(kTileBlockRows, rows - i0);
      pack_rows({a.at + i0 * a.row_stride + k * a.column_stride, a.row_stride, a.column_stride},
                height, block, 2 * parts(height, kFour), packed_a.data());
      asm volatile("" ::: "memory");  // tile loads do not say that they read memory
      for (int64_t j = 0; j < columns; j += kFour)
        for (int64_t i = 0; i < height; i += kFour) {
          multiply_four_tiles(packed_a.data() + i * steps * kTileSide,
                              packed_b.data() + j * steps * kTileSide, steps, four);
          const int64_t m = std::min(kFour, height - i), n = std::min(kFour, columns - j);
          for (int64_t row = 0; row < m; ++row) {
            float* to = c + (i0 + i + row) * stride + j;
            const float* from = four + row * kFour;
            if (n == kFour)
              for (int64_t x = 0; x < kFour; x += 16)
                store(to + x, grows ? load(to + x) + load(from + x) : load(from + x));
            else
              for (int64_t x = 0; x < n; ++x) to[x] = grows ? to[x] + from[x] : from[x];
          }
        }
    }
  }
  _tile_release();
}

}  // namespace pyllmtune

#else

namespace pyllmtune {

inline bool multiplies_tiles() { return false; }
inline void multiply_block_tiles(Operand<Bf16>, Operand<Bf16>, float*, int64_t, int64_t, int64_t,
                                 int64_t, bool) {}

}  // namespace pyllmtune

#endif
