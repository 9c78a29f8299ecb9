// The kernels compiled for avx2; hatch_build.py gives this file its target flags.
// Nothing of std:: may be instantiated here: the linker could pick this copy for every ISA.
#include <math.h>

#include "../kernels.h"

#include <immintrin.h>

namespace octavo {
namespace avx2 {
namespace {
#include "../simd/avx2.inc"

#include "../kernels/math.inc"

#include "../kernels/rows.inc"

#include "../kernels/encode.inc"

#include "../kernels/linear.inc"

#include "../kernels/attention.inc"

#include "../kernels/vocabulary.inc"

#include "../kernels/table.inc"
}  // namespace
}  // namespace avx2

const Kernels kAvx2Kernels = avx2::table("avx2");

}  // namespace octavo
