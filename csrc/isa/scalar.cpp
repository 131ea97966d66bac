#define FB_NAMESPACE fb_scalar
#define FB_ISA "scalar"
#include "../kernels.h"
