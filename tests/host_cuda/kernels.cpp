// Kernels on coroutines: blocks, barriers, warp collectives, fences, shared memory.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "runtime.h"

#ifndef __x86_64__
#error "switching coroutines is written for x86-64 only"
#endif

// Saves the caller's registers on its stack and the stack pointer in *save, then continues where `load` was saved.
extern "C" void host_cuda_switch(void** save, void* load);
asm(R"(
.text
.globl host_cuda_switch
.type host_cuda_switch, @function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_cuda_switch, .-host_cuda_switch
)");

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace host_cuda {

enum class State { kRunning, kReady, kAtBarrier, kMeeting, kExited };

struct Block;

struct Thread {
  void* stack_pointer;
  char* stack;
  void* identity;
  void* fake_stack = nullptr;  // for AddressSanitizer

  Block* block;
  unsigned linear;
  uint3 index;
  State state;
  Site site;  // where it waits

  // The warp collective that it is in.
  Collective kind;
  unsigned mask, source;
  u64 value;
  Token* order;

  unsigned bulk_groups;  // committed groups
};

namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 256 << 10, kGuardBytes = 4096;
constexpr int kSharedPoison = 0xA5;

struct Warp {
  unsigned generation[kWarp] = {};  // of collectives, by their lowest lane
  Token order[kWarp][2] = {};
};

struct Mbarrier {
  unsigned arrivals = 0, arrived = 0, phases = 0;  // expected per phase; arrived in this phase; completed phases
  std::size_t coming = 0;                          // bytes under way
  Token order = {};
};

struct BulkCopy {
  void* to;
  const void* from;
  std::size_t bytes;
  Mbarrier* barrier;     // for loads
  const Thread* thread;  // for stores
  unsigned group;
  std::vector<char> read;  // bytes that a store has read
  std::unique_ptr<Token> begun;
};

struct Grid {
  const Kernel& kernel;
  const std::function<void()>& call_one_thread;
  Operation& operation;
  Token start;
};

}  // namespace

struct Block {
  Grid* grid;
  unsigned set;
  uint3 index;
  unsigned size, waiting, exited, generation;
  std::vector<Thread*> threads, ready;
  std::vector<Warp> warps;
  void* shared;
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
  Token fenced, bulk_done;  // writes that stores may read; work that the engine has done
  Token order[2];           // alternate barriers: a thread may still leave one when another arrives at the next
};

namespace {

// --- Coroutines

struct {
  void* stack_pointer;
  void* fake_stack;
  const void* stack;
  std::size_t stack_bytes;
} scheduler;

void resume(Thread& thread) {
  runtime().thread = &thread;
  thread.state = State::kRunning;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  become(thread.identity);
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&scheduler.fake_stack, thread.stack, kStackBytes);
  host_cuda_switch(&scheduler.stack_pointer, thread.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
  runtime().thread = nullptr;
}

void suspend() {
  Thread& thread = *runtime().thread;
  become(runtime().running->identity);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&thread.fake_stack, scheduler.stack, scheduler.stack_bytes);
  host_cuda_switch(&thread.stack_pointer, scheduler.stack_pointer);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(thread.fake_stack, &scheduler.stack, &scheduler.stack_bytes);
}

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  thread.block->ready.push_back(&thread);
}

Thread& this_thread(const char* what) {
  if (!runtime().thread) fail("%s outside of a kernel", what);
  return *runtime().thread;
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

const Thread& one_at_barrier(const Block& block) {
  return **std::find_if(block.threads.begin(), block.threads.end(),
                        [](const Thread* thread) { return thread->state == State::kAtBarrier; });
}

void exit_thread(Thread& thread) {
  Block& block = *thread.block;
  if (block.waiting) {
    const Site& site = one_at_barrier(block).site;
    fail("the thread exits while others wait at the barrier of %s:%d", site.file, site.line);
  }
  const unsigned first = thread.linear / kWarp * kWarp;
  for (unsigned t = first; t < std::min(first + kWarp, block.size); ++t) {
    const Thread& other = *block.threads[t];
    if (other.state == State::kMeeting && (other.mask >> (thread.linear - first) & 1))
      fail("the thread exits while lane %u waits for it in the warp collective of %s:%d", t - first, other.site.file,
           other.site.line);
  }
  thread.state = State::kExited;
  ++block.exited;
  release(&block.grid->operation.finished);
}

void thread_main() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
  for (;;) {
    Thread& thread = *runtime().thread;
    acquire(&thread.block->grid->start);
    thread.block->grid->call_one_thread();
    exit_thread(thread);
    suspend();
  }
}

