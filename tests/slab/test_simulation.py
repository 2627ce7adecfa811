"""The index of slabs under a seeded scheduler, and its atomics under TSan."""

import shutil

import pytest

from programs import CXX, REPO, must_run, run

STEPS = 300  # of a simulated run


@pytest.mark.parametrize(
    "arguments",
    [
        *(("points", "stop"), ("points", "kill"), ("forgets", 2_000_000)),
        *(("kills", 1, 20, 20_000), ("kills", 1, 1000, STEPS), ("cuts", 1, 1000, STEPS)),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_clients_stopped_and_killed_at_any_store_leave_the_index_whole(simulation, arguments):
    must_run([simulation(), *arguments])


def test_damage_of_any_bytes_beneath_clients_is_no_crash_and_no_wrong_payload(simulation):
    flags = ["-g", "-fsanitize=undefined", "-fno-sanitize-recover=all"]  # the file also lies between inaccessible pages
    done = run([simulation(REPO / "csrc" / "slab_index.cpp", *flags), "damage", 1, 500, STEPS])
    assert done.returncode == 0, done.stdout


MUTATIONS = {
    "no mark": ("  put(header_->dirty, u64{1});\n  if (opened_", "  if (opened_"),
    "what is pinned is free": ("  if (table_.pinned(start)) {\n    rest(", "  if (false) {\n    rest("),
    "no end for readers": (
        "  if (table_.generation(start) == content.generation) table_.retire(start);\n  hash",
        "  hash",
    ),
    "two records of a key": ("current(put.key) || forgotten_since", "forgotten_since"),
    "forgotten owners": ("current(put.key) || forgotten_since(content.owner, put.as_of)", "current(put.key)"),
    "nothing moves up": ("if (stays) continue;", "continue;"),
    "no neighbours": ("if (start % segment) {", "if (false) {"),
    "nothing of an entry that is overwritten": ("put(header_->old_place, u64{start} + 1);", ""),
    "a sequence that begins again": (
        "  set(kSequence, sequence);  //",
        "  set(kSequence, 0);\n  set(kSequence, sequence);  //",
    ),
    "one header": ("{&header_->spare, &header_->fixed}", "{&header_->fixed}"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_simulation_finds_what_is_taken_away(simulation, name, tmp_path):
    original, replacement = MUTATIONS[name]
    source = (REPO / "csrc" / "slab_index.cpp").read_text()
    assert source.count(original) == 1
    (tmp_path / "slab_index.cpp").write_text(source.replace(original, replacement))
    program = simulation(tmp_path / "slab_index.cpp")
    modes = [("points", "kill"), ("kills", 1, 1000, STEPS), ("cuts", 1, 1000, STEPS)]
    assert any(run([program, *mode]).returncode for mode in modes)


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no {CXX}")
@pytest.mark.parametrize(
    "original, replacement",
    [
        ("", ""),
        ("if (state.pins.load() == 0) return true;", "return true;"),
        ("if (count == 0) slots_[slot].pins.fetch_or(bit_);", ""),
        ("if (slots_[slot].generation.load() == generation) {", "{"),
        ("--found->second == 0", "true"),
    ],
    ids=["as it is", "evict without a second look", "pin without a bit", "pin whatever is there", "unpin for others"],
)
def test_pins_and_evictions_that_meet_are_free_of_races(original, replacement, tmp_path):
    source = (REPO / "csrc" / "slab_table.h").read_text()
    assert original in source
    (tmp_path / "slab_table.h").write_text(source.replace(original, replacement, 1) if original else source)
    program = tmp_path / "driver"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", f"-I{tmp_path}"]
    must_run([CXX, *flags, REPO / "tests" / "slab" / "table_driver.cpp", "-o", program])
    if original:
        assert any(run([program]).returncode for _ in range(100))  # a run in three meets the race on a busy machine
    else:
        must_run([program])
