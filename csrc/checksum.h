// The payload checksum, version 1: a sum over 16-byte lanes, each mixed with its position. Lanes may be summed in any
// order and by any number of threads. Formula, constants and what it detects: docs/design.md.
#pragma once

#include "launch.h"

namespace lmc {

constexpr u32 kLaneBytes = 16;

constexpr u64 kLowKey = 0xBBB03F7D4E2B280B, kLowStep = 0x9E3779B97F4A7C15;
constexpr u64 kHighKey = 0x96A5B51F8EFAD769, kHighStep = 0x6A09E667F3BCC909;
constexpr u64 kHighFactor = 0x12DE34EC4F9BA061;
constexpr u64 kLengthFactor = 0xF0F7D78E3E3EAFAD;

LMC_HOST_DEVICE u64 multiply_halves(u64 x) { return (x & 0xFFFFFFFF) * (x >> 32); }

// The two sums over lanes that make a checksum.
struct LaneSums {
  u64 low = 0;
  u64 high = 0;

  // Adds lane `index`, whose 16 bytes are the little-endian words `a` and `b`; a last lane of fewer bytes is filled up
  // with zeros.
  LMC_HOST_DEVICE void add(u64 index, u64 a, u64 b) {
    low += multiply_halves(a ^ (kLowKey + index * kLowStep)) + b;
    high += multiply_halves(b ^ (kHighKey + index * kHighStep)) + a;
  }
  LMC_HOST_DEVICE u64 total() const { return low + high * kHighFactor; }
};

// The term of the payload's length, so that trailing zero bytes count.
LMC_HOST_DEVICE u64 checksum_length(u64 bytes) { return bytes * kLengthFactor; }

}  // namespace lmc