Thread* new_thread() {
  auto* thread = new Thread;
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE)) fail("no memory for the stack of a thread");
  thread->stack = static_cast<char*>(memory) + kGuardBytes;
  // The stack as host_cuda_switch leaves it: six registers, the address to continue at, and the alignment of a call.
  void** top = reinterpret_cast<void**>(thread->stack + kStackBytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&thread_main);
  thread->stack_pointer = top;
  thread->identity = new_identity();
  return thread;
}

// --- Blocks

Block* start_block(Grid& grid, u64 number, unsigned set) {
  const Quiet quiet;
  const Kernel& kernel = grid.kernel;
  auto* block = new Block{};
  block->grid = &grid;
  block->set = set;
  block->index = {static_cast<unsigned>(number % kernel.grid.x),
                  static_cast<unsigned>(number / kernel.grid.x % kernel.grid.y),
                  static_cast<unsigned>(number / kernel.grid.x / kernel.grid.y)};
  block->size = kernel.block.x * kernel.block.y * kernel.block.z;
  block->warps.resize((block->size + kWarp - 1) / kWarp);
  if (kernel.shared_bytes) {
    block->shared = std::malloc(kernel.shared_bytes);
    std::memset(block->shared, kSharedPoison, kernel.shared_bytes);
  }
  std::vector<Thread*>& threads = runtime().thread_sets[set];
  while (threads.size() < block->size) threads.push_back(new_thread());
  for (unsigned t = 0; t < block->size; ++t) {
    Thread& thread = *threads[t];
    thread.block = block;
    thread.linear = t;
    thread.index = {t % kernel.block.x, t / kernel.block.x % kernel.block.y, t / kernel.block.x / kernel.block.y};
    thread.bulk_groups = 0;
    block->threads.push_back(&thread);
    make_ready(thread);
  }
  return block;
}

[[noreturn]] void report_stuck(const Block& block) {
  for (Thread* thread : block.threads) {
    if (thread->state == State::kExited) continue;
    runtime().thread = thread;
    fail("no thread of the block can go on; this one waits at the %s of %s:%d",
         thread->state == State::kAtBarrier ? "barrier" : "warp collective", thread->site.file, thread->site.line);
  }
  std::abort();
}

}  // namespace

static void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.arrived < barrier.arrivals || barrier.coming) return;
  barrier.arrived = 0;
  ++barrier.phases;
}

// Runs one of the bulk copies that the block has issued, or half of a store, under the copy engine's identity; false if
// there is none. A store sees only fenced writes, not everything that its thread has seen.
static bool make_bulk_copy(Block& block) {
  if (block.bulk_copies.empty()) return false;
  BulkCopy& copy = block.bulk_copies[random_below(block.bulk_copies.size())];
  static void* const engine = new_identity();
  become(engine);
  acquire(&block.grid->start);
  acquire(copy.barrier ? copy.begun.get() : &block.fenced);
  const bool reads = !copy.barrier && copy.read.empty();
  if (reads) {
    {
      const Quiet quiet;
      copy.read.resize(copy.bytes);
    }
    std::memcpy(copy.read.data(), copy.from, copy.bytes);
  } else {
    std::memcpy(copy.to, copy.barrier ? copy.from : copy.read.data(), copy.bytes);
  }
  release(copy.barrier ? &copy.barrier->order : &block.bulk_done);
  release(&block.grid->operation.finished);
  become(runtime().running->identity);
  if (reads) return true;
  const Quiet quiet;
  if (copy.barrier) {
    copy.barrier->coming -= copy.bytes;
    end_phase_if_complete(*copy.barrier);
  }
  std::swap(copy, block.bulk_copies.back());
  block.bulk_copies.pop_back();
  return true;
}

