// The Python module lmcache_mm._C. It takes addresses and counts, and checks nothing twice: ops.py and operands.py have
// checked all dtypes, devices, shapes and bounds before they call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <limits>
#include <memory>

#include "ops.h"
#include "slab_index.h"
#include "tile_codec.h"

namespace py = pybind11;
using namespace lmc;

namespace {

std::vector<Item> to_items(const py::iterable& items) {
  std::vector<Item> out;
  for (const py::handle item : items) {
    const auto [modality, identifier, offset, length] = item.cast<std::tuple<std::string, std::string, u64, u64>>();
    out.push_back({modality, identifier, offset, length});
  }
  return out;
}

std::vector<u64> to_cuts(u64 address, u64 num_cuts, u64 count) {
  const u64* first = reinterpret_cast<const u64*>(address);
  std::vector<u64> cuts(first, first + num_cuts);
  cpu::check_cuts(cuts, count);
  return cuts;
}

std::vector<Chunk> to_chunks(const py::iterable& chunks) {
  std::vector<Chunk> out;
  for (const py::handle chunk : chunks) {
    const auto [ids, wide, count, tokens, payload, offset] = chunk.cast<std::tuple<u64, bool, u64, u64, u64, u64>>();
    out.push_back({reinterpret_cast<const void*>(ids), count, tokens, reinterpret_cast<u8*>(payload), wide, offset});
  }
  return out;
}

#ifdef LMCACHE_MM_CUDA
// upload(table): copies bytes to the device in stream order. Returns their address there.
cuda::Launch to_launch(int device, u64 stream, const py::function& upload, u32 max_blocks = 0) {
  cuda::Launch launch{device, reinterpret_cast<void*>(stream), max_blocks};
  launch.place_table = [&upload](const u8* table, u64 bytes) {
    const py::gil_scoped_acquire gil;
    return reinterpret_cast<const u8*>(upload(py::bytes(reinterpret_cast<const char*>(table), bytes)).cast<u64>());
  };
  return launch;
}
#endif

// A slab's index, with the lock for its writers.
struct Slab {
  Slab(u64 file, const SlabPages& pages, const SlabIndex::Shape& shape, int lock_fd, u32 lock_byte, u32 row)
      : lock(lock_fd, lock_byte, &pages), index(reinterpret_cast<void*>(file), shape, lock, row) {}

  SlabFileLock lock;
  SlabIndex index;
};

SlabKey to_slab_key(const py::handle& key) {
  char* bytes;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(key.ptr(), &bytes, &size) != 0) throw py::error_already_set();
  if (size < 32 || size > 64) throw py::value_error("keys: expected 32 to 64 bytes, got " + std::to_string(size));
  SlabKey out;
  out.bytes = static_cast<u32>(size);
  std::memcpy(out.words.data(), bytes, size);
  return out;
}

std::vector<SlabKey> to_slab_keys(const py::sequence& keys) {
  std::vector<SlabKey> out;
  out.reserve(keys.size());
  for (const py::handle key : keys) out.push_back(to_slab_key(key));
  return out;
}

std::array<u64, 2> to_16_bytes(const std::string& bytes) {
  std::array<u64, 2> out{};
  std::memcpy(out.data(), bytes.data(), std::min<std::size_t>(bytes.size(), sizeof out));
  return out;
}

py::bytes owner_bytes(const SlabOwner& owner) { return {reinterpret_cast<const char*>(owner.data()), sizeof owner}; }

std::vector<SlabPlace> to_places(const std::vector<std::pair<u32, u32>>& places) {
  std::vector<SlabPlace> out;
  for (const auto& [start, generation] : places) out.push_back({start, generation});
  return out;
}

using Terms = std::tuple<double, double, double, double, u64>;  // the fields of SlabTerms

