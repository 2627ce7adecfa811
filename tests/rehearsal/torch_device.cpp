// Tensors "on cuda:0" for a torch that has no GPU. Their memory is the stand-in's device memory (tests/host_cuda), and
// every operator of torch runs its CPU kernel on it, after all work that the current stream holds. Copies that CUDA
// makes asynchronously are put on the current stream. So is the end of a tensor's memory: it is overwritten and freed
// in the order of the stream that it was allocated on, and of those that record_stream named.
//
// An operator that gets tensors of both devices raises, except where torch allows it: 0-dimensional tensors and indices
// may be on the host.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <chrono>
#include <list>
#include <map>
#include <mutex>
#include <set>

namespace py = pybind11;

namespace {

constexpr int kFreed = 0xDB;
const c10::Device kDevice(c10::DeviceType::CUDA, 0);

void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error), " in ", what);
}
#define CUDA_CHECK(call) check(call, #call)

thread_local cudaStream_t current_stream = nullptr;  // the legacy stream, as in torch

bool capturing(cudaStream_t stream = current_stream) {
  cudaStreamCaptureStatus status{};
  CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void synchronize_current_stream() { CUDA_CHECK(cudaStreamSynchronize(current_stream)); }

// --- Memory

struct Block {
  void* pointer;
  std::size_t bytes;
  bool pinned;
  std::set<cudaStream_t> streams;   // whose work may use it
  std::vector<cudaEvent_t> left{};  // when it is not used any more
};

std::mutex mutex;                          // of what follows
std::map<const void*, Block> live_blocks;  // by address
std::list<Block> freed_blocks;             // still in use by streams

// As torch's allocators do: while a stream is captured, they may call what CUDA refuses to others.
class Relaxed {
 public:
  Relaxed() { CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

void free_unused_blocks() {
  for (auto block = freed_blocks.begin(); block != freed_blocks.end();) {
    while (!block->left.empty() && cudaEventQuery(block->left.back()) == cudaSuccess) {
      cudaEventDestroy(block->left.back());
      block->left.pop_back();
    }
    cudaGetLastError();  // which may say "not ready"
    if (!block->left.empty()) {
      ++block;
      continue;
    }
    std::memset(block->pointer, kFreed, block->bytes);
    block->pinned ? cudaFreeHost(block->pointer) : cudaFree(block->pointer);
    block = freed_blocks.erase(block);
  }
}

void free_block(void* pointer) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Relaxed relaxed;
  Block block = std::move(live_blocks.extract(pointer).mapped());
  if (std::any_of(block.streams.begin(), block.streams.end(), [](cudaStream_t stream) { return capturing(stream); }))
    return;  // the graph keeps it, and graphs are kept for good
  // Its stream alone may use it again before the host knows that it came so far.
  if (!block.pinned && block.streams.size() == 1) cudaMemsetAsync(pointer, kFreed, block.bytes, *block.streams.begin());
  for (cudaStream_t stream : block.streams) {
    cudaEvent_t event = nullptr;
    cudaEventCreate(&event);
    cudaEventRecord(event, stream);
    block.left.push_back(event);
  }
  freed_blocks.push_back(std::move(block));
}

// What `stream` holds now and gets until the block is freed may use it.
void record_stream(const void* pointer, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto block = live_blocks.upper_bound(pointer);
  if (block == live_blocks.begin()) return;
  --block;
  if (pointer < static_cast<char*>(block->second.pointer) + block->second.bytes) block->second.streams.insert(stream);
}

class Memory : public c10::Allocator {
 public:
  explicit Memory(bool pinned) : pinned_(pinned) {}
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device = pinned_ ? c10::Device(c10::kCPU) : kDevice;
    if (bytes == 0) return {nullptr, device};
    const std::lock_guard<std::mutex> lock(mutex);
    const Relaxed relaxed;
    free_unused_blocks();
    void* pointer = nullptr;
    CUDA_CHECK(pinned_ ? cudaMallocHost(&pointer, bytes) : cudaMalloc(&pointer, bytes));
    Block block{pointer, bytes, pinned_, {}};
    if (!pinned_) block.streams.insert(current_stream);
    live_blocks.emplace(pointer, std::move(block));
    return {pointer, pointer, free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return free_block; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  bool pinned_;
};
Memory device_memory(false), pinned_memory(true);

// --- What torch asks about devices

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  bool isPinnedPtr(const void* pointer) const override {
    cudaPointerAttributes attributes{};
    CUDA_CHECK(cudaPointerGetAttributes(&attributes, pointer));
    return attributes.type == cudaMemoryTypeHost;
  }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(cudaStream_t handle) {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, reinterpret_cast<c10::StreamId>(handle));
  }
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(nullptr); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    return stream(std::exchange(current_stream, reinterpret_cast<cudaStream_t>(to.id())));
  }
};

