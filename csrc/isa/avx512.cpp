#define FB_NAMESPACE fb_avx512
#define FB_ISA "avx512"
#include "../kernels.h"