SlabTerms to_terms(const Terms& terms) {
  const auto& [now, wall, patience, ttl, quota] = terms;
  return {now, wall, patience, ttl, quota};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of lmcache_mm over raw addresses; use lmcache_mm.ops.";
  m.attr("cuda_version") = LMCACHE_MM_CUDA_VERSION;
  m.attr("cuda_archs") = LMCACHE_MM_CUDA_ARCHS;

  py::class_<PagedCache, std::shared_ptr<PagedCache>>(m, "PagedCache", py::metaclass((PyObject*)&PyType_Type))
      .def(py::init([](const std::vector<u64>& planes, u64 num_pages, u64 page_stride, u64 page_bytes, u64 run_bytes,
                       u64 run_stride, u64 page_tokens, u64 token_bytes) {
             PagedCache cache{{}, num_pages, page_stride, page_bytes, run_bytes, run_stride, page_tokens, token_bytes};
             for (const u64 address : planes) cache.planes.push_back(reinterpret_cast<u8*>(address));
             return cache;
           }),
           py::arg("planes"), py::arg("num_pages"), py::arg("page_stride"), py::arg("page_bytes"), py::arg("run_bytes"),
           py::arg("run_stride"), py::arg("page_tokens"), py::arg("token_bytes"));

  m.def("simd_variants", &cpu::simd_variants);
  m.def("use_simd", &cpu::use_simd, py::arg("name"));

  m.def(
      "apply_mm_hashes_to_token_ids",
      [](u64 token_ids, u64 count, const py::iterable& items) {
        const std::vector<Item> list = to_items(items);
        py::gil_scoped_release release;
        cpu::apply_mm_hashes_to_token_ids(reinterpret_cast<i64*>(token_ids), count, ItemTable(list));
      },
      py::arg("token_ids"), py::arg("count"), py::arg("items"));

  m.def(
      "prefix_keys",
      [](u64 token_ids, u64 count, bool wide, const py::iterable& items, const std::string& root, u64 cuts,
         u64 num_cuts, u64 keys) {
        const std::vector<Item> list = to_items(items);
        const std::vector<u64> ends = to_cuts(cuts, num_cuts, count);
        py::gil_scoped_release release;
        cpu::prefix_keys({reinterpret_cast<const void*>(token_ids), count, wide}, ItemTable(list),
                         reinterpret_cast<const u8*>(root.data()), ends, reinterpret_cast<u8*>(keys));
      },
      py::arg("token_ids"), py::arg("count"), py::arg("wide"), py::arg("items"), py::arg("root"), py::arg("cuts"),
      py::arg("num_cuts"), py::arg("keys"));

  const auto def_copy = [&m](const char* name, auto* copy) {
    m.def(
        name,
        [copy](const PagedCache& cache, bool token_mode, const py::iterable& chunks, u64 checksums, u32 threads) {
          const std::vector<Chunk> list = to_chunks(chunks);
          py::gil_scoped_release release;
          copy(cache, token_mode ? Mode::kToken : Mode::kPage, list, reinterpret_cast<u64*>(checksums), threads);
        },
        py::arg("cache"), py::arg("token_mode"), py::arg("chunks"), py::arg("checksums"), py::arg("threads"));
  };
  def_copy("gather", &cpu::gather);
  def_copy("scatter", &cpu::scatter);

  const auto def_coded = [&m](const char* name, auto* copy) {
    m.def(
        name,
        [copy](const PagedCache& cache, const py::iterable& chunks, u64 sums, u32 threads) {
          const std::vector<Chunk> list = to_chunks(chunks);
          py::gil_scoped_release release;
          copy(cache, list, reinterpret_cast<u64*>(sums), threads);
        },
        py::arg("cache"), py::arg("chunks"), py::arg("sums"), py::arg("threads"));
  };
  def_coded("gather_coded", &cpu::gather_coded);
  def_coded("scatter_coded", &cpu::scatter_coded);
  m.def("coded_plane_bytes", &coded_plane_bytes, py::arg("raw_bytes"));

  py::class_<cpu::RunningKeys>(m, "RunningKeys", py::metaclass((PyObject*)&PyType_Type))
      .def(py::init([](const py::iterable& items, const std::string& root) {
             return std::make_unique<cpu::RunningKeys>(ItemTable(to_items(items)),
                                                       reinterpret_cast<const u8*>(root.data()));
           }),
           py::arg("items"), py::arg("root"))
      .def_property_readonly("tokens", &cpu::RunningKeys::tokens)
      .def(
          "extend",
          [](cpu::RunningKeys& running, u64 token_ids, u64 count, bool wide, u64 cuts, u64 num_cuts, u64 keys) {
            const u64* first = reinterpret_cast<const u64*>(cuts);
            running.extend({reinterpret_cast<const void*>(token_ids), count, wide}, {first, first + num_cuts},
                           reinterpret_cast<u8*>(keys));
          },
          py::arg("token_ids"), py::arg("count"), py::arg("wide"), py::arg("cuts"), py::arg("num_cuts"),
          py::arg("keys"));

  m.def(
      "checksum",
      [](u64 payload, u64 bytes) {
        py::gil_scoped_release release;
        return static_cast<i64>(cpu::checksum(reinterpret_cast<const u8*>(payload), bytes));
      },
      py::arg("payload"), py::arg("bytes"));

  m.def(
      "checksum_part",
      [](u64 part, u64 bytes, u64 offset, u64 payload_bytes) {
        py::gil_scoped_release release;
        return cpu::checksum_part(reinterpret_cast<const u8*>(part), bytes, offset, payload_bytes);
      },
      py::arg("part"), py::arg("bytes"), py::arg("offset"), py::arg("payload_bytes"));

  m.def(
      "copy",
      [](u64 to, u64 from, u64 bytes, u32 threads) {
        py::gil_scoped_release release;
        return static_cast<i64>(
            cpu::copy(reinterpret_cast<u8*>(to), reinterpret_cast<const u8*>(from), bytes, threads));
      },
      py::arg("to"), py::arg("source"), py::arg("bytes"), py::arg("threads"));

  m.def(
      "read_pages",
      [](u64 address, u64 bytes) {
        py::gil_scoped_release release;
        constexpr u64 kPageBytes = 4096;
        for (u64 at = 0; at < bytes; at += kPageBytes) *reinterpret_cast<const volatile u8*>(address + at);
      },
      py::arg("address"), py::arg("bytes"));

  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const SlabBusy& error) {
      PyErr_SetString(PyExc_TimeoutError, error.what());
    } catch (const SlabBroken& error) {
      PyErr_SetString(PyExc_OSError, error.what());
    }
  });
  m.def(
      "slab_table_bytes",
      [](u32 granules, u32 granule_bytes, u32 segment_granules) {
        return SlabIndex::file_bytes({granules, granule_bytes, segment_granules});
      },
      py::arg("granules"), py::arg("granule_bytes"), py::arg("segment_granules"));
  m.def(
      "slab_header",
      [](std::string page) -> py::object {
        page.resize(kHeaderBytes);
        const auto fixed = SlabIndex::fixed_of(page.data());
        if (!fixed) return py::none();
        return py::make_tuple(fixed->version, fixed->granules, fixed->granule_bytes, owner_bytes(fixed->boot_id));
      },
      py::arg("page"));
  py::class_<SlabPages>(m, "SlabPages", py::metaclass((PyObject*)&PyType_Type))
      .def(py::init([](u64 address, u64 bytes) {
             return std::make_unique<SlabPages>(reinterpret_cast<void*>(address), bytes);
           }),
           py::arg("address"), py::arg("bytes"))
      .def("lost", &SlabPages::lost);
  py::class_<Slab>(m, "SlabIndex", py::metaclass((PyObject*)&PyType_Type))
      .def(py::init([](u64 file, const SlabPages& pages, u32 granules, u32 granule_bytes, u32 segment_granules,
                       int lock_fd, u32 lock_byte, u32 row) {
             const SlabIndex::Shape shape{granules, granule_bytes, segment_granules};
             return std::make_unique<Slab>(file, pages, shape, lock_fd, lock_byte, row);
           }),
           py::keep_alive<1, 3>(), py::arg("file"), py::arg("pages"), py::arg("granules"), py::arg("granule_bytes"),
           py::arg("segment_granules"), py::arg("lock_fd"), py::arg("lock_byte"), py::arg("row"))
      .def(
          "open",
          [](Slab& slab, const std::string& boot_id, bool keep, const Terms& terms) {
            py::gil_scoped_release release;
            slab.index.open(to_16_bytes(boot_id), keep, to_terms(terms));
          },
          py::arg("boot_id"), py::arg("keep"), py::arg("terms"))
      .def(
          "close",
          [](Slab& slab, const Terms& terms) {
            py::gil_scoped_release release;
            slab.index.close(to_terms(terms));
          },
          py::arg("terms"))
      .def(
          "contains",
          [](Slab& slab, const py::sequence& keys, bool peek, double now, double ttl) {
            py::list there;
            for (const SlabKey& key : to_slab_keys(keys)) {
              const auto found = slab.index.find(key, now, ttl);
              SlabTable& table = slab.index.table();
              there.append(found && (peek ? table.generation(found->start) == found->generation
                                          : table.touch(found->start, found->generation)));
            }
            return there;
          },
          py::arg("keys"), py::arg("peek"), py::arg("now"), py::arg("ttl"))
      .def(
          "ages",
          [](Slab& slab, const py::sequence& keys, double now, double ttl) {
            std::vector<double> ages;
            for (const SlabKey& key : to_slab_keys(keys)) {
              const auto found = slab.index.find(key, now, ttl);
              ages.push_back(found ? slab.index.age(*found, now) : std::numeric_limits<double>::infinity());
            }
            return ages;
          },
          py::arg("keys"), py::arg("now"), py::arg("ttl"))
      .def(
          "lend",
          [](Slab& slab, const py::sequence& keys, const std::vector<u64>& sizes, bool peek, double now, double ttl) {
            const std::vector<SlabKey> wanted = to_slab_keys(keys);
            if (wanted.size() != sizes.size()) throw py::value_error("keys and buffers: expected as many");
            py::list lent;
            for (std::size_t i = 0; i < wanted.size(); ++i) {
              const auto found = slab.index.find(wanted[i], now, ttl);
              SlabTable& table = slab.index.table();
              if (!found || found->payload_bytes != sizes[i] || !table.pin(found->start, found->generation)) {
                lent.append(py::none());
                continue;
              }
              if (!peek) table.touch(found->start, found->generation);
              lent.append(py::make_tuple(found->start, found->generation, found->checksum, owner_bytes(found->owner)));
            }
            return lent;
          },
          py::arg("keys"), py::arg("sizes"), py::arg("peek"), py::arg("now"), py::arg("ttl"))
      .def(
          "hold",
          [](Slab& slab, const py::sequence& keys, double now, double ttl) {
            std::vector<u32> starts;
            for (const SlabKey& key : to_slab_keys(keys)) {
              const auto found = slab.index.find(key, now, ttl);
              if (found && slab.index.table().pin(found->start, found->generation)) starts.push_back(found->start);
            }
            return starts;
          },
          py::arg("keys"), py::arg("now"), py::arg("ttl"))
      .def(
          "unpin",
          [](Slab& slab, const std::vector<u32>& starts) {
            for (const u32 start : starts) slab.index.table().unpin(start);
          },
          py::arg("starts"))
      .def(
          "find",
          [](Slab& slab, const py::bytes& key, double now) -> py::object {
            const auto found = slab.index.find(to_slab_key(key), now, 0);
            if (!found) return py::none();
            return py::make_tuple(found->start, found->generation, slab.index.table().pinned(found->start));
          },
          py::arg("key"), py::arg("now"))
      .def(
          "take_visited", [](Slab& slab, u32 start) { return slab.index.table().take_visited(start); },
          py::arg("start"))
      .def("moment", [](const Slab& slab) { return slab.index.moment(); })
      .def("rows_taken", [](const Slab& slab) { return slab.index.rows_taken(); })
      .def("sizes",
           [](const Slab& slab) {
             py::dict sizes;
             for (const auto& [name, value] : slab.index.sizes()) sizes[name] = value;
             return sizes;
           })
      .def(
          "reserve",
          [](Slab& slab, const py::sequence& keys, const std::vector<u64>& sizes, const std::string& owner,
             const std::vector<std::pair<u32, u32>>& given_back, const Terms& terms) {
            const std::vector<SlabKey> wanted = to_slab_keys(keys);
            if (wanted.size() != sizes.size()) throw py::value_error("keys and buffers: expected as many");
            SlabIndex::Reserved reserved;
            {
              py::gil_scoped_release release;
              reserved = slab.index.reserve(wanted, sizes, to_16_bytes(owner), to_places(given_back), to_terms(terms));
            }
            std::vector<std::optional<std::pair<u32, u32>>> places;
            for (const auto& place : reserved.places) {
              places.emplace_back();
              if (place) places.back() = {place->start, place->generation};
            }
            return std::make_tuple(places, reserved.moment, reserved.dropped, reserved.evictions);
          },
          py::arg("keys"), py::arg("sizes"), py::arg("owner"), py::arg("given_back"), py::arg("terms"))
      .def(
          "publish",
          [](Slab& slab, const std::vector<std::tuple<py::bytes, u32, u32, i64, u64, double>>& puts,
             const Terms& terms) {
            std::vector<SlabPut> list;
            for (const auto& [key, start, generation, checksum, as_of, age] : puts)
              list.push_back({to_slab_key(key), {start, generation}, checksum, as_of, age});
            py::gil_scoped_release release;
            return slab.index.publish(list, to_terms(terms));
          },
          py::arg("puts"), py::arg("terms"))
      .def(
          "abandon",
          [](Slab& slab, const std::vector<std::pair<u32, u32>>& places, const Terms& terms) {
            py::gil_scoped_release release;
            return slab.index.abandon(to_places(places), to_terms(terms));
          },
          py::arg("places"), py::arg("terms"))
      .def(
          "remove",
          [](Slab& slab, const py::sequence& keys, const Terms& terms) {
            const std::vector<SlabKey> list = to_slab_keys(keys);
            py::gil_scoped_release release;
            return slab.index.remove(list, to_terms(terms));
          },
          py::arg("keys"), py::arg("terms"))
      .def(
          "discard",
          [](Slab& slab, const py::bytes& key, u32 start, u32 generation, const Terms& terms) {
            const SlabKey wanted = to_slab_key(key);
            py::gil_scoped_release release;
            slab.index.discard(wanted, {start, generation}, to_terms(terms));
          },
          py::arg("key"), py::arg("start"), py::arg("generation"), py::arg("terms"))
      .def(
          "forget",
          [](Slab& slab, const std::string& owner, const Terms& terms) {
            py::gil_scoped_release release;
            return slab.index.forget(to_16_bytes(owner), to_terms(terms));
          },
          py::arg("owner"), py::arg("terms"))
      .def(
          "clear",
          [](Slab& slab, const Terms& terms) {
            py::gil_scoped_release release;
            return slab.index.clear(to_terms(terms));
          },
          py::arg("terms"))
      .def(
          "bury",
          [](Slab& slab, u64 rows, const Terms& terms) {
            py::gil_scoped_release release;
            slab.index.bury(rows, to_terms(terms));
          },
          py::arg("rows"), py::arg("terms"))
      .def(
          "check",
          [](Slab& slab, const Terms& terms) {
            py::gil_scoped_release release;
            return slab.index.check(to_terms(terms));
          },
          py::arg("terms"));

