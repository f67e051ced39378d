// What the bindings ask the driver: no CUDA header, so that they compile without one.
#pragma once
#include <string>

namespace fastsample {
namespace cuda {

// Why no device can be used; empty if one can. Never throws.
std::string driver();

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
