#include "amx.h"

#if defined(FASTSAMPLE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace fastsample {
namespace {

#if defined(FASTSAMPLE_AMX) && defined(__linux__)
std::string find_out() {
    constexpr unsigned kOsSavesState = 1u << 27, kBfloatTiles = 1u << 22, kTiles = 1u << 24;
    constexpr uint32_t kTileState = 3u << 17;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return "this CPU does not tell what it has";
    const bool has_xgetbv = (c & kOsSavesState) != 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloatTiles) == 0 || (d & kTiles) == 0)
        return "this CPU has no AMX-BF16";
    uint32_t low = 0, high = 0;
    if (has_xgetbv) asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & kTileState) != kTileState) return "the operating system does not save AMX's tile registers";
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
    const std::string why = errno == ENOSPC                      ? "a thread's stack for signals is too small"
                            : errno == EINVAL || errno == ENOSYS ? "Linux before 5.16 knows no such permission"
                                                                 : strerror(errno);
    return "the system refused the permission to use AMX: " + why;
}
#elif defined(__x86_64__) && defined(__linux__)
std::string find_out() { return "the compiler that built fastsample does not know AMX"; }
#else
std::string find_out() { return "fastsample uses AMX on Linux on x86-64 alone"; }
#endif

}  // namespace

const std::string& why_no_amx() {
    static const std::string reason = find_out();
    return reason;
}

}  // namespace fastsample