void run_kernel(const Kernel& kernel, const std::function<void()>& call_one_thread, Operation& operation) {
  runtime().kernel = &kernel;
  gridDim = kernel.grid;
  blockDim = kernel.block;
  Grid grid{kernel, call_one_thread, operation, {}};
  release(&grid.start);

  // ThreadSanitizer considers blocks on one set of threads as ordered, so use several sets. But its threads are
  // expensive: half a millisecond and a megabyte each.
  std::vector<unsigned> free_sets;
  for (unsigned s = 0; s < (under_tsan() ? 2 : 3); ++s) free_sets.push_back(s);
  runtime().thread_sets.resize(free_sets.size());
  std::vector<u64> to_start(static_cast<u64>(kernel.grid.x) * kernel.grid.y * kernel.grid.z);
  for (u64 i = 0; i < to_start.size(); ++i) to_start[i] = i;
  std::vector<Block*> resident;
  while (!to_start.empty() || !resident.empty()) {
    while (!to_start.empty() && !free_sets.empty())
      resident.push_back(start_block(grid, take_random(to_start), take_random(free_sets)));
    std::swap(resident[random_below(resident.size())], resident.back());
    Block& block = *resident.back();
    if (random_below(runtime().policy == Policy::kEager ? 2 : 64) == 0) make_bulk_copy(block);
    if (block.ready.empty()) report_stuck(block);
    resume(*take_random(block.ready));
    if (block.exited < block.size) continue;
    if (make_bulk_copy(block)) fail("the block exits before a bulk copy that it has begun is complete");
    const Quiet quiet;
    resident.pop_back();
    free_sets.push_back(block.set);
    std::free(block.shared);
    delete &block;
  }
  runtime().kernel = nullptr;
}

// --- Functions that kernels call

void* shared_memory(std::size_t bytes) {
  const Thread& thread = this_thread("shared_memory");
  const std::size_t given = runtime().kernel->shared_bytes;
  if (bytes > given) fail("shared_memory of %zu bytes in a kernel launched with %zu", bytes, given);
  return thread.block->shared;
}

static void check_shared(const void* pointer, std::size_t bytes, const char* what) {
  const auto at = reinterpret_cast<std::uintptr_t>(pointer);
  const auto begin = reinterpret_cast<std::uintptr_t>(this_thread(what).block->shared);
  if (at < begin || at + bytes > begin + runtime().kernel->shared_bytes)
    fail("%p of %s is not shared memory", pointer, what);
}

static Mbarrier& mbarrier(const void* address) {
  Block& block = *this_thread("an mbarrier").block;
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail("an mbarrier that is not initialised");
  return found->second;
}

static void begin_bulk_copy(BulkCopy copy, const void* in_shared, const void* outside) {
  Block& block = *this_thread("a bulk copy").block;
  const auto all = reinterpret_cast<std::uintptr_t>(copy.to) | reinterpret_cast<std::uintptr_t>(copy.from) | copy.bytes;
  if (runtime().kernel->compute_capability < 90) fail("a bulk copy on a GPU that has none");
  if (all % 16 || copy.bytes == 0)
    fail("a bulk copy of %zu bytes from %p to %p: multiples of 16 are needed", copy.bytes, copy.from, copy.to);
  check_shared(in_shared, copy.bytes, "a bulk copy");
  if (!is_device_accessible(outside, copy.bytes))
    fail("%p of a bulk copy is neither device nor pinned memory", outside);
  copy.begun = std::make_unique<Token>();
  release(copy.begun.get());
  block.bulk_copies.push_back(std::move(copy));
}

void mbarrier_init(const void* barrier, unsigned arrivals) {
  const Quiet quiet;
  check_shared(barrier, 8, "an mbarrier");
  this_thread("an mbarrier").block->mbarriers[barrier].arrivals = arrivals;
}

void mbarrier_load(const void* address, void* to, const void* from, std::size_t bytes) {
  const Quiet quiet;
  Mbarrier& barrier = mbarrier(address);
  barrier.coming += bytes;
  begin_bulk_copy({to, from, bytes, &barrier, nullptr, 0, {}, nullptr}, to, from);
}

void mbarrier_arrive(const void* address) {
  const Quiet quiet;
  Mbarrier& barrier = mbarrier(address);
  if (barrier.arrived == barrier.arrivals) fail("more threads arrive at an mbarrier than it expects");
  release(&barrier.order);
  ++barrier.arrived;
  end_phase_if_complete(barrier);
}

void mbarrier_wait(const void* address, unsigned parity) {
  Mbarrier& barrier = mbarrier(address);
  while (barrier.phases % 2 == parity) {
    make_ready(this_thread("an mbarrier"));
    suspend();
  }
  acquire(&barrier.order);
}

void fence_for_bulk_copies() { release(&this_thread("a fence").block->fenced); }

