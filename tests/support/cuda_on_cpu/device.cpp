// One device, the CPU: what csrc/cuda/device.h declares.
#include "../../../csrc/cuda/device.h"

namespace fastsample {
namespace cuda {

std::string driver() { return ""; }
std::string supports(int) { return ""; }
DeviceGuard::DeviceGuard(int device) : device_(device), previous_(device) {}
DeviceGuard::~DeviceGuard() {}

}  // namespace cuda
}  // namespace fastsample