#ifdef LMCACHE_MM_CUDA
  // The caller owns device memory, so that it is freed in stream order.
  m.def(
      "cuda_apply_mm_hashes_to_token_ids",
      [](u64 token_ids, u64 count, const py::iterable& items, int device, u64 stream, const py::function& upload) {
        const ItemTable table(to_items(items));
        py::gil_scoped_release release;
        cuda::apply_mm_hashes_to_token_ids(reinterpret_cast<i64*>(token_ids), count, table,
                                           to_launch(device, stream, upload));
      },
      py::arg("token_ids"), py::arg("count"), py::arg("items"), py::arg("device"), py::arg("stream"),
      py::arg("upload"));

  m.def("cuda_prefix_keys_workspace_bytes", &cuda::prefix_keys_workspace_bytes, py::arg("count"), py::arg("num_cuts"));

  m.def(
      "cuda_prefix_keys",
      [](u64 token_ids, u64 count, bool wide, const py::iterable& items, const std::string& root, u64 cuts,
         u64 num_cuts, u64 keys, u64 workspace, int device, u64 stream, const py::function& upload) {
        const ItemTable table(to_items(items));
        const std::vector<u64> ends = to_cuts(cuts, num_cuts, count);
        py::gil_scoped_release release;
        cuda::prefix_keys({reinterpret_cast<const void*>(token_ids), count, wide}, table,
                          reinterpret_cast<const u8*>(root.data()), ends, reinterpret_cast<u8*>(keys),
                          reinterpret_cast<void*>(workspace), to_launch(device, stream, upload));
      },
      py::arg("token_ids"), py::arg("count"), py::arg("wide"), py::arg("items"), py::arg("root"), py::arg("cuts"),
      py::arg("num_cuts"), py::arg("keys"), py::arg("workspace"), py::arg("device"), py::arg("stream"),
      py::arg("upload"));

  const auto def_cuda_copy = [&m](const char* name, auto* copy) {
    m.def(
        name,
        [copy](const PagedCache& cache, bool token_mode, const py::iterable& chunks, bool host_ids, u64 checksums,
               int device, u64 stream, const py::function& upload, u32 max_blocks) {
          const std::vector<Chunk> list = to_chunks(chunks);
          const Mode mode = token_mode ? Mode::kToken : Mode::kPage;
          if (host_ids) cpu::check_ids(cache, mode, list);
          py::gil_scoped_release release;
          copy(cache, mode, list, host_ids, reinterpret_cast<u64*>(checksums),
               to_launch(device, stream, upload, max_blocks));
        },
        py::arg("cache"), py::arg("token_mode"), py::arg("chunks"), py::arg("host_ids"), py::arg("checksums"),
        py::arg("device"), py::arg("stream"), py::arg("upload"), py::arg("max_blocks"));
  };
  def_cuda_copy("cuda_gather", &cuda::gather);
  def_cuda_copy("cuda_scatter", &cuda::scatter);

  // Their destructors may wait for the device.
  const py::release_gil_before_calling_cpp_dtor without_gil;
  py::class_<cuda::Event>(m, "CudaEvent", py::metaclass((PyObject*)&PyType_Type), without_gil)
      .def(py::init([](int device, u64 stream) {
             py::gil_scoped_release release;
             return std::make_unique<cuda::Event>(device, reinterpret_cast<void*>(stream));
           }),
           py::arg("device"), py::arg("stream"))
      .def("wait", &cuda::Event::wait, py::call_guard<py::gil_scoped_release>());

  py::class_<cuda::Staging::Job>(m, "CudaTransfer", py::metaclass((PyObject*)&PyType_Type), without_gil)
      .def("go_on", &cuda::Staging::Job::go_on, py::arg("planes"), py::arg("behind") = nullptr,
           py::call_guard<py::gil_scoped_release>())
      .def(
          "order",
          [](const cuda::Staging::Job& job, u64 stream, u64 planes) {
            job.order(reinterpret_cast<void*>(stream), planes);
          },
          py::arg("stream"), py::arg("planes"), py::call_guard<py::gil_scoped_release>())
      .def("wait", &cuda::Staging::Job::wait, py::call_guard<py::gil_scoped_release>());

  py::class_<cuda::Staging>(m, "CudaStaging", py::metaclass((PyObject*)&PyType_Type), without_gil)
      .def(py::init([](int device, u64 ring, u64 buffer_bytes, u32 buffers, bool urgent, u32 max_blocks) {
             py::gil_scoped_release release;
             return std::make_unique<cuda::Staging>(device, reinterpret_cast<u8*>(ring), buffer_bytes, buffers, urgent,
                                                    max_blocks);
           }),
           py::arg("device"), py::arg("ring"), py::arg("buffer_bytes"), py::arg("buffers"), py::arg("urgent"),
           py::arg("max_blocks"))
      .def(
          "store",
          [](cuda::Staging& staging, const PagedCache& cache, const py::iterable& chunks, std::vector<u64> ends,
             bool checksums, u64 fragment_bytes, u32 kernel_blocks, std::vector<bool> coded) {
            std::vector<Chunk> list = to_chunks(chunks);
            py::gil_scoped_release release;
            cpu::check_ids(cache, Mode::kPage, list);
            return staging.store(cache, std::move(list), std::move(ends), checksums, fragment_bytes, kernel_blocks,
                                 std::move(coded));
          },
          py::arg("cache"), py::arg("chunks"), py::arg("ends"), py::arg("checksums"), py::arg("fragment_bytes"),
          py::arg("kernel_blocks"), py::arg("coded") = std::vector<bool>())
      .def(
          "load",
          [](cuda::Staging& staging, const PagedCache& cache, const py::iterable& chunks, std::vector<u64> ends,
             bool checksums, const cuda::Event& behind, u64 fragment_bytes, u32 kernel_blocks,
             std::vector<bool> coded) {
            std::vector<Chunk> list = to_chunks(chunks);
            py::gil_scoped_release release;
            cpu::check_ids(cache, Mode::kPage, list);
            return staging.load(cache, std::move(list), std::move(ends), checksums, behind, fragment_bytes,
                                kernel_blocks, std::move(coded));
          },
          py::arg("cache"), py::arg("chunks"), py::arg("ends"), py::arg("checksums"), py::arg("behind"),
          py::arg("fragment_bytes"), py::arg("kernel_blocks"), py::arg("coded") = std::vector<bool>());

  const auto def_of_host = [&m](const char* name, auto* call) {
    m.def(
        name,
        [call](int device, u64 address, u64 bytes, u64 piece_bytes) {
          call(device, reinterpret_cast<void*>(address), bytes, piece_bytes);
        },
        py::arg("device"), py::arg("address"), py::arg("bytes"), py::arg("piece_bytes"),
        py::call_guard<py::gil_scoped_release>());
  };
  def_of_host("cuda_register_host", &cuda::register_host);
  def_of_host("cuda_unregister_host", &cuda::unregister_host);

  m.def("cuda_devices", [] {
    std::string why;
    const int count = cuda::device_count(why);
    return std::make_tuple(count, why);
  });
#endif
}