void bulk_store(void* to, const void* from, std::size_t bytes) {
  const Quiet quiet;
  const Thread& thread = this_thread("a bulk copy");
  begin_bulk_copy({to, from, bytes, nullptr, &thread, thread.bulk_groups, {}, nullptr}, from, to);
}

void commit_bulk_stores() { ++this_thread("a bulk copy").bulk_groups; }

// Waits until all stores in this thread's groups below `end` have been read or, if `written`, written.
static void wait_for_groups(unsigned end, bool written) {
  Thread& thread = this_thread("a bulk copy");
  const auto waits_for = [&](const BulkCopy& copy) {
    return copy.thread == &thread && copy.group < end && (written || copy.read.empty());
  };
  const std::vector<BulkCopy>& copies = thread.block->bulk_copies;
  while (std::any_of(copies.begin(), copies.end(), waits_for)) {
    make_ready(thread);
    suspend();
  }
  acquire(&thread.block->bulk_done);
}

void wait_for_bulk_reads(unsigned pending) {
  const unsigned groups = this_thread("a bulk copy").bulk_groups;
  wait_for_groups(groups < pending ? 0 : groups - pending, false);
}
void wait_for_bulk_stores() { wait_for_groups(this_thread("a bulk copy").bulk_groups, true); }

unsigned lane() { return this_thread("a warp collective").linear % kWarp; }

u64 meet(Collective kind, unsigned mask, u64 value, unsigned source, Site site) {
  Thread& thread = this_thread("a warp collective");
  Block& block = *thread.block;
  const unsigned first = thread.linear / kWarp * kWarp, own = thread.linear - first;
  const unsigned lanes = std::min(kWarp, block.size - first);
  const auto refuse = [&](const char* what, unsigned lane) {
    fail("warp collective of %s:%d with mask 0x%08x: %s (lane %u)", site.file, site.line, mask, what, lane);
  };
  if (!(mask >> own & 1)) refuse("the mask leaves out the calling lane", own);
  if (kind == Collective::kShuffle && !(mask >> source & 1)) refuse("it reads a lane that the mask leaves out", source);

  Thread* named[kWarp];
  unsigned names = 0, arrived = 1;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    if (l >= lanes) refuse("the mask names a lane that the block does not have", l);
    Thread& other = *block.threads[first + l];
    named[names++] = &other;
    if (other.state == State::kExited) refuse("the mask names a lane that has exited", l);
    if (other.state != State::kMeeting || !(other.mask >> own & 1)) continue;
    if (other.mask != mask || other.kind != kind || !same(other.site, site))
      refuse("another lane of the mask waits in another collective or with another mask", l);
    ++arrived;
  }

  Warp& warp = block.warps[first / kWarp];
  const unsigned leader = static_cast<unsigned>(__builtin_ctz(mask));
  thread.site = site;
  thread.kind = kind;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  thread.order = &warp.order[leader][warp.generation[leader] % 2];
  thread.state = State::kMeeting;
  if (kind == Collective::kSyncWarp) release(thread.order);
  if (arrived == names) {
    ++warp.generation[leader];
    u64 values[kWarp] = {};
    for (unsigned n = 0; n < names; ++n) values[named[n]->linear - first] = named[n]->value;
    for (unsigned n = 0; n < names; ++n) {
      named[n]->value = values[named[n]->source];
      make_ready(*named[n]);
    }
  }
  suspend();
  if (kind == Collective::kSyncWarp) acquire(thread.order);
  return thread.value;
}

void before_atomic() {
  if (random_below(8) != 0) return;
  make_ready(this_thread("an atomic access"));
  suspend();
}

}  // namespace host_cuda

using namespace host_cuda;

void __syncthreads(const char* file, int line) {
  const Site site{file, line};
  Thread& thread = this_thread("__syncthreads");
  Block& block = *thread.block;
  if (block.exited)
    fail("at the barrier of %s:%d %u threads of the block are missing, they have exited", site.file, site.line,
         block.exited);
  if (block.waiting) {
    const Site& other = one_at_barrier(block).site;
    if (!same(other, site))
      fail("at the barrier of %s:%d while others wait at that of %s:%d", site.file, site.line, other.file, other.line);
  }
  thread.site = site;
  thread.state = State::kAtBarrier;
  const Token* order = &block.order[block.generation % 2];
  release(order);
  if (++block.waiting == block.size) {
    block.waiting = 0;
    ++block.generation;
    for (Thread* other : block.threads) make_ready(*other);
  }
  suspend();
  acquire(order);
}
