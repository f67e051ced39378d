// What every kernel file starts with.
#pragma once
#include <math.h>

#include "kernels.h"
#include "launch.h"

namespace fastsample {
namespace cuda {

#include "lanes.h"
#include "../common/philox.h"
#include "../common/normal.h"
#include "../common/exp2.h"
#include "../common/step.h"
#include "access.h"
#include "grid.h"
#include "draw.h"
#include "pass.h"

}  // namespace cuda
}  // namespace fastsample
