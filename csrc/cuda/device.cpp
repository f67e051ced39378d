#include "device.h"

#include "launch.h"

namespace fastsample {
namespace cuda {

std::string driver() {
    int version = 0, devices = 0;
    cudaError_t error = cudaDriverGetVersion(&version);
    if (error == cudaSuccess && version == 0) return "no NVIDIA driver is installed";
    if (error == cudaSuccess) error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    return devices ? "" : "no CUDA device is visible";
}

DeviceGuard::DeviceGuard(int device) : device_(device), previous_(device) {
    check(cudaGetDevice(&previous_));
    if (previous_ != device_) check(cudaSetDevice(device_));
}

DeviceGuard::~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
}

}  // namespace cuda
}  // namespace fastsample
