#include "device.h"

#include <exception>

#include "kernels.h"
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

std::string supports(int device) {
    try {
        const DeviceGuard guard(device);
        int major = 0, minor = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
        // Loads the kernel, or compiles its PTX: only the driver knows whether it can.
        cudaFuncAttributes attributes;
        const cudaError_t error = cudaFuncGetAttributes(&attributes, smallest_kernel());
        if (error == cudaSuccess) return "";
        cudaGetLastError();  // forgotten: nothing went wrong
        return "a GPU of compute capability " + std::to_string(major) + "." + std::to_string(minor) +
               " cannot run them: " + cudaGetErrorString(error);
    } catch (const std::exception& error) {
        return error.what();
    }
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