// --- Operators

// The same memory as tensors of the host, storage by storage, so that what shares memory still does.
class Aliases {
 public:
  at::Tensor host(const at::Tensor& tensor) {
    auto& alias = by_device_[tensor.storage().unsafeGetStorageImpl()];
    if (!alias) {
      c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
      alias = c10::Storage(c10::Storage::use_byte_size_t(), storage->nbytes(),
                           c10::DataPtr(storage->mutable_data(), c10::Device(c10::kCPU)), c10::GetAllocator(c10::kCPU),
                           true);
      by_host_[alias.unsafeGetStorageImpl()] = tensor.storage();
    }
    at::Tensor out = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(alias), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    copy_geometry(tensor, out);
    out._set_conj(tensor.is_conj());
    out._set_neg(tensor.is_neg());
    pairs_.push_back({tensor, out});
    return out;
  }

  // What the operator returns for `host`: the argument that it is, a view of one, or new memory.
  at::Tensor device(const at::Tensor& host) {
    for (const auto& [argument, alias] : pairs_)
      if (alias.is_same(host)) return argument;
    const auto found = by_host_.find(host.storage().unsafeGetStorageImpl());
    c10::Storage storage;
    if (found != by_host_.end()) {
      storage = found->second;
    } else {
      const std::size_t bytes = host.storage().nbytes();
      storage =
          c10::Storage(c10::Storage::use_byte_size_t(), bytes, device_memory.allocate(bytes), &device_memory, true);
      if (bytes) std::memcpy(storage.mutable_data(), host.storage().data(), bytes);
      by_host_[host.storage().unsafeGetStorageImpl()] = storage;
    }
    at::Tensor out = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), host.dtype());
    copy_geometry(host, out);
    out._set_conj(host.is_conj());
    out._set_neg(host.is_neg());
    return out;
  }

  // Arguments whose shape the operator has changed, or whose memory it has made longer.
  void update_arguments() {
    for (auto& [device_storage, alias] : by_device_)
      if (alias.data() != device_storage->data() || alias.nbytes() != device_storage->nbytes()) {
        const std::size_t bytes = alias.nbytes();
        c10::DataPtr memory = device_memory.allocate(bytes);
        if (bytes) std::memcpy(memory.get(), alias.data(), bytes);
        device_storage->set_data_ptr_noswap(std::move(memory));
        device_storage->set_nbytes(bytes);
      }
    for (auto& [argument, alias] : pairs_)
      if (argument.sizes() != alias.sizes() || argument.strides() != alias.strides()) copy_geometry(alias, argument);
  }

 private:
  static void copy_geometry(const at::Tensor& from, const at::Tensor& to) {
    to.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
  }
  std::map<c10::StorageImpl*, c10::Storage> by_device_, by_host_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
};

void arguments_to_host(const c10::OperatorHandle& op, torch::jit::Stack& stack, Aliases& aliases) {
  const c10::FunctionSchema& schema = op.schema();
  const auto to_host = [&](const at::Tensor& tensor, bool may_be_on_host) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cuda()) return aliases.host(tensor);
    TORCH_CHECK(may_be_on_host || tensor.dim() == 0,
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                tensor.device(), "! (in ", schema.operator_name(), ")");
    return tensor;
  };
  const std::size_t count = schema.arguments().size(), first = stack.size() - count;
  for (std::size_t i = 0; i < count; ++i) {
    c10::IValue& value = stack[first + i];
    if (value.isTensor()) {
      value = to_host(value.toTensor(), false);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(to_host(one, false));
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {  // indices
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& one : value.toOptionalTensorVector())
        list.push_back(one ? std::optional<at::Tensor>(to_host(*one, true)) : std::nullopt);
      value = std::move(list);
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    }
  }
}

