// The Python module lmcache_mm._C: addresses and counts in, nothing checked twice. ops.py has looked at every dtype,
// device, shape and bound before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "ops.h"

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

// Owns the table of plane addresses that a PagedLayout points to.
struct Layout {
  std::vector<u8*> planes;
  PagedLayout view;

  Layout(const std::vector<u64>& plane_addresses, u64 num_pages, u64 page_stride, u64 page_bytes, u64 run_bytes,
         u64 run_stride, u64 page_tokens, u64 token_bytes)
      : view{nullptr,
             plane_addresses.size(),
             num_pages,
             page_stride,
             run_stride,
             Divisor(page_bytes),
             Divisor(run_bytes),
             Divisor(page_tokens),
             Divisor(token_bytes ? token_bytes : page_bytes),
             token_bytes == 0} {
    for (const u64 address : plane_addresses) planes.push_back(reinterpret_cast<u8*>(address));
    view.planes = planes.data();
  }
};

std::vector<Chunk> to_chunks(const py::iterable& chunks) {
  std::vector<Chunk> out;
  for (const py::handle chunk : chunks) {
    const auto [ids, wide, count, tokens, payload] = chunk.cast<std::tuple<u64, bool, u64, u64, u64>>();
    out.push_back({reinterpret_cast<const void*>(ids), count, tokens, reinterpret_cast<u8*>(payload), wide});
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of lmcache_mm over raw addresses; use lmcache_mm.ops.";
  m.attr("cuda_version") = LMCACHE_MM_CUDA_VERSION;
  m.attr("cuda_archs") = LMCACHE_MM_CUDA_ARCHS;

  py::class_<Layout, std::shared_ptr<Layout>>(m, "Layout")
      .def(py::init<const std::vector<u64>&, u64, u64, u64, u64, u64, u64, u64>(), py::arg("planes"),
           py::arg("num_pages"), py::arg("page_stride"), py::arg("page_bytes"), py::arg("run_bytes"),
           py::arg("run_stride"), py::arg("page_tokens"), py::arg("token_bytes"));

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
        const u64* first = reinterpret_cast<const u64*>(cuts);
        py::gil_scoped_release release;
        cpu::prefix_keys({reinterpret_cast<const void*>(token_ids), count, wide}, ItemTable(list),
                         reinterpret_cast<const u8*>(root.data()), {first, first + num_cuts},
                         reinterpret_cast<u8*>(keys));
      },
      py::arg("token_ids"), py::arg("count"), py::arg("wide"), py::arg("items"), py::arg("root"), py::arg("cuts"),
      py::arg("num_cuts"), py::arg("keys"));

  m.def(
      "gather",
      [](const Layout& layout, bool token_mode, const py::iterable& chunks, u64 checksums) {
        const std::vector<Chunk> list = to_chunks(chunks);
        py::gil_scoped_release release;
        cpu::gather(layout.view, token_mode ? Mode::kToken : Mode::kPage, list, reinterpret_cast<u64*>(checksums));
      },
      py::arg("layout"), py::arg("token_mode"), py::arg("chunks"), py::arg("checksums"));

  m.def(
      "scatter",
      [](const Layout& layout, bool token_mode, const py::iterable& chunks, u64 expected, u64 matches) {
        const std::vector<Chunk> list = to_chunks(chunks);
        py::gil_scoped_release release;
        cpu::scatter(layout.view, token_mode ? Mode::kToken : Mode::kPage, list, reinterpret_cast<const u64*>(expected),
                     reinterpret_cast<bool*>(matches));
      },
      py::arg("layout"), py::arg("token_mode"), py::arg("chunks"), py::arg("expected"), py::arg("matches"));

  m.def(
      "checksum",
      [](u64 payload, u64 bytes) {
        py::gil_scoped_release release;
        return static_cast<i64>(cpu::checksum(reinterpret_cast<const u8*>(payload), bytes));
      },
      py::arg("payload"), py::arg("bytes"));
}
