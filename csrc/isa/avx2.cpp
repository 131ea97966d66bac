#define FB_NAMESPACE fb_avx2
#define FB_ISA "avx2"
#include "../kernels.h"
