// Content ids: what prompt positions are called once the items that cover them have overwritten their token ids.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "blake3.h"

namespace lmc {

constexpr u64 kOverwritten = u64{1} << 63;
constexpr u64 kTokenIdEnd = u64{1} << 32;
constexpr u32 kLanesPerBlock = blake3::kBlockBytes / 8;

// One image, video or audio, as kernels see it: the root node of its extended output and the positions it covers.
struct ItemSpan {
  blake3::Node root;
  u64 offset;
  u64 end;
};

// Eight lanes of an item: `lane(item, 8 * block + k)` for k in [0, 8).
LMC_HOST_DEVICE void lane_block(u64 lanes[kLanesPerBlock], const ItemSpan& item, u64 block) {
  u32 words[blake3::kBlockWords];
  blake3::extended_output(words, item.root, block);
  LMC_UNROLL
  for (u32 k = 0; k < kLanesPerBlock; ++k) lanes[k] = words[2 * k] | static_cast<u64>(words[2 * k + 1]) << 32;
}

// --- Host only: items as they come from a caller.

struct Item {
  std::string modality;    // UTF-8
  std::string identifier;  // UTF-8
  u64 offset;
  u64 length;
};

// The items of a prompt in the order of the items chain: spans[i] is an item, chain[i] is T after the first i items.
struct ItemTable {
  std::vector<ItemSpan> spans;
  std::vector<std::array<u32, blake3::kKeyWords>> chain;

  explicit ItemTable(const std::vector<Item>& items) {
    static const blake3::ContextKey item_context("lmcache_mm v1 item");
    static const blake3::ContextKey digest_context("lmcache_mm v1 item digest");
    static const blake3::ContextKey chain_context("lmcache_mm v1 items");
    struct Entry {
      u64 offset, length;
      std::array<u8, 32> digest;
      blake3::Node root;
      auto order() const { return std::tie(offset, length, digest); }
    };
    std::vector<Entry> entries;
    entries.reserve(items.size());
    std::string material;
    for (const Item& item : items) {
      material.clear();
      append_field(material, item.modality);
      append_field(material, item.identifier);
      Entry entry{item.offset, item.length, {}, {}};
      entry.root = blake3::subtree_node(item_context.words, blake3::kDeriveKeyMaterial, material);
      u32 digest[blake3::kKeyWords];
      blake3::hash(digest, digest_context.words, blake3::kDeriveKeyMaterial, material);
      std::memcpy(entry.digest.data(), digest, 32);
      entries.push_back(entry);
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.order() < b.order(); });
    spans.reserve(entries.size());
    chain.reserve(entries.size() + 1);
    chain.push_back({});
    for (const Entry& entry : entries) {
      const u64 end = entry.length > ~u64{0} - entry.offset ? ~u64{0} : entry.offset + entry.length;
      spans.push_back({entry.root, entry.offset, end});
      char link[32 + 32 + 8 + 8];
      std::memcpy(link, chain.back().data(), 32);
      std::memcpy(link + 32, entry.digest.data(), 32);
      std::memcpy(link + 64, &entry.offset, 8);
      std::memcpy(link + 72, &entry.length, 8);
      chain.emplace_back();
      blake3::hash(chain.back().data(), chain_context.words, blake3::kDeriveKeyMaterial, {link, sizeof link});
    }
  }

  // How many items begin before position `end`: the items that T of a prefix of `end` tokens covers.
  std::size_t begun_before(u64 end) const {
    return std::partition_point(spans.begin(), spans.end(), [end](const ItemSpan& s) { return s.offset < end; }) -
           spans.begin();
  }

 private:
  static void append_field(std::string& out, const std::string& field) {
    const u32 bytes = static_cast<u32>(field.size());
    out.append(reinterpret_cast<const char*>(&bytes), 4);
    out.append(field);
  }
};

}  // namespace lmc
