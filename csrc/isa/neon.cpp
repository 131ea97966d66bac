#define FB_NAMESPACE fb_neon
#define FB_ISA "neon"
#include "../kernels.h"
