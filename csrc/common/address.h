// Addresses as Python gives them: integers.
#pragma once
#include <cstdint>

namespace fastsample {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace fastsample