// Puts work on the current stream's graph, for as often as it runs.
void capture(std::function<void()> work) {
  const auto run = [](void* kept) { (*static_cast<std::function<void()>*>(kept))(); };
  CUDA_CHECK(cudaLaunchHostFunc(current_stream, run, new std::function<void()>(std::move(work))));
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const bool is_view = std::any_of(schema.returns().begin(), schema.returns().end(), [](const c10::Argument& one) {
    return one.alias_info() && !one.alias_info()->isWrite();
  });
  const bool captured = !is_view && capturing();
  if (!is_view && !captured) synchronize_current_stream();
  const std::size_t count = schema.arguments().size(), first = stack->size() - count;
  const torch::jit::Stack given(stack->begin() + static_cast<std::ptrdiff_t>(first), stack->end());
  // A capture runs nothing: what this run for the shapes writes into arguments is taken back.
  std::vector<std::pair<at::Tensor, at::Tensor>> before;
  for (std::size_t i = 0; captured && i < count; ++i)
    if (const auto* alias = schema.arguments()[i].alias_info(); alias && alias->isWrite() && given[i].isTensor()) {
      Aliases of_argument;
      before.emplace_back(given[i].toTensor(), of_argument.host(given[i].toTensor()).clone());
    }
  Aliases aliases;
  arguments_to_host(op, *stack, aliases);
  op.callBoxed(stack);
  aliases.update_arguments();
  for (const auto& [argument, values] : before) {
    Aliases of_argument;
    of_argument.host(argument).copy_(values);
  }
  for (std::size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined()) {
      value = aliases.device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& one : value.toTensorVector()) list.push_back(aliases.device(one));
      value = std::move(list);
    }
  }
  if (!captured) return;
  // Now it was run for the shapes; whenever the graph runs, it is run again into the same memory.
  const torch::jit::Stack results(stack->end() - static_cast<std::ptrdiff_t>(schema.returns().size()), stack->end());
  capture([op, given, results] {
    torch::jit::Stack again = given;
    Aliases of_run;
    arguments_to_host(op, again, of_run);
    op.callBoxed(&again);
    for (std::size_t i = 0; i < results.size(); ++i) {
      TORCH_CHECK(results[i].isTensor(), "tests/rehearsal captures no ", op.schema().operator_name());
      const at::Tensor to = of_run.host(results[i].toTensor());
      if (to.data_ptr() != again[i].toTensor().data_ptr()) to.copy_(again[i].toTensor());
    }
  });
}
c10::DispatchKeySet device_keys() { return c10::DispatchKeySet(c10::DispatchKey::CUDA); }

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(size, &device_memory, device_keys(), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_memory, device_keys(), c10::dtype_or_default(dtype));
}

