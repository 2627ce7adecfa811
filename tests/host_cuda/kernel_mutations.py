"""What is taken away from the kernels."""

from __future__ import annotations

from mutation import COPY, ERROR, FAILURES, KEYS, SPAN, TABLE, WARP, Mutation, call

XOR_SHUFFLE = "__shfl_xor_sync(kAllLanes, value, step)"
EXCEPTION_SHUFFLE = "__shfl_sync(kAllLanes, n < kWarp ? first : second, n % kWarp)"
IN_PAGES = "in_pages(copy, work, tile.raw + lane)"
NO_TILE = "if (tile.lanes == 0) return;"
SUMMED = "ring.summed[stage].wait(begun / kStages - 1);"
PAYLOAD = "reinterpret_cast<uint4*>(work.chunk.payload)"
PUT_SUMS = "put_sums(copy, c, sums, length_term);"
STEP_ENDS = "__syncthreads();\n  }\n\n  if (thread < kGroupLeaves)"

# Not among them, since they only save time: the check of items.reach before an item, `first >= count` in overwrite,
# leaving out nodes of partial leaves, and returning early if there are no items or no chunks to gather. Nor guards that
# only payloads of 16 GiB or caches of 2**31 pages would test, nor what destructors do when CUDA fails in them.
KERNEL_MUTATIONS = [
    # Barriers, shuffles, atomic accesses
    Mutation(KEYS, "a step before the next", "__syncthreads();", "", STEP_ENDS),
    Mutation(KEYS, "a level before the next", "__syncthreads();", "", "__syncthreads();\n    const u32 parents"),
    Mutation(KEYS, "all levels before keys", "__syncthreads();", "", "__syncthreads();\n\n  const u32 c ="),
    Mutation(KEYS, "left children", "__shfl_sync(kAllLanes, cv[w], 2 * thread % kGroupLeaves)", "cv[w]"),
    Mutation(KEYS, "right children", "__shfl_sync(kAllLanes, cv[w], (2 * thread + 1) % kGroupLeaves)", "cv[w]"),
    Mutation(KEYS, "the other lanes' bad ids", "__shfl_xor_sync(kAllLanes, value, step)", "value"),
    Mutation(KEYS, "the other warps' bad ids", "bad = at_most(bad, first_bad);"),
    Mutation(
        COPY,
        "the atomicity of a checksum",
        "atomicAdd(copy.sums + c, sum + (warp == 0 ? length_term : 0))",
        "(copy.sums[c] += sum + (warp == 0 ? length_term : 0))",
    ),
    # Tables
    Mutation(TABLE, "tables that parameters do not hold", "bytes_.size() <= sizeof parameters.bytes", "true"),
    Mutation(TABLE, "where such a table is", "elsewhere ? elsewhere : bytes", "bytes"),
    Mutation(TABLE, "aligning the parts of a table", "(bytes_.size() + 15) / 16 * 16 + part", "bytes_.size() + part"),
    Mutation(TABLE, "refusing captures", "is_captured(op, where.stream)", "false", args=("--graphs",)),
    Mutation(COPY, "the end of parameters", "part.table.bytes_after(more) > sizeof part.parameters.bytes", "false"),
    Mutation(COPY, "ids in a table", "ids_in_table", "false", "if (ids_in_table)"),
    Mutation(COPY, "ids outside the cache", "chunk.id(k) < ids_end", "true"),
    # Errors and devices
    Mutation(ERROR, "going back to the device before", "if (restore_) cudaSetDevice(before_);"),
    Mutation(ERROR, "going to the call's device", call("cudaSetDevice(device)")),
    Mutation(
        ERROR,
        "leaving alone a device that nobody chose",
        "restore_ = has_context;",
        "restore_ = true;",
        driver="transfer_driver.cpp",
    ),
    Mutation(
        ERROR,
        "letting another thread capture",
        "cudaThreadExchangeStreamCaptureMode(&mode_);",
        "",
        "cudaThreadExchangeStreamCaptureMode(&mode_); }\n  ~RelaxedCapture",
        driver="transfer_driver.cpp",
    ),
    Mutation(
        ERROR,
        "going back to the mode of captures",
        "cudaThreadExchangeStreamCaptureMode(&mode_);",
        "",
        "~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_);",
        driver="transfer_driver.cpp",
    ),
    Mutation(
        ERROR,
        "clearing an error that is thrown",
        "cudaGetLastError()",
        "cudaSuccess",
        "cudaGetLastError();   ",
        FAILURES,
    ),
    Mutation(ERROR, "looking at errors", "error_ != cudaSuccess", "false", args=FAILURES),
    # Content ids
    Mutation(KEYS, "the end of the ids", "first + k < end", "true", "first + k < end ? static_cast<u64>(token_ids"),
    Mutation(KEYS, "finding bad ids", "if (ids[k] >= kTokenIdEnd) *bad = static_cast<u32>(first + k);"),
    Mutation(KEYS, "the end of the ids", "first + kBlockIds < end ? first + kBlockIds : end", "first + kBlockIds"),
    Mutation(KEYS, "an item's begin", "item.offset > first ? item.offset : first", "first"),
    Mutation(KEYS, "an item's end", "item.end < block_end ? item.end : block_end", "block_end"),
    Mutation(KEYS, "a thread's last position", "item.end < block_end ? item.end : block_end", "item.end"),
    Mutation(KEYS, "the end of a block of lanes", "lanes_end < to ? lanes_end : to", "to"),
    Mutation(KEYS, "the begin of a block of lanes", "first + k >= p", "true"),
    Mutation(KEYS, "the end of a block of lanes", "first + k < stop", "true", "first + k >= p && first + k < stop"),
    Mutation(KEYS, "writing covered ids only", "(covered >> k & 1)", "true", "(covered >> k & 1) && static_cast"),
    Mutation(KEYS, "leaving bad ids as they are", "static_cast<u64>(token_ids[first + k]) < kTokenIdEnd", "true"),
    Mutation(KEYS, "the mark of overwritten ids", "if (covered >> k & 1) ids[k] |= kOverwritten;"),
    # Keys
    Mutation(KEYS, "the first of a thread's bad ids", "at_most(bad, bad_here)", "bad_here"),
    Mutation(KEYS, "blocks of ids that all warps make", "made < blake3::kLeafBlocks", "true"),
    Mutation(KEYS, "blocks to chain", "at_most(begin + kMakers, blake3::kLeafBlocks)", "begin + kMakers"),
    Mutation(KEYS, "the end of cuts in steps", "cuts[regular] == cuts[regular - 1] + step", "true"),
    Mutation(KEYS, "cuts behind those in steps", "c < regular", "true", "c < regular ? first"),
    Mutation(KEYS, "the last chain value, which is not kept", "b + 1 < blake3::kLeafBlocks", "true"),
    Mutation(KEYS, "the nodes of a level", "thread < kGroupLeaves >> level", "true"),
    Mutation(KEYS, "the last cut of a block", "c < cuts_end", "true"),
    Mutation(KEYS, "the end of a prefix's last block", "w < 2 * ids", "true"),
    Mutation(
        KEYS,
        "the chain's begin",
        "b == 0 ? prefixes.root[w] : shared.running[b - 1][w][leaf]",
        "shared.running[b - 1][w][leaf]",
    ),
    Mutation(KEYS, "the last key", "if (c >= prefixes.cuts.count) return;"),
    Mutation(KEYS, "the empty prefix", "end == 0", "false", "if (end == 0) {"),
    Mutation(KEYS, "levels that a prefix has no subtree of", "if ((leaves >> level & 1) == 0) continue;"),
    Mutation(KEYS, "zeros behind a bad id", "bad >= end", "true"),
    Mutation(KEYS, "the most ids that fit", "cuts.back() > kMaxIds", "false"),
    Mutation(KEYS, "no cuts", "if (cuts.empty()) return;"),
    Mutation(KEYS, "no ids to hash", "prefixes.num_groups > 0", "true"),
    Mutation(KEYS, "no ids to overwrite", "count == 0", "false", "if (count == 0 ||"),
    # Spans
    Mutation(SPAN, "pages outside of the cache", "if (block >= layout.num_pages) return span;"),
    Mutation(SPAN, "slots outside of it", "if (position >= layout.num_pages * layout.page_tokens.d) return span;"),
    Mutation(SPAN, "the tail", "valid < layout.page_tokens.d", "false"),
    Mutation(SPAN, "slots behind the tail", "if (slot >= valid) return span;"),
    Mutation(SPAN, "sizes below a unit", "bytes < unit_bytes ? 1 : bytes / unit_bytes", "bytes / unit_bytes"),
    # Copies
    Mutation(
        COPY, "the payload's end", "lane < work.units", "true", "if (lane < work.units) {\n        const uint4* from"
    ),
    Mutation(COPY, "the payload's end", "lane < work.units", "true", "if (lane < work.units) {\n        uint4* to"),
    Mutation(COPY, "the payload's end", "y < work.units", "true"),
    *(
        Mutation(COPY, "what the cache has nothing or no place for", f"if ({pointer}) {statement}", statement)
        for pointer, statement in (
            ("from", "lanes[v] = *in_global_memory(from);"),
            ("to", "*in_global_memory(to) = lanes[v];"),
            ("from", "value = unit == 4 ? *reinterpret_cast<const u32*>(from) : *from;"),
            ("cache", "return filled.load(tile + at, cache, lanes * kLaneBytes);"),
            ("cache", "bulk_store(cache, tile + at, lanes * kLaneBytes);"),
        )
    ),
    Mutation(COPY, "what the cache has no place for", "to && unit == 4", "unit == 4"),
    Mutation(COPY, "what the cache has no place for", "to && unit == 1", "unit == 1"),
    Mutation(COPY, "a gather without payloads", "payload ? payload + lane : nullptr", "payload + lane"),
    Mutation(COPY, "a gather without payloads", PAYLOAD, f"in_global_memory({PAYLOAD})", f"payload = {PAYLOAD}"),
    Mutation(
        COPY,
        "a gather without payloads",
        "work.chunk.payload ? work.chunk.payload + y * unit : nullptr",
        "work.chunk.payload + y * unit",
    ),
    Mutation(COPY, "lanes behind the payload", "lane * units < work.units", "true"),
    Mutation(COPY, "a call without checksums", f"if (copy.sums) {PUT_SUMS}", PUT_SUMS),
    Mutation(COPY, "one lane for its warp", "if (threadIdx.x % kWarp != 0) return;"),
    Mutation(COPY, "the length once, by one warp", "warp == 0", "true"),
    Mutation(COPY, "the length once, by one block", "tile == chunk_begin", "true"),
    Mutation(COPY, "sums that begin at zero", call("cudaMemsetAsync(sums, 0, 8 * call.chunks.size(), stream)")),
    Mutation(COPY, "a place for each partial sum", "(blockIdx.x + c)", "c"),
    Mutation(COPY, "the partial sums of the last block", "last_block + c + 1", "first_block + c + 1"),
    Mutation(COPY, "the partial sums of the first block", "(first_block + c)", "c"),
    Mutation(COPY, "partial sums of several kernels", "are_partial ? part.first_sum : first", "first"),
    Mutation(COPY, "chunks of no tiles", "if (begin == end) return {0, 0, 0};"),
    Mutation(COPY, "the end of a block's tiles", "tile < end", "true", "tile < end && tile < chunk_end"),
    Mutation(COPY, "the end of a chunk's tiles", "tile < chunk_end", "true", "tile < end && tile < chunk_end"),
    Mutation(COPY, "the chunk of a tile", "tile < chunk_end", "true", "if (tile < chunk_end) {"),
    Mutation(COPY, "chunks of no pages", "chunk.count ? chunk.count : 1", "chunk.count"),
    Mutation(COPY, "narrow units for narrow tokens", "all |= cache.token_bytes;"),
    Mutation(COPY, "narrow units for misaligned payloads", "all |= reinterpret_cast<u64>(chunk.payload);"),
    Mutation(COPY, "narrow units for misaligned planes", "all |= reinterpret_cast<u64>(plane);"),
    Mutation(COPY, "calls of no bytes", "if (part.tiles() == 0) continue;"),
    *(
        Mutation(COPY, "where a part has its lanes", f"work.first + {lane}", lane, f"work.first + {lane}{next}")
        for lane, next in (("lane", ", lanes[v]"), ("lane", ", low"), ("first", " + in_tile"))
    ),
    Mutation(COPY, "the cap of the grid", "most_blocks = std::min<u64>(most_blocks, call.where.max_blocks);"),
    # Coded payloads
    Mutation(WARP, "the other lanes' sums", XOR_SHUFFLE, "value", f"value += {XOR_SHUFFLE}"),
    Mutation(WARP, "the other lanes' maxima", XOR_SHUFFLE, "value", f"other = {XOR_SHUFFLE}"),
    Mutation(WARP, "a pair's words", "__shfl_xor_sync(kAllLanes, b, 1)", "b"),
    *(
        Mutation(WARP, "the words of four", f"__shfl_xor_sync(kAllLanes, words.{word}, {lanes})", f"words.{word}")
        for word, lanes in (("y", 1), ("z", 2), ("w", 3))
    ),
    Mutation(WARP, "the sums of those before", "__shfl_sync(kAllLanes, value, (thread - step) % kWarp)", "value"),
    Mutation(WARP, "that nobody is before the first", "thread >= step", "true"),
    Mutation(WARP, "counts that begin at zero", "counts[i * kWarp + thread] = 0;"),
    *(
        Mutation(WARP, f"{what}", "__syncwarp();", "", f"__syncwarp();\n{then}")
        for what, then in (
            ("zeros before counts", "  LMC_UNROLL"),
            ("all counts before their sums", "  u32* own"),
            ("all sums before they are read", "  u32 found"),
            ("a head's begin before its exceptions", "    list_exceptions"),
            ("all exceptions before they are read", "  }"),
        )
    ),
    Mutation(WARP, "the atomicity of a count", "atomicAdd(&counts[left & 0xFF], 1u)", "(counts[left & 0xFF] += 1u)"),
    Mutation(WARP, "zeros, which are no exceptions", "if (thread == 0) own[0] = 0;"),
    Mutation(WARP, "the least top", "top >= kWindow", "true"),
    Mutation(WARP, "the least top of all", "if (top < kWindow) top = kWindow;"),
    Mutation(WARP, "exceptions in all lanes of a smaller v", "__shfl_sync(kAllLanes, until, kWarp - 1)", "until"),
    Mutation(WARP, "exceptions that fit", "fits && exceptions", "exceptions != 0"),
    Mutation(WARP, "another top where too few fit", "exceptions > kMostExceptions", "false"),
    *(
        Mutation(WARP, f"the end of a tile that is {way}", bound, "true", within)
        for way, bound, within in (
            ("coded", "rest_lane(n) < 2 * fours", "rest_lane(n) < 2 * fours)\n      put"),
            ("coded", "code_lane(n) < fours", "code_lane(n) < fours) put"),
            ("decoded", "rest_lane(n) < 2 * fours", "rest_lane(n) < 2 * fours) rest"),
            ("decoded", "code_lane(n) < fours", "code_lane(n) < fours) codes"),
            ("coded", "thread < kHeadLanes", "thread < kHeadLanes) {"),
            ("coded", "thread < kHeadLanes", "thread < kHeadLanes) in_shared"),
        )
    ),
    Mutation(
        WARP,
        "as many exceptions as there are",
        "head.count < kMostExceptions ? head.count : kMostExceptions",
        "head.count",
    ),
    Mutation(WARP, "the last exceptions", "thread + kWarp < kMostExceptions", "true"),
    Mutation(WARP, "the other lanes' exceptions", EXCEPTION_SHUFFLE, "(n < kWarp ? first : second)"),
    Mutation(WARP, "the lane of an exception", "lane % kWarp == thread", "true"),
    Mutation(COPY, "a chunk's last tile, gathered", NO_TILE, "", f"{NO_TILE}\n    uint4 raw"),
    Mutation(COPY, "a chunk's last tile, scattered", NO_TILE, "", f"{NO_TILE}\n    const uint4"),
    Mutation(COPY, "planes that a chunk has", "plane * plane_lanes < work.units", "true"),
    *(
        Mutation(COPY, "the end of a plane", "lane < tile.lanes", "true", f"lane < tile.lanes){then}")
        for then in ("\n        if (const", " add_lane", " {\n        if (uint4")
    ),
    *(
        Mutation(
            COPY,
            "what the cache has nothing or no place for",
            f"if ({name} = {IN_PAGES}) {do.format(of)}",
            do.format(IN_PAGES),
        )
        for name, of, do in (
            ("const uint4* from", "from", "raw[v] = *in_global_memory({});"),
            ("uint4* to", "to", "*in_global_memory({}) = raw[v];"),
        )
    ),
    Mutation(COPY, "that a chunk does not fit", "if (!fits) ++sums.unfit;"),
    Mutation(COPY, "a place for each kind of sum", "copy.sums += copy.sums_stride;"),
    Mutation(COPY, "memory for all kinds of sums", "part.sums_stride() * call.sums_per_chunk()", "part.sums_stride()"),
    Mutation(COPY, "a part's first plane", "call.coded && plane_bytes ? plane_bytes : kLaneBytes", "kLaneBytes"),
    Mutation(COPY, "chunks of no pages", "call.coded && plane_bytes", "call.coded"),
    Mutation(COPY, "refusing what is not in lanes", "call.coded && unit != kLaneBytes", "false"),
    # Copies by the bulk copy engine
    Mutation(COPY, "barriers before their use", "__syncthreads();"),
    Mutation(COPY, "waiting for a tile to move out", "ring.filled[stage].wait(moved / kStages);"),
    Mutation(COPY, "waiting for a tile to sum up", "ring.filled[stage].wait(n / kStages);"),
    Mutation(COPY, "the phase of a tile to move out", "moved / kStages", "0"),
    Mutation(COPY, "the phase of a tile to sum up", "n / kStages", "0", "wait(n / kStages)"),
    Mutation(COPY, "waiting until a tile is summed up", f"if (copy.sums) {SUMMED}"),
    Mutation(COPY, "that nobody sums up", f"if (copy.sums) {SUMMED}", SUMMED),
    Mutation(COPY, "waiting until a tile is moved out", "wait_for_bulk_reads<kStages - kAhead>();"),
    Mutation(COPY, "a warp's tile out before the next", "__syncwarp();", "", "__syncwarp();\n    }"),
    Mutation(COPY, "a warp's sum before telling", "__syncwarp();", "", "__syncwarp();\n    if"),
    Mutation(COPY, "telling that a tile is summed up", "ring.summed[stage].arrive();"),
    Mutation(COPY, "arriving at a tile", "filled.arrive();"),
    Mutation(COPY, "zeros before they are moved out", "if (zeros) fence_for_bulk_copies();"),
    Mutation(COPY, "GPUs that have no engine", "code.ptxVersion >= 90", "true"),
    Mutation(COPY, "groups of stores", "commit_bulk_stores();"),
    Mutation(COPY, "waiting for all stores", "wait_for_bulk_stores();"),
    Mutation(COPY, "moving tiles out", "if (begun >= kAhead) move_out();"),
    Mutation(COPY, "moving the last tiles out", "while (moved < begun) move_out();"),
    Mutation(COPY, "the last stage", "begun >= kStages", "false"),
    Mutation(COPY, "the end of a chunk in a sum", "first + in_tile < work.units", "true"),
    *(
        Mutation(COPY, "the end of a chunk", "at_most(work.units - first, kTileLanes<u32>)", "kTileLanes<u32>", within)
        for within in (
            f"at_most(work.units - first, kTileLanes<u32>);\n    {next}" for next in ("filled", "bulk_store")
        )
    ),
    Mutation(COPY, "the end of a chunk", "at_most(work.units, first + kTileLanes<u32>)", "(first + kTileLanes<u32>)"),
    Mutation(COPY, "the begin of a tile in a run", "r * run.d < first ? first : r * run.d", "r * run.d"),
    Mutation(COPY, "the end of a tile in a run", "at_most(end, (r + 1) * run.d)", "(r + 1) * run.d"),
    Mutation(COPY, "the end of a piece", "at_most(span.units, stop - y)", "stop - y"),
]
