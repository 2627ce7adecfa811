"""What is taken away from transfers."""

from __future__ import annotations

from mutation import FAILURES, FRAGMENTS, TRANSFER, Mutation, call

CODED_LENGTH = "is_coded(c) ? coded_plane_bytes(raw_plane_bytes(c)) : raw_plane_bytes(c)"
CALLERS_EVENT = "cudaEventRecord(static_cast<cudaEvent_t>(event_), static_cast<cudaStream_t>(stream))"
TRANSFER_MUTATIONS = [
    # Transfers: threads and devices
    *(
        Mutation(TRANSFER, f"the device {of}", device, "0", f"guard({op}, {device});\n  {then}")
        for of, op, device, then in [
            ("of an event", "op", "device", "refuse_capture"),
            ("of what begins", "j.op", "s.device", "  const Range"),
            ("of an order", "j.op", "j.staging->device", "refuse_capture"),
            ("of a wait", "j.op", "j.staging->device", "  LMC_CUDA_CHECK(j.op, cudaEventSynchronize"),
            ("of a ring", "op", "device", "if (max_blocks == 0)"),
            ("of what is prepared", "op", "staging->device", "  if (chunks.empty())"),
        ]
    ),
    Mutation(TRANSFER, "the device of what is destroyed", "device", "0", 'guard("transfer", device)'),
    Mutation(TRANSFER, "refusing to come behind a capture", "refuse_capture(op, stream);"),
    Mutation(TRANSFER, "refusing to be in a capture", "refuse_capture(j.op, stream);"),
    *(
        Mutation(
            TRANSFER,
            f"one thread at a time that {does}",
            mutex,
            "[]() -> std::mutex& { thread_local std::mutex own; return own; }()",
            f"lock({mutex});\n{then}",
        )
        for does, mutex, then in [
            ("enqueues", "s.one_job", "  try {"),
            ("takes pinned memory", "pinned_mutex", "      for (Pinned"),
        ]
    ),
    # Transfers: order
    Mutation(TRANSFER, "what the caller's stream holds", CALLERS_EVENT, "cudaSuccess"),
    Mutation(TRANSFER, "kernels behind the caller's stream", call("cudaStreamWaitEvent(s.kernels, event)", "j.op")),
    Mutation(
        TRANSFER, "copies to pages behind the caller's stream", call("cudaStreamWaitEvent(s.copies, event)", "j.op")
    ),
    Mutation(TRANSFER, "a buffer that is free", call("cudaStreamWaitEvent(first, s.free[b])")),
    Mutation(TRANSFER, "that a buffer is filled", call("cudaEventRecord(s.filled[b], first)")),
    Mutation(TRANSFER, "a buffer that is filled", call("cudaStreamWaitEvent(second(), s.filled[b])")),
    Mutation(TRANSFER, "that a buffer is free", call("cudaEventRecord(s.free[b], second())")),
    Mutation(
        TRANSFER,
        "that layers are reached",
        call("cudaEventRecord(reached.back().event, is_store && !has_runs ? s.kernels : second())"),
    ),
    Mutation(TRANSFER, "that long runs are read after all else", "is_store && !has_runs", "is_store"),
    Mutation(TRANSFER, "that a job is finished", call("cudaEventRecord(j.finished, j.second())", "j.op")),
    Mutation(
        TRANSFER,
        "the caller's stream behind the pages",
        call("cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), found->event)", "j.op"),
    ),
    Mutation(TRANSFER, "waiting until layers are begun", "found != j.reached.end() || j.over", "true"),
    Mutation(
        TRANSFER,
        "waking those who wait for layers",
        "changed.notify_all();",
        "",
        "s.kernels : second()));\n    changed.notify_all();",
    ),
    Mutation(TRANSFER, "waiting for no layers of a job that is over", "j.over", "false", "j.over || j.chunks"),
    Mutation(TRANSFER, "waiting for no layers of no chunks", "j.chunks.empty()", "false", "j.over || j.chunks.empty()"),
    Mutation(TRANSFER, "the right layers", "one.planes >= planes", "true"),
    Mutation(TRANSFER, "layers that are not written yet", "if (step.end > planes) return false;"),
    Mutation(TRANSFER, "going on no more when it is over", "!j.over", "true", "!j.over && j.next_step"),
    Mutation(TRANSFER, "waiting for an event", call("cudaEventSynchronize(static_cast<cudaEvent_t>(event_))")),
    Mutation(TRANSFER, "waiting for a job", call("cudaEventSynchronize(j.finished)", "j.op")),
    Mutation(
        TRANSFER, "waiting for a job that nobody waits for", "if (under_way) quietly(cudaEventSynchronize(finished));"
    ),
    Mutation(TRANSFER, "a job that was not begun whole", "j.plane != j.ends.back()", "false"),
    Mutation(TRANSFER, "that it is over when it was waited for", "j.end();", "", "j.end();\n  if (j.plane"),
    # Transfers: errors
    *(
        Mutation(
            TRANSFER, f"{what} under way at an error", f"quietly(cudaStreamSynchronize({what}));", "", args=FAILURES
        )
        for what in ("copies", "kernels")
    ),
    Mutation(TRANSFER, "jobs that outlive their ring", "state_->synchronize();"),
    Mutation(TRANSFER, "that a failed job is over", "j.end();", "", "j.end();\n    throw;", FAILURES),
    Mutation(TRANSFER, "that a failed job has no checksums", "j.plane = 0;", "", args=FAILURES),
    # Transfers: steps
    Mutation(TRANSFER, "the end of a buffer by chunks", "bytes + bytes_of(step.last, plane, *end) <= budget", "true"),
    Mutation(TRANSFER, "the end of a buffer by layers", "if (bytes > budget) break;"),
    Mutation(TRANSFER, "the first layer by itself", "plane > 0", "true", "chunk == 0 && plane > 0"),
    Mutation(TRANSFER, "steps of several layers", "whole && chunk == 0", "false"),
    Mutation(TRANSFER, "few blocks", "s.max_blocks = blocks_for_bus(op, device);"),
    Mutation(TRANSFER, "kernels before their first launch", "load_page_copies(op);"),
    Mutation(TRANSFER, "pinned memory before the first job", "i < kPinnedBlocks", "false"),
    Mutation(TRANSFER, "the end of pinned memory", "pinned_used + bytes > pinned.back().bytes", "false"),
    Mutation(TRANSFER, "memory that is not pinned", "is_pinned = false;"),
    Mutation(TRANSFER, "kernels that use pinned memory only", "!is_pinned", "false", "if (!is_pinned || std::find"),
    Mutation(
        TRANSFER, "the ring for coded chunks", "std::find(coded.begin(), coded.end(), true) != coded.end()", "false"
    ),
    Mutation(TRANSFER, "no long runs of coded chunks", "is_coded(c)", "false", "kernel_blocks || is_coded(c)"),
    Mutation(TRANSFER, "the length of coded planes", CODED_LENGTH, "raw_plane_bytes(c)"),
    Mutation(
        TRANSFER, "the raw offset of a coded part", "step.begin * raw_plane_bytes(c)", "step.begin * plane_bytes(c)"
    ),
    Mutation(TRANSFER, "all sums of a coded chunk", "is_store && !coded.empty() ? kCodedSums : 1", "1"),
    Mutation(TRANSFER, "the end of a store by kernels", "is_store && !kernel_blocks", "is_store"),
    Mutation(
        TRANSFER,
        "long runs or a kernel",
        "kernel_blocks || is_coded(c) ? 0 : fragment_bytes",
        "is_coded(c) ? 0 : fragment_bytes",
    ),
    Mutation(TRANSFER, "long runs of whole pages only", "chunk.id(i) >= cache.num_pages", "false"),
    Mutation(TRANSFER, "long runs that end", "runs.back().in_plane + runs.back().bytes == at", "true"),
    Mutation(TRANSFER, "refusing what does not fit", "bytes_of(c, from, end) > staging->buffer_bytes", "false"),
    Mutation(TRANSFER, "refusing layers within lanes", "end * one.count * cache.page_bytes % kLaneBytes", "0"),
    Mutation(
        FRAGMENTS,
        "reading device memory in the order of the stream",
        "to_payloads ? CU_MEMCPY_SRC_ACCESS_ORDER_STREAM : CU_MEMCPY_SRC_ACCESS_ORDER_ANY",
        "CU_MEMCPY_SRC_ACCESS_ORDER_ANY",
    ),
    Mutation(FRAGMENTS, "a driver that does not support batches", "result != CUDA_ERROR_NOT_SUPPORTED", "true"),
    Mutation(FRAGMENTS, "looking at the driver's errors", "result == CUDA_SUCCESS", "true"),
]
