#pragma once
#include <cstdint>

namespace fastsample {

// Asks for huge pages behind fresh memory, before it is first touched. Large blocks come from the system page by page of
// 4 KiB, and those faults cost several times what filling the memory does. A hint: silently without effect where the
// system has none.
void advise_huge_pages(void* address, int64_t bytes);

}  // namespace fastsample
