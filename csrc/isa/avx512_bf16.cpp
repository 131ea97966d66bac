#define FB_NAMESPACE fb_avx512_bf16
#define FB_ISA "avx512_bf16"
#include "../kernels.h"
