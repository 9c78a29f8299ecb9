// The kernels compiled for portable; hatch_build.py gives this file its target flags.
// Nothing of std:: may be instantiated here: the linker could pick this copy for every ISA.
#include <math.h>

#include "../kernels.h"
#include "../half.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace octavo {
namespace portable {
namespace {
#include "../simd/portable.inc"

#include "../kernels/math.inc"

#include "../kernels/rows.inc"

#include "../kernels/encode.inc"

#include "../kernels/linear.inc"

#include "../kernels/attention.inc"

#include "../kernels/vocabulary.inc"

#include "../kernels/table.inc"
}  // namespace
}  // namespace portable

const Kernels kPortableKernels = portable::table("portable");

}  // namespace octavo