bool is_pinned(const at::Tensor& tensor) { return tensor.numel() && Hooks({}).isPinnedPtr(tensor.const_data_ptr()); }

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const bool plain = self.is_contiguous() && source.is_contiguous() && self.sizes() == source.sizes() &&
                     self.dtype() == source.dtype() && self.is_conj() == source.is_conj() &&
                     self.is_neg() == source.is_neg();
  if (self.is_same(source) || self.numel() == 0) {
    TORCH_CHECK(self.is_same(source) || at::is_expandable_to(source.sizes(), self.sizes()), "copy_: shapes ",
                self.sizes(), " and ", source.sizes());
    return self;
  }
  if (plain) {
    CUDA_CHECK(cudaMemcpyAsync(self.mutable_data_ptr(), source.const_data_ptr(), self.nbytes(), cudaMemcpyDefault,
                               current_stream));
    for (const at::Tensor& one : {self, source})
      if (one.is_cpu() && is_pinned(one)) record_stream(one.const_data_ptr(), current_stream);
    if (!non_blocking && !(self.is_cuda() && source.is_cuda())) synchronize_current_stream();
    return self;
  }
  const auto work = [self, source] {
    Aliases aliases;
    at::Tensor to = self.is_cuda() ? aliases.host(self) : self;
    to.copy_(source.is_cuda() ? aliases.host(source) : source);
  };
  if (capturing()) {
    capture(work);
  } else {
    synchronize_current_stream();
    work();
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  TORCH_CHECK(storage.device() == self.device(), "set_: the storage is on ", storage.device(), ", the tensor on ",
              self.device());
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.data() && stride.size() == size.size()) {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  } else {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(sizes);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const c10::SymInt count = static_cast<std::int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

// A torch that was built for CUDA has kernels that a fallback would leave in place.
void replace_kernels() {
  auto& dispatcher = c10::Dispatcher::singleton();
  static std::vector<c10::RegistrationHandleRAII> handles;
  for (const c10::OperatorName& name : dispatcher.getRegistrationsForDispatchKey(c10::DispatchKey::CUDA))
    if (name.name.rfind("aten::", 0) == 0)
      handles.push_back(dispatcher.registerImpl(name, c10::DispatchKey::CUDA,
                                                c10::KernelFunction::makeFromBoxedFunction<&run_on_host>(),
                                                std::nullopt, nullptr, "tests/rehearsal"));
  static torch::Library own(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  own.impl("empty.memory_format", empty);
  own.impl("empty_strided", empty_strided);
  own.impl("copy_", copy);
  own.impl("set_.source_Storage", set_whole_storage);
  own.impl("set_.source_Storage_storage_offset", set_storage);
  own.impl("set_.source_Tensor", set_tensor);
}

// --- Streams and events for torch.cuda

struct Event {
  bool timed;
  cudaEvent_t event = nullptr;
  bool recorded = false;
  std::shared_ptr<double> milliseconds = nullptr;  // when the stream came to it, if timed

  explicit Event(bool timed) : timed(timed) { CUDA_CHECK(cudaEventCreate(&event)); }
  Event(const Event&) = delete;
  ~Event() { cudaEventDestroy(event); }
  void record(std::uintptr_t stream) {
    if (timed) {
      milliseconds = std::make_shared<double>(0);
      const auto stamp = [](void* of) {
        const std::unique_ptr<std::shared_ptr<double>> time(static_cast<std::shared_ptr<double>*>(of));
        const auto now = std::chrono::steady_clock::now().time_since_epoch();
        **time = std::chrono::duration<double, std::milli>(now).count();
      };
      CUDA_CHECK(
          cudaLaunchHostFunc(reinterpret_cast<cudaStream_t>(stream), stamp, new std::shared_ptr<double>(milliseconds)));
    }
    CUDA_CHECK(cudaEventRecord(event, reinterpret_cast<cudaStream_t>(stream)));
    recorded = true;
  }
  void wait(std::uintptr_t stream) const {
    CUDA_CHECK(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(stream), event));
  }
  bool query() const {
    const cudaError_t state = cudaEventQuery(event);
    if (state == cudaErrorNotReady)
      cudaGetLastError();
    else
      CUDA_CHECK(state);
    return state == cudaSuccess;
  }
  void synchronize() const { CUDA_CHECK(cudaEventSynchronize(event)); }
  double elapsed_time(const Event& end) const {
    if (!timed || !end.timed) throw py::value_error("Both events must be created with argument 'enable_timing=True'.");
    if (!recorded || !end.recorded)
      throw py::value_error("Both events must be recorded before calculating elapsed time.");
    TORCH_CHECK(query() && end.query(), "Both events must be completed before calculating elapsed time.");
    return *end.milliseconds - *milliseconds;
  }
};

struct Graph {
  cudaGraphExec_t executable = nullptr;

  void begin() { CUDA_CHECK(cudaStreamBeginCapture(current_stream, cudaStreamCaptureModeGlobal)); }
  void end() {
    cudaGraph_t graph = nullptr;
    CUDA_CHECK(cudaStreamEndCapture(current_stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
  }
  void replay() const {
    TORCH_CHECK(executable, "Called CUDAGraph::replay without a preceding successful capture.");
    CUDA_CHECK(cudaGraphLaunch(executable, current_stream));
  }
};

}  // namespace

PYBIND11_MODULE(torch_device, m) {
  m.doc() = "torch's side of the stand-in for CUDA: to be imported before torch; install() follows.";
  at::CUDAHooksRegistry()->Register(
      "CUDAHooks", [](at::CUDAHooksArgs args) { return std::unique_ptr<at::CUDAHooksInterface>(new Hooks(args)); },
      c10::REGISTRY_PREFERRED);
  m.def("install", [] {
    static c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard);
    TORCH_CHECK(dynamic_cast<const Hooks*>(&at::detail::getCUDAHooks()), "torch was imported before torch_device");
    host_cuda::options().devices = 1;
    replace_kernels();
  });
  m.def("seed", &host_cuda::seed);
  m.def("properties", [] {
    cudaDeviceProp p{};
    CUDA_CHECK(cudaGetDeviceProperties(&p, 0));
    py::dict d;
    d["name"] = p.name;
    d["total_memory"] = p.totalGlobalMem;
    d["major"] = p.major;
    d["minor"] = p.minor;
    d["multi_processor_count"] = p.multiProcessorCount;
    d["max_threads_per_multi_processor"] = p.maxThreadsPerMultiProcessor;
    d["warp_size"] = p.warpSize;
    d["L2_cache_size"] = p.l2CacheSize;
    d["shared_memory_per_block"] = p.sharedMemPerBlock;
    d["shared_memory_per_block_optin"] = p.sharedMemPerBlockOptin;
    return d;
  });
  m.def("current_stream", [] { return reinterpret_cast<std::uintptr_t>(current_stream); });
  m.def("set_current_stream", [](std::uintptr_t stream) { current_stream = reinterpret_cast<cudaStream_t>(stream); });
  m.def("new_stream", [](int priority) {
    cudaStream_t stream = nullptr;
    CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority));
    return reinterpret_cast<std::uintptr_t>(stream);
  });
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "synchronize_stream",
      [](std::uintptr_t stream) { CUDA_CHECK(cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(stream))); }, no_gil);
  m.def(
      "query_stream",
      [](std::uintptr_t stream) {
        const cudaError_t state = cudaStreamQuery(reinterpret_cast<cudaStream_t>(stream));
        cudaGetLastError();
        if (state != cudaErrorNotReady) CUDA_CHECK(state);
        return state == cudaSuccess;
      },
      no_gil);
  m.def("record_stream", [](std::uintptr_t pointer, std::uintptr_t stream) {
    record_stream(reinterpret_cast<const void*>(pointer), reinterpret_cast<cudaStream_t>(stream));
  });
  m.def("synchronize", [] { CUDA_CHECK(cudaDeviceSynchronize()); }, no_gil);
  m.def(
      "copy",
      [](std::uintptr_t to, std::uintptr_t from, std::size_t bytes, int kind, std::uintptr_t stream) {
        CUDA_CHECK(cudaMemcpyAsync(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes,
                                   static_cast<cudaMemcpyKind>(kind), reinterpret_cast<cudaStream_t>(stream)));
      },
      no_gil);
  m.def("capturing", [] { return capturing(); });
  py::class_<Graph>(m, "Graph")
      .def(py::init<>())
      .def("begin", &Graph::begin)
      .def("end", &Graph::end)
      .def("replay", &Graph::replay, no_gil);
  py::class_<Event>(m, "Event")
      .def(py::init<bool>())
      .def("record", &Event::record, no_gil)
      .def("wait", &Event::wait, no_gil)
      .def("query", &Event::query, no_gil)
      .def("synchronize", &Event::synchronize, no_gil)
      .def("elapsed_time", &Event::elapsed_time);
}
