// What the bindings ask the driver: no CUDA header, so that they compile without one.
#pragma once
#include <string>

namespace fastsample {
namespace cuda {

// Why no device can be used; empty if one can. Never throws.
std::string driver();

// Why this device cannot run what was compiled; empty if it can. Makes a context there. Never throws.
std::string supports(int device);

// Makes a device current for a scope.
class DeviceGuard {
public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int device_, previous_;
};

}  // namespace cuda
}  // namespace fastsample
