// The functions of this ISA, as dispatch.cpp hands them out.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

const Kernels table = {gaussian,        perturb,   round_into,  is_rounded, add_low_rank, moments,
                       channel_moments, pack_keys, pack_values, attend,     rms_norm};

}  // namespace dlzo::DLZO_ISA
