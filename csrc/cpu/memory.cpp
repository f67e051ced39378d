#include "memory.h"

#include <sys/mman.h>

namespace fastsample {

void advise_huge_pages(void* address, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 4096;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(address) + page - 1) & ~(page - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)address;
    (void)bytes;
#endif
}

}  // namespace fastsample
