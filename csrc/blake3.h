// BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020): the compression function on host and device, and on the
// host whole hashes of short byte strings. Names follow the paper, except that its "chunk" of 1024 bytes is a "leaf"
// here: a chunk in this library is a run of tokens.
#pragma once

#include <cstring>
#include <string_view>

#include "launch.h"

namespace lmc::blake3 {

constexpr u32 kKeyWords = 8;
constexpr u32 kBlockWords = 16;
constexpr u32 kBlockBytes = 64;
constexpr u32 kLeafBytes = 1024;
constexpr u32 kLeafBlocks = kLeafBytes / kBlockBytes;

constexpr u32 kLeafStart = 1, kLeafEnd = 2, kParent = 4, kRoot = 8;
constexpr u32 kKeyedHash = 16, kDeriveKeyContext = 32, kDeriveKeyMaterial = 64;

constexpr u32 kIv0 = 0x6A09E667, kIv1 = 0xBB67AE85, kIv2 = 0x3C6EF372, kIv3 = 0xA54FF53A;
constexpr u32 kIv4 = 0x510E527F, kIv5 = 0x9B05688C, kIv6 = 0x1F83D9AB, kIv7 = 0x5BE0CD19;

// The arguments of one compression. A root node gives any 64-byte block of its extended output, see `compress`.
struct Node {
  u32 cv[kKeyWords];
  u32 block[kBlockWords];
  u64 counter;
  u32 block_bytes;
  u32 flags;
};

LMC_HOST_DEVICE u32 rotate_right(u32 x, int n) { return (x >> n) | (x << (32 - n)); }

LMC_HOST_DEVICE void mix(u32& a, u32& b, u32& c, u32& d, u32 x, u32 y) {
  a += b + x;
  d = rotate_right(d ^ a, 16);
  c += d;
  b = rotate_right(b ^ c, 12);
  a += b + y;
  d = rotate_right(d ^ a, 8);
  c += d;
  b = rotate_right(b ^ c, 7);
}

// Runs the seven rounds and leaves the 16 words of state in `v`, before the feed-forward.
LMC_HOST_DEVICE void rounds(u32 v[16], const u32 cv[kKeyWords], const u32 block[kBlockWords], u64 counter,
                            u32 block_bytes, u32 flags) {
  u32 m[16];
  LMC_UNROLL
  for (int i = 0; i < 16; ++i) m[i] = block[i];
  LMC_UNROLL
  for (int i = 0; i < 8; ++i) v[i] = cv[i];
  v[8] = kIv0, v[9] = kIv1, v[10] = kIv2, v[11] = kIv3;
  v[12] = static_cast<u32>(counter), v[13] = static_cast<u32>(counter >> 32);
  v[14] = block_bytes, v[15] = flags;
  LMC_UNROLL
  for (int round = 0; round < 7; ++round) {
    mix(v[0], v[4], v[8], v[12], m[0], m[1]);
    mix(v[1], v[5], v[9], v[13], m[2], m[3]);
    mix(v[2], v[6], v[10], v[14], m[4], m[5]);
    mix(v[3], v[7], v[11], v[15], m[6], m[7]);
    mix(v[0], v[5], v[10], v[15], m[8], m[9]);
    mix(v[1], v[6], v[11], v[12], m[10], m[11]);
    mix(v[2], v[7], v[8], v[13], m[12], m[13]);
    mix(v[3], v[4], v[9], v[14], m[14], m[15]);
    // The message permutation; unrolled, it only renames registers.
    const u32 p[16] = {m[2], m[6],  m[3],  m[10], m[7], m[0],  m[4],  m[13],
                       m[1], m[11], m[12], m[5],  m[9], m[14], m[15], m[8]};
    LMC_UNROLL
    for (int i = 0; i < 16; ++i) m[i] = p[i];
  }
}

// The chaining value of a node; `out` may be `cv`.
LMC_HOST_DEVICE void compress_cv(u32 out[kKeyWords], const u32 cv[kKeyWords], const u32 block[kBlockWords], u64 counter,
                                 u32 block_bytes, u32 flags) {
  u32 v[16];
  rounds(v, cv, block, counter, block_bytes, flags);
  LMC_UNROLL
  for (int i = 0; i < 8; ++i) out[i] = v[i] ^ v[i + 8];
}

// Block `counter` (64 bytes) of the extended output of a root node.
LMC_HOST_DEVICE void extended_output(u32 out[kBlockWords], const Node& root, u64 counter) {
  u32 v[16];
  rounds(v, root.cv, root.block, counter, root.block_bytes, root.flags | kRoot);
  LMC_UNROLL
  for (int i = 0; i < 8; ++i) {
    out[i] = v[i] ^ v[i + 8];
    out[i + 8] = v[i + 8] ^ root.cv[i];
  }
}

// The chaining value of the parent of `left` and `right`; `out` may be either of them.
LMC_HOST_DEVICE void parent_cv(u32 out[kKeyWords], const u32 left[kKeyWords], const u32 right[kKeyWords],
                               const u32 key[kKeyWords], u32 flags) {
  u32 block[kBlockWords];
  LMC_UNROLL
  for (int i = 0; i < 8; ++i) {
    block[i] = left[i];
    block[i + 8] = right[i];
  }
  compress_cv(out, key, block, 0, kBlockBytes, flags | kParent);
}

// --- Host only: whole hashes of byte strings. Words are copied as bytes: every machine this builds for is
// little-endian.

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the key format is little-endian");

inline void copy_cv(u32 out[kKeyWords], const u32 cv[kKeyWords]) { std::memcpy(out, cv, 4 * kKeyWords); }

inline Node leaf_node(const u32 key[kKeyWords], u32 flags, std::string_view bytes, u64 counter) {
  Node node{};
  copy_cv(node.cv, key);
  node.counter = counter;
  u32 start = kLeafStart;
  while (bytes.size() > kBlockBytes) {
    u32 block[kBlockWords];
    std::memcpy(block, bytes.data(), kBlockBytes);
    compress_cv(node.cv, node.cv, block, counter, kBlockBytes, flags | start);
    bytes.remove_prefix(kBlockBytes);
    start = 0;
  }
  if (!bytes.empty()) std::memcpy(node.block, bytes.data(), bytes.size());
  node.block_bytes = static_cast<u32>(bytes.size());
  node.flags = flags | start | kLeafEnd;
  return node;
}

// The node above `bytes`, which begin at leaf `counter`: the root node of a whole input. `counter` of a root is 0.
inline Node subtree_node(const u32 key[kKeyWords], u32 flags, std::string_view bytes, u64 counter = 0) {
  if (bytes.size() <= kLeafBytes) return leaf_node(key, flags, bytes, counter);
  u64 left_leaves = 1;
  while (2 * left_leaves * kLeafBytes < bytes.size()) left_leaves *= 2;
  const Node left = subtree_node(key, flags, bytes.substr(0, left_leaves * kLeafBytes), counter);
  const Node right = subtree_node(key, flags, bytes.substr(left_leaves * kLeafBytes), counter + left_leaves);
  Node node{};
  copy_cv(node.cv, key);
  compress_cv(node.block, left.cv, left.block, left.counter, left.block_bytes, left.flags);
  compress_cv(node.block + kKeyWords, right.cv, right.block, right.counter, right.block_bytes, right.flags);
  node.block_bytes = kBlockBytes;
  node.flags = flags | kParent;
  return node;
}

// The first 32 bytes of output, as words.
inline void hash(u32 out[kKeyWords], const u32 key[kKeyWords], u32 flags, std::string_view bytes) {
  const Node root = subtree_node(key, flags, bytes);
  compress_cv(out, root.cv, root.block, 0, root.block_bytes, root.flags | kRoot);
}

// The key of a derive_key context, made once and reused for every material.
struct ContextKey {
  u32 words[kKeyWords];
  explicit ContextKey(std::string_view context) {
    const u32 iv[kKeyWords] = {kIv0, kIv1, kIv2, kIv3, kIv4, kIv5, kIv6, kIv7};
    hash(words, iv, kDeriveKeyContext, context);
  }
};

}  // namespace lmc::blake3
